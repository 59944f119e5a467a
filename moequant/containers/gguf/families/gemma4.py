"""llama.cpp's `gemma4`: two kinds of layers, each with heads and a rotation of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moequant.containers.gguf.families.base import Computed, Export, Key, only, some_window
from moequant.families import Config

ARCH = "gemma4"

FULL, WINDOW = "full_attention", "sliding_attention"

STILL = 1e30
"""Divides the frequencies of dimensions that do not rotate."""

NAMES = {
    "attn_post_norm": "post_attention_norm.weight",
    "ffn_post_norm": "post_ffw_norm.weight",
    "ffn_post_norm_1": "post_ffw_norm_1.weight",
    "ffn_norm_2": "pre_ffw_norm_2.weight",
    "ffn_post_norm_2": "post_ffw_norm_2.weight",
    "scale": "layer_output_scale.weight",
}


def keys(config: Config) -> tuple[Key, ...]:
    """Keys of the file."""
    kinds, heads = list(config.layer_types), [int(each.num_key_value_heads) for each in _layers(config)]
    full, window = (_head_dim(config, kind) for kind in (FULL, WINDOW))
    bases = [float(config.rope_parameters[kind]["rope_theta"]) for kind in (FULL, WINDOW)]
    cap = config.final_logit_softcapping
    return (
        Key("context_length", "u32", int(config.max_position_embeddings)),
        Key("embedding_length", "u32", int(config.hidden_size)),
        Key("embedding_length_per_layer_input", "u32", 0),
        Key("block_count", "u32", len(kinds)),
        Key("feed_forward_length", "u32", int(config.intermediate_size)),
        Key("attention.head_count", "u32", int(config.num_attention_heads)),
        Key("attention.head_count_kv", "u32s", heads),
        Key("attention.layer_norm_rms_epsilon", "f32", float(config.rms_norm_eps)),
        Key("attention.key_length", "u32", full),
        Key("attention.value_length", "u32", full),
        Key("attention.key_length_swa", "u32", window),
        Key("attention.value_length_swa", "u32", window),
        Key("attention.sliding_window", "u32", int(config.sliding_window)),
        Key("attention.sliding_window_pattern", "bools", [kind == WINDOW for kind in kinds]),
        Key("attention.shared_kv_layers", "u32", 0),
        Key("rope.dimension_count", "u32", full),
        Key("rope.dimension_count_swa", "u32", window),
        Key("rope.freq_base", "f32", bases[0]),
        Key("rope.freq_base_swa", "f32", bases[1]),
        *([] if cap is None else [Key("final_logit_softcapping", "f32", float(cap))]),
        *(_experts(config) if config.enable_moe_block else ()),
    )


def _experts(config: Config) -> tuple[Key, ...]:
    return (
        Key("expert_count", "u32", int(config.num_experts)),
        Key("expert_used_count", "u32", int(config.top_k_experts)),
        Key("expert_feed_forward_length", "u32", int(config.moe_intermediate_size)),
    )


def _layers(config: Config) -> list[Any]:
    """What the config says of each layer."""
    return [config.per_layer_config[number] for number in range(config.num_hidden_layers)]


def _head_dim(config: Config, kind: str) -> int:
    """Width of the heads of one kind of layers; of the other where there are none of it."""
    found = {
        each: int(layer.head_dim) for each, layer in zip(config.layer_types, _layers(config), strict=True)
    }
    return found.get(kind, next(iter(found.values())))


def rotated(config: Config) -> tuple[Computed, ...]:
    """Layers of full attention rotate a part of each head: what divides the frequencies of the whole. Of the
    default rotation transformers takes no part."""
    half, told = _head_dim(config, FULL) // 2, config.rope_parameters[FULL]
    part = told.get("partial_rotary_factor", 1.0) if told.get("rope_type") == "proportional" else 1.0
    count = int(part * 2 * half) // 2
    return (Computed("rope_freqs.weight", (1.0,) * count + (STILL,) * (half - count)),)


def complaints(config: Config) -> Iterator[str]:
    """What the graph takes for granted."""
    yield from only(config, ARCH, "hidden_activation", "gelu_pytorch_tanh")
    yield from only(config, ARCH, "attention_bias", False)
    yield from only(config, ARCH, "use_bidirectional_attention", None, "vision")
    yield from some_window(config, ARCH)
    for kind in dict.fromkeys(config.layer_types):
        layers = [
            layer for each, layer in zip(config.layer_types, _layers(config), strict=True) if each == kind
        ]
        if len({(layer.head_dim, layer.num_key_value_heads) for layer in layers}) > 1:
            yield f"config key per_layer_config: layers of {kind} differ; llama.cpp's {ARCH!r} has one kind"
        told = dict(config.rope_parameters[kind])
        known = {"rope_theta", "rope_type", "partial_rotary_factor"} if kind == FULL else {"rope_theta"}
        plain = {"rope_type": "default", "partial_rotary_factor": 1.0, "factor": 1.0}
        for key in sorted(told.keys() - known):
            if told[key] != plain.get(key):
                yield f"rope_parameters of {kind}: llama.cpp's {ARCH!r} does not know {key} = {told[key]!r}"
        if kind == FULL and told.get("rope_type") not in ("proportional", "default"):
            yield f"rope_parameters of {kind}: llama.cpp's {ARCH!r} does not know {told['rope_type']!r}"


def warnings(config: Config) -> tuple[str, ...]:
    """What llama.cpp computes a little differently."""
    return (
        "on the CPU, llama.cpp takes GELU from a table in half precision: logits differ a little from "
        "transformers'",
    )


GEMMA4 = Export(ARCH, keys, complaints, NAMES, computed=rotated, warnings=warnings)
