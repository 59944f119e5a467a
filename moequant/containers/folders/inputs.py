"""Numbers that scale what weights are fed, for schemes that round it: from the largest that calibration saw.

NVFP4 rounds 16 inputs under an e4m3 scale, and one number of the module says where those scales lie: the
largest input just reaches the largest scale (compressed-tensors' static_minmax). FP8 rounds inputs under that
number alone. Each expert has the number of its own inputs. The largest of few tokens says little about the
next, so it is moved towards the largest that any expert of the layer saw. A number for too large inputs costs
next to nothing, because scales and FP8 are floats; one for too small ones cuts inputs off.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moequant.checkpoint import Checkpoint
from moequant.containers.folders.plan import KEPT
from moequant.containers.folders.schemes import Kind, find
from moequant.errors import PlanError
from moequant.formats.float8 import TOP
from moequant.formats.nvfp4 import REACH
from moequant.values import Calibration, InputStats, Plan, Weight

PRIOR_TOKENS = 32.0
"""An expert that saw so many tokens counts its own largest input as much as the layer's."""

NAMED = 5
"""Experts that a note names, at most."""


def scales(plan: Plan) -> bool:
    """Whether a scheme of the plan scales inputs."""
    return any(find(name).scales_inputs for name in {c.format for c in plan.choices} - {*KEPT})


def rounds(plan: Plan) -> bool:
    """Whether a scheme of the plan has vLLM round what weights are fed."""
    return any(find(name).rounds_inputs for name in {c.format for c in plan.choices} - {*KEPT})


def elsewhere(plan: Plan, layout: str) -> str | None:
    """Where vLLM rounds inputs that a folder's scheme leaves as they are, None where it does not.

    Of MXFP4 it takes no notice of the scheme (`CompressedTensorsW4A4Mxfp4MoEMethod` of 0.32, read); gpt-oss's
    own layout is another matter.
    """
    used = {find(name).kind for name in {c.format for c in plan.choices} - {*KEPT}}
    if layout != "compressed-tensors" or "MXFP4" not in used:
        return None
    return (
        "on compute capability 10.x and 11.x vLLM rounds the inputs of MXFP4 weights to MXFP4 as well; "
        "NVFP4A16 leaves them as they are"
    )


def input_scales(checkpoint: Checkpoint, plan: Plan, calibration: Calibration | None) -> dict[str, Tensor]:
    """By weight whose scheme scales inputs: f32 [E], a number a matrix: what divides (`storage.INPUT`), or
    multiplies (`storage.INPUT_FP8`).

    PlanError where calibration did not measure the largest inputs.
    """
    found = dict[str, Tensor]()
    for weight, kind in _scaled(checkpoint, plan):
        peak = expected_peak(_stats(weight, calibration))
        found[weight.name] = (REACH / peak if kind == "NVFP4" else peak / TOP).float()
    return found


def check(calibration: Calibration | None) -> None:
    """PlanError unless calibration measured the largest inputs: an imatrix and old statistics did not."""
    if calibration is None or any(stats.peak is None for stats in calibration.inputs.values()):
        of = "there are no statistics" if calibration is None else f"{calibration.source} does not say it"
        raise PlanError(
            f"NVFP4 and FP8 scale inputs by the largest that calibration saw, and {of}; leave out --stats "
            "and --imatrix, run route again, or take NVFP4A16 or FP8_DYNAMIC, which need no such number"
        )


def expected_peak(stats: InputStats) -> Tensor:
    """The largest input that each matrix is expected to meet, f64 [E] above 0; `stats.peak` is there."""
    assert stats.peak is not None
    most, tokens = stats.peak.max(), stats.tokens.double()
    shrunk = (tokens * stats.peak + PRIOR_TOKENS * most) / (tokens + PRIOR_TOKENS)
    return torch.where(shrunk > 0, shrunk, 1.0)


def note(checkpoint: Checkpoint, plan: Plan, calibration: Calibration | None) -> str | None:
    """Which experts have a number that is not of their own inputs, because they were fed none."""
    unseen = [
        f"{weight.name} {expert}"
        for weight, _ in _scaled(checkpoint, plan)
        for expert in (_stats(weight, calibration).tokens == 0).nonzero().flatten().tolist()
    ]
    if not unseen:
        return None
    more = f" and {len(unseen) - NAMED} more" if len(unseen) > NAMED else ""
    return f"inputs never seen, scaled by the layer's largest: {', '.join(unseen[:NAMED])}{more}"


def _scaled(checkpoint: Checkpoint, plan: Plan) -> Iterator[tuple[Weight, Kind]]:
    formats = {choice.weight: choice.format for choice in plan.choices}
    for weight in checkpoint.weights:
        name = formats[weight.name]
        if name not in KEPT and (scheme := find(name)).scales_inputs:
            yield weight, scheme.kind


def _stats(weight: Weight, calibration: Calibration | None) -> InputStats:
    check(calibration)
    assert calibration is not None and weight.site is not None
    return calibration.inputs[weight.site.name]
