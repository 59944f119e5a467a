"""Wider rows, and the cost of the default effort."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import measure
from benchmarks.harness import Rows, case
from moequant.checkpoint import Checkpoint, load, open_checkpoint
from moequant.evaluate import score_row
from moequant.forward.experts import EXPERTS
from moequant.forward.model import build_model
from moequant.forward.resources import Resources
from moequant.rounding.diagonal import Quantizer
from moequant.rounding.layerwise import round_checkpoint
from moequant.rounding.results import decoded
from moequant.rounding.rounder import Rounding
from moequant.statistics.calibrate import calibrate
from moequant.text import corpus
from moequant.values import Packed
from tests.models import build

VOCAB, LENGTH = 4096, 256
ONE = Resources(threads=1)


@dataclass(frozen=True)
class Wide:
    """Hidden sizes; tokens are drawn at random, in proportion to the width."""

    hidden: tuple[int, ...] = (256, 1024)
    types: tuple[str, ...] = ("Q2_K", "Q4_K")
    tokens_per_column: int = 64


@case("Wider rows, and the cost of the default effort", Wide((256,), ("Q4_K",), 4))
def wide(o: Wide) -> Rows:
    """Random Qwen3-MoE models of two layers whose token embeddings share directions (rank hidden / 4 and
    noise), so that inputs are correlated as in trained models. Ratios of the default effort to the plain
    search, each with its statistics pass: squared distance of hidden states behind a layer from those of full
    precision, on rows that calibrated nothing; KL divergence; CPU time."""
    for hidden in o.hidden:
        text = random_rows(o.tokens_per_column * hidden // LENGTH, 0)
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = model(Path(folder), hidden)
            for name in o.types:
                found = ratios(checkpoint, name, text, random_rows(8, 1).ids)
                yield {"hidden": hidden, "type": name, "tokens": text.tokens} | found


def random_rows(count: int, seed: int) -> corpus.Rows:
    """Rows of random tokens."""
    ids = torch.randint(1, VOCAB, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
    return corpus.Rows(ids, ("random",) * count, "random tokens", ids.numel())


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


def plain(checkpoint: Checkpoint, types: dict[str, str], text: corpus.Rows) -> dict[str, Packed]:
    """Every weight rounded by the plain search."""
    quantizer = Quantizer(calibrate(checkpoint, text, ONE), "fast")
    return {weight.name: quantizer.pack(weight, types[weight.name])[0] for weight in checkpoint.weights}


def coupled(checkpoint: Checkpoint, types: dict[str, str], text: corpus.Rows) -> dict[str, Packed]:
    """Every weight rounded as the default effort does."""
    quantizer, rounding = Quantizer(calibrate(checkpoint, text, ONE)), Rounding()
    rounding = replace(rounding, options=replace(rounding.options, threads=1))
    run = round_checkpoint(checkpoint, text.ids, types, quantizer.pack, rounding, ONE)
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


def ratios(checkpoint: Checkpoint, name: str, text: corpus.Rows, held_out: Tensor) -> dict[str, float]:
    """Of layers' output errors, of KL divergences, of CPU times."""
    types = {
        w.name: "F32" if w.role.keeps_precision or len(w.shape) < 2 else name for w in checkpoint.weights
    }
    exact, logits = outputs(checkpoint, None, held_out)
    errors, kls, seconds = [], [], []
    for rounded in plain, coupled:
        made, spent = measure.cpu(partial(rounded, checkpoint, types, text))
        seconds.append(spent)
        found, new = outputs(checkpoint, made, held_out)
        errors.append((found - exact).double().square().sum((1, 2, 3)))
        scores = [score_row(*each).kl for each in zip(logits, new, held_out, strict=True)]
        kls.append(float(torch.cat(scores).mean()))
    layers = {f"output of layer {at}": float(each) for at, each in enumerate(errors[1] / errors[0])}
    return layers | {"KL divergence": kls[1] / kls[0], "CPU time": seconds[1] / seconds[0]}
