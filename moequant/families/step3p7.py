"""Step 3.5 and 3.7: windows and another number of heads in most layers, a gate for every head, experts whose
activations are clamped; dense layers first, a sigmoid router whose correction only chooses, a shared expert.
Step 3.7 also sees; the text model alone is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from moequant.families.base import Config, Family, Get, Slot
from moequant.families.blocks import (
    SHAPE_KEYS,
    Experts,
    attention,
    correction,
    ends,
    gated_ffn,
    linear,
    released,
    router,
    seen,
)
from moequant.families.deepseek_v3 import prediction_layers
from moequant.families.predictions import APPENDED, count, last_of, like, parts
from moequant.values import ModelShape, Role


def heads(config: Config, number: int) -> int:
    """Query heads of a layer: those with a window have a number of their own."""
    return int(config.per_layer_config[number].num_attention_heads)


def shape(config: Config) -> ModelShape:
    """The shape of the model; heads are those of the first layer."""
    return ModelShape(
        layers=int(config.num_hidden_layers),
        hidden=int(config.hidden_size),
        vocab=int(config.vocab_size),
        context=int(config.max_position_embeddings),
        heads=heads(config, 0),
        kv_heads=int(config.num_key_value_heads),
        head_dim=int(config.head_dim),
        experts=int(config.n_routed_experts),
        experts_used=int(config.num_experts_per_tok),
        tied=bool(config.tie_word_embeddings),
    )


def layer(config: Config, number: int) -> tuple[Slot, ...]:
    """One decoder layer. A multiplier may stand behind the routed experts' sum."""
    return (*_front(number), *_behind(config, number))


def _front(number: int) -> tuple[Slot, ...]:
    """Attention, with a gate for every head."""
    into = seen(number, "attn.input", "self_attn.q_proj")
    return (
        *attention(number, qk_norm=True, biased=True),
        *linear(number, "attn_gate", Role.ATTN_GATE, "self_attn.g_proj", into),
    )


def _behind(config: Config, number: int) -> tuple[Slot, ...]:
    """The feed-forward block."""
    if config.mlp_layer_types[number] != "sparse":
        return gated_ffn(number)
    shared = gated_ffn(number, "mlp.shared_experts", "shared")
    return (
        router(number, "moe.gate"),
        correction(number, stored="moe.router_bias"),
        *_experts(config, number),
        *released(shared, ".mlp.shared_experts.", ".share_expert."),
    )


def _experts(config: Config, number: int) -> tuple[Slot, ...]:
    """Gate, up and down, each a stack of its own in releases: [E, f, h] twice and [E, h, f]."""
    slots = Experts(config.moe_intermediate_size, "").slots(number, config.moe_router_scaling_factor == 1)
    at = f"model.layers.{number}.moe"
    return tuple(
        replace(slot, get=(Get(f"{at}.{slot.role.value}_proj.weight"), *slot.ways)) for slot in slots
    )


AROUND = {
    **APPENDED,
    "norm": "transformer.shared_head.norm",
    "head": "transformer.shared_head.output",
}
"""What is around a layer that predicts."""


def predictions(config: Config) -> tuple[tuple[Slot, ...], ...]:
    """Layers numbered on behind the last; attention and feed-forward block may be like different layers'."""
    first, found = int(config.num_hidden_layers), list[tuple[Slot, ...]]()
    for index in range(count(config)):
        number, at = first + index, f"model.layers.{first + index}."
        heads_like = last_of(config.layer_types, predicted_kind(config, index))
        kinds = config.mtp_mlp_layer_types or ["dense"] * count(config)
        ffn_like = last_of(config.mlp_layer_types, kinds[index])
        names = {ours: at + theirs for ours, theirs in AROUND.items()}
        found.append(
            (
                *like(_front(heads_like), heads_like, number, at),
                *like(_behind(config, ffn_like), ffn_like, number, at),
                *parts(number, names),
            )
        )
    return tuple(found)


def predicted_kind(config: Config, index: int) -> str:
    """The kind of a layer that predicts."""
    kinds = config.mtp_layer_types or ["full_attention"] * count(config)
    return str(kinds[index])


def skipped(config: Config) -> Mapping[str, str]:
    """What text does not need."""
    eye = r"(model\.)?(vision_model|vit_large_projector|multi_modal_projector)\..*"
    return {eye: "vision: only text is converted", **prediction_layers(config)}


STEP3P7 = Family(
    name="step3p7",
    classes=("Step3p7ForConditionalGeneration", "Step3p5ForCausalLM"),
    model_type="step3p5",
    shape=shape,
    layer=layer,
    ends=ends,
    # The class makes the model that the release has, or the shapes of stored tensors do not go; what it
    # makes of the keys of releases (heads, layers, rotations) is what the containers read.
    known=SHAPE_KEYS
    | {
        "attention_other_setting",
        "max_seq_len",
        "mlp_layer_types",
        "moe_intermediate_size",
        "moe_layers_enum",
        "moe_router_scaling_factor",
        "mtp_layer_types",
        "mtp_mlp_layer_types",
        "n_routed_experts",
        "num_attention_groups",
        "num_experts_per_tok",
        "num_local_experts",
        "num_nextn_predict_layers",
        "num_sliding_attention_heads",
        "partial_rotary_factors",
        "per_layer_config",
        "query_pre_attn_scalar",
        "share_expert_dim",
        "swiglu_limits",
        "swiglu_limits_shared",
    },
    says={
        "att_impl_type": ("GQA",),
        "moe_every_n_layer": (1,),
        "moe_layer_offset": (0,),
        "moe_router_activation": ("sigmoid",),
        "need_fp32_gate": (True,),
        "norm_expert_weight": (True,),
        "use_head_wise_attn_gate": (True,),
        "use_moe": (True,),
        "use_moe_router_bias": (True,),
        "use_qk_norm": (True, False),  # the releases say False and have the norms
        "yarn_only_types": (["full_attention"],),
        "zero_centered": (True,),
    },
    skipped=skipped,
    predictions=predictions,
    renamed=(("model.language_model.", "model."),),
)
