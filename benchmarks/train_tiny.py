"""A small OLMoE, trained for some minutes: a third family for benchmarks, whose predictions are not noise.

    python benchmarks/train_tiny.py -o OUT --tokenizer ../shared/models/mix --text ../shared/data/calib.txt

Recipe, optimizers and expert loop are those of scripts/train_demo.py; the tokenizer is another model's.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import OlmoeConfig, OlmoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

sys.path[:1] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "scripts")]

import train_demo as demo  # noqa: E402

from moequant.text.rows import load_encoder  # noqa: E402


def rows(text: str, tokenizer_folder: Path, seed: int) -> Iterator[Tensor]:
    """Token rows i64[ROW + 1] without end, shuffled anew every epoch."""
    stream = torch.tensor(load_encoder(tokenizer_folder).encode(text, add_special_tokens=False).ids)
    shuffler = random.Random(seed)
    while True:
        cut = list(stream.unfold(0, demo.ROW + 1, demo.ROW))
        shuffler.shuffle(cut)
        yield from cut


def new_model(vocabulary: int, end: int | None, seed: int) -> OlmoeForCausalLM:
    """OLMoE with 3 layers, 8 experts of which 3 run, query and key norms, gates not renormalised."""
    config = OlmoeConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=8,
        num_experts_per_tok=3,
        norm_topk_prob=False,
        max_position_embeddings=2048,
        eos_token_id=end,
        bos_token_id=end,
        pad_token_id=None,
        experts_implementation="sorted",
    )
    torch.manual_seed(seed)
    return OlmoeForCausalLM(config)


def train(model: OlmoeForCausalLM, data: Iterator[Tensor], recipe: demo.Recipe) -> int:
    """`train_demo.train` without its checkpoints, which ten minutes are not worth; the number of steps."""
    steppers, begin, step = demo.optimizers(model, recipe.rate), time.monotonic(), 0
    while (progress := demo.run_share(step, time.monotonic() - begin, recipe)) < 1:
        for group in (g for o in steppers for g in o.param_groups):
            group["lr"] = group["initial_lr"] * demo.schedule(progress)
        batch = torch.stack([next(data) for _ in range(demo.BATCH)])
        answer = model(batch[:, :-1], output_router_logits=True, use_cache=False)
        loss = F.cross_entropy(answer.logits.flatten(0, 1), batch[:, 1:].flatten())
        (loss + recipe.balance * sum(map(demo.imbalance, answer.router_logits))).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in steppers:
            optimizer.step()
        model.zero_grad()
        step += 1
        if step % 20 == 0:
            print(f"{progress:6.1%}  step {step:5}  loss {loss.item():.3f}", flush=True)
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of another model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--steps", type=int, default=0, help="train this many steps instead of by the clock")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    ALL_EXPERTS_FUNCTIONS.register("sorted", demo.sorted_experts)
    config = json.loads((options.tokenizer / "config.json").read_text(encoding="utf-8"))
    model = new_model(config["vocab_size"], config.get("eos_token_id"), options.seed)
    data = rows(options.text.read_text(encoding="utf-8"), options.tokenizer, options.seed)
    recipe = demo.Recipe(options.seed, options.minutes, options.steps, rate=0.03, balance=0.005)
    taken = train(model.train(), data, recipe)
    model.to(torch.bfloat16).save_pretrained(options.out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(options.tokenizer / name, options.out / name)
    print(f"{taken} steps, {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
