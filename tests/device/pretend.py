"""A device in the CPU's memory that mixes with the CPU no more than a GPU does.

It is torch's own PrivateUse1 device under another name. A tensor on it is a wrapper: torch sees its device,
its numbers are in a CPU tensor that only `_run` touches. So whatever forgets `.to(device)`, or reads a tensor
of a device as if it were the CPU's, fails here as it would on CUDA, with the CPU's results everywhere else.
It says as well where the CPU waits for the device (`waits`), which costs nothing here and much on CUDA.
What it cannot find: most kernels that CUDA lacks, and order: everything here happens at once.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"

_aten = torch.ops.aten

CROSSING = {_aten.copy_.default, _aten._to_copy.default, _aten._copy_from.default}
"""What moves numbers from one device to another."""

INDEXED = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default}
"""What takes indices of the CPU for a tensor of any device, as on CUDA."""

SCALARS = INDEXED | {
    _aten.masked_fill.Tensor,
    _aten.masked_fill_.Tensor,
    _aten.fill.Tensor,
    _aten.fill_.Tensor,
}
"""What takes single numbers of the CPU, beside all that works on number by number."""

PRODUCTS = {_aten.mm.default, _aten.bmm.default, _aten.addmm.default, _aten.baddbmm.default, _aten.mv.default}
"""What CUDA has for floats alone."""

WAITS = {
    _aten._local_scalar_dense.default,
    _aten._linalg_check_errors.default,
    _aten.bincount.default,
    _aten.equal.default,
    _aten.masked_select.default,
    _aten.nonzero.default,
    _aten.repeat_interleave.Tensor,
    _aten._unique2.default,
}
"""What the CPU waits for on CUDA, beside what moves numbers and masks as indices."""

WHOLE = {_aten.scaled_dot_product_attention.default}
"""What torch makes of other operations, by the device: here it is the CPU's kernel, for the CPU's results."""

FACTORIES = (
    _aten.empty.memory_format,
    _aten.empty_strided.default,
    # torch makes these of an empty tensor that it resizes, which a wrapper cannot follow.
    _aten.arange.default,
    _aten.arange.start,
    _aten.arange.start_step,
    _aten.eye.default,
    _aten.eye.m,
    _aten.linspace.default,
    _aten.tril_indices.default,
    _aten.triu_indices.default,
)
"""What makes tensors of nothing; torch makes all others of these."""


class Mixed(RuntimeError):
    """Tensors of two devices met."""


class Pretend(Tensor):
    """A tensor on the device."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> Pretend:
        made: Pretend = Tensor._make_wrapper_subclass(
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device(NAME, 0),
        )
        made.raw = raw
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        """torch gives no lists of subclasses, but those of a device."""
        _waited("tolist")
        return self.raw.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        """The memory, which tells views from copies."""
        return self.raw.untyped_storage()

    def __repr__(self, **options: Any) -> str:
        return f"Pretend({self.raw!r})"


@cache
def register() -> str:
    """Make the device known to torch, for the life of the process; returns its name."""
    _setup_privateuseone_for_python_backend(NAME)
    library = torch.library.Library("aten", "IMPL")
    for op in FACTORIES:
        library.impl(op, _factory(op), "PrivateUse1")
    library.impl(_aten._copy_from.default, _copy_from, "PrivateUse1")
    _registered.append(library)  # it lasts as long as this object
    return NAME


_registered: list[torch.library.Library] = []


def _factory(op: Any) -> Any:
    def make(*args: Any, device: object = None, pin_memory: object = None, **kwargs: Any) -> Pretend:
        return Pretend(op(*args, device="cpu", **kwargs))

    return make


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _waited("copy")
    _raw(target).copy_(_raw(source))
    return target


@cache
def _made_of_others(func: Any) -> bool:
    """Whether torch makes the operation of others, which in inference mode it leaves to us."""
    implicit = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    return implicit and func not in WHOLE


def _raw(value: Any) -> Any:
    """The same of the CPU."""
    if isinstance(value, Pretend):
        return value.raw
    if isinstance(value, list | tuple):
        return [_raw(each) for each in value]
    if isinstance(value, torch.device) and value.type == NAME:
        return torch.device("cpu")
    return value


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Those among the arguments of an operation."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [each for each in value if isinstance(each, Tensor)]
    return found


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operation on CPU tensors, its results on the device that torch would put them on."""
    if _made_of_others(func):
        return func.decompose(*args, **kwargs)
    tensors = _tensors((*args, *kwargs.values()))
    indices = _tensors(args[1]) if func in INDEXED and isinstance(args[0], Pretend) else []
    _check(func, [each for each in tensors if not any(each is index for index in indices)], args, kwargs)
    _wait(func, args, kwargs, indices)
    asked = kwargs.get("device")
    here = any(isinstance(each, Pretend) for each in tensors) if asked is None else asked.type == NAME
    out = func(*_raw(args), **{name: _raw(value) for name, value in kwargs.items()})
    given = {id(_raw(each)): each for each in tensors}
    inside = torch.is_inference_mode_enabled()
    # A view of what was made outside of inference mode is none of its tensors.
    outside = inside and func.is_view and not tensors[0].is_inference()

    def wrap(made: Any) -> Any:
        if not isinstance(made, Tensor):
            return made
        found = given.get(id(made))
        if found is not None:
            assert found.shape == made.shape, f"{func} changed a shape in place"
            return found
        if not here:
            return made
        if not outside:
            return Pretend(made)
        with torch.inference_mode(False):
            return Pretend(made)

    return type(out)(wrap(each) for each in out) if isinstance(out, list | tuple) else wrap(out)


def _check(func: Any, tensors: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Mixed, where CUDA would refuse; single numbers of the CPU may meet tensors of any device."""
    ours = [each for each in tensors if isinstance(each, Pretend)]
    theirs = [each for each in tensors if not isinstance(each, Pretend)]
    if torch.Tag.pointwise in func.tags or func in SCALARS:
        written = _written(func, args, kwargs) if theirs else []
        theirs = [each for each in theirs if each.dim() or any(each is one for one in written)]
    if theirs and ours and func not in CROSSING:
        shapes = ", ".join(f"{each.device}{list(each.shape)}" for each in (*ours, *theirs))
        raise Mixed(f"{func}: expected all tensors to be on the same device, found {shapes}")
    if ours and isinstance(kwargs.get("generator"), torch.Generator):
        raise Mixed(f"{func}: expected a generator of the same device")
    if ours and func in PRODUCTS and not ours[0].is_floating_point():
        raise Mixed(f"{func}: not there for {ours[0].dtype}")


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """What the operation writes to."""
    named = dict(zip((each.name for each in func._schema.arguments), args, strict=False)) | kwargs
    writes = (
        each for each in func._schema.arguments if each.alias_info is not None and each.alias_info.is_write
    )
    return [named[each.name] for each in writes if each.name in named]


@contextmanager
def waits() -> Iterator[Counter[tuple[str, str]]]:
    """Inside the block, how often the CPU waits for the device: by (file:line function, operation), the line
    being the innermost of the package."""
    found = Counter[tuple[str, str]]()
    _counting.append(found)
    try:
        yield found
    finally:
        _counting.remove(found)


_counting: list[Counter[tuple[str, str]]] = []
_PACKAGE = str(Path(__file__).parents[2] / "moequant") + "/"


def _wait(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], indices: list[Tensor]) -> None:
    """Note what the CPU waits for."""
    if not _counting:
        return
    if func in WAITS:
        _waited(func.overloadpacket.__name__)
    elif func is _aten._to_copy.default and "device" in kwargs and kwargs["device"] != args[0].device:
        _waited("copy")
    elif func is _aten.copy_.default and args[0].device != args[1].device:
        _waited("copy")
    elif any(index.dtype is torch.bool or not isinstance(index, Pretend) for index in indices):
        _waited("index")


def _waited(what: str) -> None:
    if not _counting:
        return
    frame: Any = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    at = "elsewhere"
    if frame is not None:
        at = f"{frame.f_code.co_filename.removeprefix(_PACKAGE)}:{frame.f_lineno} {frame.f_code.co_name}"
    for each in _counting:
        each[at, what] += 1
