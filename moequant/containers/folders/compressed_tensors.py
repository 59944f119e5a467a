"""compressed-tensors: what vLLM, SGLang and transformers load.

Tensors are those of `storage`, the config is made by the `compressed-tensors` package itself, and the package
decodes what is written here; it is the independent decoder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moequant.containers.folders.read import Decode, FolderWeights
from moequant.containers.folders.schemes import Scheme, of_config
from moequant.containers.folders.storage import Storage
from moequant.errors import VerifyError

LINEAR = "Linear"
"""The target that stands for every linear module."""


def quantization_config(groups: Sequence[tuple[Scheme, list[str]]], kept: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json: schemes, what they are for, and linears that are kept."""
    formats = {scheme.format for scheme, _ in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": scheme.config(targets) for number, (scheme, targets) in enumerate(groups)
        },
        "ignore": [rf"re:(.*\.)?{re.escape(each)}.*" if each.endswith(".") else each for each in kept],
        "kv_cache_scheme": None,
    }


def names(targets: Iterable[str], module: str) -> bool:
    """Whether one of the targets, or of what a config ignores, is that module's name or a pattern of it."""
    return any(
        target == module or (target.startswith("re:") and re.match(target[3:], module) is not None)
        for target in targets
    )


def group_of(config: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """The entry of `config_groups` for a module: by its name, else that of all linears; VerifyError."""
    groups: list[Mapping[str, Any]] = list(config.get("config_groups", {}).values())
    for group in groups:
        if names(group["targets"], module):
            return group
    for group in groups:
        if LINEAR in group["targets"]:
            return group
    raise VerifyError(f"{module}: no target of quantization_config.config_groups names it")


def storage(config: Mapping[str, Any], module: str, scale_dtype: torch.dtype) -> Storage:
    """How a module is stored, by a config of ours or anybody's. VerifyError for a module that it does not
    name, PlanError for a scheme that moequant does not know."""
    group = group_of(config, module)
    return of_config(group, group.get("format") or config["format"]).storage((scale_dtype,))


def open_folder(path: Path) -> FolderWeights:
    """A folder in this layout, ours or anybody's, decoded by the compressed-tensors package.

    VerifyError for a folder that cannot be read or is in another layout.
    """
    return FolderWeights(path, "compressed-tensors", _decoder)


def _decoder(config: Mapping[str, Any]) -> Decode:
    """One module's tensors into its weight [out, in]."""
    from compressed_tensors.compressors import BaseCompressor  # brings transformers with it
    from compressed_tensors.quantization import QuantizationScheme

    known: dict[int, QuantizationScheme] = {}

    def decode(module: str, stored: Mapping[str, Tensor]) -> Tensor:
        group = group_of(config, module)
        if id(group) not in known:
            known[id(group)] = QuantizationScheme(**group)
        compressor = BaseCompressor.get_value_from_registry(group.get("format") or config["format"])
        weight: Tensor = compressor.decompress(dict(stored), known[id(group)])["weight"]
        return weight

    return decode
