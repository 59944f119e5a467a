"""llama.cpp's `qwen3`, and `qwen3moe`, which renormalises top-k weights and has no dense layers."""

from __future__ import annotations

from collections.abc import Iterator

from moequant.containers.gguf.families.base import Export, Key, full_attention, only
from moequant.containers.gguf.families.keys import expert_counts, head_sizes, sizes
from moequant.families import Config


def dense_complaints(config: Config) -> Iterator[str]:
    """What `qwen3` takes for granted."""
    yield from only(config, "qwen3", "hidden_act", "silu")
    yield from only(config, "qwen3", "attention_bias", False)
    yield from full_attention(config, "qwen3")


def moe_complaints(config: Config) -> Iterator[str]:
    """What `qwen3moe` takes for granted."""
    arch = "qwen3moe"
    yield from only(config, arch, "hidden_act", "silu")
    yield from only(config, arch, "attention_bias", False)
    yield from only(config, arch, "norm_topk_prob", True)
    yield from only(config, arch, "decoder_sparse_step", 1)
    yield from only(config, arch, "mlp_only_layers", [], None)
    yield from full_attention(config, arch)


def dense_keys(config: Config) -> tuple[Key, ...]:
    """Keys of a dense model."""
    return (*sizes(config), *head_sizes(config))


def moe_keys(config: Config) -> tuple[Key, ...]:
    """Keys of Qwen3-MoE."""
    width = Key("expert_feed_forward_length", "u32", int(config.moe_intermediate_size))
    return (*sizes(config), *expert_counts(config), width, *head_sizes(config))


QWEN3 = Export("qwen3", dense_keys, dense_complaints)
QWEN3_MOE = Export("qwen3moe", moe_keys, moe_complaints)
