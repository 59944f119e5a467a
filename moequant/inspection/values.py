"""What `inspect` finds out, as values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moequant.containers.gguf.header import Header


@dataclass(frozen=True, slots=True)
class RoleBytes:
    """All tensors of one role: how many, their numbers, their bytes, and tensors by type."""

    role: str
    tensors: int
    parameters: int
    bytes: int
    types: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class PresetSize:
    """The exact size of the file that a preset gives; the KL divergence that its plan expects, if known."""

    name: str
    file_bytes: int
    bits: float
    kl: float | None


@dataclass(frozen=True, slots=True)
class Runtime:
    """Whether a runtime knows the model: yes, no, or None when that cannot be told from here; and why."""

    name: str
    supported: bool | None
    note: str


@dataclass(frozen=True, slots=True)
class Inspection:
    """A model from its headers.

    `parameters` counts every number; `active` those that one token meets: all but the experts it is not sent
    to (the embedding counts whole, as on model cards). `active_bytes` are read to compute one token, the
    embedding left out, because a token reads one row of it. None is what the headers do not tell. `missing`
    says why `moequant convert` refuses the model; empty means that it does not.
    """

    path: Path
    kind: Literal["checkpoint", "gguf"]
    architecture: str
    family: str | None
    layers: int | None
    experts: int | None
    experts_per_token: int | None
    shared_experts: int | None
    context: int | None
    parameters: int
    active: int
    bytes: int
    active_bytes: int
    file_bytes: int
    types: tuple[tuple[str, int], ...]
    roles: tuple[RoleBytes, ...]
    tokenizer: str
    made_by: str | None
    presets: tuple[PresetSize, ...]
    missing: tuple[str, ...]
    notes: tuple[str, ...]
    runtimes: tuple[Runtime, ...]

    @property
    def bits(self) -> float:
        """Bits of weight data per parameter."""
        return 8 * self.bytes / self.parameters


@dataclass(frozen=True, slots=True)
class Counted:
    """One stored tensor: its role, its numbers, its bytes, and the share of it that a token meets."""

    role: str
    type: str
    parameters: int
    bytes: int
    share: float = 1.0
    read: bool = True


def by_role(tensors: Iterable[Counted], order: tuple[str, ...]) -> tuple[RoleBytes, ...]:
    """Sums by role, in that order, empty roles left out."""
    groups: dict[str, list[Counted]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.role, []).append(tensor)
    return tuple(
        RoleBytes(
            role,
            len(groups[role]),
            sum(tensor.parameters for tensor in groups[role]),
            sum(tensor.bytes for tensor in groups[role]),
            _counts((tensor.type, 1) for tensor in groups[role]),
        )
        for role in order
        if role in groups
    )


def by_type(tensors: Iterable[Counted]) -> tuple[tuple[str, int], ...]:
    """Bytes of each type, most first."""
    return _counts((tensor.type, tensor.bytes) for tensor in tensors)


def _counts(pairs: Iterable[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
    totals: dict[str, int] = {}
    for name, count in pairs:
        totals[name] = totals.get(name, 0) + count
    return tuple(sorted(totals.items(), key=lambda item: -item[1]))


@dataclass(frozen=True, slots=True)
class PresetFile:
    """What `--type name` gives: the file's header, and the KL divergence that its plan expects, if known."""

    name: str
    header: Header
    kl: float | None
