"""Granite's mixtures of experts: multipliers on embeddings, attention, residuals and logits; gate and up are
one matrix, of experts and of the shared expert alike.

What blocks give is multiplied before it is added to the residual stream, so nothing `adds` as it is.
"""

from __future__ import annotations

from moequant.families.base import Config, Family, Slot
from moequant.families.blocks import (
    SHAPE_KEYS,
    Experts,
    attention,
    ends,
    linear,
    moe_shape,
    norm,
    router,
    seen,
    shape,
)
from moequant.families.mamba import mamba2
from moequant.values import ModelShape, Role

MULTIPLIERS = (
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "logits_scaling",
)

KNOWN = SHAPE_KEYS | {*MULTIPLIERS, "num_local_experts", "num_experts_per_tok"}

SAYS = {"init_method": ("mup",), "normalization_function": ("rmsnorm",)}


def experts(config: Config, number: int) -> tuple[Slot, ...]:
    """Router and experts."""
    at = "block_sparse_moe"
    fused = (f"{at}.input_linear.weight", f"{at}.output_linear.weight")
    kept = Experts(config.intermediate_size, "", module=f"{at}.experts", fused=fused)
    return (router(number, f"{at}.router.layer", f"{at}.router"), *kept.slots(number, adds=False))


def shared(config: Config, number: int) -> tuple[Slot, ...]:
    """The expert that every token crosses, if there is one."""
    if not config.shared_intermediate_size:
        return ()
    into = seen(number, "shared.input", "shared_mlp.input_linear")
    inner = seen(number, "shared.inner", "shared_mlp.output_linear")
    return (
        *linear(number, "shared.gate_up", Role.SHARED_GATE_UP, "shared_mlp.input_linear", into),
        *linear(number, "shared.down", Role.SHARED_DOWN, "shared_mlp.output_linear", inner),
    )


def hybrid_shape(config: Config) -> ModelShape:
    """The shape of a model that may be dense."""
    return moe_shape(config) if config.num_local_experts else shape(config)


def layer(config: Config, number: int) -> tuple[Slot, ...]:
    """One decoder layer of a model without shared experts."""
    return (*attention(number, biased=config.attention_bias, adds=False), *experts(config, number))


def shared_layer(config: Config, number: int) -> tuple[Slot, ...]:
    """One decoder layer of a model that may have them."""
    return (*layer(config, number), *shared(config, number))


def window_layer(config: Config, number: int) -> tuple[Slot, ...]:
    """The same with sinks in its attention."""
    at = f"model.layers.{number}.self_attn.sinks"
    return (*shared_layer(config, number), Slot(f"layers.{number}.attn_sinks", Role.SINKS, at))


def hybrid_layer(config: Config, number: int) -> tuple[Slot, ...]:
    """A layer with attention or a Mamba-2 mixer, and experts unless the model is dense."""
    blocks = (*(experts(config, number) if config.num_local_experts else ()), *shared(config, number))
    if config.layer_types[number] != "linear_attention":
        return (*attention(number, biased=config.attention_bias, adds=False), *blocks)
    return (
        norm(number, "attn_norm", "input_layernorm"),
        *mamba2(number, "mamba", adds=False),
        norm(number, "ffn_norm", "post_attention_layernorm"),
        *blocks,
    )


GRANITE_MOE = Family(
    name="granitemoe",
    classes=("GraniteMoeForCausalLM",),
    model_type="granitemoe",
    shape=moe_shape,
    layer=layer,
    ends=ends,
    known=KNOWN,
    says=SAYS,
)

GRANITE_MOE_SHARED = Family(
    name="granitemoeshared",
    classes=("GraniteMoeSharedForCausalLM",),
    model_type="granitemoeshared",
    shape=moe_shape,
    layer=shared_layer,
    ends=ends,
    known=KNOWN | {"shared_intermediate_size"},
    says=SAYS,
)

GRANITE_MOE_SWA = Family(
    name="granitemoe_swa",
    classes=("GraniteMoeSWAForCausalLM",),
    model_type="granitemoe_swa",
    shape=moe_shape,
    layer=window_layer,
    ends=ends,
    known=KNOWN | {"shared_intermediate_size", "layer_rope_theta"},
    says=SAYS,
)

GRANITE_MOE_HYBRID = Family(
    name="granitemoehybrid",
    classes=("GraniteMoeHybridForCausalLM",),
    model_type="granitemoehybrid",
    shape=hybrid_shape,
    layer=hybrid_layer,
    ends=ends,
    known=KNOWN
    | {
        "shared_intermediate_size",
        "position_embedding_type",
        "mamba_n_heads",
        "mamba_n_groups",
        "mamba_d_state",
        "mamba_d_head",
        "mamba_d_conv",
        "mamba_expand",
        "mamba_chunk_size",
        "mamba_conv_bias",
        "mamba_proj_bias",
        "time_step_limit",
    },
    says=SAYS,
)
