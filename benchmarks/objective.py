"""Which objective should the quantizers minimise? KL divergence at llama.cpp's own choice of types.

    python benchmarks/objective.py MODEL --text TEXT --score OTHER --types TYPES --files IQ2_XS Q3_K_S

The plan of every file is llama.cpp's (`--types`: file name -> tensor -> type), so the bytes are as many in
every column. The first `--calibrate` rows of 512 tokens of TEXT calibrate; `--rows` rows, evenly spread over
OTHER (documents of one kind stand together, and ratios differ more between kinds than within), are scored in
our own engine. Columns: ggml's encoder; ours with the importance times (c·mean(x²) + x²)^(p/2) for p = 0, 0.5
and 1, all with the same importance as ggml; and our defaults (each format's own p, tokens weighted by the
square of the router's weight). ± is the standard error of the difference to ggml's column, paired by row.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from moequant import formats
from moequant.checkpoint import load, open_checkpoint, uninterleave
from moequant.evaluate import score_row
from moequant.formats import Format
from moequant.forward.experts import EXPERTS
from moequant.forward.model import build_model
from moequant.statistics.calibrate import calibrate
from moequant.statistics.importance import importance
from moequant.text import corpus
from moequant.text.rows import load_encoder
from moequant.values import Weight
from tests.formats import ggml

Pack = Callable[[Format, Tensor, Tensor | None], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", required=True)
    parser.add_argument("--score", required=True)
    parser.add_argument("--types", type=Path, required=True)
    parser.add_argument("--files", nargs="+", help="default: all in TYPES")
    parser.add_argument("--calibrate", type=int, default=400)
    parser.add_argument("--rows", type=int, default=80)
    arguments = parser.parse_args()
    checkpoint, n = open_checkpoint(arguments.model), arguments.calibrate
    encoder = load_encoder(arguments.model)
    rows = corpus.pack(corpus.read(arguments.text), encoder, 512)
    stats = calibrate(checkpoint, corpus.Rows(rows.ids[:n], rows.domains[:n], rows.source, n * 512)).inputs
    scored = spread(corpus.pack(corpus.read(arguments.score), encoder, 512).ids, arguments.rows)
    model = build_model(checkpoint, EXPERTS)
    params = dict(model.named_parameters(remove_duplicate=False))

    def logits() -> list[Tensor]:
        with torch.inference_mode():
            return [model(input_ids=row[None], use_cache=False).logits[0] for row in scored]

    base = logits()

    def columns(weight: Weight, gated: bool) -> Tensor | None:
        if weight.input is None:
            return None
        found = importance(stats[weight.input], "gate2" if gated else "none")
        return found if weight.n_experts > 1 else found[0]

    def divergence(types: dict[str, str], pack: Pack, gated: bool = False) -> Tensor:
        for weight in checkpoint.weights:
            if weight.role.keeps_precision:
                continue
            fmt = formats.get(types[weight.name])
            decoded = formats.dequantize(fmt, pack(fmt, load(weight), columns(weight, gated)))
            with torch.no_grad():
                params[weight.param][..., slice(*weight.param_rows), :].copy_(
                    uninterleave(decoded, weight.rope_heads) if weight.rope_heads else decoded
                )
        return torch.stack(
            [score_row(one, two, row).kl.mean() for row, one, two in zip(scored, base, logits(), strict=True)]
        )

    def ggml_pack(fmt: Format, values: Tensor, weights: Tensor | None) -> Tensor:
        needed = weights is None and ggml.needs_importance(fmt)
        return ggml.quantize(fmt, values, torch.ones(values.shape[-1]) if needed else weights)

    print(
        "| file | ggml | p = 0 | p = 0.5 | p = 1 | default | default / ggml |\n|---|---|---|---|---|---|---|"
    )
    files = json.loads(arguments.types.read_text())
    for name in arguments.files or files:
        types = files[name]
        reference = divergence(types, ggml_pack)
        found = [
            divergence(types, lambda fmt, x, w, p=p: formats.quantize(fmt, x, w, magnitude=p))
            for p in (0.0, 0.5, 1.0)
        ]
        ours = divergence(types, formats.quantize, gated=True)
        error = float((ours - reference).std() / len(ours) ** 0.5 / reference.mean())
        cells = [reference.mean(), *(kl.mean() for kl in found), ours.mean()]
        ratio = float(ours.mean() / reference.mean())
        print(
            f"| {name} | " + " | ".join(f"{float(c):.5f}" for c in cells) + f" | {ratio:.3f} ± {error:.3f} |"
        )
        sys.stdout.flush()


def spread(ids: Tensor, count: int) -> Tensor:
    """`count` of the rows ids [n, 512], evenly spaced; all of them where there are no more."""
    return ids[torch.linspace(0, len(ids) - 1, min(count, len(ids))).long()]


if __name__ == "__main__":
    main()
