"""GPTQ, first version, symmetric, without activation order: the layout with the most loaders.

Of every linear module:

| tensor | dtype | shape |
|---|---|---|
| qweight | I32 | [in · bits / 32, out], lowest bits first along `in`, code + 2^(bits-1) |
| qzeros | I32 | [in / group, out · bits / 32], the zero point 2^(bits-1), less one |
| scales | F16 | [in / group, out] |
| g_idx | I32 | [in], the group of each channel |

The codes are those of the compressed-tensors layout. Reference: AutoGPTQ's and GPTQModel's packing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moequant.containers.folders.read import FolderWeights
from moequant.containers.folders.shards import Entry
from moequant.formats import groups
from moequant.formats.groups import GroupFormat

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")


def entries(module: str, fmt: GroupFormat, n_out: int, n_in: int) -> tuple[Entry, ...]:
    """The tensors of one linear module."""
    count = fmt.groups(n_in)
    return (
        Entry(f"{module}.qweight", "I32", (n_in // fmt.per_word, n_out)),
        Entry(f"{module}.qzeros", "I32", (count, n_out // fmt.per_word)),
        Entry(f"{module}.scales", "F16", (count, n_out)),
        Entry(f"{module}.g_idx", "I32", (n_in,)),
    )


def tensors(fmt: GroupFormat, codes: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
    """Codes [out, in] and scales [out, groups] as the values of `entries`."""
    n_out, n_in = codes.shape
    # pack() adds 2^(bits-1) to each code: -1 is stored as the zero point less one.
    zeros = groups.pack(torch.full((fmt.groups(n_in), n_out), -1, dtype=torch.int8), fmt.bits)
    group_of = torch.arange(n_in, dtype=torch.int32) // fmt.size(n_in)
    return groups.pack(codes, fmt.bits).T.contiguous(), zeros, scales.T.contiguous(), group_of


def integers(fmt: GroupFormat, stored: Mapping[str, Tensor], n_in: int) -> tuple[Tensor, Tensor]:
    """Codes [out, in] and scales [out, groups] of one module's tensors: the inverse of `tensors`."""
    return groups.unpack(stored["qweight"].T, fmt.bits, n_in), stored["scales"].T


def quantization_config(fmt: GroupFormat, kept: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json, and the whole of quantize_config.json.

    `kept` are the linear modules that are not quantized. Loaders that fuse q, k and v look
    for the fused name, so that a block of which nothing is quantized is named as a whole.
    """
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": fmt.bits,
        "group_size": fmt.group,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "dynamic": {f"-:{pattern}": {} for pattern in _patterns(kept)},
    }


def open_folder(path: Path) -> FolderWeights:
    """A folder in this layout, decoded here. VerifyError when it cannot be read or is in another layout."""
    return FolderWeights(path, "gptq", SUFFIXES, _decode)


def _patterns(kept: Sequence[str]) -> list[str]:
    """Regular expressions, from the start of a module's name, that match the kept modules of every layer."""
    found = set()
    for name in kept:
        tail = name.split(".")
        if tail[:2] == ["model", "layers"] and "self_attn" in tail:
            found.add(r"model\.layers\.\d+\.self_attn\.")
        elif tail[:2] == ["model", "layers"]:
            found.add(r"model\.layers\.\d+\." + r"\.".join(tail[3:]) + "$")
        else:
            found.add(name.replace(".", r"\.") + "$")
    return sorted(found)


def _decode(config: Mapping[str, Any], stored: Mapping[str, Tensor]) -> Tensor:
    """One module's tensors into its weight [out, in], in the precision of its scales."""
    bits = int(config["bits"])
    words = stored["qweight"].T
    codes = groups.unpack(words, bits, words.shape[1] * 32 // bits)
    zeros = groups.unpack(stored["qzeros"], bits, stored["scales"].shape[1]) + 1
    group_of = stored["g_idx"].long()
    centred = codes.to(torch.int16) - zeros.T.to(torch.int16)[:, group_of]
    return centred.to(stored["scales"].dtype) * stored["scales"].T[:, group_of]
