"""llama.cpp's `dots1`: as many key heads as query heads, and a head of its own."""

from __future__ import annotations

from collections.abc import Iterator

from moequant.containers.gguf.families.base import Export, Key, full_attention, only
from moequant.containers.gguf.families.keys import SIGMOID, head_sizes, routing, sizes
from moequant.families import Config

ARCH = "dots1"


def keys(config: Config) -> tuple[Key, ...]:
    """Keys of the file. A file without the gating function would load and score by nothing."""
    router = routing(config, SIGMOID, int(config.first_k_dense_replace))
    return (*sizes(config), *router, *head_sizes(config))


def complaints(config: Config) -> Iterator[str]:
    """What the graph takes for granted."""
    yield from only(config, ARCH, "hidden_act", "silu")
    yield from only(config, ARCH, "attention_bias", False)
    yield from only(config, ARCH, "num_key_value_heads", config.num_attention_heads)
    yield from full_attention(config, ARCH)


DOTS1 = Export(ARCH, keys, complaints, own_head=True)
