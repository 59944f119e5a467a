"""Does a token count once for its experts, by the router's weight, or by its square: in KL divergence.

    python benchmarks/gating.py MODEL --text TEXT --types FILE

For each type, FILE's types of every tensor (llama.cpp's own, `mix.types.json`), the plain search
with importance from the first `--rows` rows of 512 tokens of TEXT, and the KL divergence in our
own engine on the `--held-out` rows behind them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

sys.path[0] = str(Path(__file__).parents[1])

from moequant import formats  # noqa: E402
from moequant.checkpoint import Checkpoint, open_checkpoint  # noqa: E402
from moequant.evaluate import score_row  # noqa: E402
from moequant.forward.experts import EXPERTS  # noqa: E402
from moequant.forward.model import build_model  # noqa: E402
from moequant.forward.stream import LayerStream, Resources  # noqa: E402
from moequant.rounding.diagonal import Quantizer  # noqa: E402
from moequant.statistics.moments import Moments  # noqa: E402
from moequant.statistics.store import combine  # noqa: E402
from moequant.text import corpus  # noqa: E402
from moequant.text.rows import load_encoder  # noqa: E402
from moequant.values import Calibration  # noqa: E402

POWERS = {"1": 0.0, "gate": 0.5, "gate²": 1.0}
"""What the router's weight is raised to before `Moments` squares it."""


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
            made = Powered(
                checkpoint.n_experts, torch.zeros(stream.batches[batch].numel(), dtype=torch.int64), 1
            )
            made.power = power
            return made

        def total(found: list[Moments]) -> Calibration:
            return combine(
                [Calibration((), each.inputs, 0, len(each.domains), "text", ("text",)) for each in found]
            )

        hidden = stream.new_hidden(Path(folder))
        stream.embed(hidden)
        for layer in stream.layers():
            layers.append(total(list(stream.cross(layer, hidden, make, hidden))))
        layers.append(total([told for told, _ in stream.finish(hidden, make)]))
    return replace(layers[0], inputs={name: each for part in layers for name, each in part.inputs.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", required=True)
    parser.add_argument("--types", type=Path, required=True)
    parser.add_argument("--names", default="IQ2_XXS,Q2_K_S,IQ2_M,Q3_K_M,IQ3_S,Q4_K_M,Q5_K_M")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--held-out", type=int, default=48)
    arguments = parser.parse_args()
    checkpoint = open_checkpoint(arguments.model)
    rows = corpus.pack(corpus.read(arguments.text), load_encoder(arguments.model), 512)
    ids, held_out = rows.ids[: arguments.rows], rows.ids[arguments.rows :][: arguments.held_out]
    base = build_model(checkpoint, EXPERTS)
    with torch.inference_mode():
        exact = [base(row[None]).logits[0] for row in held_out]
    quantizers = {name: Quantizer(moments(checkpoint, ids, power)) for name, power in POWERS.items()}
    print("| types of | " + " | ".join(POWERS) + " | gate / 1 | gate² / 1 |\n" + "|---" * 6 + "|", flush=True)
    for name in arguments.names.split(","):
        types, found = json.loads(arguments.types.read_text())[name], []
        for quantizer in quantizers.values():
            packed = {w.name: quantizer.pack(w, types[w.name])[0] for w in checkpoint.weights}

            def load(weight, packed=packed):
                made = packed[weight.name]
                return formats.dequantize(formats.get(made.format), made.data).reshape(weight.shape)

            model = build_model(checkpoint, EXPERTS, load)
            with torch.inference_mode():
                scores = [
                    score_row(before, model(row[None]).logits[0], row).kl
                    for before, row in zip(exact, held_out, strict=True)
                ]
            found.append(torch.cat(scores))
        ratios = []
        for other in found[1:]:
            change = other - found[0]
            error = float(change.std() / len(change) ** 0.5 / found[0].mean())
            ratios.append(f"{float(other.mean() / found[0].mean()):.3f} ± {error:.3f}")
        print(
            f"| {name} | "
            + " | ".join(f"{float(each.mean()):.5f}" for each in found)
            + " | "
            + " | ".join(ratios)
            + " |",
            flush=True,
        )


if __name__ == "__main__":
    main()
