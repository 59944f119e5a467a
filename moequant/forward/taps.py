"""Who is told what flows through a layer: the current recorder, one per thread.

A recorder sees the inputs of every weight while a batch crosses a layer. Every thread has
its own, so several batches can cross the same module at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

from moequant.values import Weight

NAME = "moequant_name"
"""Attribute of an experts module that holds its name in the model."""


class Recorder(Protocol):
    """What a layer's forward reports. Names are those of `Weight.input`; n tokens, m of them an expert's."""

    def dense(self, name: str, inputs: Tensor) -> None:
        """The inputs [..., in] of a weight that every token sees."""

    def routed(self, name: str, hidden: Tensor, index: Tensor, gates: Tensor) -> None:
        """The experts' common input [n, in] and the router's choice: index i64 [n, k], gates [n, k]."""

    def expert(self, name: str, expert: int, inputs: Tensor, gates: Tensor) -> None:
        """What one product of one expert is fed: inputs [m, in], the router's weights [m] for them."""


class Enough(Exception):
    """Raised by a recorder that has seen what it came for: the rest of the layer is not computed."""


class _Thread(threading.local):
    """Per thread and not per context: a forward pass that runs in a greenlet has a context of its own."""

    recorder: Recorder | None = None


_thread = _Thread()


def recorder() -> Recorder | None:
    """The recorder of the calling thread, if any."""
    return _thread.recorder


@contextmanager
def recording(to: Recorder | None) -> Iterator[None]:
    """Everything that flows in this thread inside the block is reported to `to`."""
    before, _thread.recorder = _thread.recorder, to
    try:
        yield
    finally:
        _thread.recorder = before


def watch(model: nn.Module, weights: tuple[Weight, ...]) -> None:
    """Make the model report every input name of `weights` to the current recorder.

    A name is a module (its input), `module:out` (its output), or `experts:up` and
    `experts:down` (what the two products of every expert are fed).
    """
    for name in sorted({weight.input for weight in weights if weight.input is not None}):
        module_name, _, side = name.partition(":")
        module = model.get_submodule(module_name)
        if side == "up":
            setattr(module, NAME, module_name)
        elif side == "out":
            module.register_forward_hook(_output_hook(name))
        elif not side:
            module.register_forward_pre_hook(_input_hook(name))


def _input_hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if (current := recorder()) is not None:
            current.dense(name, args[0])

    return hook


def _output_hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if (current := recorder()) is not None:
            current.dense(name, output)

    return hook
