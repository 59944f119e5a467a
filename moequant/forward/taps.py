"""Who is told what flows through a layer: the current recorder, one per thread.

A recorder sees the inputs of every weight while a batch crosses a layer. Every thread has
its own, so several batches can cross the same module at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from moequant.values import Site
from moequant.values.ops import apply

SEEN = "moequant_sites"
"""Attribute of an experts module that holds its `Seen`."""


class Recorder:
    """What a layer's forward reports; by itself it keeps nothing.

    Names are those of `Site`; n tokens, m of them an expert's.
    """

    def dense(self, name: str, inputs: Tensor) -> None:
        """What a weight that every token sees is fed: [..., in]."""

    def heads(self, name: str, inputs: Tensor) -> None:
        """What each matrix of a stack of heads is fed, for every token: [..., heads, in]."""

    def routed(self, name: str, hidden: Tensor, index: Tensor, gates: Tensor) -> None:
        """The experts' common input [n, in] and the router's choice: index i64 [n, k], gates [n, k]. An index
        of E sends to none of the E experts, with weight 0."""

    def expert(self, name: str, expert: int, inputs: Tensor, gates: Tensor) -> None:
        """What one product of one expert is fed: inputs [m, in], the router's weights [m] for them."""


class Enough(Exception):
    """Raised by a recorder that has seen what it came for: the rest of the layer is not computed."""


@dataclass(frozen=True, slots=True)
class Seen:
    """The sites of a module of experts: before its first product, and before its second."""

    before: str
    inner: str


class _Thread(threading.local):
    """Several batches cross the same module at once, each in a thread of its own."""

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


def watch(model: nn.Module, sites: Iterable[Site]) -> None:
    """Make the model report every one of `sites` to the current recorder."""
    experts: dict[str, dict[str, str]] = {}
    for site in sites:
        module = model.get_submodule(site.module)
        if site.side == "output":
            module.register_forward_hook(_output_hook(site))
        elif site.side == "input":
            module.register_forward_pre_hook(_input_hook(site))
        else:
            experts.setdefault(site.module, {})[site.side] = site.name
    for name, sides in experts.items():
        setattr(model.get_submodule(name), SEEN, Seen(sides["experts"], sides["inner"]))


def _tell(site: Site, values: Tensor) -> None:
    if (current := recorder()) is not None:
        (current.heads if site.heads else current.dense)(site.name, apply(site.ops, values))


def _input_hook(site: Site) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        _tell(site, args[0])

    return hook


def _output_hook(site: Site) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        _tell(site, output)

    return hook
