"""Checkpoints of a few tensors, and what every codec must do: rows alone as rows of the whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moequant.checkpoint.codecs import Stored, recognise
from moequant.files.local import LocalFile
from moequant.values import TensorRef


def write(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, TensorRef]:
    """The tensors in one file, as references into it."""
    path = folder / "model.safetensors"
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    refs = {}
    for name, entry in json.loads(raw[8:start]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            refs[name] = TensorRef(
                name, tuple(entry["shape"]), entry["dtype"], LocalFile(path), start + begin, start + end
            )
    return refs


def one(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> Stored:
    """The only weight that the tensors make."""
    (stored,) = recognise(write(folder, tensors), config).values()
    return stored


def read(stored: Stored) -> Tensor:
    """All values, and what every codec promises: dtype and shape as announced, rows alone as in the whole."""
    indices = range(stored.shape[0]) if len(stored.shape) == 3 else [None]
    matrices = [stored.read(index) for index in indices]
    height = stored.shape[-2]
    cuts = sorted({0, 1, height // 3, height // 2, min(height, 37), height})
    for index, matrix in zip(indices, matrices, strict=True):
        parts = [stored.read(index, range(*cut)) for cut in pairwise(cuts)]
        assert torch.equal(torch.cat(parts), matrix) and matrix.is_contiguous()
    whole = torch.stack(matrices) if len(stored.shape) == 3 else matrices[0]
    assert tuple(whole.shape) == stored.shape
    assert whole.dtype == {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[stored.dtype]
    return whole


def seeded(seed: int = 0) -> torch.Generator:
    """The same numbers every time."""
    return torch.Generator().manual_seed(seed)
