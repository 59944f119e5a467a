"""Compiled inner loops, and how many weights they see at a time.

`@kernel` marks a function of tensors that takes most of an encoder's time. torch.compile
compiles it for the sizes it meets, when its first tensor holds at least a tile's worth of
weights. The engine cuts large tensors into whole tiles, always as many at once, and small ones
into smaller pieces, so that small tensors run eagerly and never wait for a compiler. Inductor
keeps what it compiled on disk (in its cache folder, `TORCHINDUCTOR_CACHE_DIR`), for the next
process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, update_wrapper
from typing import Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

# Weights in a tile, by device: on a CPU a tile and its weights stay in the second-level cache.
TILE = {"cpu": 1 << 18, "cuda": 1 << 24}


VARIANTS = 64
"""Compiled versions of one kernel, at most: one for every format that shares it, and a few over."""


def tile(device: str) -> int:
    """Weights in a tile on a device of that type; on those that nothing is compiled for as on a GPU."""
    return TILE.get(device, TILE["cuda"])


_OPTIONS: dict[str, str | int | bool | Callable[..., object]] = {
    "emulate_precision_casts": True,  # or a scale rounded to f16 and back would stay unrounded
}
_CPU_OPTIONS = _OPTIONS | {
    "cpp.threads": 1,  # the engine's threads each take their own tile
    "cpp_wrapper": True,  # the one mode in which a kernel runs without the interpreter's lock
    "cpp.enable_floating_point_contract_flag": "fast",
    # Codes that several sums read are cheaper to compute again in registers than to store.
    "realize_reads_threshold": 16,
}


class Kernel(Generic[P, R]):
    """A function that runs compiled on whole tiles and eagerly on anything less."""

    def __init__(self, function: Callable[P, R]) -> None:
        self.function = self.eager = function
        update_wrapper(self, function)

    def uncompiled(self, function: Callable[P, R]) -> Callable[P, R]:
        """Run this eagerly instead: it gives the same numbers, bit for bit, in fewer and larger calls."""
        self.eager = function
        return function

    @cached_property
    def _cpu(self) -> Callable[P, R]:
        return torch.compile(self.function, dynamic=False, options=_CPU_OPTIONS)

    @cached_property
    def _cuda(self) -> Callable[P, R]:
        return torch.compile(self.function, dynamic=False, options=_OPTIONS)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        tensor = next(a for a in args if isinstance(a, Tensor))
        device = tensor.device.type
        if device not in TILE or tensor.numel() < TILE[device]:
            return self.eager(*args, **kwargs)
        run = self._cpu if device == "cpu" else self._cuda
        return run(*args, **kwargs)


@contextmanager
def as_compiled() -> Iterator[None]:
    """The state of this thread in which kernels are compiled: torch compiles anew for any other.

    That is one thread of torch's own, and gradients, without which tensors are of another kind (`plain`).
    Inside, as many versions of a kernel are kept as `VARIANTS`: past 8, torch's usual limit, it would warn.
    """
    from torch._dynamo import config  # slow to import, and needed by large tensors only

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # Torch's limit is a thread's own. It counts what was compiled for all threads, and now and then torch
        # compiles anew what it has.
        with torch.inference_mode(False), torch.enable_grad(), config.patch(recompile_limit=VARIANTS):
            yield
    finally:
        torch.set_num_threads(threads)


def plain(tensor: Tensor) -> Tensor:
    """The tensor, one of inference mode as a copy: of the kind that kernels are compiled for."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def kernel(function: Callable[P, R]) -> Kernel[P, R]:
    """Compile `function` for whole tiles; its first tensor argument tells the size."""
    return Kernel(function)
