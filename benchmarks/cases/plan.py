"""Plans: measured sensitivities, tables, llama.cpp's types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.data import CALIB, DEMO, MIX, rows
from benchmarks.engine import Judge
from benchmarks.harness import Row, Rows, case
from benchmarks.llama import as_file, preset_types
from moequant.containers.gguf.presets import facts
from moequant.plan import Budget, Sensitivities, data_bytes, make_plan, prior_sensitivities
from moequant.plan.measure import Probing, measure
from moequant.rounding.diagonal import Quantizer
from moequant.rounding.results import decoded
from moequant.statistics.calibrate import calibrate
from moequant.text import corpus


@dataclass(frozen=True)
class Plans:
    """Of rows drawn at random `probes` are for the probes, `scored` judge, and the rest calibrate."""

    model: Path = MIX
    text: Path | None = CALIB
    tokens: int = 131_072
    scored: int = 48
    probes: int = 16
    presets: tuple[str, ...] = ("IQ2_XXS", "IQ2_M", "Q2_K", "IQ3_XXS", "Q3_K_M", "Q4_K_M", "Q5_K_M")


@case("Plans by measured sensitivities beside llama.cpp's types", Plans(DEMO, None, 2048, 2, 2, ("Q3_K_M",)))
def plan(o: Plans) -> Rows:
    """At llama.cpp's sizes: its types, plans from tables, from measured errors, and all measured. Every
    weight is rounded by the plain search, whoever chose its type; KL divergence in our engine. Predictions
    are those of the sensitivities that were all measured."""
    exported = as_file(o.model)
    checkpoint = exported.checkpoint
    every = rows(o.model, o.text)
    order = torch.randperm(len(every.ids), generator=torch.Generator().manual_seed(0))
    score, probe, rest = order.tensor_split([o.scored, o.scored + o.probes])
    calibration = calibrate(checkpoint, chosen(every, rest[: o.tokens // 512].sort().values))
    measured = measure(checkpoint, calibration, every.ids[probe], Probing())
    yield {"sensitivities": measured.source, "KL of a plan / x": measured.linear, "/ sqrt(x)": measured.root}
    judge, quantizer = Judge.of(checkpoint, every.ids[score]), Quantizer(calibration)
    by_name = {weight.name: weight for weight in checkpoint.weights}
    weights, known = checkpoint.weights, facts(exported)
    tables = prior_sensitivities(weights, checkpoint.n_layers)

    @cache
    def values(weight: str, type_: str) -> Tensor:
        return decoded(quantizer.pack(by_name[weight], type_)[0])

    def kl(types: Mapping[str, str]) -> float:
        return float(judge.kl(lambda weight: values(weight.name, types[weight.name])).mean())

    for preset in o.presets:
        types = preset_types(exported, preset)
        limit = data_bytes(weights, types)
        theirs = kl(types)
        row: Row = {"size of": preset, "bytes": limit}
        row |= {"llama.cpp's types": theirs, "predicted for them": predict(measured, types)}
        plans = {"tables": tables, "errors measured": with_sensitivity(measured, tables)}
        for name, sensitivities in (plans | {"all measured": measured}).items():
            made = make_plan(weights, Budget(preset, file_bytes=limit), known, sensitivities)
            types = {choice.weight: choice.format for choice in made.choices}
            row[name] = kl(types)
        yield row | {"predicted": predict(measured, types), "ratio": row["all measured"] / theirs}


def chosen(every: corpus.Rows, at: Tensor) -> corpus.Rows:
    """Some of the rows."""
    domains = tuple(every.domains[row] for row in at.tolist())
    return corpus.Rows(every.ids[at], domains, every.source, every.ids[at].numel())


def with_sensitivity(errors: Sensitivities, tables: Sensitivities) -> Sensitivities:
    """Relative errors as measured, sensitivities from tables."""
    table = {
        name: {
            fmt: kl / errors.per_error[name] * tables.per_error[name] if kl else 0.0
            for fmt, kl in row.items()
        }
        for name, row in errors.table.items()
    }
    return replace(tables, table=table)


def predict(sensitivities: Sensitivities, types: Mapping[str, str]) -> float:
    """The prediction for any plan; a type that is no candidate counts as the next larger one."""
    return sensitivities.predict(
        sum(row.get(types[name], min(row.values())) for name, row in sensitivities.table.items())
    )
