"""GPTQ, first version, symmetric, without activation order: the layout with the most loaders.

The codes are those of the compressed-tensors layout (`storage.GptqIntegers` has the tensors).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moequant.containers.folders.plan import of_stack
from moequant.containers.folders.read import FolderWeights
from moequant.containers.folders.schemes import Scheme
from moequant.containers.folders.storage import GptqIntegers, Storage
from moequant.formats.groups import GroupFormat, unpack

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Modules that loaders make of several, and those."""


def quantization_config(groups: Sequence[tuple[Scheme, list[str]]], kept: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json, and the whole of quantize_config.json: of the one scheme.

    `kept` are the linear modules that are not quantized. Loaders that make one module of several look for
    its name.
    """
    ((scheme, _),) = groups
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": scheme.bits,
        "group_size": scheme.group,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "dynamic": {f"-:{pattern}": {} for pattern in _patterns(kept)},
    }


def storage(config: Mapping[str, Any], module: str, scale_dtype: torch.dtype) -> Storage:
    """How every module is stored, by a config of ours or anybody's."""
    return GptqIntegers(GroupFormat(int(config["bits"]), int(config["group_size"]), (scale_dtype,)))


def open_folder(path: Path) -> FolderWeights:
    """A folder in this layout, decoded here. VerifyError when it cannot be read or is in another layout."""
    return FolderWeights(path, "gptq", lambda config: partial(_decode, int(config["bits"])))


def _patterns(kept: Sequence[str]) -> list[str]:
    """Regular expressions, from the start of a module's name, that match the kept modules and no others: one
    for all layers in which a module of that name is kept."""
    layers: dict[tuple[str, str], list[str]] = {}
    whole = [rf"(?:.*\.)?{re.escape(name)}" for name in kept if name.endswith(".")]
    named = [name for name in kept if not name.endswith(".")]
    for name in dict.fromkeys((*map(of_stack, named), *_fused(named))):
        before, number, after = re.fullmatch(r"(?:(.*?\.)(\d+)(?=\.))?(.*)", name).groups("")  # type: ignore[union-attr]
        layers.setdefault((before, after), []).append(number)
    return whole + sorted(
        re.escape(before)
        + (f"(?:{'|'.join(sorted(numbers, key=int))})" if before else "")
        + re.escape(after)
        + (r"(?:\.|$)" if after.endswith(".experts") else "$")
        for (before, after), numbers in layers.items()
    )


def _fused(kept: Sequence[str]) -> Iterator[str]:
    """What loaders call kept modules that they make one of."""
    known = {*kept}
    for name in kept:
        block, _, last = name.rpartition(".")
        for fused, parts in FUSED.items():
            if last == parts[0] and known.issuperset(f"{block}.{part}" for part in parts):
                yield f"{block}.{fused}"


def _decode(bits: int, module: str, stored: Mapping[str, Tensor]) -> Tensor:
    """One module's tensors into its weight [out, in], in the precision of its scales."""
    words = stored["qweight"].T
    codes = unpack(words, bits, words.shape[1] * 32 // bits)
    zeros = unpack(stored["qzeros"], bits, stored["scales"].shape[1]) + 1
    group_of = stored["g_idx"].long()
    centred = codes.to(torch.int16) - zeros.T.to(torch.int16)[:, group_of]
    return centred.to(stored["scales"].dtype) * stored["scales"].T[:, group_of]
