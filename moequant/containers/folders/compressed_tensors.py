"""compressed-tensors `pack-quantized`: what vLLM, SGLang and transformers load.

Of every linear module:

| tensor | dtype | shape |
|---|---|---|
| weight_packed | I32 | [out, in · bits / 32], lowest bits first along `in`, code + 2^(bits-1) |
| weight_scale | BF16 or F16 | [out, in / group] |
| weight_shape | I64 | [2], out and in |

The `compressed-tensors` package decodes what is written here; it is the independent decoder.
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

SUFFIXES = ("weight_packed", "weight_scale", "weight_shape")


def entries(module: str, fmt: GroupFormat, n_out: int, n_in: int) -> tuple[Entry, ...]:
    """The tensors of one linear module."""
    dtype = "F16" if fmt.scale_dtype == torch.float16 else "BF16"
    return (
        Entry(f"{module}.weight_packed", "I32", (n_out, -(-n_in // fmt.per_word))),
        Entry(f"{module}.weight_scale", dtype, (n_out, fmt.groups(n_in))),
        Entry(f"{module}.weight_shape", "I64", (2,)),
    )


def tensors(fmt: GroupFormat, codes: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
    """Codes [out, in] and scales [out, groups] as the values of `entries`."""
    return groups.pack(codes, fmt.bits), scales, torch.tensor(codes.shape, dtype=torch.int64)


def integers(fmt: GroupFormat, stored: Mapping[str, Tensor], n_in: int) -> tuple[Tensor, Tensor]:
    """Codes [out, in] and scales [out, groups] of one module's tensors: the inverse of `tensors`."""
    return groups.unpack(stored["weight_packed"], fmt.bits, n_in), stored["weight_scale"]


def quantization_config(fmt: GroupFormat, kept: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json; `kept` are the linear modules that are not quantized."""
    weights = {
        "num_bits": fmt.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if fmt.group == -1 else "group",
        "group_size": None if fmt.group == -1 else fmt.group,
        "actorder": None,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            }
        },
        "ignore": list(kept),
        "kv_cache_scheme": None,
    }


def open_folder(path: Path) -> FolderWeights:
    """A folder in this layout, ours or anybody's, decoded by the compressed-tensors package.

    VerifyError for a folder that cannot be read or is in another layout.
    """
    return FolderWeights(path, "compressed-tensors", SUFFIXES, _decode)


def _decode(config: Mapping[str, Any], stored: Mapping[str, Tensor]) -> Tensor:
    """One module's tensors into its weight [out, in]."""
    from compressed_tensors.compressors import BaseCompressor  # brings transformers with it
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(**config["config_groups"]["group_0"]["weights"])
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format="pack-quantized")
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    weight: Tensor = compressor.decompress(dict(stored), scheme)["weight"]
    return weight
