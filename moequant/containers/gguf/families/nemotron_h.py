"""llama.cpp's `nemotron_h_moe`: a layer's widths say what it is; all norms are called after attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moequant.containers.gguf.families.base import Drafting, Export, FileTensor, Key, both_kinds, only
from moequant.containers.gguf.families.keys import (
    SIGMOID,
    experts,
    groups,
    head_dim,
    instead,
    scoring,
    sizes,
)
from moequant.families import Config
from moequant.families.nemotron_h import ATTENTION, EXPERTS, MAMBA
from moequant.values import Weight
from moequant.values.ops import NegativeExp

ARCH = "nemotron_h_moe"


def keys(config: Config) -> tuple[Key, ...]:
    """Keys of the file."""
    width, eps, head = int(config.moe_intermediate_size), float(config.layer_norm_epsilon), head_dim(config)
    ours = instead(
        sizes(config),
        Key("feed_forward_length", "u32s", _where(config, EXPERTS, width)),
        Key("attention.head_count_kv", "u32s", _where(config, ATTENTION, int(config.num_key_value_heads))),
        Key("attention.layer_norm_rms_epsilon", "f32", eps),
    )
    latent = config.moe_latent_size
    return (
        *ours,
        Key("attention.layer_norm_epsilon", "f32", eps),
        Key("attention.key_length", "u32", head),
        Key("attention.value_length", "u32", head),
        *experts(config, width, config.moe_shared_expert_intermediate_size),
        Key("expert_shared_count", "u32", int(config.n_shared_experts)),
        *scoring(SIGMOID, config.norm_topk_prob, config.routed_scaling_factor),
        *groups(config),
        *([] if latent is None else [Key("moe_latent_size", "u32", int(latent))]),
        Key("ssm.conv_kernel", "u32", int(config.conv_kernel)),
        Key("ssm.inner_size", "u32", int(config.mamba_num_heads * config.mamba_head_dim)),
        Key("ssm.state_size", "u32", int(config.ssm_state_size)),
        Key("ssm.time_step_rank", "u32", int(config.mamba_num_heads)),
        Key("ssm.group_count", "u32", int(config.n_groups)),
    )


def _where(config: Config, kind: str, size: int) -> list[int]:
    """A size in layers of one kind, 0 in others."""
    return [size if each == kind else 0 for each in config.layers_block_type]


def mamba2_tensors(config: Config, weight: Weight) -> tuple[FileTensor, ...] | None:
    """Rates and skips as columns, the norm by groups."""
    heads = weight.shape[0] if len(weight.shape) == 1 else 0
    match weight.name.removeprefix(f"layers.{weight.layer}."):
        case "ssm.a":
            return (FileTensor("ssm_a", (NegativeExp(),), shape=(heads, 1)),)
        case "ssm.d":
            return (FileTensor("ssm_d", shape=(heads, 1)),)
        case "ssm.norm":
            groups = int(config.n_groups)
            return (FileTensor("ssm_norm.weight", shape=(groups, heads // groups)),)
    return None


def complaints(config: Config) -> Iterator[str]:
    """What the graph takes for granted."""
    yield from only(config, ARCH, "mlp_hidden_act", "relu2")
    yield from only(config, ARCH, "mamba_hidden_act", "silu")
    yield from only(config, ARCH, "mlp_bias", False)
    yield from only(config, ARCH, "use_bias", False)
    yield from only(config, ARCH, "use_conv_bias", True)
    if "mlp" in config.layers_block_type or EXPERTS not in config.layers_block_type:
        yield f"config key layers_block_type: llama.cpp's {ARCH!r} has experts in every feed-forward layer"
    if config.mamba_num_heads % config.n_groups:
        yield (
            f"config key mamba_num_heads = {config.mamba_num_heads}: a multiple of n_groups = "
            f"{config.n_groups} was expected"
        )
    mixers = (kind == MAMBA for kind in config.layers_block_type if kind in (MAMBA, ATTENTION))
    yield from both_kinds("layers_block_type", mixers, ARCH)


def warnings(config: Config) -> tuple[str, ...]:
    """What llama.cpp computes a little differently."""
    if config.time_step_min <= 0:
        return ()
    return (
        f"transformers raises time steps of Mamba layers to time_step_min = {config.time_step_min:g} at "
        "least, llama.cpp does not: logits may differ a little",
    )


def both_blocks(config: Config, number: int) -> Mapping[str, Any]:
    """A layer that predicts has attention and experts."""
    return {
        "feed_forward_length": int(config.moe_intermediate_size),
        "attention.head_count_kv": int(config.num_key_value_heads),
    }


NEMOTRON_H = Export(
    ARCH,
    keys,
    complaints,
    {"ffn_norm": "attn_norm.weight"},
    mamba2_tensors,
    warnings=warnings,
    drafting=Drafting(both_blocks),
)
