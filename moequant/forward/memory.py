"""What passes over a model need in memory at once, and how what may be used is shared out.

Budgets decide where numbers lie and how much is done at a time, never what comes out.
"""

from __future__ import annotations

from moequant.checkpoint import Checkpoint
from moequant.errors import CheckpointError
from moequant.progress import available_bytes

WORK = 1 << 30
"""The most that rounding works with beside what it rounds: more serves nothing on a CPU."""


def usable_bytes(ram: int | None) -> int | None:
    """What may be used, `ram` bytes or what the machine has free; None: nobody knows."""
    free = available_bytes()
    return min((each for each in (ram, free) if each is not None), default=None)


def resident_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of a whole model in float32, with room for what it computes and for a weight that is decoded."""
    return 5 * sum(weight.numel for weight in checkpoint.weights)


def rounding_work(ram: int | None) -> int:
    """Bytes for what is rounded together, and as many again to work with: an eighth of what may be used."""
    usable = usable_bytes(ram)
    return WORK if usable is None else min(WORK, usable // 8)


def check_memory(checkpoint: Checkpoint, models: int, available: int | None = None) -> None:
    """CheckpointError when the largest layer does not fit: said before any work is done.

    `models` is 0 when nothing runs, 1 for calibration, 2 for a comparison as well. `available`
    bytes are what the machine has free when None; hidden states are not counted, they may spill.
    """
    free = available_bytes() if available is None else available
    needed = working_bytes(checkpoint, models) if models else 0
    if free is not None and needed > free:
        raise CheckpointError(
            f"{checkpoint.path}: {needed / 1e9:.1f} GB of memory are needed for its largest layer or head, "
            f"{free / 1e9:.1f} GB are free; use a larger machine (--eval-tokens 0 may need less)"
        )


def working_bytes(checkpoint: Checkpoint, models: int) -> int:
    """Bytes of weights in memory at once while `models` versions of the checkpoint run layer by layer.

    Experts keep the checkpoint's precision, all else and whatever was decoded is float32; a
    weight is there twice while it is copied into its place.
    """
    layers: dict[int, int] = {}
    largest = 0
    for weight in checkpoint.weights:
        stored = 4 if weight.origin.dtype == "F32" else 2
        own = weight.numel * (stored if weight.is_expert else 4)
        once = own + (weight.numel * 4 if models > 1 else 0)
        if weight.layer is None:
            ends = (stored + 4 * models) * weight.numel if len(weight.shape) > 1 else 0
            largest = max(largest, ends)
        else:
            layers[weight.layer] = layers.get(weight.layer, 0) + once
    copied = max(weight.numel for weight in checkpoint.weights if weight.layer is not None)
    return max(largest, max(layers.values()) + copied * (4 if models > 1 else 2))
