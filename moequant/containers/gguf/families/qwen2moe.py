"""llama.cpp's `qwen2moe`: it does not renormalise top-k weights, and every layer has experts."""

from __future__ import annotations

from collections.abc import Iterator

from moequant.containers.gguf.families.base import Export, FileTensor, Key, full_attention, only, square_heads
from moequant.containers.gguf.families.keys import expert_counts, head_sizes, sizes
from moequant.families import Config
from moequant.values import Role, Weight

ARCH = "qwen2moe"


def shared_gate(config: Config, weight: Weight) -> tuple[FileTensor, ...] | None:
    """The gate of the shared expert [1, h] is a vector in the file."""
    return (FileTensor(shape=(weight.n_in,)),) if weight.role is Role.SHARED_ROUTER else None


def expert_widths(config: Config) -> tuple[Key, ...]:
    """Widths of a routed expert and of the shared one."""
    return (
        Key("expert_feed_forward_length", "u32", int(config.moe_intermediate_size)),
        Key("expert_shared_feed_forward_length", "u32", int(config.shared_expert_intermediate_size)),
    )


def keys(config: Config) -> tuple[Key, ...]:
    """Keys of Qwen2-MoE."""
    return (*sizes(config), *expert_counts(config), *expert_widths(config), *head_sizes(config))


def complaints(config: Config) -> Iterator[str]:
    """What the graph takes for granted."""
    yield from square_heads(config, ARCH)
    yield from only(config, ARCH, "hidden_act", "silu")
    yield from only(config, ARCH, "norm_topk_prob", False)
    yield from only(config, ARCH, "decoder_sparse_step", 1)
    yield from only(config, ARCH, "mlp_only_layers", [], None)
    yield from full_attention(config, ARCH)


QWEN2_MOE = Export(ARCH, keys, complaints, cut=shared_gate, own_head=True)
