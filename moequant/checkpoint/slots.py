"""One slot of a family, filled with what a checkpoint stores for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from moequant.checkpoint.codecs import WHOLE, as_shipped, whole_numbers
from moequant.errors import CheckpointError
from moequant.families import Get, Slot
from moequant.values import ModelShape, Origin, Place, Role, Stack, Stored, Weight
from moequant.values.ops import shape_after

FLOATS = ("BF16", "F16", "F32")
"""Types that a stored tensor may decode to."""


def weight_of(
    slot: Slot, layer: int | None, shape: ModelShape, stored: Mapping[str, Stored]
) -> Weight | None:
    """What the checkpoint has for a slot; None for an optional one that is absent.

    CheckpointError for one that is missing, stored twice, or of another shape than the slot's.
    """
    where = slot.role.value if layer is None else f"layer {layer} {slot.role.value}"
    there = {way: names for way in slot.ways if (names := _there(way, shape.experts, stored))}
    # Where none has the rows that it should, the first says what is wrong.
    fit = [way for way, names in there.items() if way.rows in (None, *stored[names[0]].shape[-2:-1])]
    ways = {way: there[way] for way in fit or list(there)[:1]}
    if not ways:
        if slot.optional:
            return None
        name, asked = slot.ways[0].name, f", which config key {slot.asked} asks for" if slot.asked else ""
        raise CheckpointError(f"{where} is missing ({name}){asked}; is the download complete?")
    if len(ways) > 1:
        one, two = (names[0] for names in list(ways.values())[:2])
        raise CheckpointError(f"{where}: stored twice, as {one} and as {two}; remove one of them")
    ((way, names),) = ways.items()
    tensors = tuple(stored[name] for name in names)
    _check_tensors(where, way, tensors, shape.experts, WHOLE if slot.role is Role.TABLE else FLOATS)
    if slot.role is Role.TABLE:
        tensors = tuple(whole_numbers(each, shape.experts) for each in tensors)
    try:
        whole = _shape_of(slot, way, tensors, shape.experts)
    except ValueError as error:
        raise CheckpointError(f"{where}: {names[0]} is {list(tensors[0].shape)}; {error} do not go") from None
    holds = None if way.below else _holds(tensors)
    made = filled(slot, layer, shape, whole, Origin(tensors, way.ops, holds))
    return replace(made, names=_spelled(made.names, names[0], tensors[0].name))


def filled(
    slot: Slot, layer: int | None, model: ModelShape, shape: tuple[int, ...], origin: Origin
) -> Weight:
    """The weight of a slot, of that shape, with values from there."""
    return Weight(
        name=slot.name,
        role=slot.role,
        layer=layer,
        shape=shape,
        stack=slot.stack,
        origin=origin,
        place=Place(slot.param, slot.ops),
        site=slot.site,
        names=_release_names(slot, model.experts),
        adds=slot.adds,
    )


def _holds(tensors: tuple[Stored, ...]) -> str | None:
    """The ggml type that holds exactly what all of the tensors do."""
    kinds = {as_shipped(each) for each in tensors}
    return kinds.pop() if len(kinds) == 1 else None


def _there(way: Get, experts: int, stored: Mapping[str, Stored]) -> tuple[str, ...]:
    """The stored tensors of a way that are there, in the order of the experts."""
    if "{e}" not in way.name:
        wanted = (way.name, *way.below)
        return wanted if all(name in stored for name in wanted) else ()
    names = (way.name.replace("{e}", str(expert)) for expert in range(experts))
    return tuple(name for name in names if name in stored)


def _check_tensors(
    where: str, way: Get, tensors: tuple[Stored, ...], experts: int, kinds: tuple[str, ...]
) -> None:
    """CheckpointError for experts that are missing or unlike each other, and for types other than `kinds`."""
    for each in tensors:
        if each.dtype not in kinds:
            raise CheckpointError(
                f"tensor {each.name} is stored as {each.dtype}; expected "
                f"{', '.join(kinds)} (convert the checkpoint first)"
            )
    if "{e}" not in way.name:
        if len({(each.shape[1:], each.dtype) for each in tensors}) > 1:
            shown = ", ".join(f"{each.name} {list(each.shape)}" for each in tensors)
            raise CheckpointError(f"{where}: {shown} do not go below each other")
        return
    if len(tensors) < experts:
        there = {each.name for each in tensors}
        gone = [e for e in range(experts) if way.name.replace("{e}", str(e)) not in there]
        shown = ", ".join(map(str, gone[:10])) + (", …" if len(gone) > 10 else "")
        raise CheckpointError(f"{where}: experts [{shown}] of {experts} missing; is the download complete?")
    first = tensors[0]
    if odd := next((each for each in tensors if each.shape != first.shape), None):
        raise CheckpointError(
            f"{where}: {odd.name} is {list(odd.shape)}, expert 0 is {list(first.shape)}; are all files of "
            "one model? Download them again"
        )
    if odd := next((each for each in tensors if each.dtype != first.dtype), None):
        raise CheckpointError(
            f"{where}: {odd.name} is stored as {odd.dtype}, expert 0 as {first.dtype}; save all in one type, "
            "as transformers does: from_pretrained(…, dtype=…) and save_pretrained"
        )


def _shape_of(slot: Slot, way: Get, tensors: tuple[Stored, ...], experts: int) -> tuple[int, ...]:
    """The weight's shape; ValueError, with what does not go, when the stored ones are not what the slot
    says."""
    shape = tensors[0].shape
    if way.below:
        shape = (sum(each.shape[0] for each in tensors), *shape[1:])
    if slot.stack is not Stack.EXPERTS:
        return shape_after(way.ops, shape)
    if "{e}" in way.name:
        return (experts, *shape_after(way.ops, shape))
    if len(shape) == 2:
        return shape_after(way.ops, shape)
    if len(shape) != 3 or shape[0] != experts:
        raise ValueError(f"{experts} experts of config.json")
    return (experts, *shape_after(way.ops, shape[1:]))


def _spelled(names: tuple[str, ...], slots: str, files: str) -> tuple[str, ...]:
    """Names as the files spell them, of which one tensor is called `slots` by the family and `files` there:
    what stands in front of their common end differs."""
    ours, theirs = slots.split("."), files.split(".")
    while ours and theirs and ours[-1] == theirs[-1]:
        ours.pop()
        theirs.pop()
    begins = [name.split(".") for name in names]
    return tuple(
        ".".join([*theirs, *each[len(ours) :]]) if each[: len(ours)] == ours else ".".join(each)
        for each in begins
    )


def _release_names(slot: Slot, experts: int) -> tuple[str, ...]:
    """What checkpoints with a tensor of its own for every expert call the matrices of a slot."""
    name = slot.ways[0].name
    return tuple(name.replace("{e}", str(e)) for e in range(experts)) if "{e}" in name else (name,)
