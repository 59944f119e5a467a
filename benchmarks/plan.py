"""Plans from measured damage beside plans from tables and llama.cpp's own types, at llama.cpp's sizes.

    python benchmarks/plan.py MODEL --text TEXT

Rows are drawn at random from the whole text: some are for the probes, `--score-rows` others
for the KL divergence to the unquantized model, in our own engine; the rest calibrate. Every
weight is rounded by the plain search, whoever chose its type, so that only the choice of
types differs. Predictions are those of the damages that were all measured.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from moequant import formats
from moequant.checkpoint import Checkpoint, load, open_checkpoint, uninterleave
from moequant.commands.convert import facts
from moequant.containers.gguf.presets import llama_cpp_types
from moequant.evaluate import score_row
from moequant.forward.experts import EXPERTS
from moequant.forward.model import build_model
from moequant.plan import Budget, Damages, data_bytes, make_plan, prior_damages
from moequant.plan.sensitivity import Probing, measure
from moequant.statistics.calibrate import calibrate
from moequant.statistics.importance import importance
from moequant.text import corpus
from moequant.text.rows import load_encoder
from moequant.values import Calibration

PROBE_ROWS = 16


class Scorer:
    """The model with any types: mean KL divergence to itself unquantized. Decoded weights are kept."""

    def __init__(self, checkpoint: Checkpoint, calibration: Calibration, ids: Tensor) -> None:
        self.checkpoint, self.calibration, self.ids = checkpoint, calibration, ids
        self.model = build_model(checkpoint, EXPERTS)
        self.params = dict(self.model.named_parameters(remove_duplicate=False))
        self.decoded: dict[tuple[str, str], Tensor] = {}
        self.base = self._logits()

    def kl(self, types: Mapping[str, str]) -> float:
        for weight in self.checkpoint.weights:
            name = types[weight.name]
            key = (weight.name, name)
            if key not in self.decoded:
                values, columns = load(weight), None
                if weight.input is not None:
                    columns = importance(self.calibration.inputs[weight.input])
                    columns = columns[0] if values.ndim < 3 else columns
                matrix = values if values.ndim > 1 else values[None]
                made = formats.dequantize(name, formats.quantize(name, matrix, columns)).view(values.shape)
                self.decoded[key] = uninterleave(made, weight.rope_heads) if weight.rope_heads else made
            target = self.params[weight.param]
            if len(weight.shape) > 1:
                target = target[..., slice(*weight.param_rows), :]
            with torch.no_grad():
                target.copy_(self.decoded[key])
        rows = zip(self.base, self._logits(), self.ids, strict=True)
        return float(torch.cat([score_row(base, now, row).kl for base, now, row in rows]).mean())

    def _logits(self) -> list[Tensor]:
        with torch.inference_mode():
            return [self.model(input_ids=row[None], use_cache=False).logits[0] for row in self.ids]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", help="[default: bundled]")
    parser.add_argument("--calib-tokens", type=int, default=131_072)
    parser.add_argument("--score-rows", type=int, default=48)
    parser.add_argument("--presets", default="IQ2_XXS,IQ2_M,Q2_K,IQ3_XXS,Q3_K_M,Q4_K_M,Q5_K_M")
    arguments = parser.parse_args()
    checkpoint = open_checkpoint(arguments.model)
    rows = corpus.pack(corpus.read(arguments.text), load_encoder(arguments.model), 512)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(rows.ids), generator=generator)
    score, probe, rest = order.tensor_split([arguments.score_rows, arguments.score_rows + PROBE_ROWS])
    rest = rest[: arguments.calib_tokens // 512].sort().values
    domains = tuple(rows.domains[row] for row in rest.tolist())
    seen = corpus.Rows(rows.ids[rest], domains, rows.source, rest.numel() * 512)
    began = time.perf_counter()
    calibration = calibrate(checkpoint, seen)
    routed = time.perf_counter()
    probing = Probing()
    measured = measure(checkpoint, calibration, rows.ids[probe], probing)
    probed = time.perf_counter()
    print(f"calibration {routed - began:.1f} s, damages {probed - routed:.1f} s ({measured.source};")
    print(f"KL divergence of a plan = {measured.linear:.3f} x + {measured.root:.4f} sqrt(x))\n")
    scorer = Scorer(checkpoint, calibration, rows.ids[score])
    _compare(checkpoint, arguments.presets.split(","), scorer, measured)


def _compare(checkpoint: Checkpoint, presets: list[str], scorer: Scorer, measured: Damages) -> None:
    """Print a row for every size: KL divergences of four plans, and the prediction for two of them."""
    weights, known = checkpoint.weights, facts(checkpoint)
    tables = prior_damages(weights, checkpoint.n_layers)
    print(
        "| size of | bytes | llama.cpp's types | predicted | tables | errors measured | all measured | ",
        end="",
    )
    print("predicted | ratio |\n|---|---|---|---|---|---|---|---|---|")
    for preset in tqdm(presets, disable=None):
        theirs = llama_cpp_types(preset, weights, known)
        limit = data_bytes(weights, theirs)
        cells = [scorer.kl(theirs), _predict(measured, theirs)]
        for damages in (tables, _with_sensitivity(measured, tables), measured):
            plan = make_plan(weights, Budget(preset, file_bytes=limit), known, damages)
            types = {choice.weight: choice.format for choice in plan.choices}
            cells.append(scorer.kl(types))
        cells.append(_predict(measured, types))
        values = " | ".join(f"{cell:.5f}" for cell in cells)
        print(f"| {preset} | {limit:,} | {values} | {cells[-2] / cells[0]:.3f} |", flush=True)


def _with_sensitivity(errors: Damages, tables: Damages) -> Damages:
    """Relative errors as measured, sensitivities from tables."""
    table = {
        name: {
            fmt: damage / errors.sensitivity[name] * tables.sensitivity[name] if damage else 0.0
            for fmt, damage in row.items()
        }
        for name, row in errors.table.items()
    }
    return replace(tables, table=table)


def _predict(damages: Damages, types: Mapping[str, str]) -> float:
    """The prediction for any plan; a type that is no candidate counts as the next larger one."""
    total = 0.0
    for name, row in damages.table.items():
        total += row.get(types[name], min(row.values()))
    return damages.predict(total)


if __name__ == "__main__":
    main()
