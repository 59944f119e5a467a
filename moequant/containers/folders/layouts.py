"""Layouts: which tensors a folder keeps its rounded weights in, and what its config says of them.

Most loaders know every linear module by itself. Where one takes all experts of a layer in one tensor, a class
of its own says when such a tensor is whole. So a new kind of folder is one entry here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moequant.containers.folders import awq, compressed_tensors, gptq, mxfp4
from moequant.containers.folders.plan import LayoutName, modules
from moequant.containers.folders.read import FolderWeights
from moequant.containers.folders.schemes import Scheme
from moequant.containers.folders.shards import Entry
from moequant.containers.folders.storage import Storage
from moequant.values import Packed, Weight

Scales = Mapping[str, Tensor]
"""By weight, where its scheme scales inputs: f32 [E], `storage.INPUT` of every matrix."""

Groups = Sequence[tuple[Scheme, list[str]]]
"""Schemes, and the targets of each."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A layout in which every linear module has tensors of its own.

    `config` makes the `quantization_config` of config.json of schemes and of linears that are kept, `storage`
    says from such a config how a module is stored, with scales of a type. `open` reads a folder by somebody
    else's rules. `beside` is a file that repeats the config, where loaders look for one.
    """

    name: LayoutName
    config: Callable[[Groups, Sequence[str]], dict[str, Any]]
    storage: Callable[[Mapping[str, Any], str, torch.dtype], Storage]
    open: Callable[[Path], FolderWeights]
    beside: str | None = None

    def entries(self, weight: Weight, storage: Storage) -> tuple[Entry, ...]:
        """The tensors that are whole once a rounded weight is there, none while others are waited for."""
        return tuple(
            entry
            for module in modules(weight)
            for entry in storage.entries(module, weight.shape[-2], weight.n_in)
        )

    def values(self, items: Sequence[Packed], storage: Storage, inputs: Scales) -> Iterator[Iterable[Tensor]]:
        """What is in each of `entries`, in parts, of the weights since the last that were written."""
        for item in items:
            rows = item.data.reshape(item.weight.matrices, item.weight.shape[-2], -1)
            for matrix, scale in zip(rows, inputs.get(item.weight.name, [None] * len(rows)), strict=True):
                yield from ((tensor,) for tensor in storage.tensors(matrix, item.weight.n_in))
                if scale is not None:
                    yield (scale.view(1),)


class _Stacked(Layout):
    """One in which the experts of a layer lie in one tensor, gate and up together."""

    __slots__ = ()

    def entries(self, weight: Weight, storage: Storage) -> tuple[Entry, ...]:
        """See `Layout`."""
        return mxfp4.entries(weight)

    def values(self, items: Sequence[Packed], storage: Storage, inputs: Scales) -> Iterator[Iterable[Tensor]]:
        """See `Layout`: of one expert after another, so that memory holds the codes of one more."""
        for number in range(len(mxfp4.ENDINGS)):
            yield (each[number] for each in mxfp4.values(items))


LAYOUTS: Mapping[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout(
            "compressed-tensors",
            compressed_tensors.quantization_config,
            compressed_tensors.storage,
            compressed_tensors.open_folder,
        ),
        Layout(
            "gptq", gptq.quantization_config, gptq.storage, gptq.open_folder, beside="quantize_config.json"
        ),
        Layout("awq", awq.quantization_config, awq.storage, awq.open_folder),
        _Stacked("mxfp4", mxfp4.quantization_config, mxfp4.storage, mxfp4.open_folder),
    )
}
"""Every layout, by the `quant_method` of its config."""
