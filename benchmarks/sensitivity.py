"""What a unit of relative error in each kind of weight costs in KL divergence: the priors of `plan.py`.

    python benchmarks/sensitivity.py MODEL --text TEXT [--type Q3_K]

Every (layer, role) of a trained model is quantized alone, the KL divergence to the
unquantized model is measured in our own engine, and divided by the relative squared
error of that weight. The last table has the relative errors themselves, by format.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import torch
from tqdm import tqdm

from moequant import formats
from moequant.checkpoint import load, open_checkpoint, uninterleave
from moequant.evaluate import score_row
from moequant.forward.experts import EXPERTS
from moequant.forward.model import build_model
from moequant.rounding.diagonal import relative_error
from moequant.statistics.calibrate import calibrate
from moequant.statistics.importance import importance
from moequant.text import corpus
from moequant.text.rows import load_encoder
from moequant.values import Role, Weight


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", help="first half calibrates, second half is scored [default: bundled]")
    parser.add_argument("--type", default="Q3_K")
    parser.add_argument("--rows", type=int, default=40)
    arguments = parser.parse_args()
    checkpoint = open_checkpoint(arguments.model)
    encoder = load_encoder(arguments.model)
    rows = corpus.pack(corpus.read(arguments.text), encoder, 512)
    half = len(rows.ids) // 2
    seen = corpus.Rows(rows.ids[:half], rows.domains[:half], rows.source, rows.ids[:half].numel())
    calibration = calibrate(checkpoint, seen)
    scored = rows.ids[half : half + arguments.rows]
    model = build_model(checkpoint, EXPERTS)
    params = dict(model.named_parameters(remove_duplicate=False))

    def logits() -> list[torch.Tensor]:
        with torch.inference_mode():
            return [model(input_ids=row[None], use_cache=False).logits[0] for row in scored]

    base = logits()

    def packed(weight: Weight, name: str) -> tuple[torch.Tensor, float]:
        values = load(weight)
        columns = None
        if weight.input is not None:
            columns = importance(calibration.inputs[weight.input])
            columns = columns[0] if values.ndim == 2 else columns
        fmt = formats.get(name)
        data = formats.quantize(fmt, values, columns)
        return formats.dequantize(fmt, data), float(relative_error(fmt, values, data, columns).mean())

    costs: dict[Role, list[float]] = defaultdict(list)
    errors: dict[str, list[float]] = defaultdict(list)
    print("| layer | role | relative error | KL divergence | KL per unit of error |\n|---|---|---|---|---|")
    for weight in tqdm(checkpoint.weights, disable=None):
        if weight.role.keeps_precision:
            continue
        decoded, error = packed(weight, arguments.type)
        target = params[weight.param][..., slice(*weight.param_rows), :]
        with torch.no_grad():
            before = target.clone()
            target.copy_(uninterleave(decoded, weight.rope_heads) if weight.rope_heads else decoded)
            pairs = zip(scored, base, logits(), strict=True)
            kl = float(torch.cat([score_row(one, other, row).kl for row, one, other in pairs]).mean())
            target.copy_(before)
        costs[weight.role].append(kl / error)
        print(f"| {weight.layer} | {weight.role} | {error:.5f} | {kl:.6f} | {kl / error:.4f} |", flush=True)
        if weight.role.is_expert:
            for name in ("Q2_K", "Q3_K", "IQ4_NL", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0"):
                errors[name].append(packed(weight, name)[1])
    print("\n| role | mean KL per unit of error |\n|---|---|")
    for role, found in costs.items():
        print(f"| {role} | {sum(found) / len(found):.4f} |")
    print("\n| format | relative error of expert weights |\n|---|---|")
    for name, values in errors.items():
        print(f"| {name} | {sum(values) / len(values):.3e} |")


if __name__ == "__main__":
    main()
