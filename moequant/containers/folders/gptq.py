"""GPTQ, first version, symmetric, without activation order: the layout with the most loaders.

The codes are those of the compressed-tensors layout (`storage.GptqIntegers` has the tensors).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moequant.containers.folders.read import FolderWeights
from moequant.containers.folders.schemes import Scheme
from moequant.containers.folders.storage import GptqIntegers, Storage
from moequant.formats.groups import GroupFormat, unpack


def quantization_config(groups: Sequence[tuple[Scheme, list[str]]], kept: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json, and the whole of quantize_config.json: of the one scheme.

    `kept` are the linear modules that are not quantized. Loaders that fuse q, k and v look
    for the fused name, so that a block of which nothing is quantized is named as a whole.
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


def _decode(bits: int, module: str, stored: Mapping[str, Tensor]) -> Tensor:
    """One module's tensors into its weight [out, in], in the precision of its scales."""
    words = stored["qweight"].T
    codes = unpack(words, bits, words.shape[1] * 32 // bits)
    zeros = unpack(stored["qzeros"], bits, stored["scales"].shape[1]) + 1
    group_of = stored["g_idx"].long()
    centred = codes.to(torch.int16) - zeros.T.to(torch.int16)[:, group_of]
    return centred.to(stored["scales"].dtype) * stored["scales"].T[:, group_of]
