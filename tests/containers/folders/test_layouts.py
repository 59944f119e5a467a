"""Every layout: what it says it holds is what comes, tensor by tensor, and its config names its storage."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from moequant.checkpoint import open_checkpoint
from moequant.containers.folders.container import FolderContainer
from moequant.containers.folders.layouts import LAYOUTS
from moequant.containers.folders.plan import FolderSettings, LayoutName, stores
from moequant.containers.folders.write import quantization
from moequant.values import Packed
from tests.containers.folders.cases import packed


def test_all_have_a_name_that_settings_know() -> None:
    assert tuple(LAYOUTS) == get_args(LayoutName)


@pytest.mark.parametrize("name", LAYOUTS)
def test_values_are_those_of_the_entries(tiny, name: str) -> None:
    family, scheme = ("gpt_oss", "MXFP4A16") if name == "mxfp4" else ("mixtral", "W4A16_G32")
    asked = FolderSettings("compressed-tensors" if name == "mxfp4" else name, scheme=scheme)
    folder = FolderContainer(open_checkpoint(tiny(family)), asked)
    layout, kinds = LAYOUTS[name], stores(folder.checkpoint, folder.plan, folder.settings.layout)
    config = quantization(folder.checkpoint, folder.plan, folder.settings)
    assert config["quant_method"] == name
    held: list[Packed] = []
    names = []
    for item in packed(folder, []):
        storage = kinds[item.weight.name]
        module = item.weight.names[0].removesuffix(".weight")
        assert layout.storage(config, module, torch.bfloat16).suffixes == storage.suffixes
        held.append(item)
        if whole := layout.entries(item.weight, storage):
            for entry, parts in zip(whole, layout.values(held, storage, {}), strict=True):
                assert sum(part.nbytes for part in parts) == entry.bytes, entry
                names.append(entry.name)
            held.clear()
    assert not held and len(set(names)) == len(names)
