"""Tiny models of other kinds, trained for some minutes: their predictions are not noise."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from scripts.training import Recipe, rows, train

COMMON = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}

ENDS = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
"""What most of a short training would go into."""


@dataclass(frozen=True)
class Trained:
    """A model to train: family, config, recipe, whether its ends are at first another model's, starved
    experts.

    The router's rows of the last `starved` experts of every layer start at `faint` of the others' size: their
    logits stay near 0 while some other expert's is nearly always above. No loss calls them back.
    """

    family: str
    config: Mapping[str, Any]
    recipe: Recipe
    given_ends: bool = True
    router_std: float = 0.02
    starved: int = 0
    faint: float = 0.02

    def new(self, ends: Path) -> nn.Module:
        """The model in float32 before training, with the vocabulary of `ends`."""
        torch.manual_seed(self.recipe.seed)
        given = load_file(ends / "model.safetensors")
        vocab = len(given["lm_head.weight"])
        config = AutoConfig.for_model(self.family, vocab_size=vocab, **{**COMMON, **self.config})
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="sdpa", experts_implementation="sorted"
        )
        for name, parameter in model.named_parameters():
            if self.given_ends and name in ENDS:
                parameter.data = given[name].float()
            if self.given_ends and name.endswith("mlp.gate.weight"):
                nn.init.normal_(parameter, std=self.router_std)
                with torch.no_grad():
                    parameter[len(parameter) - self.starved :] *= self.faint
        return model

    def train(self, ends: Path, ids: Tensor, folder: Path) -> int:
        """Train on tokens `ids`, save in bfloat16 with the tokenizer of `ends`; the number of steps taken."""
        model = self.new(ends)
        steps = train(model, rows(ids, self.recipe.seed), self.recipe)
        partial = folder.with_name(f"partial-{folder.name}")
        model.to(torch.bfloat16).save_pretrained(partial)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(ends / name, partial / name)
        partial.rename(folder)
        return steps

    def of(self, steps: int) -> Trained:
        """The same with another number of steps; 0 changes nothing."""
        return replace(self, recipe=replace(self.recipe, steps=steps)) if steps else self


MODELS = {
    "olmoe": Trained(
        "olmoe",
        {"num_key_value_heads": 4, "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": False},
        Recipe(minutes=35),
        given_ends=False,
    ),
    "experts32": Trained(
        "qwen3_moe",
        {
            "head_dim": 64,
            "num_experts": 32,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 256,
            "norm_topk_prob": True,
            "sliding_window": None,
        },
        Recipe(steps=12, balance=0.05),
    ),
    "starved": Trained(
        "mixtral",
        {"head_dim": 64, "num_local_experts": 12, "num_experts_per_tok": 2, "sliding_window": None},
        Recipe(steps=18, balance=0.0),
        router_std=0.1,
        starved=6,
    ),
}
"""OLMoE without normalised gates, 32 experts of which four work, and experts that hardly any token
reaches."""
