"""llama.cpp's `kimi-linear` and `bailingmoe3`: a layer without key heads is delta attention, the others are
`deepseek2`'s. Decay rates are -exp(A) in the one, exp(A) in the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moequant.containers.gguf.families.base import (
    Drafting,
    Export,
    FileTensor,
    Key,
    both_kinds,
    dense_in_front,
    only,
    other_epsilon,
)
from moequant.containers.gguf.families.deepseek2 import (
    latent_complaints,
    latent_keys,
    latent_sizes,
    split_latent,
)
from moequant.containers.gguf.families.keys import SIGMOID, instead, leading_dense, routing, sizes
from moequant.families import Config
from moequant.families.kda import LINEAR
from moequant.values import Role, Weight
from moequant.values.ops import Exp, NegativeExp, Op

KIMI, BAILING = "kimi-linear", "bailingmoe3"

NAMES = {
    **{f"ssm.conv_{each}": f"ssm_conv1d_{each}.weight" for each in "qkv"},
    **{f"ssm.{each}": f"ssm_{each}.weight" for each in ("f_a", "f_b", "g_a", "g_b")},
    "ssm.out": "attn_output.weight",
}


def recurrent_keys(config: Config) -> tuple[Key, ...]:
    """What both have: one key head in layers of latent attention, none in the others."""
    heads = [0 if kind == LINEAR else 1 for kind in config.layer_types]
    return (
        *instead(sizes(config), Key("attention.head_count_kv", "u32s", heads)),
        *routing(config, SIGMOID, leading_dense(config)),
        Key("ssm.conv_kernel", "u32", int(config.linear_conv_kernel_dim)),
        Key("kda.head_dim", "u32", int(config.linear_head_dim)),
    )


def kimi_keys(config: Config) -> tuple[Key, ...]:
    """Keys of Kimi-Linear, in which nothing is rotated."""
    return (*recurrent_keys(config), *latent_sizes(config))


def bailing_keys(config: Config) -> tuple[Key, ...]:
    """Keys of Ling 3."""
    shared = int(config.moe_intermediate_size) * int(config.n_shared_experts)
    return (
        *recurrent_keys(config),
        *latent_keys(config, BAILING),
        Key("expert_shared_feed_forward_length", "u32", shared),
        Key("kda.safe_gate", "bool", True),
        Key("kda.gate_lower_bound", "f32", float(config.kda_lower_bound)),
    )


def _parts(config: Config, weight: Weight, rates: Op) -> tuple[FileTensor, ...] | None:
    """Latent attention in two, kernels and decay rates with an axis more."""
    if weight.role is Role.CONV:
        channels, kernel = weight.shape
        return (FileTensor(shape=(channels, 1, kernel)),)
    if weight.role is Role.STATE:
        return (FileTensor(ops=(rates,), shape=(weight.numel, 1)),)
    return split_latent(config, weight)


def kimi_parts(config: Config, weight: Weight) -> tuple[FileTensor, ...] | None:
    """Tensors of `kimi-linear`."""
    return _parts(config, weight, NegativeExp())


def bailing_parts(config: Config, weight: Weight) -> tuple[FileTensor, ...] | None:
    """Tensors of `bailingmoe3`."""
    return _parts(config, weight, Exp())


def _complaints(config: Config, arch: str) -> Iterator[str]:
    """What both graphs take for granted."""
    yield from only(config, arch, "linear_num_heads", config.num_attention_heads)
    yield from both_kinds("layer_types", (kind == LINEAR for kind in config.layer_types), arch)


def kimi_complaints(config: Config) -> Iterator[str]:
    """What `kimi-linear` takes for granted."""
    yield from _complaints(config, KIMI)
    yield from only(config, KIMI, "hidden_act", "silu")
    yield from only(config, KIMI, "attention_bias", False)
    yield from only(config, KIMI, "q_lora_rank", None)
    yield from only(config, KIMI, "norm_topk_prob", True)
    yield from dense_in_front(config, KIMI)


def bailing_complaints(config: Config) -> Iterator[str]:
    """What `bailingmoe3` takes for granted."""
    yield from _complaints(config, BAILING)
    yield from latent_complaints(config, BAILING)
    yield from only(config, BAILING, "kda_safe_gate", True)
    if config.kda_lower_bound >= 0:
        yield f"config key kda_lower_bound = {config.kda_lower_bound!r}: a number below 0 was expected"


def warnings(config: Config) -> tuple[str, ...]:
    """What llama.cpp computes a little differently."""
    return other_epsilon(config, "queries, keys and latents")


def latent(config: Config, number: int) -> Mapping[str, Any]:
    """A layer that predicts has latent attention."""
    return {"attention.head_count_kv": 1}


KIMI_LINEAR = Export(KIMI, kimi_keys, kimi_complaints, NAMES, kimi_parts, warnings=warnings, own_head=True)
BAILING_HYBRID = Export(
    BAILING,
    bailing_keys,
    bailing_complaints,
    NAMES | {"nextn.norm": "layer_output_norm.weight"},
    bailing_parts,
    warnings=warnings,
    drafting=Drafting(latent),
    own_head=True,
)
