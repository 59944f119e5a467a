"""Hunyuan-A13B: q/k norms behind the rotation, a softmax router, a block like an expert for every token."""

from __future__ import annotations

from moequant.families.base import Config, Family, Slot
from moequant.families.blocks import SHAPE_KEYS, Experts, attention, ends, gated_ffn, norm, router, shape
from moequant.values import ModelShape


def used(config: Config) -> int:
    """Experts a token; releases list them layer by layer. The largest, where they differ."""
    told = config.moe_topk
    return max(told) if isinstance(told, list) else int(told)


def model_shape(config: Config) -> ModelShape:
    """The shape of the model."""
    return shape(config, int(config.num_experts), used(config))


def layer(config: Config, number: int) -> tuple[Slot, ...]:
    """One decoder layer."""
    return (
        *attention(number, biased=True),
        norm(number, "attn_q_norm", "self_attn.query_layernorm"),
        norm(number, "attn_k_norm", "self_attn.key_layernorm"),
        router(number, "mlp.gate.wg", "mlp.gate.wg"),
        *Experts(config.intermediate_size).slots(number),
        *gated_ffn(number, "mlp.shared_mlp", "shared"),
    )


UNUSED = frozenset(
    {
        "add_classification_head",
        "cla_share_factor",
        "class_num",
        "dense_list",
        "eod_token_id",
        "im_end_id",
        "im_newline_id",
        "im_start_id",
        "image_token_id",
        "mask_init_id",
        "moe_drop_tokens",
        "moe_random_routing_dropped_token",
        "org_vocab_size",
        "pool_type",
        "skip_cls_token",
        "text_end_id",
        "text_start_id",
        "video_end_id",
        "video_start_id",
    }
)
"""Config keys of releases that say nothing of what text computes."""

HUNYUAN_V1_MOE = Family(
    name="hunyuan_v1_moe",
    classes=("HunYuanMoEV1ForCausalLM",),
    model_type="hunyuan_v1_moe",
    shape=model_shape,
    layer=layer,
    ends=ends,
    known=SHAPE_KEYS
    | UNUSED
    # The widths of experts are those of the stored tensors, whatever these two say.
    | {"num_experts", "num_experts_per_tok", "moe_topk", "moe_intermediate_size", "num_shared_expert"}
    | {"attention_head_dim", "moe_layer_num_skipped"},
    says={
        "norm_type": ("rms",),
        "position_embedding_xdrope": (False,),
        "use_cla": (False,),
        "use_mixed_mlp_moe": (True,),
        "use_mla": (False,),
        "use_qk_norm": (True,),
        "qk_norm": (True,),
        "use_rotary_pos_emb": (True,),
        "norm_topk_prob": (True,),
        "group_limited_greedy": (False,),
    },
)
