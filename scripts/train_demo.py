"""Train the tiny Qwen3-MoE that ships in demo/ (9 MB of bf16) on a CPU, from text that any machine has.

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000 python -m scripts.train_demo --minutes 35 -o demo

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

from moequant.text import bundled
from scripts import generators
from scripts.training import BATCH, ROW, Recipe, sorted_experts, train

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


@dataclass(frozen=True)
class Source:
    """Documents of one kind, each used `repeats` times per epoch."""

    name: str
    documents: tuple[str, ...]
    repeats: int


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
    sources = corpus(seed)
    tokenizer = train_tokenizer(sources, size=2048)
    model = new_model(tokenizer, seed)
    tokenizer.save_pretrained(out, save_jinja_files=False)
    recipe = Recipe(seed, minutes, steps, rate, balance)
    taken = train(model, rows(sources, tokenizer, seed), recipe, lambda: save(model, out))
    save(model, out)
    print(
        f"{taken} steps of {BATCH} x {ROW} tokens, {sum(p.numel() for p in model.parameters()):,} parameters"
    )
    report(out)


if __name__ == "__main__":
    typer.run(main)
