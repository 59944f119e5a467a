"""What is computed once a layer and stream: attention, or a recurrence, and the routed experts.

After the weights in front of it are rounded, what the mixer's last product is fed no longer changes, however
often tokens cross the rest of the layer. Experts are multiplied apart (`routed`); the layer is told what they
give.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moequant.forward.hidden import Hidden
from moequant.forward.taps import Recorder, recorder


class Recalled(Recorder):
    """A recorder that knows what the attention output of its batch is fed, [rows, n, in], None: nothing yet,
    and what routed experts give, [n, h]; `to` is told.

    While experts are not rounded yet they give zeros: nothing that is rounded before them depends on them.
    """

    def __init__(self, attention: Tensor | None, experts: Tensor | None, to: Recorder | None) -> None:
        self.attention, self._experts, self._to = attention, experts, to

    def given(self, hidden: Tensor) -> Tensor:
        """See `forward.experts.Known`."""
        # A copy: models add shared experts to it in place.
        return torch.zeros_like(hidden) if self._experts is None else self._experts.to(hidden, copy=True)

    def dense(self, name: str, inputs: Tensor) -> None:
        """See `Recorder`."""
        if self._to is not None:
            self._to.dense(name, inputs)

    def heads(self, name: str, inputs: Tensor) -> None:
        """See `Recorder`."""
        if self._to is not None:
            self._to.heads(name, inputs)

    def routed(self, name: str, hidden: Tensor, index: Tensor, gates: Tensor) -> None:
        """See `Recorder`."""
        if self._to is not None:
            self._to.routed(name, hidden, index, gates)


@dataclass(slots=True)
class Kept:
    """What is known of one layer, batch by batch: in full precision and as rounded.

    `last` is the product at the end of its mixer, such as `self_attn.o_proj`, whose inputs are kept in
    `mixed`, so far those of `batches`; "" keeps nothing. Its module gives so many `others`, which nobody
    needs: attention its weights, a recurrence nothing. `experts` are the sums that routed experts give, once
    they are rounded.
    """

    layer: int
    last: str = ""
    others: int = 1
    mixed: tuple[Hidden, Hidden] | None = None
    batches: set[int] = field(default_factory=set)
    experts: tuple[Hidden, Hidden] | None = None

    def keep(self, batch: int, exact: Tensor, rounded: Tensor) -> None:
        """Both [rows, n, in]."""
        if self.mixed is not None:
            for room, fed in zip(self.mixed, (exact, rounded), strict=True):
                room.put(self.layer, batch, fed)
            self.batches.add(batch)

    def recorders(
        self, batch: int, exact: Recorder | None = None, rounded: Recorder | None = None
    ) -> tuple[Recorder, Recorder]:
        """The two streams' recorders of a batch, with what is known."""
        mixed = self._known(self.mixed if batch in self.batches else None, batch)
        experts = self._known(self.experts, batch)
        return Recalled(mixed[0], experts[0], exact), Recalled(mixed[1], experts[1], rounded)

    def _known(self, rooms: tuple[Hidden, Hidden] | None, batch: int) -> tuple[Tensor | None, Tensor | None]:
        """What lies there of the batch, in both streams."""
        return (
            (None, None)
            if rooms is None
            else (
                rooms[0].get(self.layer, batch),
                rooms[1].get(self.layer, batch),
            )
        )

    @contextmanager
    def used_by(self, *layers: nn.Module) -> Iterator[None]:
        """Inside the block the attention of these layers listens to `recorders`."""
        held = [layer.get_submodule(self._attention) for layer in layers] if self.last else []
        for layer, attention in zip(layers, held, strict=False):
            recalling = _Recalling(attention, self.last.rpartition(".")[2], self.others)
            layer.set_submodule(self._attention, recalling)
        try:
            yield
        finally:
            for layer, attention in zip(layers, held, strict=False):
                layer.set_submodule(self._attention, attention)

    @property
    def _attention(self) -> str:
        return self.last.rpartition(".")[0]


class _Recalling(nn.Module):
    """Stands for an attention module and computes no more than its last product where that suffices."""

    def __init__(self, attention: nn.Module, last: str, others: int) -> None:
        super().__init__()
        self._others = (None,) * others
        self._held, self._last = (attention,), last  # a tuple: the parameters keep their names

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._held[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        current = recorder()
        if isinstance(current, Recalled) and current.attention is not None:
            last = self._held[0].get_submodule(self._last)
            out = last(current.attention.to(next(last.parameters()).device))
            return (out, *self._others) if self._others else out
        return self._held[0](*args, **kwargs)
