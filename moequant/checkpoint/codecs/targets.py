"""Which of compressed-tensors' `config_groups` is for a module."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moequant.checkpoint.codecs.patterns import compiled, names_of
from moequant.errors import CheckpointError, few

Config = Mapping[str, Any]
Group = tuple[str, Config]
"""A group's name and its entry."""

FORMATS = (
    "dense", "int-quantized", "float-quantized", "naive-quantized", "pack-quantized", "mixed-precision",
    "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized",
)  # fmt: skip
"""Every `format` that is read, of all weights or of those of a group."""

_EMBEDDING, _PRODUCT = "Embedding", "Linear"
"""The class of tables, and that of products. Others that have weights are taken for those of products that no
group is for by `Linear`: a group may be for the cache alone, by the class of the attention."""


@dataclass(frozen=True, slots=True)
class Targets:
    """What groups are for, by the rules of the library that writes them: a module's own name comes first,
    then expressions, by the alphabet, then the names of classes. Of two groups with one target the last
    counts.

    Thousands of names meet 100,000 weights: they are looked up.
    """

    names: Mapping[str, Group]
    patterns: tuple[tuple[re.Pattern[str], Group], ...]
    classes: tuple[tuple[str, Group], ...]

    def __bool__(self) -> bool:
        return bool(self.names or self.patterns or self.classes)

    def find(self, module: str) -> Group | None:
        """The group of a module."""
        named = names_of(module)
        for name in named:
            if name in self.names:
                return self.names[name]
        for pattern, group in self.patterns:
            if any(pattern.match(name) for name in named):
                return group
        is_table = "embed" in module.rpartition(".")[2]
        tables = [group for name, group in self.classes if name == _EMBEDDING]
        others = [group for name, group in self.classes if name != _EMBEDDING]
        return next(iter(tables + others if is_table else others), None)


NONE = Targets({}, (), ())


def targets_of(raw: Config) -> Targets:
    """Those of a config. CheckpointError for a format, or an entry, that is not read."""
    groups: Config = raw.get("config_groups") or {}
    _check_format("quantization_config.format", raw)
    every: dict[str, Group] = {}
    for name, group in groups.items():
        key = f"quantization_config.config_groups.{name}"
        if not isinstance(group, Mapping):
            raise CheckpointError(
                f"{key} is {str(group)[:80]}, expected an object with targets and weights; save the config "
                "as its library writes it, or give the unquantized checkpoint"
            )
        _check_format(f"{key}.format", group)
        every |= {str(target): (name, group) for target in group.get("targets") or ()}
    patterns = [(compiled(each[3:]), every[each]) for each in sorted(every) if each.startswith("re:")]
    plain = {each: every[each] for each in sorted(every) if not each.startswith("re:")}
    names = sorted((each for each in plain if re.fullmatch(r"[A-Z]\w*", each)), key=_PRODUCT.__ne__)
    return Targets(plain, tuple(patterns), tuple((each, plain[each]) for each in names))


def _check_format(key: str, told: Config) -> None:
    """CheckpointError for a way to store weights that is not read: its tensors may look like others."""
    found = told.get("format")
    if found is not None and found not in FORMATS:
        raise CheckpointError(
            f"{key} is {found}, expected one of {few(FORMATS)}; give the unquantized checkpoint"
        )
