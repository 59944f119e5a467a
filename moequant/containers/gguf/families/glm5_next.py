"""llama.cpp's `glm5-next`: `kimi-linear` with an indexer over pools of tokens and four streams."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moequant.containers.gguf.families.base import (
    FIXED_EPS,
    Drafting,
    Export,
    FileTensor,
    Key,
    both_kinds,
    dense_in_front,
    only,
    other_epsilon,
)
from moequant.containers.gguf.families.deepseek2 import latent_sizes
from moequant.containers.gguf.families.hy_v4 import NAMES as STREAMS
from moequant.containers.gguf.families.kimi_linear import NAMES as DELTA
from moequant.containers.gguf.families.kimi_linear import kimi_parts, recurrent_keys
from moequant.families import Config
from moequant.families.kda import LINEAR
from moequant.values import Role, Weight
from moequant.values.ops import NegativeExp

ARCH = "glm5-next"

NAMES = {
    **DELTA,
    **STREAMS,
    "indexer.pool_gate": "indexer_compressor_gate.weight",
    "indexer.pool_places": "indexer_compressor_ape.weight",
}


def keys(config: Config) -> tuple[Key, ...]:
    """Keys of the file. Its keys are normed with the epsilon of transformers' layer norms."""
    limits = [float(config.swiglu_limit)] * int(config.num_hidden_layers)
    bound = config.linear_lower_bound
    return (
        *recurrent_keys(config),
        *latent_sizes(config),
        Key("attention.layer_norm_epsilon", "f32", FIXED_EPS),
        *([] if bound is None else [Key("kda.gate_lower_bound", "f32", float(bound))]),
        Key("attention.indexer.head_count", "u32", int(config.index_n_heads)),
        Key("attention.indexer.key_length", "u32", int(config.index_head_dim)),
        Key("attention.indexer.top_k", "u32", int(config.index_topk)),
        Key("attention.indexer.kpool", "u32", int(config.index_kpool)),
        Key("attention.indexer.kpool_select_tail", "bool", bool(config.index_kpool_always_select_tail)),
        Key("attention.indexer.types", "bools", [kind == "full" for kind in config.indexer_types]),
        Key("swiglu_clamp_exp", "f32s", limits),
        Key("swiglu_clamp_shexp", "f32s", limits),
        Key("hyper_connection.count", "u32", int(config.hc_mult)),
        Key("hyper_connection.sinkhorn_iterations", "u32", int(config.hc_sinkhorn_iters)),
        Key("hyper_connection.epsilon", "f32", float(config.hc_eps)),
    )


def parts(config: Config, weight: Weight) -> tuple[FileTensor, ...] | None:
    """Decay rates are a vector here."""
    return (FileTensor(ops=(NegativeExp(),)),) if weight.role is Role.STATE else kimi_parts(config, weight)


def complaints(config: Config) -> Iterator[str]:
    """What the graph takes for granted."""
    yield from only(config, ARCH, "hidden_act", "silu")
    yield from only(config, ARCH, "attention_bias", False)
    yield from only(config, ARCH, "hc_mult", 4)
    yield from only(config, ARCH, "linear_num_heads", config.num_attention_heads)
    yield from dense_in_front(config, ARCH)
    yield from both_kinds("layer_types", (kind == LINEAR for kind in config.layer_types), ARCH)
    if config.swiglu_limit <= 0:
        yield f"config key swiglu_limit = {config.swiglu_limit!r}: a number above 0 was expected"
    yield from only(config, ARCH, "index_kpool_always_select_tail", True)  # else NaN for the first tokens
    if config.index_kpool < 2:
        yield f"config key index_kpool = {config.index_kpool!r}: llama.cpp's {ARCH!r} needs 2 or more"


def warnings(config: Config) -> tuple[str, ...]:
    """What llama.cpp computes a little differently."""
    return other_epsilon(config, "queries and keys of delta attention")


def predicted(config: Config, number: int) -> Mapping[str, Any]:
    """A layer that predicts has latent attention, and its experts are clamped like the others."""
    clamps = dict.fromkeys(("swiglu_clamp_exp", "swiglu_clamp_shexp"), float(config.swiglu_limit))
    return {"attention.head_count_kv": 1, **clamps}


GLM5_NEXT = Export(
    ARCH, keys, complaints, NAMES, parts, warnings=warnings, drafting=Drafting(predicted), own_head=True
)
