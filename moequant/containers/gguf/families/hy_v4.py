"""llama.cpp's `hy_v4`: `glm-dsa` with several streams. It rotates pairs where transformers rotates halves."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from moequant.containers.gguf.families.base import Export, FileTensor, Key
from moequant.containers.gguf.families.deepseek2 import (
    latent_complaints,
    latent_keys,
    one_key_head,
    split_latent,
    warnings,
)
from moequant.containers.gguf.families.keys import SIGMOID, leading_dense, routing, sizes
from moequant.families import Config
from moequant.families.hy_v4 import CONNECTION
from moequant.values import Weight
from moequant.values.ops import Taken

ARCH = "hy_v4"

NAMES = {
    **{f"hc_{kind}_{name}": f"hc_{kind}_{name}.weight" for kind in ("attn", "ffn") for name in CONNECTION},
    **{f"hc_{name}": f"output_hc_{name}.weight" for name in CONNECTION},
}


def keys(config: Config) -> tuple[Key, ...]:
    """Keys of the file."""
    own = [kind == "full" for kind in config.indexer_types]
    clamps = [float(config.swiglu_limit)] * int(config.num_hidden_layers)
    return (
        *one_key_head(sizes(config)),
        *routing(config, SIGMOID, leading_dense(config)),
        *latent_keys(config, ARCH),
        Key("attention.indexer.head_count", "u32", int(config.index_n_heads)),
        Key("attention.indexer.key_length", "u32", int(config.index_head_dim)),
        Key("attention.indexer.top_k", "u32", int(config.index_topk)),
        Key("attention.indexer.types", "bools", own),
        Key("swiglu_clamp_exp", "f32s", clamps),
        Key("hyper_connection.count", "u32", int(config.hc_mult)),
        Key("hyper_connection.epsilon", "f32", float(config.hc_eps)),
        Key("hyper_connection.magnitude", "f32", float(config.hc_magnitude)),
    )


def parts(config: Config, weight: Weight) -> tuple[FileTensor, ...] | None:
    """Rotated rows in pairs; latent attention in two."""
    rotated, wide = int(config.qk_rope_head_dim), int(config.index_head_dim)
    still = {
        "attn_q_b": (int(config.num_attention_heads), int(config.qk_nope_head_dim)),
        "attn_kv_a": (1, int(config.kv_lora_rank)),
        "indexer.q_b": (int(config.index_n_heads), wide - rotated),
        "indexer.k": (1, wide - rotated),
        "indexer.k_norm": (1, wide - rotated),
        "indexer.k_norm.bias": (1, wide - rotated),
    }
    own = weight.name.removeprefix(f"layers.{weight.layer}.")
    if own not in still:
        return split_latent(config, weight)
    order = pairs(*still[own], rotated)
    return (FileTensor(ops=(Taken(order, axis=-1 if len(weight.shape) == 1 else -2),)),)


@cache
def pairs(heads: int, still: int, rotated: int) -> tuple[int, ...]:
    """Rows of heads whose last `rotated` ones stand in halves, with those in pairs."""
    half = rotated // 2
    turned = [still + at + half * second for at in range(half) for second in (0, 1)]
    each = (*range(still), *turned)
    return tuple(head * (still + rotated) + row for head in range(heads) for row in each)


def complaints(config: Config) -> Iterator[str]:
    """What the graph takes for granted."""
    yield from latent_complaints(config, ARCH)
    if config.swiglu_limit <= 0:
        yield f"config key swiglu_limit = {config.swiglu_limit!r}: a number above 0 was expected"
    if config.index_head_dim <= config.qk_rope_head_dim:
        yield (
            f"config key index_head_dim = {config.index_head_dim}: llama.cpp's {ARCH!r} needs more than "
            f"qk_rope_head_dim = {config.qk_rope_head_dim}"
        )
    if config.indexer_types[0] != "full":
        yield f"config key indexer_types: in llama.cpp's {ARCH!r} the first layer chooses for itself"


def rotations(config: Config) -> tuple[str, ...]:
    """What llama.cpp's own converter would write, and what is a little different."""
    return (
        *warnings(config),
        "transformers and llama.cpp's own converter disagree about the order of rotary rows: this file "
        "computes what transformers computes",
    )


HY_V4 = Export(ARCH, keys, complaints, NAMES, parts, warnings=rotations, own_head=True)
