"""llama.cpp's `lfm2moe`: a layer without key heads is a convolution; its final norm is called after the
embedding."""

from __future__ import annotations

from collections.abc import Iterator

from moequant.containers.gguf.families.base import Export, Key, both_kinds, only, square_heads
from moequant.containers.gguf.families.keys import SIGMOID, experts, head_sizes, instead, scoring, sizes
from moequant.families import Config
from moequant.families.lfm2_moe import is_conv

ARCH = "lfm2moe"


def keys(config: Config) -> tuple[Key, ...]:
    """Keys of the file."""
    one = int(config.num_key_value_heads)
    heads = [0 if is_conv(config, number) else one for number in range(config.num_hidden_layers)]
    eps = Key("attention.layer_norm_rms_epsilon", "f32", float(config.norm_eps))
    return (
        *instead(sizes(config), eps, Key("attention.head_count_kv", "u32s", heads)),
        *experts(config, config.moe_intermediate_size),
        *scoring(SIGMOID, True),
        Key("leading_dense_block_count", "u32", int(config.num_dense_layers)),
        Key("shortconv.l_cache", "u32", int(config.conv_L_cache)),
        *head_sizes(config),
    )


def complaints(config: Config) -> Iterator[str]:
    """What the graph takes for granted."""
    yield from square_heads(config, ARCH)
    yield from only(config, ARCH, "norm_topk_prob", True)
    yield from only(config, ARCH, "routed_scaling_factor", 1.0)
    if config.conv_L_cache < 2:
        yield f"config key conv_L_cache = {config.conv_L_cache}: llama.cpp's {ARCH!r} needs 2 or more"
    convolved = (is_conv(config, number) for number in range(config.num_hidden_layers))
    yield from both_kinds("layer_types", convolved, ARCH)


LFM2_MOE = Export(ARCH, keys, complaints, {"norm": "token_embd_norm.weight"})
