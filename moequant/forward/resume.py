"""Forward passes that start at a later layer, from hidden states kept of the first pass.

Where only weights from some layer on change, what the layers before it compute stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


class Resumable:
    """A model with its weights in memory, its layers at `layers_at`, and the rows of tokens `ids` i64
    [rows, n] that cross it again and again. The first pass is run here: its logits, f32 [n, vocab] a row, are
    `base`."""

    def __init__(self, model: PreTrainedModel, layers_at: str, ids: Tensor) -> None:
        self._model, self._ids = model, ids
        layers = model.get_submodule(layers_at)
        assert isinstance(layers, nn.ModuleList)
        self._doors = [_Door(layer) for layer in layers]
        for index, door in enumerate(self._doors):
            layers[index] = door
        self._kept: list[list[_Passed]] = []
        self.base = [self._first(row) for row in ids]

    def logits(self, layer: int = 0) -> list[Tensor]:
        """Logits f32 [n, vocab] of every row; all weights before `layer` must be those of the first pass."""
        for index, door in enumerate(self._doors):
            door.closed = index < layer
        return [self._again(layer, row, kept) for row, kept in zip(self._ids, self._kept, strict=True)]

    def _again(self, layer: int, row: Tensor, kept: list[_Passed]) -> Tensor:
        for door, passed in zip(self._doors, kept, strict=True):
            door.passed = _Passed(kept[layer].fed, passed.beside) if door.closed else passed
        return self._run(row)

    def _first(self, row: Tensor) -> Tensor:
        logits = self._run(row)
        self._kept.append([door.passed for door in self._doors if door.passed is not None])
        return logits

    def _run(self, row: Tensor) -> Tensor:
        logits: Tensor = self._model(input_ids=row[None], use_cache=False).logits[0]
        return logits


@dataclass(frozen=True, slots=True)
class _Passed:
    """What a layer was fed, and what it gave besides hidden states."""

    fed: Tensor
    beside: tuple[Any, ...]


class _Door(nn.Module):
    """Stands for a decoder layer; remembers what it was fed. A closed one gives what it remembers."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.passed: _Passed | None = None
        self._held, self.closed = (layer,), False  # a tuple: the model's parameters keep their names

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._held[0], name)  # models ask layers for their attention type

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.closed and self.passed is not None:
            return (self.passed.fed, *self.passed.beside) if self.passed.beside else self.passed.fed
        out: Any = self._held[0](hidden, *args, **kwargs)
        self.passed = _Passed(hidden, out[1:] if isinstance(out, tuple) else ())
        return out
