"""llama.cpp's `hunyuan-moe` and `hy_v3`."""

from __future__ import annotations

from collections.abc import Iterator

from moequant.containers.gguf.families.base import DRAFTING, Export, Key, only
from moequant.containers.gguf.families.keys import (
    SIGMOID,
    experts,
    head_dim,
    head_sizes,
    head_widths,
    leading_dense,
    rope,
    scoring,
    sizes,
)
from moequant.families import Config
from moequant.families.hunyuan_v1_moe import used


def stretched(config: Config) -> dict[str, object]:
    """Rotary parameters. A fixed `alpha` of NTK scaling is another base, and nothing else."""
    found = dict(config.rope_parameters or {})
    if found.get("rope_type") != "dynamic" or not found.get("alpha"):
        return found
    width = head_dim(config)
    base = float(found["rope_theta"]) * float(found["alpha"]) ** (width / (width - 2))
    return {"rope_type": "default", "rope_theta": base}


def v1_keys(config: Config) -> tuple[Key, ...]:
    """Keys of Hunyuan-A13B."""
    width = int(config.intermediate_size)
    return (
        *sizes(config),
        Key("expert_count", "u32", int(config.num_experts)),
        Key("expert_used_count", "u32", used(config)),
        Key("expert_feed_forward_length", "u32", width),
        Key("expert_shared_feed_forward_length", "u32", width),
        *head_widths(config),
        *rope(config, stretched(config)),
    )


def v1_complaints(config: Config) -> Iterator[str]:
    """What `hunyuan-moe` takes for granted."""
    arch = "hunyuan-moe"
    yield from only(config, arch, "hidden_act", "silu")
    yield from only(config, arch, "attention_bias", False)
    if isinstance(config.moe_topk, list) and len(set(config.moe_topk)) > 1:
        yield f"config key moe_topk: llama.cpp's {arch!r} sends tokens to as many experts in every layer"


def v3_keys(config: Config) -> tuple[Key, ...]:
    """Keys of Hy3."""
    width = int(config.moe_intermediate_size)
    return (
        *sizes(config),
        *experts(config, width, width * int(config.num_shared_experts)),
        *scoring(SIGMOID, True, config.router_scaling_factor),
        Key("leading_dense_block_count", "u32", leading_dense(config)),
        *head_sizes(config),
    )


def v3_complaints(config: Config) -> Iterator[str]:
    """What `hy_v3` takes for granted."""
    arch = "hy_v3"
    yield from only(config, arch, "hidden_act", "silu")
    yield from only(config, arch, "attention_bias", False)
    yield from only(config, arch, "mlp_bias", False)


HUNYUAN_V1_MOE = Export("hunyuan-moe", v1_keys, v1_complaints)
HY_V3 = Export("hy_v3", v3_keys, v3_complaints, {"router.correction": "exp_probs_b"}, drafting=DRAFTING)
