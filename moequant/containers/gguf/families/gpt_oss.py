"""llama.cpp's `gpt-oss`: sinks, a window in every other layer, experts with biases and a clamped gate."""

from __future__ import annotations

from collections.abc import Iterator

from moequant.containers.gguf.families.base import Export, Key, only, some_window
from moequant.containers.gguf.families.keys import expert_counts, head_widths, rope, sizes
from moequant.families import Config

ARCH = "gpt-oss"


def keys(config: Config) -> tuple[Key, ...]:
    """Keys of the file. The pattern of windows is written out, though the graph assumes the usual one."""
    scaling = {key: value for key, value in (config.rope_parameters or {}).items() if key != "truncate"}
    windows = [kind == "sliding_attention" for kind in config.layer_types]
    return (
        *sizes(config),
        *expert_counts(config),
        Key("expert_feed_forward_length", "u32", int(config.intermediate_size)),
        Key("attention.sliding_window", "u32", int(config.sliding_window or 0)),
        Key("attention.sliding_window_pattern", "bools", windows),
        *head_widths(config),
        *rope(config, scaling),  # of truncate, a warning says what it costs
    )


def complaints(config: Config) -> Iterator[str]:
    """What the graph takes for granted."""
    yield from only(config, ARCH, "hidden_act", "silu")
    yield from only(config, ARCH, "attention_bias", True)
    yield from only(config, ARCH, "swiglu_alpha", 1.702)
    yield from only(config, ARCH, "swiglu_limit", 7.0)
    yield from some_window(config, ARCH)


def warnings(config: Config) -> tuple[str, ...]:
    """What llama.cpp computes otherwise."""
    rope = config.rope_parameters or {}
    if rope.get("rope_type") == "yarn" and rope.get("truncate") is False:
        return (
            "llama.cpp rounds the bounds of YaRN to whole dimensions (it ignores truncate: false in "
            "config.json): logits differ from transformers', by more the longer the text; every GGUF file of "
            "this model has that",
        )
    return ()


GPT_OSS = Export(
    ARCH, keys, complaints, names={"ffn_norm": "post_attention_norm.weight"}, warnings=warnings, own_head=True
)
