"""llama.cpp's `olmoe`: it neither renormalises top-k weights nor clips q, k and v."""

from __future__ import annotations

from collections.abc import Iterator

from moequant.containers.gguf.families.base import Export, Key, full_attention, only, square_heads
from moequant.containers.gguf.families.keys import expert_counts, head_sizes, sizes
from moequant.families import Config

ARCH = "olmoe"


def keys(config: Config) -> tuple[Key, ...]:
    """Keys of OLMoE."""
    return (*sizes(config), *expert_counts(config), *head_sizes(config))


def complaints(config: Config) -> Iterator[str]:
    """What the graph takes for granted."""
    yield from square_heads(config, ARCH)
    yield from only(config, ARCH, "hidden_act", "silu")
    yield from only(config, ARCH, "attention_bias", False)
    yield from only(config, ARCH, "norm_topk_prob", False)
    yield from only(config, ARCH, "clip_qkv", None)
    yield from full_attention(config, ARCH)


OLMOE = Export(ARCH, keys, complaints)
