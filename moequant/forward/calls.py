"""A model's own forward pass, stopped in front of every decoder layer.

Each batch runs the forward of the transformers model in a greenlet. Every decoder layer
is wrapped; the wrapper hands the call to the driver and goes on with a placeholder that
has the shape of hidden states and no memory. So the driver decides when a layer runs,
with which weights and on which hidden states, and no model code is written twice: masks,
position embeddings and per-layer arguments are those that the model itself makes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from moequant.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Call:
    """One batch in front of a layer: everything the model passes besides the hidden states, and what it
    gets back besides them (`beside`)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden: Tensor
    beside: tuple[Any, ...] = ()

    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """The layer's output for `hidden`. CheckpointError when it is not hidden states alone."""
        out = layer(hidden, *self.args, **self.kwargs)
        if self.beside and isinstance(out, tuple):
            out = out[0]
        if not isinstance(out, Tensor):
            raise CheckpointError(
                f"{type(layer).__name__} returns a {type(out).__name__}, hidden states were expected; "
                "this model cannot be streamed"
            )
        return out


Beside = Callable[[Tensor], tuple[Any, ...]]
"""What a layer gives besides the hidden states, by the hidden states that it is fed: known without running
it, or not needed."""


def alone(hidden: Tensor) -> tuple[()]:
    """Hidden states are all that a layer gives."""
    return ()


class _Paused(nn.Module):
    """Stands in the model for a decoder layer and hands its calls to the greenlet's parent."""

    def __init__(self, layer: nn.Module, beside: Beside) -> None:
        super().__init__()
        self._held = (layer,)  # a tuple: the parameters keep their names in the model
        self._beside = beside

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._held[0], name)  # models ask layers for their attention type

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        parent, beside = getcurrent().parent, self._beside(hidden)
        assert parent is not None
        back: Tensor = parent.switch(Call(args, kwargs, hidden, beside))
        return (back, *beside) if beside else back


class _Placeholder(nn.Module):
    """Stands in for the embedding once its output is known: right shape, no memory."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, ids: Tensor) -> Tensor:
        return _nothing((*ids.shape, self.width), ids.device)


class _Given(nn.Module):
    """Stands in for the decoder when its output is known."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, **arguments: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=self.hidden)


def _nothing(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Zeros of that shape that take no memory."""
    return torch.zeros((), device=device).expand(shape)


class Skeleton:
    """The forward passes of all batches, in lock step.

    `forward` is the model or its decoder; `layers_at` names its decoder layers; `batches` are i64 [rows, n]
    on the device where layers run; `beside` says what layers give besides hidden states. Use: `embed`, then
    per layer `calls` and `advance`, then `finish`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        forward: Callable[..., Any],
        layers_at: str,
        batches: list[Tensor],
        beside: Beside = alone,
    ) -> None:
        self.model, self.forward, self.batches = model, forward, batches
        # Collected by hooks while a layer runs, but here layers run outside of the model's forward.
        for collected in ("output_router_logits", "output_hidden_states", "output_attentions"):
            if getattr(model.config, collected, False):
                setattr(model.config, collected, False)
        holder = model.get_submodule(layers_at)
        assert isinstance(holder, nn.ModuleList)
        self.layers = list(holder)
        for index, layer in enumerate(self.layers):
            holder[index] = _Paused(layer, beside)
        self.calls: list[Call] = []
        self._passes: list[greenlet] = []

    def embed(self) -> Iterator[Tensor]:
        """What each batch feeds the first layer; needs the embedding's values."""
        for batch in self.batches:
            run = greenlet(self._start)
            call: Call = run.switch(batch)
            run.throw(GreenletExit)
            yield call.hidden

    def begin(self) -> None:
        """Take every batch to the first layer without values; the embedding may be released.

        Passes that were under way end here.
        """
        self.close()
        embedding = self.model.get_input_embeddings()
        self.model.set_input_embeddings(_Placeholder(embedding.embedding_dim))
        self._passes = [greenlet(self._start) for _ in self.batches]
        try:
            self._wait(run.switch(batch) for run, batch in zip(self._passes, self.batches, strict=True))
        finally:
            self.model.set_input_embeddings(embedding)

    def advance(self) -> None:
        """Take every batch to the next layer."""
        self._wait(run.switch(call.hidden) for run, call in zip(self._passes, self.calls, strict=True))

    def finish(self, batch: int, hidden: Tensor) -> Any:
        """The result of the forward pass of that batch, whose last layer gave `hidden`."""
        return self._passes[batch].switch(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's head, and whatever it does after it: final hidden states [m, h] -> [m, vocab]."""
        name = self.model.base_model_prefix
        decoder = getattr(self.model, name)
        setattr(self.model, name, _Given(hidden[None]))
        try:
            ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits[0]
        finally:
            setattr(self.model, name, decoder)
        return logits

    def close(self) -> None:
        """End passes that are still waiting."""
        for run in self._passes:
            if run:
                run.throw(GreenletExit)
        self._passes, self.calls = [], []

    def _wait(self, calls: Iterable[Call]) -> None:
        """Keep what the model passes, without states that it may have computed from a placeholder."""
        self.calls = [replace(call, hidden=_nothing(call.hidden.shape, call.hidden.device)) for call in calls]

    def _start(self, ids: Tensor) -> Any:
        return self.forward(input_ids=ids, use_cache=False)
