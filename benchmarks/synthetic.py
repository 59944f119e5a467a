"""A synthetic Qwen3-MoE checkpoint of any size, one shard a layer, written a layer at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from tests.models import VOCAB, tokenizer


@dataclass(frozen=True)
class Shape:
    """What the synthetic model looks like, and how much text crosses it. Where inputs are `correlated`, the
    embeddings of tokens share an eighth of the directions, as in trained models."""

    layers: int
    hidden: int
    experts: int
    inner: int
    vocab: int
    tokens: int
    top_k: int = 2
    heads: int = 4
    kv_heads: int = 2
    head: int = 64
    correlated: bool = False

    @property
    def layer_bytes(self) -> int:
        """bf16 bytes of a layer's experts, all but a few percent of it."""
        return 2 * 3 * self.experts * self.hidden * self.inner


FULL = Shape(layers=16, hidden=1024, experts=240, inner=256, vocab=32_768, tokens=65_536)
SMALL = Shape(layers=32, hidden=256, experts=32, inner=256, vocab=512, tokens=2_048)


def build(folder: Path, shape: Shape) -> Path:
    """The checkpoint, a shard a layer; values are cut from one block of random numbers at random places."""
    config = AutoConfig.for_model(
        "qwen3_moe",
        architectures=["Qwen3MoeForCausalLM"],
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head,
        intermediate_size=shape.inner,
        moe_intermediate_size=shape.inner,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
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
    outside = {name: some(*size) for name, size in ends.items()} | {"model.norm.weight": one.clone()}
    if shape.correlated:
        rank = shape.hidden // 8
        shared = torch.randn(shape.vocab, rank, generator=generator) @ torch.randn(
            rank, shape.hidden, generator=generator
        )
        scale = torch.exp(0.5 * torch.randn(shape.hidden, generator=generator))
        noise = torch.randn(shape.vocab, shape.hidden, generator=generator)
        mixed = (0.8 * shared / rank**0.5 + 0.6 * noise) * scale
        outside["model.embed_tokens.weight"] = mixed.to(torch.bfloat16)
    shard(shape.layers, outside)
    for layer in range(shape.layers):
        shard(layer, layer_tensors(f"model.layers.{layer}.", shape, some, one))
    # Without "metadata" transformers does not load it, and the self-check would be left out.
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def layer_tensors(
    start: str, shape: Shape, some: Callable[..., torch.Tensor], one: torch.Tensor
) -> dict[str, torch.Tensor]:
    """One layer's tensors by name; `some` makes random ones."""
    tensors = {
        "input_layernorm.weight": one.clone(),
        "post_attention_layernorm.weight": one.clone(),
        "self_attn.q_norm.weight": one[: shape.head].clone(),
        "self_attn.k_norm.weight": one[: shape.head].clone(),
        "self_attn.q_proj.weight": some(shape.heads * shape.head, shape.hidden),
        "self_attn.k_proj.weight": some(shape.kv_heads * shape.head, shape.hidden),
        "self_attn.v_proj.weight": some(shape.kv_heads * shape.head, shape.hidden),
        "self_attn.o_proj.weight": some(shape.hidden, shape.heads * shape.head),
        "mlp.gate.weight": some(shape.experts, shape.hidden),
    }
    for expert in range(shape.experts):
        for name, size in (("gate", (shape.inner, shape.hidden)), ("up", (shape.inner, shape.hidden)),
                           ("down", (shape.hidden, shape.inner))):  # fmt: skip
            tensors[f"mlp.experts.{expert}.{name}_proj.weight"] = some(*size)
    return {start + name: tensor for name, tensor in tensors.items()}
