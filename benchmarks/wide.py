"""Wider rows: what the default effort makes of layers' outputs, and what it costs, at hidden 256 and 1024.

    python benchmarks/wide.py [--hidden 256,1024] [--types Q2_K,Q4_K] [--tokens-per-column 64]

Each model is a random Qwen3-MoE of two layers whose token embeddings share directions (rank hidden / 4 and
noise), so that inputs are correlated as they are in trained models; tokens are drawn at random, in proportion
to the width. The error of a layer's output is the squared distance of hidden states behind it from those of
the full-precision model, on rows that calibrated nothing; printed is that of the default over that of the
plain search, layer by layer, beside the ratios of KL divergence and of CPU time, each with its statistics
pass.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from moequant.checkpoint import Checkpoint, load, open_checkpoint
from moequant.evaluate import score_row
from moequant.forward.experts import EXPERTS
from moequant.forward.model import build_model
from moequant.forward.stream import LayerStream, Resources
from moequant.rounding.coupled import Coupled, Rounding, Streams, decoded
from moequant.rounding.diagonal import Quantizer
from moequant.statistics.calibrate import calibrate
from moequant.text.corpus import Rows
from moequant.values import Packed
from tests.models import build

VOCAB, LENGTH = 4096, 256
ONE = Resources(threads=1)


def model(folder: Path, hidden: int) -> Checkpoint:
    """A random model of that width, 8 experts, 2 of them a token."""
    width = {"hidden_size": hidden, "moe_intermediate_size": hidden, "initializer_range": hidden**-0.5}
    heads = {"num_attention_heads": hidden // 64, "head_dim": 64}
    build(folder, "qwen3_moe", vocab_size=VOCAB, num_experts=8, **width, **heads)
    path, g = folder / "model.safetensors", torch.Generator().manual_seed(1)
    tensors = load_file(path)
    shared = torch.randn(VOCAB, hidden // 4, generator=g) @ torch.randn(hidden // 4, hidden, generator=g)
    mixed = 0.8 * shared / (hidden // 4) ** 0.5 + 0.6 * torch.randn(VOCAB, hidden, generator=g)
    name = "model.embed_tokens.weight"
    tensors[name] = (mixed * torch.exp(0.5 * torch.randn(hidden, generator=g))).to(tensors[name].dtype)
    save_file(tensors, path, metadata={"format": "pt"})
    return open_checkpoint(folder)


def rows(count: int, seed: int) -> Rows:
    """Rows of random tokens."""
    ids = torch.randint(1, VOCAB, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
    return Rows(ids, ("random",) * count, "random tokens", ids.numel())


def plain(checkpoint: Checkpoint, types: dict[str, str], text: Rows) -> dict[str, Packed]:
    """Every weight rounded by the plain search."""
    quantizer = Quantizer(calibrate(checkpoint, text, ONE), "fast")
    return {weight.name: quantizer.pack(weight, types[weight.name])[0] for weight in checkpoint.weights}


def coupled(checkpoint: Checkpoint, types: dict[str, str], text: Rows) -> dict[str, Packed]:
    """Every weight rounded as the default effort does."""
    quantizer, rounding = Quantizer(calibrate(checkpoint, text, ONE)), Rounding()
    rounding = replace(rounding, options=replace(rounding.options, threads=1))
    with tempfile.TemporaryDirectory() as folder, LayerStream(checkpoint, text.ids, ONE) as stream:
        run = Coupled(stream, types, quantizer.pack, rounding).run(Streams.under(Path(folder), stream))
        return {packed.weight.name: packed for packed, _ in run}


def outputs(checkpoint: Checkpoint, made: dict[str, Packed] | None, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states behind every layer [layers, rows, n, h], before the last norm, and logits."""
    provider = load if made is None else lambda weight: decoded(made[weight.name])
    whole = build_model(checkpoint, EXPERTS, provider)
    behind: list[Tensor] = []
    for layer in whole.get_decoder().layers:
        layer.register_forward_hook(lambda module, args, out: behind.append(out))
    with torch.inference_mode():
        logits = whole(input_ids=ids, use_cache=False).logits
    return torch.stack(behind), logits


def measure(checkpoint: Checkpoint, name: str, text: Rows, held_out: Tensor) -> list[float]:
    """Ratios of layers' output errors, of KL divergences, of CPU times."""
    types = {
        w.name: "F32" if w.role.keeps_precision or len(w.shape) < 2 else name for w in checkpoint.weights
    }
    exact, logits = outputs(checkpoint, None, held_out)
    errors, kls, seconds = [], [], []
    for rounded in plain, coupled:
        began = time.process_time()
        made = rounded(checkpoint, types, text)
        seconds.append(time.process_time() - began)
        found, new = outputs(checkpoint, made, held_out)
        errors.append((found - exact).double().square().sum((1, 2, 3)))
        scores = [score_row(*each).kl for each in zip(logits, new, held_out, strict=True)]
        kls.append(float(torch.cat(scores).mean()))
    return [*(errors[1] / errors[0]).tolist(), kls[1] / kls[0], seconds[1] / seconds[0]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", default="256,1024")
    parser.add_argument("--types", default="Q2_K,Q4_K")
    parser.add_argument("--tokens-per-column", type=int, default=64)
    arguments = parser.parse_args()
    print("| hidden | type | tokens | output of layer 0 | of layer 1 | KL divergence | CPU time |")
    print("|---" * 7 + "|")
    for hidden in (int(each) for each in arguments.hidden.split(",")):
        text = rows(arguments.tokens_per_column * hidden // LENGTH, 0)
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = model(Path(folder), hidden)
            for name in arguments.types.split(","):
                found = measure(checkpoint, name, text, rows(8, 1).ids)
                cells = " | ".join(f"{each:.3f}" for each in found[:-1])
                print(f"| {hidden} | {name} | {text.tokens:,} | {cells} | {found[-1]:.1f}x |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
