"""llama.cpp's `granitemoe`, `granite_swa` and `granitehybrid`: multipliers are keys, q and k rotate pairs."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf

from moequant.containers.gguf.families.base import (
    Export,
    FileTensor,
    Key,
    both_kinds,
    full_attention,
    only,
    some_window,
)
from moequant.containers.gguf.families.keys import (
    LLAMA3,
    LONG,
    expert_counts,
    head_sizes,
    rope_factors,
    sizes,
    window,
)
from moequant.containers.gguf.families.llama import pairs
from moequant.families import Config
from moequant.values import Role, Weight
from moequant.values.ops import NegativeExp, Part

MOE, WINDOW, HYBRID = "granitemoe", "granite_swa", "granitehybrid"


def halves(config: Config, weight: Weight) -> tuple[FileTensor, ...] | None:
    """Rotary pairs, and gate and up of the shared expert one by one."""
    if weight.role is not Role.SHARED_GATE_UP:
        return pairs(config, weight)
    width = config.shared_intermediate_size
    gate, up = (Part(0, width),), (Part(width, 2 * width),)
    return (
        FileTensor("ffn_gate_shexp.weight", gate, "shared.gate", Role.SHARED_GATE),
        FileTensor("ffn_up_shexp.weight", up, "shared.up", Role.SHARED_UP),
    )


def hybrid(config: Config, weight: Weight) -> tuple[FileTensor, ...] | None:
    """The same; the shared expert of a dense model is its feed-forward block. A state's decay is stored as
    it is used, and vectors of a mixer stand in columns."""
    own, (rows, *_) = weight.name.removeprefix(f"layers.{weight.layer}."), weight.shape
    match own:
        case "shared.gate_up" if not config.num_local_experts:
            gate, up = (Part(0, rows // 2),), (Part(rows // 2, rows),)
            return (
                FileTensor("ffn_gate.weight", gate, "ffn.gate", Role.DENSE_GATE),
                FileTensor("ffn_up.weight", up, "ffn.up", Role.DENSE_UP),
            )
        case "shared.down" if not config.num_local_experts:
            return (FileTensor("ffn_down.weight", (), "ffn.down", Role.DENSE_DOWN),)
        case "ssm.a":
            return (FileTensor("ssm_a", (NegativeExp(),), shape=(rows, 1)),)
        case "ssm.d":
            return (FileTensor("ssm_d", shape=(rows, 1)),)
        case "ssm.norm":
            groups = config.mamba_n_groups
            return (FileTensor("ssm_norm.weight", shape=(groups, rows // groups)),)
    return halves(config, weight)


def keys(config: Config, in_tensors: tuple[str, ...] = (LLAMA3, LONG)) -> tuple[Key, ...]:
    """Keys of a model; experts are as wide as the key says that a dense block is."""
    return (
        *sizes(config),
        *(expert_counts(config) if config.num_local_experts else ()),
        *_shared(config),
        Key("attention.scale", "f32", float(config.attention_multiplier)),
        Key("embedding_scale", "f32", float(config.embedding_multiplier)),
        Key("residual_scale", "f32", float(config.residual_multiplier)),
        Key("logit_scale", "f32", float(config.logits_scaling)),
        *head_sizes(config, in_tensors=in_tensors),
    )


def _shared(config: Config) -> tuple[Key, ...]:
    width = int(getattr(config, "shared_intermediate_size", 0))
    if not width or not config.num_local_experts:
        return ()
    return (Key("expert_shared_feed_forward_length", "u32", width),)


def window_keys(config: Config) -> tuple[Key, ...]:
    """Which layers look at a window, and which rotate at all; every layer that does has one base."""
    bases = [theta for theta in config.layer_rope_theta if theta]
    found = [
        Key(key.name, key.kind, float(bases[0])) if bases and key.name == "rope.freq_base" else key
        for key in keys(config)
    ]
    windows = [kind == "sliding_attention" for kind in config.layer_types]
    return (
        *found,
        window(config),
        Key("attention.sliding_window_pattern", "bools", windows),
        Key("attention.rope_pattern", "bools", [bool(theta) for theta in config.layer_rope_theta]),
    )


def hybrid_keys(config: Config) -> tuple[Key, ...]:
    """Keys of a hybrid: a layer without key heads is a mixer."""
    heads = [0 if _is_mixer(kind) else int(config.num_key_value_heads) for kind in config.layer_types]
    width = config.intermediate_size if config.num_local_experts else config.shared_intermediate_size
    changed = {"attention.head_count_kv": ("u32s", heads), "feed_forward_length": ("u32", int(width))}
    found = [Key(k.name, *changed[k.name]) if k.name in changed else k for k in keys(config, (LLAMA3,))]  # type: ignore[arg-type]
    return (
        *found,
        Key("ssm.conv_kernel", "u32", int(config.mamba_d_conv)),
        Key("ssm.state_size", "u32", int(config.mamba_d_state)),
        Key("ssm.group_count", "u32", int(config.mamba_n_groups)),
        Key("ssm.inner_size", "u32", int(config.mamba_expand * config.hidden_size)),
        Key("ssm.time_step_rank", "u32", int(config.mamba_n_heads)),
        Key("rope.scaling.finetuned", "bool", config.position_embedding_type == "rope"),
    )


def _is_mixer(kind: str) -> bool:
    return kind == "linear_attention"


def complaints(config: Config) -> Iterator[str]:
    """What `granitemoe` takes for granted."""
    yield from only(config, MOE, "hidden_act", "silu")
    yield from full_attention(config, MOE)


def window_complaints(config: Config) -> Iterator[str]:
    """What `granite_swa` takes for granted."""
    yield from only(config, WINDOW, "hidden_act", "silu")
    yield from some_window(config, WINDOW)
    bases = sorted({theta for theta in config.layer_rope_theta if theta})
    if not bases:
        yield f"config key layer_rope_theta: llama.cpp's {WINDOW!r} needs layers with a rotation"
    if len(bases) > 1:
        yield f"config key layer_rope_theta has {bases}: llama.cpp's {WINDOW!r} rotates with one base"


def hybrid_complaints(config: Config) -> Iterator[str]:
    """What `granitehybrid` takes for granted."""
    yield from only(config, HYBRID, "hidden_act", "silu")
    yield from only(config, HYBRID, "mamba_expand", 2)
    yield from only(config, HYBRID, "mamba_proj_bias", False)
    yield from only(config, HYBRID, "time_step_limit", (0.0, inf), None)
    yield from only(config, HYBRID, "mamba_conv_bias", True)
    yield from both_kinds("layer_types", map(_is_mixer, config.layer_types), HYBRID)


NAMES = {"shared.gate_up": "ffn_up_shexp.weight"}
"""`granite_swa` keeps both in one tensor."""

GRANITE_MOE = Export(MOE, keys, complaints, cut=halves, computed=rope_factors)
GRANITE_MOE_SWA = Export(WINDOW, window_keys, window_complaints, NAMES, pairs, rope_factors)
GRANITE_MOE_HYBRID = Export(HYBRID, hybrid_keys, hybrid_complaints, cut=hybrid, computed=rope_factors)
