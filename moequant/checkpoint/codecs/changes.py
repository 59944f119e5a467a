"""What a quantization config says of some modules alone, where it says another thing of all."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import translate
from typing import Any

from moequant.checkpoint.codecs.patterns import compiled

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Changes:
    """One key of a config, with entries by module: plain names, and patterns in their order.

    There are up to as many names as weights: they are looked up. `inside`: an entry also holds for what is
    inside its module ("model.layers.3.mlp.experts").
    """

    key: str
    names: Config
    patterns: tuple[tuple[str, re.Pattern[str], Any], ...] = ()
    inside: bool = False

    def find(self, module: str) -> tuple[str, Any] | None:
        """The name of the entry for a module, and the entry."""
        dots = [match.start() for match in re.finditer(r"\.", module)] if self.inside else []
        for name in (module, *(module[:dot] for dot in reversed(dots))):
            if name in self.names:
                return name, self.names[name]
        for entry, pattern, found in self.patterns:
            if pattern.search(module):
                return entry, found
        return None

    def removes(self, entry: str) -> bool:
        """Whether an entry says that its modules stay as they were."""
        return self.key == "dynamic" and entry.startswith("-:")


def changes_of(raw: Config) -> tuple[Changes, ...]:
    """Those of GPTQModel (`dynamic`), auto-round (`extra_config`), ModelOpt (`quantized_layers`) and Quark
    (`layer_quant_config`), by the rules of the library that writes the key."""
    return tuple(made(raw) for key, made in _MADE.items() if raw.get(key))


def _dynamic(raw: Config) -> Changes:
    """Regular expressions that fit the start, in their order; those with "-:" leave a module out."""
    told = {entry: entry.removeprefix("+:").removeprefix("-:") for entry in raw["dynamic"]}
    patterns = [(entry, compiled(rf"\A(?:{by})"), raw["dynamic"][entry]) for entry, by in told.items()]
    return Changes("dynamic", {}, tuple(patterns))


def _extra_config(raw: Config) -> Changes:
    """Names, and regular expressions that fit anywhere."""
    names, others = _names(raw["extra_config"])
    return Changes("extra_config", names, tuple((each, compiled(each), others[each]) for each in others))


def _quantized_layers(raw: Config) -> Changes:
    """Names of modules, also of one that has all experts of a layer."""
    return Changes("quantized_layers", raw["quantized_layers"], inside=True)


def _layer_quant_config(raw: Config) -> Changes:
    """Names, and patterns as of files."""
    names, others = _names(raw["layer_quant_config"])
    patterns = tuple((each, compiled(rf"\A{translate(each)}"), others[each]) for each in others)
    return Changes("layer_quant_config", names, patterns)


def _names(told: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """The entries for plain names, and the others."""
    plain = {entry: change for entry, change in told.items() if re.fullmatch(r"[\w.-]*", entry)}
    return plain, {entry: change for entry, change in told.items() if entry not in plain}


_MADE = {
    "dynamic": _dynamic,
    "extra_config": _extra_config,
    "quantized_layers": _quantized_layers,
    "layer_quant_config": _layer_quant_config,
}
