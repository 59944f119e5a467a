"""Gemma 4, alone or with its towers: norms before and after every block, a dense branch beside the experts,
a router with scales of its own, wider heads in layers of full attention, whose values may be the keys.

What blocks give is normalised before it is added to the residual stream, so nothing `adds` as it is.
"""

from __future__ import annotations

from collections.abc import Mapping

from moequant.errors import FamilyError
from moequant.families.base import Config, Family, Slot
from moequant.families.blocks import SHAPE_KEYS, Experts, ends, gated_ffn, linear, norm, seen
from moequant.values import ModelShape, Role


def shape(config: Config) -> ModelShape:
    """The shape of the model; heads are those of the first layer, which most are like. FamilyError for those
    with per-layer embeddings."""
    if width := int(config.hidden_size_per_layer_input or 0):
        raise FamilyError(
            f"gemma4: config key hidden_size_per_layer_input = {width}: models with an embedding for every "
            "layer (E2B, E4B) are not supported yet"
        )
    first = config.per_layer_config[0]
    experts = bool(config.enable_moe_block)
    return ModelShape(
        layers=int(config.num_hidden_layers),
        hidden=int(config.hidden_size),
        vocab=int(config.vocab_size),
        context=int(config.max_position_embeddings),
        heads=int(config.num_attention_heads),
        kv_heads=int(first.num_key_value_heads),
        head_dim=int(first.head_dim),
        experts=int(config.num_experts) if experts else 0,
        experts_used=int(config.top_k_experts) if experts else 0,
        tied=bool(config.tie_word_embeddings),
    )


def layer(config: Config, number: int) -> tuple[Slot, ...]:
    """One decoder layer."""
    scale = Slot(f"layers.{number}.scale", Role.SCALE, f"model.layers.{number}.layer_scalar")
    return (
        *_attention(config, number),
        norm(number, "ffn_norm", "pre_feedforward_layernorm"),
        *gated_ffn(number, adds=False),
        *(_experts(config, number) if config.enable_moe_block else ()),
        norm(number, "ffn_post_norm", "post_feedforward_layernorm"),
        scale,
    )


def _attention(config: Config, number: int) -> tuple[Slot, ...]:
    into = seen(number, "attn.input", "self_attn.q_proj")
    out = seen(number, "attn.output", "self_attn.o_proj")
    keys_only = config.attention_k_eq_v and config.layer_types[number] == "full_attention"
    return (
        norm(number, "attn_norm", "input_layernorm"),
        *linear(number, "attn_q", Role.ATTN_Q, "self_attn.q_proj", into),
        norm(number, "attn_q_norm", "self_attn.q_norm"),
        *linear(number, "attn_k", Role.ATTN_K, "self_attn.k_proj", into),
        norm(number, "attn_k_norm", "self_attn.k_norm"),
        *(() if keys_only else linear(number, "attn_v", Role.ATTN_V, "self_attn.v_proj", into)),
        *linear(number, "attn_out", Role.ATTN_OUT, "self_attn.o_proj", out),
        norm(number, "attn_post_norm", "post_attention_layernorm"),
    )


def _experts(config: Config, number: int) -> tuple[Slot, ...]:
    """The router sees the residual stream, normalised without a weight and scaled; experts see it through a
    norm of their own."""
    own, router = f"layers.{number}", f"model.layers.{number}.router"
    kept = Experts(config.moe_intermediate_size, "", module="experts")
    return (
        norm(number, "ffn_post_norm_1", "post_feedforward_layernorm_1"),
        Slot(f"{own}.router", Role.ROUTER, f"{router}.proj.weight"),
        Slot(f"{own}.router.scale", Role.SCALE, f"{router}.scale"),
        Slot(f"{own}.experts.scale", Role.SCALE, f"{router}.per_expert_scale"),
        norm(number, "ffn_norm_2", "pre_feedforward_layernorm_2"),
        *kept.slots(number, adds=False),
        norm(number, "ffn_post_norm_2", "post_feedforward_layernorm_2"),
    )


def towers(config: Config) -> Mapping[str, str]:
    """What only images and sounds cross."""
    return {
        r"model\.(vision_tower|embed_vision)\..*": "vision: only text is converted",
        r"model\.(audio_tower|embed_audio)\..*": "audio: only text is converted",
    }


GEMMA4 = Family(
    name="gemma4",
    classes=("Gemma4ForConditionalGeneration", "Gemma4ForCausalLM"),
    model_type="gemma4_text",
    shape=shape,
    layer=layer,
    ends=ends,
    known=SHAPE_KEYS
    | {
        "hidden_activation",
        "global_head_dim",
        "num_global_key_value_heads",
        "per_layer_config",
        "attention_k_eq_v",
        "enable_moe_block",
        "num_experts",
        "top_k_experts",
        "moe_intermediate_size",
        "final_logit_softcapping",
        "use_bidirectional_attention",
        "hidden_size_per_layer_input",
        "vocab_size_per_layer_input",
    },
    skipped=towers,
    renamed=(("model.language_model.", "model."),),
)
