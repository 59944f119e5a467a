"""Nemotron-H with experts (Nemotron 3): each layer is one block, Mamba-2, attention without positions or
experts without gates, which may work on a narrower latent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from moequant.families.base import PREDICTION, Config, Family, Slot
from moequant.families.blocks import (
    SHAPE_KEYS,
    Experts,
    correction,
    linear,
    moe_shape,
    norm,
    plain_ffn,
    released,
    router,
    seen,
)
from moequant.families.blocks import ends as named_ends
from moequant.families.mamba import mamba2
from moequant.families.predictions import count, like, parts
from moequant.values import Role

MAMBA, ATTENTION, EXPERTS = "linear_attention", "full_attention", "moe"
"""Kinds of layers; the fourth is a plain feed-forward block."""


def layer(config: Config, number: int) -> tuple[Slot, ...]:
    """One decoder layer: a norm, and one block."""
    return released(_layer(config, number), "model.layers.", "backbone.layers.")


def _layer(config: Config, number: int) -> tuple[Slot, ...]:
    match config.layers_block_type[number]:
        case "linear_attention":
            return (norm(number, "attn_norm", "norm"), *mamba2(number, "mixer"))
        case "full_attention":
            return (norm(number, "attn_norm", "norm"), *_attention(number))
        case "moe":
            return (norm(number, "ffn_norm", "norm"), *_experts(config, number))
    return (norm(number, "ffn_norm", "norm"), *plain_ffn(number, "mixer"))


def _attention(number: int) -> tuple[Slot, ...]:
    into = seen(number, "attn.input", "mixer.q_proj")
    out = seen(number, "attn.output", "mixer.o_proj")
    return (
        *linear(number, "attn_q", Role.ATTN_Q, "mixer.q_proj", into),
        *linear(number, "attn_k", Role.ATTN_K, "mixer.k_proj", into),
        *linear(number, "attn_v", Role.ATTN_V, "mixer.v_proj", into),
        *linear(number, "attn_out", Role.ATTN_OUT, "mixer.o_proj", out, adds=True),
    )


def _experts(config: Config, number: int) -> tuple[Slot, ...]:
    """Router, routed and shared experts; a latent's way back adds to the stream in the place of experts."""
    module, narrow = "mixer.experts", config.moe_latent_size is not None
    experts = Experts(config.moe_intermediate_size, module, module=module, gated=False)
    down: tuple[Slot, ...] = ()
    up: tuple[Slot, ...] = ()
    if narrow:
        into = seen(number, "latent.input", "mixer.fc1_latent_proj")
        out = seen(number, "latent.output", "mixer.fc2_latent_proj")
        down = linear(number, "latent.down", Role.LATENT_DOWN, "mixer.fc1_latent_proj", into)
        up = linear(number, "latent.up", Role.LATENT_UP, "mixer.fc2_latent_proj", out, adds=True)
    return (
        router(number, "mixer.gate", "mixer.gate"),
        correction(number, "mixer.gate.e_score_correction_bias"),
        *down,
        *experts.slots(number, adds=not narrow),
        *up,
        *plain_ffn(number, "mixer.shared_experts", "shared"),
    )


def ends(config: Config) -> tuple[Slot, ...]:
    """Embedding, final norm and head."""
    return released(named_ends(config, "model.norm_f", "model.embeddings"), "model.", "backbone.")


def prediction_layers(config: Config) -> Mapping[str, str]:
    """What releases may hold beside the layers that transformers runs."""
    return {r"mtp\..*": PREDICTION}


PARTS = {
    "join": "mtp.layers.0.eh_proj",
    "embedding_norm": "mtp.layers.0.enorm",
    "hidden_norm": "mtp.layers.0.hnorm",
    "norm": "mtp.layers.1.final_layernorm",
}
"""What is around the two blocks that predict."""


def predictions(config: Config) -> tuple[tuple[Slot, ...], ...]:
    """Attention and then experts, one layer in files; other patterns are not known there."""
    kinds = list(config.layers_block_type)
    told = list(getattr(config, "mtp_layers_block_type", None) or (ATTENTION, EXPERTS))
    if count(config) != 1 or told != [ATTENTION, EXPERTS] or not {*told} <= {*kinds}:
        return ()
    last = int(config.num_hidden_layers)
    attention, experts = (
        like(layer(config, twin), twin, last, f"mtp.layers.{part}.")
        for part, kind in enumerate(told)
        for twin in (len(kinds) - 1 - kinds[::-1].index(kind),)
    )
    between = {f"layers.{last}.ffn_norm": f"layers.{last}.attn_post_norm"}
    renamed = (replace(slot, name=between.get(slot.name, slot.name)) for slot in experts)
    return ((*attention, *renamed, *parts(last, PARTS)),)


NEMOTRON_H = Family(
    name="nemotron_h",
    classes=("NemotronHForCausalLM",),
    model_type="nemotron_h",
    shape=moe_shape,
    layer=layer,
    ends=ends,
    known=SHAPE_KEYS
    | {
        "layers_block_type",
        "hybrid_override_pattern",
        "num_local_experts",
        "n_routed_experts",
        "n_shared_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "moe_shared_expert_intermediate_size",
        "moe_latent_size",
        "routed_scaling_factor",
        "norm_topk_prob",
        "n_group",
        "topk_group",
        "layer_norm_epsilon",
        "mlp_hidden_act",
        "mamba_hidden_act",
        "mamba_num_heads",
        "mamba_head_dim",
        "mamba_n_groups",
        "n_groups",
        "ssm_state_size",
        "conv_kernel",
        "mamba_d_conv",
        "use_conv_bias",
        "mamba_conv_bias",
        "use_bias",
        "time_step_min",
        "mamba_dt_min",
        "num_nextn_predict_layers",
        "mtp_layers_block_type",
        "mtp_hybrid_override_pattern",
        # What the class does not use: heads say how wide layers are, and nothing is rotated.
        "attention_head_dim",
        "expand",
        "mamba_expand",
        "mamba_proj_bias",
        "norm_eps",
        "partial_rotary_factor",
        # Of training, and how it is computed, not what.
        "chunk_size",
        "mamba_chunk_size",
        "mamba_dt_init_floor",
        "mamba_dt_limit",
        "mamba_dt_max",
        "mamba_ssm_cache_dtype",
        "moe_shared_expert_overlap",
        "num_logits_to_keep",
        "rescale_prenorm_residual",
        "residual_in_fp32",
        "time_step_floor",
        "time_step_limit",
        "time_step_max",
        "use_mamba_kernels",
    },
    skipped=prediction_layers,
    predictions=predictions,
)
