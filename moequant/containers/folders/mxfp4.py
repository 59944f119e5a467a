"""gpt-oss as it is released: experts in MXFP4, stacked, rows of gate and up in turn in one tensor.

| tensor | dtype | shape |
|---|---|---|
| gate_up_proj_blocks, down_proj_blocks | U8 | [experts, out, in / 32, 16], the low nibble the even weight |
| gate_up_proj_scales, down_proj_scales | U8 | [experts, out, in / 32], exponents plus 127 |

vLLM 0.32 (`models/gpt_oss.py`) and transformers 5.24 read its experts so, or as floats, and not one by one.
transformers' own function decodes them here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moequant.containers.folders.read import FolderWeights
from moequant.containers.folders.schemes import Scheme
from moequant.containers.folders.shards import Entry
from moequant.containers.folders.storage import Mxfp4, Storage
from moequant.errors import VerifyError
from moequant.values import Packed, Role, Weight

FAMILY = "gpt_oss"
"""The one family that is released so."""

ENDINGS = ("_blocks", "_scales")

_STORAGE = Mxfp4()


def quantization_config(groups: Sequence[tuple[Scheme, list[str]]], kept: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json, as the release has it, whatever is asked."""
    floats = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return {"quant_method": "mxfp4", "modules_to_not_convert": floats}


def storage(config: Mapping[str, Any], module: str, scale_dtype: torch.dtype) -> Storage:
    """How the rows of every expert are stored."""
    return _STORAGE


def completes(weight: Weight) -> bool:
    """Whether a stack is whole with this weight: up comes behind gate."""
    return weight.role is not Role.GATE


def entries(weight: Weight) -> tuple[Entry, ...]:
    """The tensors that can be written once a weight is there."""
    if not completes(weight):
        return ()
    experts, n_out, n_in = weight.shape
    rows = 2 * n_out if weight.role is Role.UP else n_out
    shapes = ((experts, rows, n_in // 32, 16), (experts, rows, n_in // 32))
    names = (weight.place.param + ending for ending in ENDINGS)
    return tuple(Entry(name, "U8", shape) for name, shape in zip(names, shapes, strict=True))


def values(items: Sequence[Packed]) -> Iterator[tuple[Tensor, ...]]:
    """Of gate and up, or of down: blocks and scales of one expert after another."""
    n_in = items[0].weight.n_in
    for each in zip(*(item.data for item in items), strict=True):
        parts = [_STORAGE.tensors(rows.reshape(len(rows), -1), n_in) for rows in each]
        yield tuple(torch.stack(both, 1).flatten(0, 1) for both in zip(*parts, strict=True))


class StackedWeights(FolderWeights):
    """The weights of such a folder."""

    def is_quantized(self, weight: Weight) -> bool:
        """See `FolderWeights`."""
        return weight.is_expert and weight.place.param + ENDINGS[0] in self.files

    def parts(self, weight: Weight) -> tuple[tuple[str, ...], ...]:
        """See `FolderWeights`."""
        return (tuple(weight.place.param + ending for ending in ENDINGS),) * weight.matrices

    def label(self, weight: Weight, expert: int) -> str:
        """See `FolderWeights`."""
        return f"{weight.place.param}[{expert}]"

    def stored(self, weight: Weight, expert: int = 0) -> dict[str, Tensor]:
        """See `FolderWeights`: as `storage.Mxfp4` has them."""
        blocks, scales = (self.tensor(name, expert) for name in self.parts(weight)[0])
        if blocks.ndim != 3 or scales.shape != blocks.shape[:2]:
            raise VerifyError(
                f"{self.path}: {self.label(weight, expert)} has blocks {list(blocks.shape)} and scales "
                f"{list(scales.shape)}, expected [out, in / 32, 16] and [out, in / 32]"
            )
        start, step = {Role.GATE: (0, 2), Role.UP: (1, 2)}.get(weight.role, (0, 1))
        kept = (blocks.flatten(1)[start::step].contiguous(), scales[start::step].contiguous())
        return dict(zip(_STORAGE.suffixes, kept, strict=True))


def open_folder(path: Path) -> FolderWeights:
    """A folder in this layout, decoded by transformers. VerifyError when it cannot be read or is another."""
    return StackedWeights(path, "mxfp4", lambda config: _decode)


def _decode(module: str, stored: Mapping[str, Tensor]) -> Tensor:
    """One expert's rows into its weight bf16 [out, in]."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = (stored[suffix] for suffix in _STORAGE.suffixes)
    stack: Tensor = convert_moe_packed_tensors(blocks.reshape(1, *scales.shape, 16), scales[None])
    return stack[0].mT
