"""DeepSeek-V4: attention to a window of tokens and, in most layers, to entries that stand for several older
tokens each; one head of keys that are the values too; heads put out in groups. The first layers look a
token's experts up in a table. Layers read one hidden state out of several streams."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moequant.families.base import PREDICTION, Config, Family, Get, Slot
from moequant.families.blocks import (
    SHAPE_KEYS,
    Experts,
    correction,
    gated_ffn,
    linear,
    moe_shape,
    norm,
    router,
    seen,
)
from moequant.families.blocks import ends as plain_ends
from moequant.families.hy_v4 import CONNECTION
from moequant.values import ModelShape, Role, Site, Stack
from moequant.values.ops import Stacked

WINDOW, SPARSE, HEAVY = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
"""What layers look at beside a window: nothing; entries of few tokens, which an indexer chooses; all entries
of many."""

RELEASED = (
    (".self_attn.compressor.indexer.scorer.", ".attn.indexer."),
    (".self_attn.compressor.indexer.q_b_proj.", ".attn.indexer.wq_b."),
    (".self_attn.compressor.indexer.", ".attn.indexer.compressor."),
    (".self_attn.", ".attn."),
    (".compressor.kv_norm.", ".compressor.norm."),
    (".compressor.gate_proj.", ".compressor.wgate."),
    (".compressor.position_bias", ".compressor.ape"),
    (".q_a_proj.", ".wq_a."),
    (".q_b_proj.", ".wq_b."),
    (".q_a_norm.", ".q_norm."),
    (".kv_proj.", ".wkv."),
    (".o_a_proj.", ".wo_a."),
    (".o_b_proj.", ".wo_b."),
    (".attn.sinks", ".attn.attn_sink"),
    (".mlp.", ".ffn."),
    (".gate.e_score_correction_bias", ".gate.bias"),
    (".gate_proj.", ".w1."),
    (".down_proj.", ".w2."),
    (".up_proj.", ".w3."),
    (".input_layernorm.", ".attn_norm."),
    (".post_attention_layernorm.", ".ffn_norm."),
    (".attn_hc.", ".hc_attn_"),
    (".ffn_hc.", ".hc_ffn_"),
    ("model.hc_head.hc_", "model.hc_head_"),
    ("model.embed_tokens.", "model.embed."),
    ("lm_head.", "head."),
)
"""Parts of names in transformers' model, and what releases have in their place, one after the other."""

SAVED = ((".attn.kv_norm.", ".attn.norm."),)
"""What transformers 5.24 makes of the release's names in saving."""

TABLE = "router.table"
"""A table of the experts of every token, by our name within a layer."""


DRAFTS = {
    "dspark_block_size",
    "dspark_markov_rank",
    "dspark_noise_token_id",
    "dspark_target_layer_ids",
}
"""Keys of stages that draft, of releases since July 2026: they lie under `mtp.`, and are left out."""


def shape(config: Config) -> ModelShape:
    """The shape of the model."""
    return replace(moe_shape(config), streams=int(config.hc_mult))


def layer(config: Config, number: int) -> tuple[Slot, ...]:
    """One decoder layer. Nothing is added to a stream as it is."""
    slots = (
        *_connection(number, "attn"),
        *_attention(config, number),
        *_connection(number, "ffn"),
        norm(number, "ffn_norm", "post_attention_layernorm"),
        router(number),
        _choice(config, number),
        *Experts(config.moe_intermediate_size).slots(number),
        *gated_ffn(number, "mlp.shared_experts", "shared"),
    )
    return tuple(_released(replace(slot, adds=False)) for slot in slots)


def _released(slot: Slot) -> Slot:
    """The slot with all names that checkpoints store it under: the release's first."""
    ways: dict[str, Get] = {}
    for way in slot.ways:
        saved = theirs = way.name
        for own, released in RELEASED:
            theirs = theirs.replace(own, released)
        saved = theirs
        for released, made in SAVED:
            saved = saved.replace(released, made)
        for name in (theirs.removeprefix("model."), saved, way.name):
            ways.setdefault(name, replace(way, name=name))
    return replace(slot, get=tuple(ways.values()))


def _attention(config: Config, number: int) -> tuple[Slot, ...]:
    """Everything in front of it, and what puts its heads out: each group of them by a matrix of its own."""
    into = seen(number, "attn.input", "self_attn.q_a_proj")
    latent = seen(number, "attn.q_latent", "self_attn.q_b_proj")
    mixed = seen(number, "attn.output", "self_attn.o_b_proj")
    own, at = f"layers.{number}", f"model.layers.{number}.self_attn"
    heads = Site(f"{own}.attn.heads", f"{at}.o_a_proj", heads=True)
    groups, cut = f"{at}.o_a_proj.weight", (Stacked(int(config.o_groups)),)
    return (
        norm(number, "attn_norm", "input_layernorm"),
        *linear(number, "attn_q_a", Role.Q_A, "self_attn.q_a_proj", into),
        norm(number, "attn_q_a_norm", "self_attn.q_a_norm"),
        *linear(number, "attn_q_b", Role.Q_B, "self_attn.q_b_proj", latent),
        *linear(number, "attn_kv", Role.KV_A, "self_attn.kv_proj", into),
        norm(number, "attn_kv_norm", "self_attn.kv_norm"),
        *_compressed(config, number, into, latent),
        Slot(f"{own}.attn_sinks", Role.SINKS, f"{at}.sinks"),
        Slot(f"{own}.attn_out_a", Role.OUT_A, groups, ops=cut, site=heads, stack=Stack.HEADS),
        *linear(number, "attn_out_b", Role.OUT_B, "self_attn.o_b_proj", mixed),
    )


def _compressed(config: Config, number: int, into: Site, latent: Site) -> tuple[Slot, ...]:
    """What makes entries of tokens, and chooses among them."""
    kind, at = config.layer_types[number], "self_attn.compressor"
    if kind == WINDOW:
        return ()
    made = _compressor(number, "compressor", at, into, Role.COMPRESSOR)
    if kind == HEAVY:
        return made
    weights = f"model.layers.{number}.{at}.indexer.scorer.weights_proj.weight"
    return (
        *made,
        *_compressor(number, "indexer.compressor", f"{at}.indexer", into, Role.INDEXER),
        *linear(number, "indexer.q_b", Role.INDEXER, f"{at}.indexer.q_b_proj", latent),
        Slot(f"layers.{number}.indexer.weights", Role.INDEXER_WEIGHTS, weights),
    )


def _compressor(number: int, name: str, module: str, into: Site, role: Role) -> tuple[Slot, ...]:
    """Keys of tokens, how much each counts in its entry, by itself and by its place, and a norm."""
    places = f"model.layers.{number}.{module}.position_bias"
    return (
        *linear(number, f"{name}.kv", role, f"{module}.kv_proj", into),
        *linear(number, f"{name}.gate", role, f"{module}.gate_proj", into),
        Slot(f"layers.{number}.{name}.places", Role.SCALE, places),
        norm(number, f"{name}.norm", f"{module}.kv_norm"),
    )


def _choice(config: Config, number: int) -> Slot:
    """What a token's experts are chosen by, beside the router: a table by its number, or a correction."""
    if config.mlp_layer_types[number] != "hash_moe":
        return correction(number)
    return Slot(f"layers.{number}.{TABLE}", Role.TABLE, f"model.layers.{number}.mlp.gate.tid2eid")


def _connection(number: int, kind: str) -> tuple[Slot, ...]:
    at = f"model.layers.{number}.{kind}_hc"
    return tuple(
        Slot(f"layers.{number}.hc_{kind}_{name}", Role.STREAMS, f"{at}.{name}") for name in CONNECTION
    )


def ends(config: Config) -> tuple[Slot, ...]:
    """What makes one hidden state of the streams stands before the final norm."""
    head = (Slot(f"hc_{name}", Role.STREAMS, f"model.hc_head.hc_{name}") for name in CONNECTION)
    return tuple(_released(slot) for slot in (*plain_ends(config), *head))


def dialect(raw: dict[str, Any]) -> dict[str, Any]:
    """What transformers 5.7 wrote of the rotation of compressed entries, left out where the class makes the
    same of the other keys."""
    said = raw.get("compress_rope_parameters")
    made = (raw.get("rope_parameters") or {}) | {"rope_theta": raw.get("compress_rope_theta")}
    if said is None or said != made:
        return raw
    return {key: value for key, value in raw.items() if key != "compress_rope_parameters"}


def skipped(config: Config) -> Mapping[str, str]:
    """What the model does not use: with a table there is nothing to correct."""
    table = [str(number) for number, kind in enumerate(config.mlp_layer_types) if kind == "hash_moe"]
    unused = rf"layers\.({'|'.join(table)})\.ffn\.gate\.bias"
    return {r"mtp\..*": PREDICTION, **({unused: "a correction where a table chooses"} if table else {})}


DEEPSEEK_V4 = Family(
    name="deepseek_v4",
    classes=("DeepseekV4ForCausalLM",),
    model_type="deepseek_v4",
    shape=shape,
    layer=layer,
    ends=ends,
    known=SHAPE_KEYS
    | {
        "n_routed_experts",
        "num_local_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "routed_scaling_factor",
        "mlp_layer_types",
        "num_hash_layers",
        "q_lora_rank",
        "qk_rope_head_dim",
        "partial_rotary_factor",
        "o_groups",
        "o_lora_rank",
        "compress_ratios",
        "compress_rates",
        "compress_rope_theta",
        "index_head_dim",
        "index_n_heads",
        "index_topk",
        "hc_eps",
        "hc_mult",
        "hc_sinkhorn_iters",
        "swiglu_limit",
        "num_nextn_predict_layers",
        "expert_dtype",  # as the tensors say themselves
    }
    | DRAFTS,
    says={"topk_method": ("noaux_tc",)},
    skipped=skipped,
    dialect=dialect,
)
