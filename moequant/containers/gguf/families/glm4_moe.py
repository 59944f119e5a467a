"""llama.cpp's `glm4moe`: GLM-4.5 to 4.7 and Solar-Open. It rotates halves, as transformers does."""

from __future__ import annotations

from collections.abc import Iterator

from moequant.containers.gguf.families.base import DRAFTING, Export, Key, only
from moequant.containers.gguf.families.keys import SIGMOID, head_sizes, rotated_part, routing, sizes
from moequant.families import Config

ARCH = "glm4moe"


def keys(config: Config) -> tuple[Key, ...]:
    """Keys of the file. Solar-Open has no dense layers; some of its configs say how wide they would be."""
    dense = int(getattr(config, "first_k_dense_replace", 0))
    own = (key for key in sizes(config) if dense or key.name != "feed_forward_length")
    return (
        *own,
        *routing(config, SIGMOID, dense),
        *head_sizes(config, rotated_part(config)),
    )


def complaints(config: Config) -> Iterator[str]:
    """What the graph takes for granted."""
    yield from only(config, ARCH, "hidden_act", "silu")


NAMES = {"ffn_norm": "post_attention_norm.weight"}

GLM4_MOE = Export(ARCH, keys, complaints, NAMES, drafting=DRAFTING)
"""Of GLM-4 and of Solar-Open."""
