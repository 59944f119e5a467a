"""Bytes: of a weight in a format, of a file's weight data, and of the budget that a person names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from moequant.containers.gguf.presets import BASE_TYPES, ModelFacts, llama_cpp_types
from moequant.errors import PlanError, nearest
from moequant.values import Weight

ALIGNMENT = 32
"""GGUF pads every tensor to a multiple of this many bytes."""

MOST_BITS = 64
"""No type has more bits a weight."""

_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([KMGT]?)(I?)B?\s*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Budget:
    """What a file may cost, named in one of three ways; `text` says it in words, `label` in a file's name.

    `file_bytes` is the whole file, header and tokenizer included; `bpw` bits of weight
    data per weight of the model; `preset` llama.cpp's file of that name.
    """

    text: str
    file_bytes: int | None = None
    bpw: float | None = None
    preset: str | None = None
    label: str = ""

    @classmethod
    def of_size(cls, text: str) -> Budget:
        """`14G`, `14GB`, `13.5GiB`, `800M`, `3300000`; PlanError for anything else."""
        unit = " bytes" if text.strip().isdecimal() else ""
        return cls(f"at most {text.strip()}{unit}", file_bytes=parse_size(text), label="".join(text.split()))

    @classmethod
    def of_bpw(cls, bits: float | str) -> Budget:
        """So many bits a weight, F32 routers and norms counted in; PlanError for what no weight can have."""
        try:
            bpw = float(bits)
        except ValueError:
            bpw = 0.0
        if not 0 < bpw <= MOST_BITS:
            raise PlanError(
                f"{bits} bits per weight: give a number above 0 and of at most {MOST_BITS}, such as 3.6"
            )
        return cls(f"at most {bpw:g} bits per weight", bpw=bpw, label=f"{bpw:g}bpw")

    @classmethod
    def of_preset(cls, preset: str) -> Budget:
        """No larger than llama.cpp's file; PlanError lists the presets that exist."""
        check_preset(preset)
        return cls(preset, preset=preset, label=preset)

    def weight_bytes(self, weights: tuple[Weight, ...], facts: ModelFacts, overhead: int = 0) -> int:
        """Bytes that the aligned weight data may take in a file with `overhead` bytes of everything else."""
        if self.preset is not None:
            return data_bytes(weights, llama_cpp_types(self.preset, weights, facts))
        if self.bpw is not None:
            return int(self.bpw * sum(weight.numel for weight in weights) / 8)
        assert self.file_bytes is not None
        return self.file_bytes - overhead


def parse_size(text: str) -> int:
    """Bytes of a size as people write it: K, M, G, T are powers of 1000, KiB … TiB of 1024."""
    found = _SIZE.fullmatch(text)
    if found is None:
        raise PlanError(f"size {text!r}: give bytes or a number with K, M, G, T (or GiB), such as 14G")
    number, unit, binary = found.groups()
    if binary and not unit:
        raise PlanError(f"size {text!r}: give KiB, MiB, GiB or TiB, such as 13.5GiB")
    size = float(number) * (1024 if binary else 1000) ** _UNITS[unit.upper()]
    if not 1 <= size < 2**63:
        raise PlanError(f"size {text!r}: must be above 0 bytes, and less than any disk has")
    return int(size)


def check_preset(preset: str) -> None:
    """PlanError, with the presets that exist, when this is none of them."""
    if preset not in BASE_TYPES:
        raise PlanError(f"unknown type {preset!r}; {nearest(preset, BASE_TYPES)}")


def aligned(size: int) -> int:
    """`size` rounded up to what it takes in a GGUF file."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def bits_of(format_name: str) -> float:
    """Bits per weight of a ggml type; PlanError when gguf knows none of that name."""
    block, block_bytes = _block(format_name)
    return 8 * block_bytes / block


def packed_bytes(format_name: str, weight: Weight) -> int:
    """Bytes of `weight` in that format; PlanError when the format's block does not divide the rows."""
    block, block_bytes = _block(format_name)
    if weight.n_in % block:
        raise PlanError(
            f"{weight.name}: {format_name} needs rows of a multiple of {block}, not {weight.n_in}"
        )
    return weight.numel // block * block_bytes


def data_bytes(weights: Iterable[Weight], types: dict[str, str]) -> int:
    """Bytes of all weights in those formats, aligned as in the file."""
    return sum(aligned(packed_bytes(types[weight.name], weight)) for weight in weights)


def checksum_bytes(weights: Iterable[Weight]) -> int:
    """What the checksums of every expert add to a GGUF header (llama.cpp's files have none), at most."""
    return aligned(4 * sum(weight.matrices for weight in weights) + 2 * ALIGNMENT)


def _block(format_name: str) -> tuple[int, int]:
    """Weights and bytes of one block."""
    try:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[format_name]]
    except KeyError:
        raise PlanError(f"unknown format {format_name!r}; ggml has no type of that name") from None
    return int(block), int(block_bytes)
