"""llama.cpp's `cohere2moe`: it rotates layers with a window and leading dense ones. Heads are stored as it
rotates them, in pairs."""

from __future__ import annotations

from collections.abc import Iterator

from moequant.containers.gguf.families.base import DRAFTING, Export, Key, dense_in_front, only, some_window
from moequant.containers.gguf.families.keys import (
    SIGMOID,
    SOFTMAX,
    experts,
    head_sizes,
    instead,
    leading_dense,
    scoring,
    sizes,
    windows,
)
from moequant.families import Config

ARCH = "cohere2moe"


def keys(config: Config) -> tuple[Key, ...]:
    """Keys of the file. The softmax is taken over the chosen experts, so that it needs no other sum."""
    width, shared = int(config.intermediate_size), int(config.num_shared_experts)
    softmax = config.expert_selection_fn == "softmax"
    dense = Key("feed_forward_length", "u32", int(config.prefix_dense_intermediate_size or width))
    layer_norm = Key("attention.layer_norm_epsilon", "f32", float(config.layer_norm_eps))
    return (
        *instead(sizes(config), dense),
        *([layer_norm] if config.rms_norm_eps is None else []),
        *experts(config, width, width * shared),
        *scoring(SOFTMAX if softmax else SIGMOID, softmax or config.norm_topk_prob),
        Key("expert_shared_count", "u32", shared),
        Key("leading_dense_block_count", "u32", leading_dense(config)),
        Key("logit_scale", "f32", float(config.logit_scale)),
        *windows(config),
        *head_sizes(config),
    )


def complaints(config: Config) -> Iterator[str]:
    """What the graph takes for granted."""
    yield from only(config, ARCH, "hidden_act", "silu")
    yield from only(config, ARCH, "attention_bias", False)
    yield from dense_in_front(config, ARCH)
    if config.num_shared_experts:
        yield from only(config, ARCH, "shared_expert_combination_strategy", "average")
    if config.rms_norm_eps == 0:
        yield f"config key rms_norm_eps = 0: llama.cpp's {ARCH!r} would take another norm"
    # Which kinds dense layers have is in layer_types: of those that look at everything, it rotates each.
    if ("dense", "full_attention") in zip(config.mlp_layer_types, config.layer_types, strict=True):
        yield from only(config, ARCH, "prefix_dense_sliding_window_pattern", 1)
    yield from some_window(config, ARCH)


COHERE2_MOE = Export(ARCH, keys, complaints, drafting=DRAFTING)
