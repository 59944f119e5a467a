"""Train the tiny Qwen3-MoE that ships in demo/ (9 MB of bf16) on a CPU, from text that any machine has.

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000 python scripts/train_demo.py --minutes 35 -o demo

The text is the standard library of the interpreter that runs this program (source code, docstrings and
the language reference that `pydoc` carries), the calibration text of this repository, and its generators
of JSON, CSV, logs and arithmetic under a seed of their own. The evaluation text is never trained on: the
program ends by measuring the model on it.

Initial weights, tokenizer and the order of the rows follow from --seed alone. With --minutes the schedule
follows the clock, so the number of steps is the machine's; --steps repeats a run of that many steps.

The two malloc settings keep glibc from handing every large activation back to the kernel and faulting it
in again; without them a step takes several times as long. OMP_NUM_THREADS=1 suits a machine that has other
work: the threads of one small matrix product wait for each other.
"""

import ast
import math
import pydoc_data.topics
import random
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moequant import generators
from moequant.text import bundled

END, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# The pre-tokenizer of Qwen2, which llama.cpp knows as "qwen2". No NFC normalizer: llama.cpp applies none.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# llama.cpp's perplexity window; rows of this length make every position it scores a trained one.
ROW = 512
BATCH = 8  # rows per step


@dataclass(frozen=True)
class Source:
    """Documents of one kind, each used `repeats` times per epoch."""

    name: str
    documents: tuple[str, ...]
    repeats: int


@dataclass(frozen=True)
class Recipe:
    """What decides a run besides the text. `steps` 0 means: as many as `minutes` allow."""

    seed: int
    minutes: float
    steps: int
    rate: float  # peak learning rate of Muon; AdamW's is a quarter of it
    balance: float  # weight of the load-balancing loss


# ---------------------------------------------------------------------------------------------- text


def standard_library() -> tuple[Source, Source]:
    """The interpreter's own sources without its tests, and the English in them."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "test", "tests", "idle_test", "pydoc_data", "encodings", "__pycache__"}
    files = [p for p in sorted(root.rglob("*.py")) if not skipped & set(p.relative_to(root).parts)]
    code = tuple(text for p in files if (text := p.read_text("utf-8", errors="ignore").strip()))
    prose = [english for text in code if len(english := docstrings(text)) > 500]
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items()) if len(text) > 500]
    return Source("code", code, 1), Source("prose", tuple(prose + topics), 2)


def docstrings(code: str) -> str:
    """The docstrings of one source file, a blank line between them."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for node in ast.walk(ast.parse(code)) if isinstance(node, documented))
    return "\n\n".join(text for node in nodes if (text := ast.get_docstring(node)))


def corpus(seed: int) -> tuple[Source, ...]:
    """Everything the model is trained on. The little prose there is counts several times."""
    written = [d for texts in bundled.texts("calibration").values() for d in texts]
    # The calibration and evaluation splits use the generator seeds 1 and 2.
    structured = [d for name in generators.DOMAINS for d in generators.generate(name, 1000 + seed, 350_000)]
    bundle = Source("calibration", tuple(written), 12), Source("structured", tuple(structured), 1)
    return standard_library() + bundle


def train_tokenizer(sources: tuple[Source, ...], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `size` tokens with Qwen2's pre-tokenizer and ChatML's special tokens."""
    bpe = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END, IM_START, IM_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator((d for s in sources for d in s.documents * s.repeats), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, pad_token=END, chat_template=CHAT_TEMPLATE, model_max_length=2048
    )


def rows(sources: tuple[Source, ...], tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[Tensor]:
    """Token rows i64[ROW + 1] without end; every epoch shuffles the documents and the rows anew."""
    end = [tokenizer.eos_token_id]
    encoded = {s.name: [end + tokenizer.encode(d, verbose=False) for d in s.documents] for s in sources}
    for name, documents in encoded.items():
        print(f"{name:>12}: {len(documents)} documents, {sum(map(len, documents)):,} tokens")
    shuffler = random.Random(seed)
    while True:
        epoch = [document for s in sources for document in encoded[s.name] * s.repeats]
        shuffler.shuffle(epoch)
        stream = torch.tensor([token for document in epoch for token in document])
        # Consecutive rows share one token: the last target of a row is the first input of the next.
        cut = list(stream.unfold(0, ROW + 1, ROW))
        shuffler.shuffle(cut)
        yield from cut


# --------------------------------------------------------------------------------------------- model


def sorted_experts(experts: nn.Module, hidden: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
    """Experts function for transformers: one matrix product per expert over its tokens, made contiguous.

    hidden [T, d], chosen i64[T, k], gates [T, k] -> [T, d].
    """
    k = chosen.shape[1]
    by_expert = chosen.flatten().argsort(stable=True)
    counts = chosen.flatten().bincount(minlength=experts.num_experts).tolist()
    outputs = []
    for e, tokens in enumerate(hidden[by_expert // k].split(counts)):
        gate, up = F.linear(tokens, experts.gate_up_proj[e]).chunk(2, dim=-1)
        outputs.append(F.linear(F.silu(gate) * up, experts.down_proj[e]))
    unsorted = torch.cat(outputs)[by_expert.argsort()].unflatten(0, (-1, k))
    return (unsorted * gates.unsqueeze(-1)).sum(dim=1)


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3MoeForCausalLM:
    """A freshly initialised two-layer Qwen3-MoE of 4.6 million parameters, in float32."""
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=256,
        norm_topk_prob=True,
        max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id,
        # The end of text also pads, but is a token to learn: pad_token_id would keep its embedding at zero.
        pad_token_id=None,
        experts_implementation="sorted",
    )
    torch.manual_seed(seed)
    return Qwen3MoeForCausalLM(config)


# ------------------------------------------------------------------------------------------ training


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for matrices and stacks of matrices (K. Jordan et al., 2024).

    torch.optim.Muon takes 2-D parameters only; the experts here are [E, out, in].
    """

    def __init__(self, parameters: list[nn.Parameter], rate: float) -> None:
        super().__init__(parameters, {"lr": rate, "initial_lr": rate})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.05)
                update = orthogonal(p.grad.lerp(momentum, 0.95))
                p.mul_(1 - 0.1 * group["lr"])
                p.add_(update, alpha=-group["lr"] * max(1, p.shape[-2] / p.shape[-1]) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """[..., out, in] -> the nearest semi-orthogonal matrix, roughly, by five quintic Newton-Schulz steps."""
    wide = matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix
    x = wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if matrix.shape[-2] > matrix.shape[-1] else x


def optimizers(model: Qwen3MoeForCausalLM, rate: float) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for attention and experts, AdamW for embeddings, output, router and norms."""
    named = dict(model.named_parameters())
    hidden = [n for n in named if n.endswith(("_proj.weight", "gate_up_proj", "down_proj"))]
    others = [p for n, p in named.items() if n not in hidden]
    adam = torch.optim.AdamW(others, lr=rate / 4, betas=(0.9, 0.95), weight_decay=0.01)
    adam.param_groups[0]["initial_lr"] = rate / 4
    return Muon([named[n] for n in hidden], rate), adam


def schedule(progress: float) -> float:
    """Share of the peak rate at `progress` 0..1: 3 % warm-up, then a cosine down to 2 %."""
    warm = min(1.0, progress / 0.03)
    return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(model: Qwen3MoeForCausalLM, data: Iterator[Tensor], recipe: Recipe, out: Path) -> int:
    """Train in place, print the loss curve, save every five minutes; the number of steps taken."""
    steppers = optimizers(model, recipe.rate)
    begin = printed = saved = time.monotonic()
    step, losses = 0, []
    while (progress := run_share(step, time.monotonic() - begin, recipe)) < 1:
        for group in (g for o in steppers for g in o.param_groups):
            group["lr"] = group["initial_lr"] * schedule(progress)
        batch = torch.stack([next(data) for _ in range(BATCH)])
        answer = model(batch[:, :-1], output_router_logits=True, use_cache=False)
        loss = F.cross_entropy(answer.logits.flatten(0, 1), batch[:, 1:].flatten())
        (loss + recipe.balance * sum(map(imbalance, answer.router_logits))).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in steppers:
            optimizer.step()
        model.zero_grad()
        step, losses = step + 1, [*losses, loss.item()]
        now = time.monotonic()
        if now - printed > 20:
            speed = len(losses) * BATCH * ROW / (now - printed)
            mean = sum(losses) / len(losses)
            print(f"{progress:6.1%}  step {step:5}  loss {mean:.3f}  {speed:,.0f} tokens/s", flush=True)
            printed, losses = now, []
        if now - saved > 300:
            save(model, out)
            saved = now
    return step


def imbalance(router_logits: Tensor) -> Tensor:
    """[T, E] of one layer -> the Switch Transformer's load-balancing loss; 1 when evenly loaded.

    transformers pools the layers before multiplying, so that one layer may make up for another.
    """
    probabilities = router_logits.softmax(dim=-1)
    experts = probabilities.shape[1]
    load = probabilities.topk(2).indices.flatten().bincount(minlength=experts) / probabilities.shape[0]
    return experts / 2 * (load * probabilities.mean(dim=0)).sum()


def run_share(step: int, seconds: float, recipe: Recipe) -> float:
    """How much of the run is done, 0..1."""
    return step / recipe.steps if recipe.steps else seconds / (60 * recipe.minutes)


def save(model: Qwen3MoeForCausalLM, out: Path) -> None:
    """Write a bfloat16 copy of the model, one tensor per expert, as transformers lays it out."""
    copy = Qwen3MoeForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(out)


# ---------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def losses_by_domain(model: nn.Module, tokenizer: PreTrainedTokenizerFast) -> dict[str, tuple[float, int]]:
    """Domain of the evaluation text -> (summed nats, tokens scored), in windows of 512."""
    sums: dict[str, tuple[float, int]] = {}
    for name, documents in bundled.texts("evaluation").items():
        tokens = tokenizer.encode(END + END.join(documents), verbose=False)
        windows = [w for w in torch.tensor(tokens).split(ROW) if len(w) > 1]
        logits = (model(w[None, :-1]).logits[0] for w in windows)
        nats = sum(
            F.cross_entropy(x, w[1:], reduction="sum").item() for x, w in zip(logits, windows, strict=True)
        )
        sums[name] = nats, sum(len(w) - 1 for w in windows)
    return sums


def report(out: Path) -> None:
    """Print the saved model's perplexity per domain, and every expert's share of the tokens."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    model = Qwen3MoeForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    counts = torch.zeros(model.config.num_hidden_layers, model.config.num_experts)

    def count(experts: nn.Module, hidden: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        counts[layers.index(experts)] += chosen.flatten().bincount(minlength=counts.shape[1])
        return sorted_experts(experts, hidden, chosen, gates)

    layers = [layer.mlp.experts for layer in model.model.layers]
    ALL_EXPERTS_FUNCTIONS.register("counted", count)
    model.set_experts_implementation("counted")
    sums = losses_by_domain(model, tokenizer)
    sums["all"] = tuple(map(sum, zip(*sums.values(), strict=True)))
    for name, (nats, tokens) in sums.items():
        mean = nats / tokens
        print(f"{name:>14}  {tokens:7,} tokens  loss {mean:.3f}  perplexity {math.exp(mean):7.2f}")
    for index, shares in enumerate(counts / counts.sum(dim=1, keepdim=True)):
        print(f"layer {index}: token share per expert", *(f"{share:.1%}" for share in shares))


def main(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write the model to.")],
    minutes: Annotated[float, typer.Option(help="Wall-clock budget of the training loop.")] = 35,
    steps: Annotated[int, typer.Option(help="Train this many steps instead of by the clock.")] = 0,
    seed: Annotated[int, typer.Option(help="Initial weights and data order.")] = 0,
    rate: Annotated[float, typer.Option(help="Peak learning rate of Muon; AdamW gets a quarter.")] = 0.03,
    balance: Annotated[float, typer.Option(help="Weight of the load-balancing loss.")] = 0.005,
) -> None:
    """Train the demo model and measure it on text it has not seen."""
    ALL_EXPERTS_FUNCTIONS.register("sorted", sorted_experts)
    sources = corpus(seed)
    tokenizer = train_tokenizer(sources, size=2048)
    model = new_model(tokenizer, seed)
    tokenizer.save_pretrained(out, save_jinja_files=False)
    recipe = Recipe(seed, minutes, steps, rate, balance)
    taken = train(model.train(), rows(sources, tokenizer, seed), recipe, out)
    save(model, out)
    print(
        f"{taken} steps of {BATCH} x {ROW} tokens, {sum(p.numel() for p in model.parameters()):,} parameters"
    )
    report(out)


if __name__ == "__main__":
    typer.run(main)
