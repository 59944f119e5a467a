"""What passes over a model need in memory at once, and how what may be used is shared out.

Budgets decide where numbers lie and how much is done at a time, never what comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moequant.checkpoint import Checkpoint
from moequant.errors import ShortageError
from moequant.progress import available_bytes
from moequant.values import Weight


@dataclass(frozen=True, slots=True)
class Versions:
    """How many versions of a layer's weights are in memory together (`layer_bytes`; 0: layers are there as
    wholes, whatever they take), and how many sets of hidden states cross it."""

    weights: int = 1
    states: int = 1


ONE = Versions()
WHOLE = Versions(weights=0)

WORK = 1 << 30
"""The most that rounding works with beside what it rounds: more serves nothing on a CPU."""


LOOKED_UP = 1 << 28
"""Numbers of a table that a pass over the usual count of tokens looks up, at most."""


def free_bytes(device: str = "cpu") -> int | None:
    """What the device has free; None: nobody knows."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_bytes()


def usable_bytes(ram: int | None, device: str = "cpu") -> int | None:
    """What may be used, `ram` bytes or what the device has free; None: nobody knows."""
    free = free_bytes(device)
    return min((each for each in (ram, free) if each is not None), default=None)


def resident_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of a whole model in float32, with room for what it computes and for a weight that is decoded."""
    return 5 * sum(weight.numel for weight in checkpoint.weights)


def rounding_work(ram: int | None) -> int:
    """Bytes for what is rounded together, and as many again to work with: an eighth of what may be used."""
    usable = usable_bytes(ram)
    return WORK if usable is None else min(WORK, usable // 8)


def chunks(weights: Sequence[Weight], models: int, usable: int | None) -> tuple[range, ...]:
    """How many experts of a layer with these weights are in memory at a time; () where the layer is as a
    whole.

    Weights may take half of the `usable` bytes, the other half is for hidden states; the experts of a layer
    that takes more come some at a time, in a quarter. `models` as in `layer_bytes`.
    """
    experts = _routed(weights)
    if usable is None or not models or not experts or layer_bytes(weights, models) <= usable // 2:
        return ()
    count = experts[0].matrices
    step = max(1, usable // 4 // max(1, _expert_bytes(experts, models)))
    return tuple(range(at, min(at + step, count)) for at in range(0, count, step))


def check_memory(checkpoint: Checkpoint, models: int, available: int | None = None) -> None:
    """ShortageError when the least that a pass needs does not fit: said before any work is done.

    `models` is 0 when nothing runs, 1 for calibration, 2 for a comparison as well. `available`
    bytes are what the machine has free when None; hidden states are not counted, they may spill.
    """
    free = available_bytes() if available is None else available
    needed = working_bytes(checkpoint, models) if models else 0
    if free is not None and needed > free:
        raise ShortageError(
            f"{checkpoint.path}: {needed / 1e9:.1f} GB of memory are needed for its largest layer, without "
            f"its routed experts, or its head, {free / 1e9:.1f} GB are free; use a larger machine "
            "(--eval-tokens 0 may need less)"
        )


def working_bytes(checkpoint: Checkpoint, models: int, usable: int | None = 0) -> int:
    """Bytes of weights in memory at once while `models` versions of the checkpoint run layer by layer, where
    so many are usable; by default the least, with experts one by one."""
    layers: dict[int, list[Weight]] = {}
    largest = 0
    for weight in checkpoint.weights:
        if weight.layer is None:
            ends = (_stored(weight) + 4 * models) * weight.numel if len(weight.shape) > 1 else 0
            largest = max(largest, ends)
        else:
            layers.setdefault(weight.layer, []).append(weight)
    return max(largest, *(_working(weights, models, usable) for weights in layers.values()))


def layer_bytes(weights: Sequence[Weight], models: int) -> int:
    """Bytes of a layer with these weights, as a whole, in `models` versions.

    Experts keep the checkpoint's precision, all else and whatever was decoded is float32; a
    weight is there twice while it is copied into its place.
    """
    experts = sum(_bytes(weight, models) for weight in weights if weight.is_expert)
    others = sum(_bytes(weight, models) for weight in weights if not weight.is_expert)
    copied = max((held_numbers(weight) for weight in weights), default=0)
    return experts + others + copied * (4 if models > 1 else 2)


def _working(weights: Sequence[Weight], models: int, usable: int | None) -> int:
    """Bytes of what is in memory of a layer."""
    some = chunks(weights, models, usable)
    if not some:
        return layer_bytes(weights, models)
    others = [weight for weight in weights if not weight.is_expert]
    return layer_bytes(others, models) + len(some[0]) * _expert_bytes(_routed(weights), models)


def _routed(weights: Sequence[Weight]) -> list[Weight]:
    """The routed experts that the model runs, of one module."""
    found = [weight for weight in weights if weight.is_expert and weight.runs]
    modules = {weight.place.param.rpartition(".")[0] for weight in found}
    return found if len(modules) == 1 else []


def _expert_bytes(experts: Sequence[Weight], models: int) -> int:
    """Bytes of one expert; each of its matrices is there twice while it is copied into its place."""
    own = sum(_bytes(weight, models) for weight in experts)
    copied = max(weight.numel for weight in experts) * (4 if models > 1 else 2)
    return (own + copied) // experts[0].matrices


def _bytes(weight: Weight, models: int) -> int:
    """Bytes of a weight in so many versions: the first as it is kept, the others decoded."""
    return held_numbers(weight) * ((_stored(weight) if weight.is_expert else 4) + (4 if models > 1 else 0))


def held_numbers(weight: Weight) -> int:
    """How many numbers of a weight are in memory while it is used: of a table the rows that are looked up."""
    return min(weight.numel, LOOKED_UP) if weight.is_table else weight.numel


def _stored(weight: Weight) -> int:
    """Bytes of a number of the weight in the checkpoint's precision."""
    return 4 if weight.origin.dtype == "F32" else 2
