"""ERNIE-4.5: dense layers first, a softmax router whose correction only chooses, shared experts. Releases for
Paddle have names and fused matrices of their own, in which rows are inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from moequant.families.base import PREDICTION, Config, Family, Get, Slot
from moequant.families.blocks import (
    SHAPE_KEYS,
    Experts,
    attention,
    correction,
    gated_ffn,
    moe_shape,
    router,
)
from moequant.families.blocks import ends as plain_ends
from moequant.values import Role
from moequant.values.ops import Op, Ops, Part, Squeezed, Transposed


def is_sparse(config: Config, number: int) -> bool:
    """Whether a layer has experts."""
    inside = config.moe_layer_start_index <= number <= config.moe_layer_end_index
    return bool(inside and (number + 1) % config.moe_layer_interval == 0)


def layer(config: Config, number: int) -> tuple[Slot, ...]:
    """One decoder layer. The correction is stored as one row."""
    parts = _parts(config)
    return tuple(_also_paddle(slot, parts.get(slot.role, ())) for slot in _layer(config, number))


def _layer(config: Config, number: int) -> tuple[Slot, ...]:
    if not is_sparse(config, number):
        return (*attention(number), *gated_ffn(number))
    statics = "moe_statics.e_score_correction_bias"
    shared = gated_ffn(number, "mlp.shared_experts", "shared") if config.moe_num_shared_experts else ()
    return (
        *attention(number),
        router(number),
        correction(number, f"mlp.gate.{statics}", f"mlp.{statics}", (Squeezed(-2),)),
        *Experts(config.moe_intermediate_size).slots(number),
        *shared,
    )


def _parts(config: Config) -> Mapping[Role, Ops]:
    """Rows of Paddle's fused matrices, once they are turned: queries, keys, values; gate and up."""
    width = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    keys, first = int(config.num_key_value_heads) * width, int(config.num_attention_heads) * width
    shared = int(config.moe_intermediate_size * config.moe_num_shared_experts)
    found: dict[Role, Ops] = {
        Role.ATTN_Q: (Part(0, first),),
        Role.ATTN_K: (Part(first, first + keys),),
        Role.ATTN_V: (Part(first + keys, first + 2 * keys),),
    }
    for gate, up, each in (
        (Role.GATE, Role.UP, int(config.moe_intermediate_size)),
        (Role.SHARED_GATE, Role.SHARED_UP, shared),
        (Role.DENSE_GATE, Role.DENSE_UP, int(config.intermediate_size)),
    ):
        found |= {gate: (Part(0, each),), up: (Part(each, 2 * each),)}
    return found


_FUSED = {
    **dict.fromkeys(("q_proj.", "k_proj.", "v_proj."), "qkv_proj."),
    **dict.fromkeys(("gate_proj.", "up_proj."), "up_gate_proj."),
}


def _also_paddle(slot: Slot, part: Ops) -> Slot:
    """The slot, read also as Paddle stores it: vectors as they are, matrices turned."""
    release = slot.ways[0]
    name = release.name.replace("model.layers.", "ernie.layers.")
    for ours, theirs in _FUSED.items():
        name = name.replace(f".{ours}", f".{theirs}") if part else name
    vector = slot.role in (Role.NORM, Role.CORRECTION)
    ops: tuple[Op, ...] = release.ops if vector else (Transposed(), *part)
    return replace(slot, get=(*slot.ways, Get(name, ops)))


def ends(config: Config) -> tuple[Slot, ...]:
    """Embedding, final norm and head, which Paddle stores turned as well."""
    embedding, norm, head = plain_ends(config)
    ways = (
        Get("lm_head.weight", rows=int(config.vocab_size)),
        Get("lm_head.weight", (Transposed(),), int(config.hidden_size)),
    )
    return embedding, norm, replace(head, get=ways)


def prediction_layers(config: Config) -> Mapping[str, str]:
    """What releases may hold beside the layers that transformers runs."""
    return {r"model\.mtp_.*": PREDICTION}


TRAINING = frozenset(
    {
        "disable_ffn_model_parallel",
        "fuse_attn_ffn",
        "fuse_gate_detach_matmul",
        "fuse_linear",
        "fuse_ln",
        "fuse_rms_norm",
        "fuse_rope",
        "fuse_swiglu",
        "fuse_softmax_mask",
        "global_aux_loss",
        "max_sequence_length",
        "model_name",
        "moe_aux_loss_lambda",
        "moe_capacity",
        "moe_dropout_prob",
        "moe_group",
        "moe_group_experts",
        "moe_group_orthogonal_loss",
        "moe_orthogonal_loss_lambda",
        "moe_z_loss_lambda",
        "paddlenlp_version",
        "sinkhorn_2gate",
        "sinkhorn_temp",
        "use_fast_ln",
        "use_flash_attention",
    }
)
"""Config keys of Paddle's releases that say how they were trained, and with which kernels."""

ERNIE4_5_MOE = Family(
    name="ernie4_5_moe",
    classes=("Ernie4_5_MoeForCausalLM",),
    model_type="ernie4_5_moe",
    shape=moe_shape,
    layer=layer,
    ends=ends,
    known=SHAPE_KEYS
    | TRAINING
    | {
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "moe_num_shared_experts",
        "moe_layer_start_index",
        "moe_layer_end_index",
        "moe_layer_interval",
        "num_nextn_predict_layers",
    },
    says={
        "add_tail_layers": (0, False),
        "compression_ratio": (1.0,),
        "is_quantized": (False,),
        "moe_gate": ("topk", "top2_fused"),
        "moe_gate_act": ("softmax",),
        "moe_use_aux_free": (True,),
        "use_qk_norm": (False,),
        "use_rmsnorm": (True,),
    },
    skipped=prediction_layers,
    renamed=(
        ("ernie.embed_tokens.", "model.embed_tokens."),
        ("ernie.norm.", "model.norm."),
        ("ernie.mtp_", "model.mtp_"),
    ),
)
