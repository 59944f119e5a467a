"""A model's own forward pass, cut at its decoder layers.

One dry pass of each batch runs the forward of the transformers model with stand-ins for the embedding and
the layers: they compute nothing, and keep what the model passes to each layer besides the hidden states.
So the driver decides when a layer runs, with which weights and on which hidden states, and no model code is
written twice: masks, position embeddings and per-layer arguments are those that the model itself makes.
What a model computes from hidden states between its layers is not seen; no family of the tables does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import MoeModelOutputWithPast

from moequant.checkpoint import Checkpoint
from moequant.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Call:
    """One batch in front of a layer: everything the model passes besides the hidden states, and what it gets
    back besides them (`beside`)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
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


def beside(checkpoint: Checkpoint, tokens: int) -> Beside:
    """What the layers give besides hidden states, for rows of so many tokens.

    Layers that give which tokens to look at give all of them, in short rows, in whatever version of the
    weights. CheckpointError for rows in which they would have to choose.
    """
    if checkpoint.family.chosen is None:
        return alone
    most = checkpoint.family.chosen(checkpoint.config)
    if tokens > most:
        raise CheckpointError(
            f"{checkpoint.family.name}: layers look at {most} tokens that an earlier layer chose; rows of "
            f"{tokens} tokens cannot be streamed, only up to {most}"
        )

    def every_token(hidden: Tensor) -> tuple[Tensor]:
        numbers = torch.arange(tokens, dtype=torch.int32, device=hidden.device)
        return (numbers.expand(*hidden.shape[:2], tokens),)

    return every_token


class _Reached(Exception):
    """Ends a forward pass in front of a layer."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _StandIn(nn.Module):
    """Stands in the model for a decoder layer: `told` gets its number and its call, and gives its output."""

    def __init__(
        self, number: int, layer: nn.Module, beside: Beside, told: Callable[[int, Tensor, Call], Tensor]
    ) -> None:
        super().__init__()
        self._number, self._held = number, (layer,)  # a tuple: parameters keep their names
        self._beside, self._told = beside, told

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._held[0], name)  # models ask layers for their attention type

    def __setattr__(self, name: str, value: Any) -> None:
        held = self.__dict__.get("_held")  # what is the layer's own goes there
        to = held[0] if held and (name in held[0]._parameters or name in held[0]._buffers) else super()
        to.__setattr__(name, value)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        beside = self._beside(hidden)
        out = self._told(self._number, hidden, Call(args, kwargs, beside))
        return (out, *beside) if beside else out


class _Placeholder(nn.Module):
    """Stands in for the embedding once its output is known: right shape, no memory."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__()
        self.width = width
        self.weight = torch.empty(0, device=device)  # models ask it where their tokens should be

    def forward(self, ids: Tensor) -> Tensor:
        return _nothing((*ids.shape, self.width), ids.device)


class _Output(MoeModelOutputWithPast):  # type: ignore[misc]  # transformers is Any to mypy
    """What a decoder gives; of what some give besides, nothing."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _Given(nn.Module):
    """Stands in for the decoder when its output is known."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, **arguments: Any) -> MoeModelOutputWithPast:
        return _Output(last_hidden_state=self.hidden)


def _nothing(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Zeros of that shape that take no memory."""
    return torch.zeros((), device=device).expand(shape)


class Skeleton:
    """The forward passes of all batches, cut at the layers.

    `forward` is the model or its decoder; `layers_at` names its decoder layers; `batches` are i64 [rows, n]
    on the device where layers run; `beside` says what layers give besides hidden states. `layers` are the
    model's own, which the driver runs.
    """

    def __init__(
        self,
        model: transformers.PreTrainedModel,
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
        self._decoder = layers_at.rpartition(".")[0]
        holder = model.get_submodule(layers_at)
        assert isinstance(holder, nn.ModuleList)
        self.layers = list(holder)
        for index, layer in enumerate(self.layers):
            holder[index] = _StandIn(index, layer, beside, lambda *told: self._told(*told))
        self._told: Callable[[int, Tensor, Call], Tensor] = _nobody
        self._calls = [self._dry(batch) for batch in batches]

    def embed(self) -> Iterator[Tensor]:
        """What each batch feeds the first layer; needs the embedding's values."""

        def reached(number: int, hidden: Tensor, call: Call) -> Tensor:
            raise _Reached(hidden)

        for batch in self.batches:
            with self._telling(reached):
                try:
                    self._run(batch)
                except _Reached as found:
                    yield found.hidden

    def call(self, layer: int, batch: int) -> Call:
        """What the model passes to a layer for that batch."""
        return self._calls[batch][layer]

    def finish(self, batch: int, hidden: Tensor, **asked: Any) -> Any:
        """The result of the forward pass of that batch, whose last layer gave `hidden`; `asked` are more
        arguments of the model's forward."""

        def told(number: int, before: Tensor, call: Call) -> Tensor:
            return hidden if number == len(self.layers) - 1 else before

        with self._telling(told), self._without_embedding():
            return self._run(self.batches[batch], **asked)

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's head, and whatever it does after it: final hidden states [m, h] -> [m, vocab]."""
        decoder = self.model.get_submodule(self._decoder)
        self.model.set_submodule(self._decoder, _Given(hidden[None]))
        try:
            ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits[0]
        finally:
            self.model.set_submodule(self._decoder, decoder)
        return logits

    def _dry(self, batch: Tensor) -> list[Call]:
        calls: list[Call] = []

        def told(number: int, hidden: Tensor, call: Call) -> Tensor:
            calls.append(call)
            if number == len(self.layers) - 1:  # what comes behind needs weights
                raise _Reached(hidden)
            return hidden

        with (
            torch.inference_mode(),
            self._telling(told),
            self._without_embedding(),
            suppress(_Reached),
        ):
            self._run(batch)
        return calls

    def _run(self, ids: Tensor, **asked: Any) -> Any:
        return self.forward(input_ids=ids, use_cache=False, **asked)

    @contextmanager
    def _telling(self, told: Callable[[int, Tensor, Call], Tensor]) -> Iterator[None]:
        before, self._told = self._told, told
        try:
            yield
        finally:
            self._told = before

    @contextmanager
    def _without_embedding(self) -> Iterator[None]:
        """Inside the block no weights of the embedding are needed."""
        embedding = self.model.get_input_embeddings()
        self.model.set_input_embeddings(_Placeholder(embedding.embedding_dim, self.batches[0].device))
        try:
            yield
        finally:
            self.model.set_input_embeddings(embedding)


def _nobody(number: int, hidden: Tensor, call: Call) -> Tensor:
    raise AssertionError("a layer was called outside of a pass")
