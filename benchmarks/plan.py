"""Plans from measured damage beside plans from tables and llama.cpp's own types, at llama.cpp's sizes.

    python benchmarks/plan.py MODEL --text TEXT

The first `--calib-tokens` of the text calibrate, the next rows are for the probes, the
last `--score-rows` for the KL divergence to the unquantized model, in our own engine.
Every weight is rounded by the plain search, whoever chose its type, so that only the choice
of types differs. The second table asks how far predictions are from measurements.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from moequant import corpus, formats
from moequant.checkpoint import Checkpoint, load, open_checkpoint, uninterleave
from moequant.compare import score_row
from moequant.conversion import facts, load_encoder
from moequant.damage import Probing, measure
from moequant.plan import Budget, Damages, data_bytes, make_plan, prior_damages
from moequant.presets import llama_cpp_types
from moequant.routing.calibrate import calibrate
from moequant.routing.experts import EXPERTS
from moequant.routing.model import build_model
from moequant.routing.statistics import importance
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
    split = min(arguments.calib_tokens // 512, len(rows.ids) - PROBE_ROWS - arguments.score_rows)
    seen = corpus.Rows(rows.ids[:split], rows.domains[:split], rows.source, split * 512)
    began = time.perf_counter()
    calibration = calibrate(checkpoint, seen)
    routed = time.perf_counter()
    probing = Probing()
    measured = measure(checkpoint, calibration, rows.ids[split : split + PROBE_ROWS], probing)
    probed = time.perf_counter()
    errors_only = measure(checkpoint, calibration, None, probing)
    print(f"calibration {routed - began:.1f} s, damages {probed - routed:.1f} s ({measured.source};")
    print(f"KL divergence of a plan = {measured.linear:.3f} x + {measured.root:.4f} sqrt(x))\n")
    scorer = Scorer(checkpoint, calibration, rows.ids[-arguments.score_rows :])
    _compare(checkpoint, arguments.presets.split(","), scorer, measured, errors_only)


def _compare(
    checkpoint: Checkpoint, presets: list[str], scorer: Scorer, measured: Damages, errors_only: Damages
) -> None:
    """Print both tables."""
    weights, known = checkpoint.weights, facts(checkpoint)
    tables = prior_damages(weights, checkpoint.n_layers)
    honest = []
    print("| size of | bytes | llama.cpp's types | tables | errors measured | all measured | ratio |")
    print("|---|---|---|---|---|---|---|")
    for preset in tqdm(presets, disable=None):
        theirs = llama_cpp_types(preset, weights, known)
        limit = data_bytes(weights, theirs)
        cells = [scorer.kl(theirs)]
        honest.append((f"llama.cpp's {preset}", _predict(measured, theirs), cells[0]))
        for damages in (tables, errors_only, measured):
            plan = make_plan(weights, Budget(preset, file_bytes=limit), known, damages)
            types = {choice.weight: choice.format for choice in plan.choices}
            cells.append(scorer.kl(types))
            source = "all measured" if damages is measured else "tables" if damages is tables else "errors"
            honest.append((f"{source}, size of {preset}", _predict(measured, types), cells[-1]))
        values = " | ".join(f"{cell:.5f}" for cell in cells)
        print(f"| {preset} | {limit:,} | {values} | {cells[-1] / cells[0]:.3f} |", flush=True)
    print("\n| plan | predicted | measured | predicted / measured |\n|---|---|---|---|")
    for name, predicted, found in honest:
        print(f"| {name} | {predicted:.5f} | {found:.5f} | {predicted / found:.2f} |")


def _predict(damages: Damages, types: Mapping[str, str]) -> float:
    """The prediction for any plan; a type that is no candidate counts as the next larger one."""
    total = 0.0
    for name, row in damages.table.items():
        total += row.get(types[name], min(row.values()))
    return damages.predict(total)


if __name__ == "__main__":
    main()
