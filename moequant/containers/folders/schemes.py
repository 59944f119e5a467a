"""Schemes: what a weight is stored as and what its inputs are rounded to, under compressed-tensors' names.

A scheme is one of the presets of that package, perhaps with another group size: `W4A16` has groups of 128,
`W4A16_G32` of 32, `W4A16_CHANNEL` a scale a row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from moequant.containers.folders.storage import Float8, Mxfp4, Nvfp4, PackedIntegers, PlainIntegers, Storage
from moequant.errors import PlanError
from moequant.formats.float8 import Span
from moequant.formats.groups import GROUPS, GroupFormat

Kind = Literal["integers", "W8A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4", "MXFP4"]

_GROUP_OF = {"W8A8": -1, "FP8": -1, "FP8_DYNAMIC": -1, "FP8_BLOCK": 128, "NVFP4": 16, "MXFP4": 32}
_FORMATS = {
    "integers": "pack-quantized",
    "W8A8": "int-quantized",
    "FP8": "float-quantized",
    "FP8_DYNAMIC": "float-quantized",
    "FP8_BLOCK": "float-quantized",
    "NVFP4": "nvfp4-pack-quantized",
    "MXFP4": "mxfp4-pack-quantized",
}

_SPANS: Mapping[Kind, Span] = {"FP8": "matrix", "FP8_DYNAMIC": "row", "FP8_BLOCK": "square"}


@dataclass(frozen=True, slots=True)
class Scheme:
    """A preset of compressed-tensors and the weights of a row that share a scale (-1: all).

    `capability` is the least compute capability of a GPU that vLLM serves it on, ten times the number.
    `scales_inputs`: it has a number from calibration that scales what a weight is fed.
    """

    preset: str
    kind: Kind
    bits: int
    group: int
    capability: int
    words: str
    scales_inputs: bool = False

    @property
    def name(self) -> str:
        """How plans and options call it."""
        if self.kind != "integers" or self.group == 128:
            return self.preset
        return f"{self.preset}_" + ("CHANNEL" if self.group == -1 else f"G{self.group}")

    @property
    def format(self) -> str:
        """What compressed-tensors calls the way it is stored."""
        return _FORMATS[self.kind]

    @property
    def rounds_inputs(self) -> bool:
        """Whether what a weight is fed is rounded too: in 16 bits it stays as it is."""
        return not self.preset.endswith("A16")

    @property
    def in_transformers(self) -> bool:
        """Whether transformers 5.24 loads experts of it rightly; tests expect it to fail for the others."""
        return self.kind not in ("W8A8", "FP8_BLOCK", "NVFP4")

    @property
    def rows(self) -> int:
        """Rows that have their scales in common: 1, or the side of a square."""
        return 128 if self.kind == "FP8_BLOCK" else 1

    def storage(self, scale_dtypes: tuple[torch.dtype, ...]) -> Storage:
        """How a module is stored, with scales of that type where the scheme leaves it open."""
        match self.kind:
            case "integers":
                return PackedIntegers(GroupFormat(self.bits, self.group, scale_dtypes))
            case "W8A8":
                return PlainIntegers(GroupFormat(8, -1, scale_dtypes))
            case "FP8" | "FP8_DYNAMIC" | "FP8_BLOCK":
                return Float8(_SPANS[self.kind], scale_dtypes, self.scales_inputs)
            case "NVFP4":
                return Nvfp4(self.scales_inputs)
            case "MXFP4":
                return Mxfp4()

    def config(self, targets: list[str]) -> dict[str, Any]:
        """Its entry of `config_groups`, made by compressed-tensors itself."""
        from compressed_tensors.quantization import preset_name_to_scheme  # brings transformers with it

        made = preset_name_to_scheme(self.preset, targets).model_dump(mode="json")
        if self.kind == "integers":
            grouped = self.group != -1
            made["weights"] |= {"strategy": "group" if grouped else "channel"}
            made["weights"] |= {"group_size": self.group if grouped else None}
        made["format"] = self.format
        found: dict[str, Any] = made
        return found


def _integers(bits: int) -> Scheme:
    capability = 75 if bits in (4, 8) else 80
    return Scheme(f"W{bits}A16", "integers", bits, 128, capability, f"int{bits}")


def _other(preset: str, kind: Kind, bits: int, capability: int, words: str) -> Scheme:
    return Scheme(preset, kind, bits, _GROUP_OF[kind], capability, words)


PRESETS: dict[str, Scheme] = {
    scheme.preset: scheme
    for scheme in (
        *(_integers(bits) for bits in range(2, 9)),
        replace(_other("FP8", "FP8", 8, 80, "FP8, one scale a matrix, inputs too"), scales_inputs=True),
        _other("FP8_DYNAMIC", "FP8_DYNAMIC", 8, 80, "FP8, one scale a row"),
        _other("FP8_BLOCK", "FP8_BLOCK", 8, 80, "FP8, one scale for 128 x 128 weights"),
        _other("MXFP4A16", "MXFP4", 4, 75, "MXFP4"),
        _other("NVFP4A16", "NVFP4", 4, 75, "NVFP4"),
        replace(_other("NVFP4", "NVFP4", 4, 100, "NVFP4, inputs as well"), scales_inputs=True),
        _other("W8A8", "W8A8", 8, 75, "int8, one scale a row"),
    )
}
"""Every scheme that is written, by the name of its preset."""

UNWRITTEN: Mapping[str, str] = {
    "MXFP4": "rounds its inputs to four bits; MXFP4A16 has the same weights",
    "W4A16_ASYM": "has zero points, which vLLM's experts do not take; W4A16 has none",
}
"""Presets that people know and that are not written: why, and what comes closest."""

_GROUPED = re.compile(r"(W[2-8]A16)_(G\d+|CHANNEL)")


def find(name: str, option: str = "--scheme") -> Scheme:
    """The scheme of that name, in capitals or not. PlanError lists those there are."""
    wanted = name.upper()
    if found := _GROUPED.fullmatch(wanted):
        preset, group = found.groups()
        size = -1 if group == "CHANNEL" else int(group[1:])
        if size not in GROUPS:
            raise PlanError(
                f"{option} {name}: no such scheme; {preset} has groups of "
                f"{', '.join(map(str, GROUPS[:-1]))} ({preset}_G{GROUPS[0]}), or {preset}_CHANNEL"
            )
        return with_group(PRESETS[preset], size)
    if wanted in UNWRITTEN:
        raise PlanError(f"{option} {name}: {UNWRITTEN[wanted]}")
    if wanted not in PRESETS:
        raise PlanError(f"{option} {name}: no such scheme; there are {', '.join(PRESETS)}")
    return PRESETS[wanted]


def with_group(scheme: Scheme, group: int) -> Scheme:
    """The same with another group size; PlanError where no loader has it or there is no choice."""
    if scheme.kind != "integers":
        if group == scheme.group:
            return scheme
        raise PlanError(f"--group-size {group}: {scheme.preset} has its own; leave it out")
    if group not in GROUPS:
        raise PlanError(
            f"--group-size {group}: loaders take {', '.join(map(str, GROUPS[:-1]))} or -1 (one scale a row)"
        )
    return replace(scheme, group=group)


def of_config(group: Mapping[str, Any], stored_as: str) -> Scheme:
    """The scheme of an entry of `config_groups`, whoever wrote it; PlanError for an unknown one."""
    weights: Mapping[str, Any] = group.get("weights") or {}
    kind, bits, size = weights.get("type"), weights.get("num_bits"), weights.get("group_size")
    strategy, square = weights.get("strategy"), weights.get("block_structure")
    if weights.get("symmetric") and kind == "int":
        if stored_as == "int-quantized" and strategy == "channel":
            return PRESETS["W8A8"]
        if stored_as == "pack-quantized" and strategy in ("group", "channel"):
            return with_group(find(f"W{bits}A16"), size or -1)
    inputs: Mapping[str, Any] = group.get("input_activations") or {}
    if (kind, bits, strategy, stored_as) == ("float", 8, "tensor", "float-quantized"):
        if inputs.get("dynamic") is False:
            return PRESETS["FP8"]
    elif kind == "float":
        nvfp4 = "NVFP4" if inputs else "NVFP4A16"
        for name in ("FP8_DYNAMIC", "FP8_BLOCK", nvfp4, "MXFP4A16"):
            known = PRESETS[name]
            same_size = size == known.group if known.bits == 4 else (square is not None) == (known.rows > 1)
            if known.format == stored_as and same_size:
                return known
    raise PlanError(f"{stored_as} with {kind} of {bits} bits, {strategy}: no scheme that moequant knows")
