"""Memory, reads and speed of routing, conversion and comparison of a model that streams.

    python benchmarks/streaming.py                      a synthetic Qwen3-MoE checkpoint of about 6 GB
    python benchmarks/streaming.py --small              one of 0.4 GB, in seconds; prints one JSON object
    python benchmarks/streaming.py --speed MODEL TEXT   tokens per second beside llama.cpp's own forward

The synthetic checkpoint has one shard a layer and is written a layer at a time. Peaks are
resident bytes of the process that does the work, interpreter and libraries included. For the
speed, both run the same rows in turn on one thread, between matrix multiplications that say
how fast the machine was at that moment; llama-imatrix does more than the forward it is held
against (its statistics, and logits of every token).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.pop(0)  # this folder: a script beside this one may be called like a package
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from moequant.checkpoint import load, open_checkpoint
from moequant.commands.convert import Settings, convert
from moequant.evaluate.open_source import open_source
from moequant.evaluate.side_by_side import Version, compare
from moequant.forward.stream import Reader, Resources
from moequant.progress import Meter
from moequant.statistics.calibrate import calibrate
from moequant.text import corpus
from moequant.text.rows import ROW, load_encoder
from tests.models import VOCAB, tokenizer


@dataclass(frozen=True)
class Shape:
    """What the synthetic model looks like, and how much text crosses it."""

    layers: int
    hidden: int
    experts: int
    inner: int
    vocab: int
    tokens: int

    @property
    def layer_bytes(self) -> int:
        """bf16 bytes of a layer's experts, all but a few percent of it."""
        return 2 * 3 * self.experts * self.hidden * self.inner


FULL = Shape(layers=16, hidden=1024, experts=240, inner=256, vocab=32_768, tokens=65_536)
SMALL = Shape(layers=32, hidden=256, experts=32, inner=256, vocab=512, tokens=2_048)
HEADS, KV_HEADS, HEAD = 4, 2, 64


def build(folder: Path, shape: Shape) -> Path:
    """The checkpoint, a shard a layer; values are cut from one block of random numbers at random places."""
    config = AutoConfig.for_model(
        "qwen3_moe",
        architectures=["Qwen3MoeForCausalLM"],
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD,
        intermediate_size=shape.inner,
        moe_intermediate_size=shape.inner,
        num_experts=shape.experts,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=1024,
        sliding_window=None,
        bos_token_id=0,
        eos_token_id=0,
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    tokenizer(min(shape.vocab, VOCAB)).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
    )
    generator = torch.Generator().manual_seed(0)
    pool = (torch.randn(1 << 22, generator=generator) * 0.04).to(torch.bfloat16)

    def some(*size: int) -> torch.Tensor:
        count = torch.Size(size).numel()
        start = int(torch.randint(1 << 21, (1,), generator=generator))
        part = pool[start : start + count]
        return part.repeat(-(-count // len(part)))[:count].reshape(size).clone()

    weight_map: dict[str, str] = {}

    def shard(number: int, tensors: dict[str, torch.Tensor]) -> None:
        name = f"model-{number + 1:05d}-of-{shape.layers + 1:05d}.safetensors"
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    one = torch.ones(shape.hidden, dtype=torch.bfloat16)
    ends = {
        "model.embed_tokens.weight": (shape.vocab, shape.hidden),
        "lm_head.weight": (shape.vocab, shape.hidden),
    }
    shard(
        shape.layers, {name: some(*size) for name, size in ends.items()} | {"model.norm.weight": one.clone()}
    )
    for layer in range(shape.layers):
        shard(layer, _layer(f"model.layers.{layer}.", shape, some, one))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def _layer(
    start: str, shape: Shape, some: Callable[..., torch.Tensor], one: torch.Tensor
) -> dict[str, torch.Tensor]:
    tensors = {
        "input_layernorm.weight": one.clone(),
        "post_attention_layernorm.weight": one.clone(),
        "self_attn.q_norm.weight": one[:HEAD].clone(),
        "self_attn.k_norm.weight": one[:HEAD].clone(),
        "self_attn.q_proj.weight": some(HEADS * HEAD, shape.hidden),
        "self_attn.k_proj.weight": some(KV_HEADS * HEAD, shape.hidden),
        "self_attn.v_proj.weight": some(KV_HEADS * HEAD, shape.hidden),
        "self_attn.o_proj.weight": some(shape.hidden, HEADS * HEAD),
        "mlp.gate.weight": some(shape.experts, shape.hidden),
    }
    for expert in range(shape.experts):
        for name, size in (("gate", (shape.inner, shape.hidden)), ("up", (shape.inner, shape.hidden)),
                           ("down", (shape.hidden, shape.inner))):  # fmt: skip
            tensors[f"mlp.experts.{expert}.{name}_proj.weight"] = some(*size)
    return {start + name: tensor for name, tensor in tensors.items()}


def alone(action: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """The action in a fresh process: its peak is nobody else's."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(action, arguments)


def _rows(folder: Path, tokens: int, split: corpus.Split = "calibration") -> corpus.Rows:
    return corpus.pack(corpus.read(None, split), load_encoder(folder), ROW, tokens)


def routed(folder: Path, tokens: int, resources: Resources) -> dict[str, Any]:
    """One calibration pass: what it read, how long it took, its peak."""
    torch.set_num_threads(1)
    checkpoint, reader, meter = open_checkpoint(folder), Reader(), Meter()
    rows = _rows(folder, tokens)
    with meter.stage("idle"):
        pass
    with meter.stage("route"):
        calibrate(checkpoint, rows, resources, reader)
    idle, route = meter.costs
    return {
        "seconds": route.seconds,
        "tokens": rows.ids.numel(),
        "peak": route.peak_bytes,
        "growth": route.peak_bytes - idle.peak_bytes,
        "read": reader.bytes,
        "checkpoint": checkpoint.source_bytes,
        "reads": max(reader.reads.values()),
        "unread": [weight.name for weight in checkpoint.weights if weight.name not in reader.reads],
    }


def converted(folder: Path, out: Path, tokens: int) -> dict[str, Any]:
    """The whole conversion but for the comparison, stage by stage."""
    settings = Settings("Q4_K_M", calib_tokens=tokens, eval_tokens=0, effort="fast")
    report = convert(folder, out, settings)
    return {"bytes": report.file_bytes, "stages": [(c.name, c.seconds, c.peak_bytes) for c in report.stages]}


def compared(folder: Path, out: Path, tokens: int) -> dict[str, Any]:
    """The comparison of checkpoint and file."""
    checkpoint, meter = open_checkpoint(folder), Meter()
    rows = _rows(folder, tokens, "evaluation")
    source = open_source(out, checkpoint)
    with meter.stage("compare"):
        (found,) = compare(
            checkpoint, Version("checkpoint", load), [Version(source.name, source.provider)], rows
        )
    (cost,) = meter.costs
    return {"seconds": cost.seconds, "peak": cost.peak_bytes, "kl": found.comparison.kl_mean.value}


def small() -> dict[str, Any]:
    """Growth of the peak by depth: the deeper model may not need more than the shallow one."""
    found: dict[str, Any] = {"layer": SMALL.layer_bytes, "layers": SMALL.layers}
    for name, layers in (("shallow", 2), ("deep", SMALL.layers)):
        shape = Shape(layers, SMALL.hidden, SMALL.experts, SMALL.inner, SMALL.vocab, SMALL.tokens)
        with tempfile.TemporaryDirectory(prefix="moequant-") as folder:
            build(Path(folder), shape)
            found[name] = alone(routed, Path(folder), shape.tokens, Resources(threads=1))
    return found


def full(tokens: int) -> None:
    """The run of results/streaming.md, as a table."""
    folder = Path(tempfile.mkdtemp(prefix="moequant-streaming-"))
    try:
        if shutil.disk_usage(folder).free < 14e9:
            sys.exit(f"{folder}: 14 GB of disk are needed")
        build(folder / "model", FULL)
        one = alone(routed, folder / "model", 2_048, Resources())
        print(f"checkpoint: {one['checkpoint']:,} bytes in {FULL.layers + 1} shards, {FULL.layers} layers")
        share, unread = one["read"] / one["checkpoint"], ", ".join(one["unread"])
        print(
            f"read in one pass: {share:.3f} of it, a tensor at most {one['reads']} x, not read: {unread}\n",
            flush=True,
        )
        made = alone(converted, folder / "model", folder / "out.gguf", tokens)
        print("| stage | seconds | peak GB |\n|---|---|---|")
        for name, seconds, peak in made["stages"]:
            print(f"| {name} | {seconds:.1f} | {peak / 1e9:.2f} |", flush=True)
        other = alone(compared, folder / "model", folder / "out.gguf", 4_096)
        print(f"| compare, 4,096 tokens | {other['seconds']:.1f} | {other['peak'] / 1e9:.2f} |")
        seconds = next(seconds for name, seconds, _ in made["stages"] if name == "route")
        print(
            f"\n{tokens:,} tokens routed at {tokens / seconds:,.0f} tokens/s; file: {made['bytes']:,} bytes"
        )
    finally:
        shutil.rmtree(folder)


def matmul_rate() -> float:
    """float32 operations per second of one thread, best of a few products of 1024 x 1024."""
    a, b = torch.randn(2, 1024, 1024)
    best = 0.0
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        best = max(best, 2 * 1024**3 / (time.perf_counter() - start))
    return best


def speed(model: Path, text: str, tokens: int, rounds: int) -> None:
    """Ours and llama.cpp's forward of the same rows in turn, both on one thread."""
    from moequant.runtimes.llama_cpp.engine import Llama

    torch.set_num_threads(1)
    checkpoint = open_checkpoint(model)
    rows = corpus.pack(corpus.read(text, "calibration"), load_encoder(model), ROW, tokens)
    count = rows.ids.numel()
    print(
        "| round | matmul GFLOP/s | ours tokens/s | llama.cpp tokens/s | ours / llama.cpp |\n"
        "|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "f32.gguf"
        convert(model, file, Settings("F32", eval_tokens=0))
        with Llama(file, n_ctx=ROW, threads=1) as llama:
            llama.generate(rows.ids[0, :-1].tolist(), 1)
            for number in range(rounds):
                before = matmul_rate()
                start = time.perf_counter()
                calibrate(checkpoint, rows, Resources(threads=1))
                ours = count / (time.perf_counter() - start)
                start = time.perf_counter()
                for row in rows.ids:
                    llama.generate(row[:-1].tolist(), 1)
                theirs = (count - len(rows.ids)) / (time.perf_counter() - start)
                rate = max(before, matmul_rate())
                figures = f"{rate / 1e9:.0f} | {ours:,.0f} | {theirs:,.0f} | {ours / theirs:.2f}"
                print(f"| {number + 1} | {figures} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--speed", nargs=2, metavar=("MODEL", "TEXT"))
    parser.add_argument("--tokens", type=int, default=FULL.tokens)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.small:
        print(json.dumps(small()))
    elif arguments.speed:
        speed(Path(arguments.speed[0]), arguments.speed[1], arguments.tokens, arguments.rounds)
    else:
        full(arguments.tokens)


if __name__ == "__main__":
    main()
