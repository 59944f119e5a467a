"""llama.cpp's `deepseek32` and `glm-dsa`: `deepseek2` with an indexer that chooses the tokens to look at."""

from __future__ import annotations

from collections.abc import Iterator

from moequant.containers.gguf.families.base import DRAFTING, Export, Key, whole_indexers
from moequant.containers.gguf.families.deepseek2 import (
    latent_complaints,
    latent_keys,
    one_key_head,
    split_latent,
    warnings,
)
from moequant.containers.gguf.families.keys import SIGMOID, leading_dense, routing, sizes
from moequant.families import Config

V32, GLM = "deepseek32", "glm-dsa"


def keys(config: Config, arch: str = V32) -> tuple[Key, ...]:
    """Keys of DeepSeek-V3.2."""
    return (
        *one_key_head(sizes(config)),
        *routing(config, SIGMOID, leading_dense(config)),
        *latent_keys(config, arch),
        Key("attention.indexer.head_count", "u32", int(config.index_n_heads)),
        Key("attention.indexer.key_length", "u32", int(config.index_head_dim)),
        Key("attention.indexer.top_k", "u32", int(config.index_topk)),
    )


def glm_keys(config: Config) -> tuple[Key, ...]:
    """Keys of GLM-5; llama.cpp would guess by the context which layers choose for themselves."""
    own = [kind == "full" for kind in config.indexer_types]
    return (*keys(config, GLM), Key("attention.indexer.types", "bools", own))


def complaints(config: Config) -> Iterator[str]:
    """What `deepseek32` takes for granted."""
    yield from latent_complaints(config, V32)
    yield from whole_indexers(config, V32)


def glm_complaints(config: Config) -> Iterator[str]:
    """What `glm-dsa` takes for granted."""
    yield from latent_complaints(config, GLM)
    yield from whole_indexers(config, GLM)


DEEPSEEK_V32 = Export(V32, keys, complaints, cut=split_latent, warnings=warnings, drafting=DRAFTING)
GLM_MOE_DSA = Export(GLM, glm_keys, glm_complaints, cut=split_latent, warnings=warnings, drafting=DRAFTING)
