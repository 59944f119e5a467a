"""The weights of a model as a GGUF file has them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from moequant.containers.gguf.export import Exported
from moequant.containers.gguf.read import GgufFile
from moequant.errors import VerifyError
from moequant.values import Weight
from moequant.values.ops import put


class GgufWeights:
    """A GGUF file of a known model, decoded by gguf-py."""

    def __init__(self, path: Path, exported: Exported, file: GgufFile | None = None) -> None:
        self.file, self.exported = file or GgufFile(path), exported
        self._shapes = {weight.name: weight.shape for weight in exported.weights}

    def tensor(
        self, name: str, experts: range | None = None, rows: range | tuple[int, ...] | None = None
    ) -> Tensor:
        """One of the file's tensors by our name, f32, shape of its weight; of a stack these experts alone, of
        a table these rows. VerifyError for another shape."""
        theirs = self.exported.names[name]
        expected, found = self.exported.shapes[name], self.file.info(theirs).shape
        if found != expected:
            raise VerifyError(f"{self.file.path}: {theirs} is {list(found)}, expected {list(expected)}")
        shape = self._shapes[name]
        if rows is not None:
            return self.file.rows(theirs, rows)
        if experts is None:
            values = self.file.values(theirs).reshape(shape)
            if not values.is_floating_point():
                self._check_table(theirs, values)
            return values
        if len(found) < 3:  # experts in one matrix
            return self.file.values(theirs).reshape(shape)[experts.start : experts.stop]
        return self.file.values(theirs, experts).reshape(len(experts), *shape[1:])

    def _check_table(self, theirs: str, values: Tensor) -> None:
        """VerifyError for a table with a number that is no expert's."""
        experts = self.exported.checkpoint.n_experts
        wrong = values[(values < 0) | (values >= experts)]
        if len(wrong):
            raise VerifyError(
                f"{self.file.path}: {theirs} has a {int(wrong[0])}, where 0 to {experts - 1} can be; the "
                "file is damaged, make it again"
            )

    def as_cut(self, weight: Weight) -> Tensor:
        """Decoded values of a weight as the file cuts it: a `forward.model.Provider` of
        `exported.checkpoint`."""
        return self.tensor(weight.name, weight.origin.matrices, weight.origin.rows)

    def load(self, weight: Weight) -> Tensor:
        """Decoded values of a weight of the model, in the model's order: a `forward.model.Provider`."""
        parts, some = self.exported.parts[weight.name], weight.origin.matrices
        if len(parts) == 1 and not parts[0][1]:
            return self.tensor(parts[0][0], some, weight.origin.rows)
        out = torch.empty(weight.shape)
        for name, ops in parts:
            put(ops, out, self.tensor(name, some))
        return out
