"""AWQ in gemm order, symmetric: the layout that runtimes without compressed-tensors know.

The codes are those of the compressed-tensors layout (`storage.AwqIntegers` has the tensors). Its zero points
are all 8: groups are symmetric, as everywhere in `formats.groups`. AutoAWQ's config has no word for that;
auto-round's has, in folders of this layout: `sym`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moequant.containers.folders.plan import of_stack
from moequant.containers.folders.read import FolderWeights
from moequant.containers.folders.schemes import Scheme
from moequant.containers.folders.storage import AwqIntegers, Storage
from moequant.formats.groups import GroupFormat


def quantization_config(groups: Sequence[tuple[Scheme, list[str]]], kept: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json: of the one scheme, and the linear modules that are `kept`."""
    ((scheme, _),) = groups
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": scheme.bits,
        "group_size": scheme.group,
        "zero_point": True,
        "sym": True,  # of which are all the same: who reads it need not look
        "modules_to_not_convert": list(dict.fromkeys(map(of_stack, kept))),
    }


def storage(config: Mapping[str, Any], module: str, scale_dtype: torch.dtype) -> Storage:
    """How every module is stored, by a config of ours or anybody's."""
    return AwqIntegers(GroupFormat(int(config["bits"]), int(config["group_size"]), (scale_dtype,)))


def open_folder(path: Path) -> FolderWeights:
    """A folder in this layout, unpacked by compressed-tensors. VerifyError when it cannot be read or is in
    another layout."""
    return FolderWeights(path, "awq", lambda config: partial(_decode, int(config["bits"])))


def _decode(bits: int, module: str, stored: Mapping[str, Tensor]) -> Tensor:
    """One module's tensors into its weight [out, in], in the precision of its scales."""
    from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter

    words, scales = (stored["qweight"], stored["qzeros"]), stored["scales"]
    reader = AutoAWQConverter(group_size=len(words[0]) // len(scales))
    codes, zeros = (
        each.bitwise_and((1 << bits) - 1)
        for each in reader.reverse_awq_order(*reader.unpack_awq(*words, bits), bits)
    )
    by_group = (codes.view(len(scales), -1, codes.shape[1]) - zeros[:, None]).to(scales.dtype)
    weight: Tensor = (by_group * scales[:, None]).flatten(0, 1).T
    return weight
