"""DBRX: q, k and v in one matrix, clipped; experts as flat matrices, one below the other."""

from __future__ import annotations

from typing import Any

from moequant.errors import FamilyError
from moequant.families.base import Config, Family, Get, Slot
from moequant.families.blocks import shape as llama_shape
from moequant.families.config import HARMLESS
from moequant.values import ModelShape, Role, Site, Stack
from moequant.values.ops import Ops, Part, Stacked, Transposed

PARTS = {
    "attn_config": {"attn_pdrop", "clip_qkv", "kv_n_heads", "rope_theta"},
    "ffn_config": {
        "ffn_act_fn",
        "ffn_hidden_size",
        "hidden_size",
        "moe_jitter_eps",
        "moe_loss_weight",
        "moe_normalize_expert_weights",
        "moe_num_experts",
        "moe_top_k",
        "uniform_expert_assignment",  # of benchmarks
    },
}
"""Config keys one level down."""

BOOKKEEPING = frozenset({"chunk_size_feed_forward", "is_encoder_decoder", "name_or_path", "tokenizer_class"})
"""What transformers 5 saves there besides."""


def dialect(raw: dict[str, Any]) -> dict[str, Any]:
    """Releases say the base of the rotation beside the other numbers of attention, where transformers 5
    does not look for it: it would rotate with 10,000. FamilyError for unknown keys one level down."""
    for name, known in PARTS.items():
        inner = raw.get(name)
        for key, value in inner.items() if isinstance(inner, dict) else ():
            if key not in known and value and key not in HARMLESS | BOOKKEEPING:
                raise FamilyError(
                    f"dbrx: config key {name}.{key} = {value!r:.80}: unknown, and it may change what the "
                    "model computes"
                )
    attention = raw.get("attn_config")
    told = raw.keys() & {"rope_parameters", "rope_theta"}
    if told or not isinstance(attention, dict) or "rope_theta" not in attention:
        return raw
    return {**raw, "rope_theta": attention["rope_theta"]}


def shape(config: Config) -> ModelShape:
    """The shape of the model."""
    ffn = config.ffn_config
    return llama_shape(config, int(ffn.moe_num_experts), int(ffn.moe_top_k))


def layer(config: Config, number: int) -> tuple[Slot, ...]:
    """One decoder layer."""
    own, at = f"layers.{number}", f"transformer.blocks.{number}"
    attention = f"{at}.norm_attn_norm"
    into = Site(f"{own}.attn.input", f"{attention}.attn.Wqkv")
    out = Site(f"{own}.attn.output", f"{attention}.attn.out_proj")
    return (
        Slot(f"{own}.attn_norm", Role.NORM, f"{attention}.norm_1.weight"),
        Slot(f"{own}.attn_qkv", Role.ATTN_QKV, f"{attention}.attn.Wqkv.weight", site=into),
        Slot(f"{own}.attn_out", Role.ATTN_OUT, f"{attention}.attn.out_proj.weight", site=out, adds=True),
        Slot(f"{own}.ffn_norm", Role.NORM, f"{attention}.norm_2.weight"),
        Slot(f"{own}.router", Role.ROUTER, f"{at}.ffn.router.layer.weight"),
        *_experts(config, number),
    )


def _experts(config: Config, number: int) -> tuple[Slot, ...]:
    """Gate, up and down, stored as [E·f, h]; down is transposed."""
    width, count = int(config.ffn_config.ffn_hidden_size), int(config.ffn_config.moe_num_experts)
    at = f"transformer.blocks.{number}.ffn.experts"
    before = Site(f"layers.{number}.experts.input", at, "experts")
    inner = Site(f"layers.{number}.experts.inner", at, "inner")

    def slot(role: Role, stored: str, ops: Ops, param: str, place: Ops, site: Site) -> Slot:
        way = Get(f"{at}.mlp.{stored}", (Stacked(count), *ops))
        name, adds = f"layers.{number}.experts.{role.value}", role is Role.DOWN
        return Slot(name, role, f"{at}.{param}", (way,), place, site, Stack.EXPERTS, adds)

    return (
        slot(Role.GATE, "w1", (), "gate_up_proj", (Part(0, width),), before),
        slot(Role.UP, "v1", (), "gate_up_proj", (Part(width, 2 * width),), before),
        slot(Role.DOWN, "w2", (Transposed(),), "down_proj", (), inner),
    )


def ends(config: Config) -> tuple[Slot, ...]:
    """Embedding, final norm and head."""
    norm = "transformer.norm_f"
    return (
        Slot("embedding", Role.EMBEDDING, "transformer.wte.weight"),
        Slot("norm", Role.NORM, f"{norm}.weight"),
        Slot("head", Role.OUTPUT, "lm_head.weight", site=Site("head.input", norm, "output")),
    )


DBRX = Family(
    name="dbrx",
    classes=("DbrxForCausalLM",),
    model_type="dbrx",
    shape=shape,
    layer=layer,
    ends=ends,
    known=frozenset(
        {
            "d_model",
            "n_heads",
            "n_layers",
            "max_seq_len",
            "vocab_size",
            "attn_config",
            "ffn_config",
            "num_key_value_heads",
            "rope_theta",
            "rope_scaling",
            "rope_parameters",
            "emb_pdrop",
        }
    ),
    layers_at="transformer.blocks",
    dialect=dialect,
)
