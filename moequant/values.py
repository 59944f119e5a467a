"""The frozen values that one step of the line hands to the next."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class Role(StrEnum):
    """What a weight does in the model; expert roles are the ones with an expert dimension."""

    EMBEDDING = "embedding"
    OUTPUT = "output"
    NORM = "norm"
    ATTN_Q = "attn_q"
    ATTN_K = "attn_k"
    ATTN_V = "attn_v"
    ATTN_OUT = "attn_out"
    ROUTER = "router"
    GATE = "gate"
    UP = "up"
    DOWN = "down"
    DENSE_GATE = "dense_gate"
    DENSE_UP = "dense_up"
    DENSE_DOWN = "dense_down"

    @property
    def is_expert(self) -> bool:
        """Whether only the tokens that the router sends see this weight."""
        return self in (Role.GATE, Role.UP, Role.DOWN)

    @property
    def keeps_precision(self) -> bool:
        """Norms and routers are small and decide much: they stay F32 in every file."""
        return self in (Role.NORM, Role.ROUTER)


@dataclass(frozen=True, slots=True)
class TensorRef:
    """One tensor of a safetensors file: where its bytes are, nothing read yet."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Source:
    """Rows `start:stop` of the second-to-last dimension of a stored tensor (all of them for a vector)."""

    ref: TensorRef
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of the output file and where it comes from.

    `shape` is torch order: `(E, out, in)` for experts, `(out, in)` for a dense linear,
    `(n,)` for a vector. `sources` are the experts in order, or a single tensor.
    `rope_heads` > 0 asks for the rows of so many heads to be re-ordered from
    transformers' rotary layout (halves) to llama.cpp's (interleaved pairs).
    `param` is where the weight lives in the transformers model (rows `param_rows` of it);
    `input` names the activations that it multiplies, see `routing`.
    """

    name: str
    role: Role
    layer: int | None
    shape: tuple[int, ...]
    sources: tuple[Source, ...]
    param: str
    param_rows: tuple[int, int]
    input: str | None
    rope_heads: int = 0

    @property
    def numel(self) -> int:
        """How many numbers it holds."""
        return prod(self.shape)

    @property
    def n_experts(self) -> int:
        """E for stacked experts, 1 otherwise."""
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def n_in(self) -> int:
        """Row length: the dimension that a format cuts into blocks."""
        return self.shape[-1]


@dataclass(frozen=True, slots=True)
class InputStats:
    """What the inputs of a weight looked like during calibration; E = 1 when dense.

    `tokens` i64 [E] rows seen; `gate_mass` f64 [E] sum of the router's weights g;
    `moment` f64 [E, in] sum of x²; `gated_moment` f64 [E, in] sum of g²·x², and
    `gate_square` f64 [E] sum of g².
    """

    tokens: Tensor
    gate_mass: Tensor
    gate_square: Tensor
    moment: Tensor
    gated_moment: Tensor


@dataclass(frozen=True, slots=True)
class RouteStats:
    """Where one layer's router sent the calibration tokens.

    `tokens` i64 [E]; `gate_mass` f64 [E], sum of the router's weights; `domain_tokens`
    i64 [D, E], tokens by domain of the text; `pairs` i64 [E, E], tokens that chose both
    experts (the diagonal is `tokens`); `gate_entropy`, the sum over tokens of the entropy,
    in nats, of their top-k weights divided by their sum.
    """

    layer: int
    tokens: Tensor
    gate_mass: Tensor
    domain_tokens: Tensor
    pairs: Tensor
    gate_entropy: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """Everything that the calibration pass learned: by layer for routers, by input name for weights.

    `domains` names the rows of `RouteStats.domain_tokens`.
    """

    routes: tuple[RouteStats, ...]
    inputs: dict[str, InputStats]
    rows: int
    tokens: int
    source: str
    domains: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """The format of one weight, why, and what it is expected to add to the KL divergence (None: unknown)."""

    weight: str
    format: str
    bytes: int
    reason: str
    damage: float | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """A format for every weight of the file, in file order.

    `preset` is llama.cpp's name for a file that is mostly of such types, `target` what
    was asked for, and `budget` its limit in bytes of aligned weight data.
    """

    preset: str
    choices: tuple[Choice, ...]
    budget: int
    target: str = ""

    @property
    def bytes(self) -> int:
        """Bytes of weight data, alignment left out."""
        return sum(choice.bytes for choice in self.choices)

    @property
    def damage(self) -> float | None:
        """Predicted KL divergence to the unquantized model; None when a choice's share is unknown."""
        shares = [choice.damage for choice in self.choices]
        known = [share for share in shares if share is not None]
        return sum(known) if len(known) == len(shares) else None


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight in the bytes of its format: `data` u8 [..., rows, row_bytes]."""

    weight: Weight
    format: str
    data: Tensor


@dataclass(frozen=True, slots=True)
class ExpertLoss:
    """What rounding cost each expert of one weight.

    `error` f64 [E], relative squared error of its outputs: under the Hessian of its inputs where
    it was rounded with one, else under their mean squares. `fallbacks` are the reasons why
    experts were rounded by the plain search instead.
    """

    weight: str
    role: Role
    layer: int | None
    format: str
    error: Tensor
    tokens: Tensor | None
    fallbacks: tuple[str, ...] = ()
