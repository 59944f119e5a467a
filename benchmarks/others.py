"""The same types as llama.cpp's files on other models: 32 experts of which four work, and starved experts.

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000 OMP_NUM_THREADS=1 python benchmarks/others.py \\
        --calib TEXT --eval TEXT --ends MODEL --llama-bin FOLDER --cache FOLDER

Two models are trained (`MODELS`), from a seed, on what `--calib` holds after its first `--tokens`
tokens; tokenizer, embeddings, head and last norm are at first those of MODEL, all between them is new.
llama.cpp's own tools make their files: llama-imatrix on the first `--tokens` of `--calib`, then
llama-quantize. For every type our file of exactly the types that its tensors have (read by gguf-py) is made
from the same tokens, and both are scored in llama.cpp on the first `--chunks` chunks of 512 tokens of --eval
against the F32 file. For every one of `--sizes`, a type, ours is as large as llama.cpp's file of that type,
types free to choose, against the best of all its files that are no larger. ± is paired by token.
`TYPE:layers` among the types keeps embeddings and head in F32 on both sides.

Models and llama.cpp's files are kept in `--cache` and found there again. The malloc settings keep glibc
from handing every large activation of the training back to the kernel.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

sys.path[0] = str(Path(__file__).parents[1])  # the other benchmarks and scripts are found from here

from benchmarks.ladder import llama_logits  # noqa: E402
from moequant.commands.convert import Settings, convert  # noqa: E402
from moequant.containers.gguf.read import read_header  # noqa: E402
from moequant.evaluate import Scores, score_tokens, summarize  # noqa: E402
from moequant.evaluate.divergence import join  # noqa: E402
from moequant.report import Report  # noqa: E402
from moequant.text import corpus  # noqa: E402
from moequant.text.rows import ROW, load_encoder  # noqa: E402
from scripts.train_demo import optimizers, schedule  # noqa: E402

BATCH = 8
"""Rows a training step."""

RIVALS = (
    "IQ2_XS",
    "IQ2_S",
    "IQ2_M",
    "Q2_K_S",
    "Q2_K",
    "IQ3_XXS",
    "IQ3_XS",
    "IQ3_S",
    "Q3_K_S",
    "IQ3_M",
    "Q3_K_M",
    "Q3_K_L",
    "IQ4_XS",
    "Q4_K_S",
    "Q4_K_M",
)
"""llama.cpp's types whose files a size is held against, smallest first; only those of 3/4 of it or more."""


@dataclass(frozen=True)
class Recipe:
    """A model to train: family, config, steps, weight of the load-balancing loss, its starved experts.

    The router's rows of the last `starved` experts of every layer start at `faint` of the others' size: their
    logits stay near 0 while some other expert's is nearly always above. No loss calls them back.
    """

    family: str
    config: Mapping[str, Any]
    steps: int
    balance: float = 0.0
    router_std: float = 0.02
    starved: int = 0
    faint: float = 0.02


COMMON = {
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
    "sliding_window": None,
    "tie_word_embeddings": False,
}

ENDS = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
"""What most of a short training would go into."""

MODELS = {
    "experts32": Recipe(
        "qwen3_moe",
        {
            "num_experts": 32,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 256,
            "intermediate_size": 256,
            "norm_topk_prob": True,
        },
        steps=12,
        balance=0.05,
    ),
    "starved": Recipe(
        "mixtral",
        {"num_local_experts": 12, "num_experts_per_tok": 2, "intermediate_size": 256},
        steps=18,
        router_std=0.1,
        starved=6,
    ),
}


# ------------------------------------------------------------------------------------------ training


def new_model(recipe: Recipe, ends: Path, seed: int) -> nn.Module:
    """A model of the recipe in float32: embeddings, head and last norm those of `ends`, all else random."""
    torch.manual_seed(seed)
    given = load_file(ends / "model.safetensors")
    vocab = len(given["lm_head.weight"])
    config = AutoConfig.for_model(recipe.family, vocab_size=vocab, **COMMON, **recipe.config)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="sdpa", experts_implementation="sorted"
    )
    for name, parameter in model.named_parameters():
        if name in ENDS:
            parameter.data = given[name].float()
        if name.endswith("mlp.gate.weight"):
            nn.init.normal_(parameter, std=recipe.router_std)
            with torch.no_grad():
                parameter[len(parameter) - recipe.starved :] *= recipe.faint
    return model


def batches(ids: Tensor, seed: int) -> Iterator[Tensor]:
    """i64 [BATCH, ROW + 1] without end: rows of the text, every epoch cut elsewhere and shuffled."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        start = int(torch.randint(ROW, (), generator=generator))
        rows = ids[start:].unfold(0, ROW + 1, ROW)
        for chosen in torch.randperm(len(rows), generator=generator).split(BATCH):
            if len(chosen) == BATCH:
                yield rows[chosen]


def sorted_experts(experts: nn.Module, hidden: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
    """Experts function for transformers: one product per expert. [T, d], [T, k] twice -> [T, d].

    The weights are unbound at once: the gradient of indexing would be as large as the stack for every expert.
    """
    active, order = chosen.shape[1], chosen.flatten().argsort(stable=True)
    counts = chosen.flatten().bincount(minlength=experts.num_experts).tolist()
    outputs = []
    parts = hidden[order // active].split(counts), experts.gate_up_proj.unbind(), experts.down_proj.unbind()
    for tokens, gate_up, down in zip(*parts, strict=True):
        gate, up = F.linear(tokens, gate_up).chunk(2, -1)
        outputs.append(F.linear(F.silu(gate) * up, down))
    unsorted = torch.cat(outputs)[order.argsort()].unflatten(0, (-1, active))
    return (unsorted * gates[:, :, None]).sum(1)


def imbalance(router_logits: Tensor, active: int) -> Tensor:
    """[T, E] of one layer -> the Switch Transformer's load-balancing loss; 1 when evenly loaded."""
    probabilities = router_logits.softmax(-1)
    count = probabilities.shape[1]
    load = probabilities.topk(active).indices.flatten().bincount(minlength=count) / len(probabilities)
    return count / active * (load * probabilities.mean(0)).sum()


def train(recipe: Recipe, ends: Path, ids: Tensor, folder: Path) -> None:
    """Train a model on `ids` and save it in bfloat16 with the tokenizer of `ends`."""
    ALL_EXPERTS_FUNCTIONS.register("sorted", sorted_experts)
    model = new_model(recipe, ends, seed=0).train()
    steppers, data = optimizers(model, rate=0.03), batches(ids, seed=0)
    bar = tqdm(range(recipe.steps))
    for step in bar:
        for group in (group for optimizer in steppers for group in optimizer.param_groups):
            group["lr"] = group["initial_lr"] * schedule(step / recipe.steps)
        batch = next(data)
        answer = model(batch[:, :-1], output_router_logits=True, use_cache=False)
        loss = F.cross_entropy(answer.logits.flatten(0, 1), batch[:, 1:].flatten())
        active = recipe.config["num_experts_per_tok"]
        uneven = sum(imbalance(each, active) for each in answer.router_logits)
        (loss + recipe.balance * uneven).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with torch.autocast("cpu", torch.bfloat16):  # Newton-Schulz steps need no more
            for optimizer in steppers:
                optimizer.step()
        model.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    partial = folder.with_suffix(".partial")
    model.to(torch.bfloat16).save_pretrained(partial)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ends / name, partial / name)
    partial.rename(folder)


# ----------------------------------------------------------------------------------- llama.cpp's files


@dataclass(frozen=True)
class Theirs:
    """llama.cpp's own files of one model, made when first asked for. `exact` is ours, in F32."""

    binaries: Path
    exact: Path
    folder: Path

    def imatrix(self, text: str, chunks: int) -> Path:
        """llama-imatrix's file of the first `chunks` of `text`."""
        path = self.folder / f"imatrix-{chunks}.gguf"
        options = ["-f", text, "-c", ROW, "--chunks", chunks, "-t", 1, "--no-ppl"]
        return self._made(path, lambda out: ["llama-imatrix", "-m", self.exact, *options, "-o", out])

    def quantized(self, kind: str, imatrix: Path) -> Path:
        """llama-quantize's file of a type under an imatrix; `TYPE:layers` leaves the ends in F32."""
        path, (name, _, part) = self.folder / f"{kind}-{imatrix.name}", kind.partition(":")
        kept = ["--token-embedding-type", "f32", "--output-tensor-type", "f32"] if part else []
        tool = ["llama-quantize", *kept, "--imatrix", imatrix, self.exact]
        return self._made(path, lambda out: [*tool, out, name, 1])

    def _made(self, path: Path, command: Any) -> Path:
        if path.exists():
            return path
        partial = path.with_name(f"partial-{path.name}")
        program, *options = map(str, command(partial))
        subprocess.run([self.binaries / program, *options], check=True, capture_output=True)
        return partial.rename(path)


def types_of(path: Path) -> dict[str, str]:
    """Tensor → its type in a GGUF file: a plan."""
    return {tensor.name: tensor.type for tensor in read_header(path).tensors}


# ------------------------------------------------------------------------------------------- the tables


@dataclass(frozen=True)
class Judge:
    """The F32 file's logits on the evaluation rows, and what other files are scored against."""

    ids: Tensor
    base: list[Tensor]

    @classmethod
    def of(cls, exact: Path, ids: Tensor) -> Judge:
        """The judge of one model."""
        return cls(ids, llama_logits(exact, ids))

    def scores(self, path: Path) -> Scores:
        """Every scored token of a file in llama.cpp, as llama-perplexity defines it."""
        half = ROW // 2
        found = zip(self.base, llama_logits(path, self.ids), self.ids, strict=True)
        return join([score_tokens(p[:-1], q[:-1], row[half + 1 :]) for p, q, row in found])


HEAD = (
    "| type | bytes | its bytes | mean KL | its | ratio | KL 99 % | its | same top | its "
    "| perplexity | its | CPU s | fallbacks |"
)


def row(label: str, ours: tuple[Path, Scores], theirs: tuple[Path, Scores], cost: tuple[float, int]) -> str:
    """One line of the table; the ratio's error is that of the mean of ours - ratio · theirs, by token.

    `cost`: CPU seconds, and experts that the plain search rounded because their Hessian was useless.
    """
    (path, mine), (other, its) = ours, theirs
    one, two = summarize(mine, path.name), summarize(its, other.name)
    ratio = one.kl_mean.value / two.kl_mean.value
    error = float((mine.kl - ratio * its.kl).std() / len(mine.kl) ** 0.5) / two.kl_mean.value
    return (
        f"| {label} | {path.stat().st_size:,} | {other.stat().st_size:,} "
        f"| {one.kl_mean.value:.5f} | {two.kl_mean.value:.5f} | {ratio:.3f} ± {error:.3f} "
        f"| {one.kl_99:.4f} | {two.kl_99:.4f} | {one.same_top:.2%} | {two.same_top:.2%} "
        f"| {one.perplexity.value:.3f} | {two.perplexity.value:.3f} | {cost[0]:.0f} | {cost[1]} |"
    )


def shares(report: Report) -> Iterator[str]:
    """How the calibration tokens spread over the experts, one line a layer."""
    yield "\n| layer | tokens an expert sees if even | fewest first |\n|---|---|---|"
    for route in report.calibration.routes:
        counts = route.tokens.sort().values.tolist()
        shown = ", ".join(f"{count:,}" for count in counts[:8])
        yield f"| {route.layer} | {sum(counts) / len(counts):,.0f} | {shown} … {counts[-1]:,} |"


def frequencies(seen: Tensor, ids: Tensor, vocab: int) -> float:
    """Perplexity of `ids` under the token frequencies of `seen`, one added to every count."""
    counts = seen.bincount(minlength=vocab).double() + 1
    return float((-(counts / counts.sum()).log()[ids.flatten()]).mean().exp())


Case = tuple[str, Path, dict[str, Any]]
"""A row's label, llama.cpp's file, and the settings that make ours."""


def cases(arguments: argparse.Namespace, files: Theirs, judge: Judge, plan: Path) -> Iterator[Case]:
    """Every row to come; `plan` is written anew for each."""
    imatrix = files.imatrix(arguments.calib, arguments.tokens // ROW)
    for kind in filter(None, arguments.types.split(",")):
        other = files.quantized(kind, imatrix)
        plan.write_text(json.dumps(types_of(other)))
        yield kind, other, {"plan": plan, "calib_tokens": arguments.tokens}
    for kind in filter(None, arguments.sizes.split(",")):
        rivals = [files.quantized(each, imatrix) for each in RIVALS[: RIVALS.index(kind) + 1]]
        size = rivals[-1].stat().st_size
        fitting = [each for each in rivals if 0.75 * size <= each.stat().st_size <= size]
        best = min(fitting, key=lambda each: float(judge.scores(each).kl.mean()))
        # The rows that probe the plan come on top of those that calibrate.
        wanted = {"size": str(size), "calib_tokens": arguments.tokens - 16 * ROW}
        yield f"{kind}'s size / {best.name.split('-')[0]}", best, wanted


def measure(model: Path, arguments: argparse.Namespace, ids: Tensor) -> Iterator[str]:
    """The lines of one model's tables."""
    exact = model / "F32.gguf"
    if not exact.exists():
        convert(model, exact, Settings("F32", eval_tokens=0))
    judge, files = Judge.of(exact, ids), Theirs(arguments.llama_bin, exact, model)
    given = {"calib": arguments.calib, "eval_tokens": 0, "overwrite": True, "effort": arguments.effort}
    yield HEAD + "\n" + "|---" * 14 + "|"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ours.gguf"
        for label, other, wanted in cases(arguments, files, judge, Path(folder) / "plan.json"):
            began = time.process_time()
            report = convert(model, path, Settings(**given, **wanted))
            cost = time.process_time() - began, sum(len(each.fallbacks) for each in report.losses)
            mine = judge.scores(path)
            yield row(label, (path, mine), (other, judge.scores(other)), cost)
    ppl = summarize(mine, path.name).base_perplexity
    yield f"\nPerplexity of the F32 file: {ppl.value:.2f} ± {ppl.error:.2f}. Tokens that experts saw:"
    yield from shares(report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calib", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--ends", type=Path, required=True)
    parser.add_argument("--llama-bin", type=Path, required=True, help="of llama-imatrix and llama-quantize")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--steps", type=int, help="of the training, to try with fewer")
    parser.add_argument("--tokens", type=int, default=51_200, help="to calibrate on")
    parser.add_argument("--chunks", type=int, default=60)
    parser.add_argument("--types", default="Q2_K_S,Q4_K_M,IQ3_S,Q6_K,Q3_K_M,IQ2_XS,Q5_K_M")
    parser.add_argument("--sizes", default="Q3_K_S,Q4_K_M", help="types whose file says how large")
    parser.add_argument("--effort", default="default")
    arguments = parser.parse_args()
    encoder = load_encoder(arguments.ends)
    text = corpus.read(arguments.calib)[0].text
    seen = torch.tensor(encoder.encode(text, add_special_tokens=False).ids)[arguments.tokens :]
    documents = corpus.read(arguments.eval, "evaluation")
    ids = corpus.pack(documents, encoder, ROW, arguments.chunks * ROW).ids
    vocab = encoder.get_vocab_size()
    print(
        f"{len(seen):,} tokens to train on; perplexity of their frequencies on the evaluation text: "
        f"{frequencies(seen, ids, vocab):.0f}, of a uniform guess: {vocab}",
        flush=True,
    )
    for name in arguments.models.split(","):
        model = arguments.cache / name
        if not model.exists():
            recipe = replace(MODELS[name], steps=arguments.steps or MODELS[name].steps)
            train(recipe, arguments.ends, seen, model)
        print(f"\n## {name}\n", flush=True)
        for line in measure(model, arguments, ids):
            print(line, flush=True)


if __name__ == "__main__":
    main()
