"""MiniMax-M3: an indexer chooses the blocks of tokens that attention looks at; dense layers first,
MiniMax-M2's router, a shared expert, clamped gates. It also sees; the text model alone is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moequant.families.base import PREDICTION, Config, Family, Get, Slot
from moequant.families.blocks import (
    SHAPE_KEYS,
    Experts,
    attention,
    correction,
    ends,
    gated_ffn,
    linear,
    moe_shape,
    norm,
    released,
    router,
    seen,
)
from moequant.values import Role
from moequant.values.ops import Part

STORED = "block_sparse_moe"
"""What releases call the module that transformers calls `mlp`."""

SPARSE = "minimax_m3_sparse"
"""What `layer_types` calls a layer with an indexer."""


def layer(config: Config, number: int) -> tuple[Slot, ...]:
    """One decoder layer. A multiplier may stand behind the routed experts' sum."""
    front = (
        *attention(number, qk_norm=True),
        *(_indexer(number) if config.layer_types[number] == SPARSE else ()),
    )
    if config.mlp_layer_types[number] != "sparse":
        return (*front, *_halves(number, "mlp", "ffn", config.dense_intermediate_size))
    experts = Experts(config.intermediate_size, f"{STORED}.experts", ("w1", "w3", "w2"))
    shared = _halves(number, "mlp.shared_experts", "shared", config.shared_intermediate_size)
    return (
        *front,
        router(number, f"{STORED}.gate"),
        correction(number, stored=f"{STORED}.e_score_correction_bias"),
        *experts.slots(number, config.routed_scaling_factor == 1),
        *released(shared, ".mlp.shared_experts.", f".{STORED}.shared_experts."),
    )


def _indexer(number: int) -> tuple[Slot, ...]:
    """What chooses blocks of tokens: it is fed what attention is fed."""
    into = seen(number, "attn.input", "self_attn.q_proj")
    at = "self_attn.indexer"
    slots = (
        *linear(number, "indexer.q", Role.INDEXER, f"{at}.q_proj", into),
        *linear(number, "indexer.k", Role.INDEXER, f"{at}.k_proj", into),
        norm(number, "indexer.q_norm", f"{at}.q_norm"),
        norm(number, "indexer.k_norm", f"{at}.k_norm"),
    )
    return released(slots, ".indexer.", ".index_")


def _halves(number: int, module: str, kind: str, width: int) -> tuple[Slot, ...]:
    """A gated block whose gate and up are one matrix in transformers, and two as stored."""
    gate, up, down = gated_ffn(number, module, kind)
    param = f"model.layers.{number}.{module}.gate_up_proj"
    site = seen(number, f"{kind}.input", f"{module}.gate_up_proj")

    def half(slot: Slot, rows: Part) -> Slot:
        fused = f"{param}.weight"
        ways = (Get(slot.param), Get(fused, (rows,)))
        return replace(slot, param=fused, get=ways, ops=(rows,), site=site)

    return (half(gate, Part(0, width)), half(up, Part(width, 2 * width)), down)


NESTED = {
    "sparse_init_block": (0,),
    "sparse_score_type": ("max",),
    "use_sparse_attention": (True,),
}
"""What releases say of the indexer, in an object of their own, and the class computes anyway."""


def dialect(raw: dict[str, Any]) -> dict[str, Any]:
    """What the class does not read of the indexer's object, among the other keys."""
    nested = raw.get("sparse_attention_config") or {}
    return {**raw, **{key: nested[key] for key in NESTED if key in nested}}


def vision(config: Config) -> Mapping[str, str]:
    """What only images cross."""
    eye = r"(model\.)?(vision_tower|multi_modal_projector|patch_merge_mlp)\..*"
    return {eye: "vision: only text is converted", r"model\.mtp\..*": PREDICTION}


MINIMAX_M3 = Family(
    name="minimax_m3",
    classes=(
        "MiniMaxM3SparseForConditionalGeneration",
        "MiniMaxM3SparseForCausalLM",
        "MiniMaxM3VLForCausalLM",
    ),
    model_type="minimax_m3_vl_text",
    shape=moe_shape,
    layer=layer,
    ends=ends,
    known=SHAPE_KEYS
    | {
        "dense_intermediate_size",
        "index_block_size",
        "index_head_dim",
        "index_local_blocks",
        "index_n_heads",
        "index_topk_blocks",
        "mlp_layer_types",
        "moe_layer_freq",
        "num_experts_per_tok",
        "num_local_experts",
        "num_mtp_modules",
        "partial_rotary_factor",
        "rotary_dim",
        "routed_scaling_factor",
        "shared_intermediate_size",
        "sparse_attention_config",
        "swiglu_alpha",
        "swiglu_limit",
    },
    says={
        **NESTED,
        "n_shared_experts": (1,),
        "qk_norm_type": ("per_head",),
        "scoring_func": ("sigmoid",),
        "use_gemma_norm": (True,),
        "use_qk_norm": (True,),
        "use_routing_bias": (True,),
    },
    dialect=dialect,
    skipped=vision,
    renamed=(
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
        ("model.language_model.", "model."),
    ),
)
