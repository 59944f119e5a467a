"""What a unit of relative error in each kind of weight costs: the priors of `moequant.plan.sensitivity`."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from benchmarks.data import CALIB, DEMO, MIX, part, rows
from benchmarks.engine import Judge
from benchmarks.harness import Rows, case
from moequant.checkpoint import load, open_checkpoint
from moequant.forward.model import Provider
from moequant.rounding.diagonal import Quantizer
from moequant.rounding.results import decoded
from moequant.statistics.calibrate import calibrate
from moequant.values import Packed, Role


@dataclass(frozen=True)
class Sensitivity:
    """The first half of the text calibrates; `rows` rows behind it are scored."""

    model: Path = MIX
    text: Path | None = CALIB
    type: str = "Q3_K"
    others: tuple[str, ...] = (
        "Q2_K", "Q3_K", "IQ4_NL", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0",
    )  # fmt: skip
    rows: int = 40


@case("KL divergence per unit of relative error", Sensitivity(DEMO, None, others=("Q4_K",), rows=1))
def sensitivity(o: Sensitivity) -> Rows:
    """Every weight of a trained model is quantized alone, and the KL divergence in our engine divided by its
    relative squared error. Then means by role, and the relative errors of experts by format."""
    checkpoint, every = open_checkpoint(o.model), rows(o.model, o.text)
    half = len(every.ids) // 2
    quantizer = Quantizer(calibrate(checkpoint, part(every, 0, half)))
    judge = Judge.of(checkpoint, every.ids[half : half + o.rows])
    costs: dict[Role, list[float]] = defaultdict(list)
    errors: dict[str, list[float]] = defaultdict(list)
    for weight in checkpoint.weights:
        if weight.role.keeps_precision:
            continue
        packed, loss = quantizer.pack(weight, o.type)
        kl = float(judge.kl(only(packed)).mean())
        error = float(loss.error.mean())
        costs[weight.role].append(kl / error)
        place = {"layer": weight.layer, "role": str(weight.role)}
        yield place | {"relative error": error, "KL": kl, "KL per unit of error": kl / error}
        for name in o.others if weight.role.is_expert else ():
            errors[name].append(float(quantizer.pack(weight, name)[1].error.mean()))
    for role, found in costs.items():
        yield {"role": str(role), "mean KL per unit of error": fmean(found)}
    for name, found in errors.items():
        yield {"format": name, "relative error of expert weights": fmean(found)}


def only(packed: Packed) -> Provider:
    """One weight rounded, all others as they are."""
    values = decoded(packed)
    return lambda weight: values if weight.name == packed.weight.name else load(weight)
