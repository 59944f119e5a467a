"""How tokens are weighted in importance."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.data import CALIB, DEMO, MIX, rows
from benchmarks.engine import Judge, plain_search
from benchmarks.harness import Row, Rows, case
from benchmarks.llama import as_file, preset_types
from moequant.checkpoint import Checkpoint
from moequant.forward.resources import Resources
from moequant.forward.stream import LayerStream
from moequant.rounding.diagonal import Quantizer
from moequant.statistics.moments import Moments
from moequant.statistics.store import combine
from moequant.values import Calibration

POWERS = {"1": 0.0, "gate": 0.5, "gate²": 1.0}
"""What the router's weight is raised to before `Moments` squares it."""


@dataclass(frozen=True)
class Gating:
    """The first `rows` rows give importance, the `held_out` behind them judge."""

    model: Path = MIX
    text: Path | None = CALIB
    presets: tuple[str, ...] = ("IQ2_XXS", "Q2_K_S", "IQ2_M", "Q3_K_M", "IQ3_S", "Q4_K_M", "Q5_K_M")
    rows: int = 200
    held_out: int = 48


@case("How tokens are weighted in importance", Gating(DEMO, None, ("Q2_K_S",), 4, 2))
def gating(o: Gating) -> Rows:
    """Does a token count once for its experts, by the router's weight, or by its square: KL divergence in our
    engine at llama.cpp's own types, plain search. ± is paired by token."""
    exported, ids = as_file(o.model), rows(o.model, o.text).ids
    checkpoint = exported.checkpoint
    judge = Judge.of(checkpoint, ids[o.rows :][: o.held_out])
    found = {name: Quantizer(moments(checkpoint, ids[: o.rows], power)) for name, power in POWERS.items()}
    for preset in o.presets:
        types = preset_types(exported, preset)
        kl = {name: judge.kl(plain_search(each, types)).flatten() for name, each in found.items()}
        row: Row = {"types of": preset} | {name: float(each.mean()) for name, each in kl.items()}
        for name in ("gate", "gate²"):
            ratio, error = measure.ratio(kl[name], kl["1"])
            row |= {f"{name} / 1": ratio, f"± {name}": error}
        yield row


class Powered(Moments):
    """Moments with the router's weights raised to `power`."""

    power = 1.0

    def expert(self, name: str, expert: int, inputs: Tensor, gates: Tensor) -> None:
        super().expert(name, expert, inputs, gates**self.power)


def moments(checkpoint: Checkpoint, ids: Tensor, power: float) -> Calibration:
    """Statistics of all layers with that power."""
    layers: list[Calibration] = []
    with tempfile.TemporaryDirectory() as folder, LayerStream(checkpoint, ids, Resources()) as stream:

        def make(batch: int) -> Moments:
            domains = torch.zeros(stream.batches[batch].numel(), dtype=torch.int64)
            made = Powered(checkpoint.n_experts, domains, 1)
            made.power = power
            return made

        hidden = stream.new_hidden(Path(folder))
        stream.embed(hidden)
        for layer in stream.layers():
            layers.append(total(list(stream.cross(layer, hidden, make, hidden))))
        layers.append(total([told for told, _ in stream.finish(hidden, make)]))
    return replace(layers[0], inputs={name: each for part in layers for name, each in part.inputs.items()})


def total(found: list[Moments]) -> Calibration:
    """The sum of what several batches saw."""
    return combine([Calibration((), each.inputs, 0, len(each.domains), "text", ("text",)) for each in found])
