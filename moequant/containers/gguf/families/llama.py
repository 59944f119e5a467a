"""llama.cpp's `llama`: Llama, Mistral and Mixtral. It rotates pairs of rows, where transformers rotates
halves."""

from __future__ import annotations

from collections.abc import Iterator

from moequant.containers.gguf.families.base import Export, FileTensor, Key, full_attention, only
from moequant.containers.gguf.families.keys import (
    LLAMA3,
    LONG,
    expert_counts,
    head_sizes,
    rope_factors,
    sizes,
)
from moequant.families import Config
from moequant.values import Role, Weight
from moequant.values.ops import Interleaved

ARCH = "llama"


def pairs(config: Config, weight: Weight) -> tuple[FileTensor, ...] | None:
    """Rows of q and k and their biases, head by head, in llama.cpp's rotary order."""
    own = weight.name.removeprefix(f"layers.{weight.layer}.").removesuffix(".bias")
    if own not in ("attn_q", "attn_k"):
        return None
    heads = config.num_attention_heads
    if own == "attn_k":
        heads = getattr(config, "num_key_value_heads", None) or heads
    kind, axis = ("bias", -1) if weight.role is Role.BIAS else ("weight", -2)
    return (FileTensor(f"{own}.{kind}", (Interleaved(heads, axis),)),)


def complaints(config: Config) -> Iterator[str]:
    """What the graph takes for granted."""
    yield from only(config, ARCH, "hidden_act", "silu")
    yield from full_attention(config, ARCH)


def dense_keys(config: Config) -> tuple[Key, ...]:
    """Keys of a dense model."""
    return (*sizes(config), *head_sizes(config, in_tensors=(LLAMA3, LONG)))


def moe_keys(config: Config) -> tuple[Key, ...]:
    """Keys of Mixtral."""
    return (*sizes(config), *expert_counts(config), *head_sizes(config, in_tensors=(LLAMA3, LONG)))


LLAMA = Export(ARCH, dense_keys, complaints, cut=pairs, computed=rope_factors)
MIXTRAL = Export(ARCH, moe_keys, complaints, cut=pairs, computed=rope_factors)
