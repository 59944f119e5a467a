"""llama.cpp's `deepseek4`: compressed attention, four streams, and a table of experts in the first layers."""

from __future__ import annotations

from collections.abc import Iterator

from moequant.containers.gguf.families.base import Export, Key, only, whole_indexers
from moequant.containers.gguf.families.hy_v4 import NAMES as STREAMS
from moequant.containers.gguf.families.keys import expert_counts, rope, scoring, sizes
from moequant.families import Config
from moequant.families.deepseek_v4 import HEAVY, SPARSE, TABLE, WINDOW

ARCH = "deepseek4"

SQRT_SOFTPLUS = 4
"""llama.cpp's number of how this router scores."""

RATIOS = {WINDOW: 0, SPARSE: 4, HEAVY: 128}
"""Tokens of an entry: the graph implements these."""

NAMES = {
    **STREAMS,
    TABLE: "ffn_gate_tid2eid.weight",
    "attn_kv": "attn_kv.weight",
    "attn_kv_norm": "attn_kv_a_norm.weight",
    "attn_out_a": "attn_output_a.weight",
    "attn_out_b": "attn_output_b.weight",
    "compressor.kv": "attn_compressor_kv.weight",
    "compressor.gate": "attn_compressor_gate.weight",
    "compressor.places": "attn_compressor_ape.weight",
    "compressor.norm": "attn_compressor_norm.weight",
    "indexer.compressor.kv": "indexer_compressor_kv.weight",
    "indexer.compressor.gate": "indexer_compressor_gate.weight",
    "indexer.compressor.places": "indexer_compressor_ape.weight",
    "indexer.compressor.norm": "indexer_compressor_norm.weight",
}


def keys(config: Config) -> tuple[Key, ...]:
    """Keys of the file."""
    layers, width = int(config.num_hidden_layers), int(config.head_dim)
    return (
        *sizes(config),
        Key("embedding_length_out", "u32", int(config.hidden_size * config.hc_mult)),
        *_rotations(config),
        Key("rope.dimension_count", "u32", int(config.qk_rope_head_dim)),
        Key("attention.key_length", "u32", width),
        Key("attention.value_length", "u32", width),
        Key("attention.q_lora_rank", "u32", int(config.q_lora_rank)),
        Key("attention.sliding_window", "u32", int(config.sliding_window)),
        Key("attention.output_group_count", "u32", int(config.o_groups)),
        Key("attention.output_lora_rank", "u32", int(config.o_lora_rank)),
        Key("attention.compress_ratios", "u32s", [RATIOS[kind] for kind in config.layer_types]),
        Key("attention.indexer.head_count", "u32", int(config.index_n_heads)),
        Key("attention.indexer.key_length", "u32", int(config.index_head_dim)),
        Key("attention.indexer.top_k", "u32", int(config.index_topk)),
        *expert_counts(config),
        *scoring(SQRT_SOFTPLUS, True, config.routed_scaling_factor),
        Key("expert_feed_forward_length", "u32", int(config.moe_intermediate_size)),
        Key("expert_shared_count", "u32", 1),
        Key("hash_layer_count", "u32", _tables(config)),
        Key("swiglu_clamp_exp", "f32s", [float(config.swiglu_limit)] * layers),
        Key("swiglu_clamp_shexp", "f32s", [float(config.swiglu_limit)] * layers),
        Key("hyper_connection.count", "u32", int(config.hc_mult)),
        Key("hyper_connection.sinkhorn_iterations", "u32", int(config.hc_sinkhorn_iters)),
        Key("hyper_connection.epsilon", "f32", float(config.hc_eps)),
    )


def _rotations(config: Config) -> tuple[Key, ...]:
    """Two bases: of layers with a window alone, and of all others, where it may be scaled. The graph never
    scales attention itself."""
    main, compressed = config.rope_parameters["main"], dict(config.rope_parameters["compress"])
    compressed.pop("attention_factor", None)
    own, *scaling = rope(config, compressed)
    (base,) = rope(config, main)
    return (base, Key("attention.compress_rope_freq_base", "f32", own.value), *scaling)


def _tables(config: Config) -> int:
    """How many layers look experts up."""
    return sum(kind == "hash_moe" for kind in config.mlp_layer_types)


def complaints(config: Config) -> Iterator[str]:
    """What the graph takes for granted."""
    yield from only(config, ARCH, "hidden_act", "silu")
    yield from only(config, ARCH, "attention_bias", False)
    yield from only(config, ARCH, "mlp_bias", False)
    yield from only(config, ARCH, "num_key_value_heads", 1)
    yield from only(config, ARCH, "hc_mult", 4)
    if config.num_attention_heads % config.o_groups:
        yield (
            f"config key o_groups = {config.o_groups}: llama.cpp's {ARCH!r} needs a number that divides "
            f"num_attention_heads = {config.num_attention_heads}"
        )
    yield from only(config, ARCH, "compress_rates", {kind: RATIOS[kind] for kind in (SPARSE, HEAVY)})
    if SPARSE not in config.layer_types:
        yield f"config key layer_types: llama.cpp's {ARCH!r} crashes on a model without a {SPARSE!r} layer"
    if "moe" in config.mlp_layer_types[: _tables(config)]:
        yield f"config key mlp_layer_types: llama.cpp's {ARCH!r} has tables only before the other layers"
    if config.swiglu_limit <= 0:
        yield f"config key swiglu_limit = {config.swiglu_limit!r}: a number above 0 was expected"
    yield from whole_indexers(config, ARCH)
    main, compressed = (config.rope_parameters[kind] for kind in ("main", "compress"))
    if main.get("rope_type", "default") != "default":
        yield f"rope scaling {main['rope_type']!r} of layers with a window: llama.cpp's {ARCH!r} has none"
    if (factor := compressed.get("attention_factor")) not in (None, 1):
        yield f"rope scaling with attention_factor {factor!r}: llama.cpp's {ARCH!r} implements only 1"
    for kind, told in config.rope_parameters.items():
        if int(config.head_dim * told.get("partial_rotary_factor", 1)) != config.qk_rope_head_dim:
            yield (
                f"rope parameter partial_rotary_factor of {kind!r}: llama.cpp's {ARCH!r} rotates "
                f"qk_rope_head_dim = {config.qk_rope_head_dim} everywhere"
            )


DEEPSEEK_V4 = Export(ARCH, keys, complaints, NAMES, own_head=True)
