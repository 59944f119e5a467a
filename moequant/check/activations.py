"""Real inputs of every weight, a few tokens an expert, and what the routers chose."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from moequant.forward.taps import Recorder

K = TypeVar("K")

TOKENS = 16
"""Inputs kept of each expert: enough to see its error, few enough for the vector path too."""

BLOCK_TOKENS = 256
"""Tokens that cross a whole MoE block."""


@dataclass(slots=True)
class Collector(Recorder):
    """A recorder that keeps the first inputs of every weight, and all choices.

    `inputs` by site and expert or head (0 when dense) f32 [n, in]; `hidden` and `index` by the site of
    the experts' inputs: what the block was fed [n, in], and what its router chose i64 [n, k].
    """

    inputs: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    hidden: dict[str, Tensor] = field(default_factory=dict)
    index: dict[str, Tensor] = field(default_factory=dict)

    def dense(self, name: str, inputs: Tensor) -> None:
        """See `Recorder`."""
        _keep(self.inputs, (name, 0), inputs.reshape(-1, inputs.shape[-1]), TOKENS)

    def heads(self, name: str, inputs: Tensor) -> None:
        """See `Recorder`."""
        flat = inputs.reshape(-1, *inputs.shape[-2:])[:TOKENS]
        for head in range(flat.shape[1]):
            _keep(self.inputs, (name, head), flat[:, head], TOKENS)

    def routed(self, name: str, hidden: Tensor, index: Tensor, gates: Tensor) -> None:
        """See `Recorder`."""
        _keep(self.hidden, name, hidden, BLOCK_TOKENS)
        before = self.index.get(name)
        self.index[name] = index.cpu() if before is None else torch.cat([before, index.cpu()])

    def expert(self, name: str, expert: int, inputs: Tensor, gates: Tensor) -> None:
        """See `Recorder`."""
        _keep(self.inputs, (name, expert), inputs, TOKENS)


def _keep(store: dict[K, Tensor], key: K, rows: Tensor, limit: int) -> None:
    before = store.get(key)
    room = limit - (0 if before is None else len(before))
    if room > 0:
        new = rows[:room].detach().float().cpu()
        store[key] = new.clone() if before is None else torch.cat([before, new])


def merged(parts: Iterable[Collector]) -> Collector:
    """The collectors of all batches, in order, as one."""
    whole = Collector()
    for part in parts:
        for key, rows in part.inputs.items():
            _keep(whole.inputs, key, rows, TOKENS)
        for name, rows in part.hidden.items():
            _keep(whole.hidden, name, rows, BLOCK_TOKENS)
        for name, index in part.index.items():
            before = whole.index.get(name)
            whole.index[name] = index if before is None else torch.cat([before, index])
    return whole
