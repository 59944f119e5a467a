"""GLM-5.3-Flash: delta attention in most layers, latent attention without rotation in the others, in which an
indexer chooses pools of tokens; dense layers first, DeepSeek-V3's router, shared experts, clamped gates.
Layers read one hidden state out of several streams, which they mix. It also sees; only its text is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from moequant.families.base import Config, Family, Get, Slot
from moequant.families.blocks import SHAPE_KEYS, ends, gated_ffn, moe_shape
from moequant.families.deepseek_v3 import ROUTING_KEYS, prediction_layers, sparse_ffn
from moequant.families.deepseek_v32 import chosen, indexer
from moequant.families.hy_v4 import CONNECTION
from moequant.families.kda import KDA_KEYS, LINEAR, delta_attention
from moequant.families.mla import LATENT_KEYS, latent_attention
from moequant.families.predictions import appended
from moequant.values import ModelShape, Role


def shape(config: Config) -> ModelShape:
    """The shape of the model. No part of its heads is rotated, and the config's width is that part's."""
    return replace(moe_shape(config), head_dim=int(config.qk_nope_head_dim), streams=int(config.hc_mult))


def layer(config: Config, number: int) -> tuple[Slot, ...]:
    """One decoder layer. Nothing is added to a stream as it is."""
    width = int(config.linear_num_heads * config.linear_head_dim)
    mixer = (
        delta_attention(number, width, narrow=True)
        if config.layer_types[number] == LINEAR
        else (*latent_attention(config, number), *_chooses(config, number))
    )
    dense = config.mlp_layer_types[number] != "sparse"
    slots = (
        *_connection(number, "attn"),
        *mixer,
        *_connection(number, "ffn"),
        *(gated_ffn(number) if dense else sparse_ffn(config, number)),
    )
    return tuple(replace(slot, adds=False) for slot in slots)


def _chooses(config: Config, number: int) -> tuple[Slot, ...]:
    """The indexer, and what makes one key of a pool of tokens: a gate [d, h], and where in the pool they
    stand [pool, d]."""
    if config.indexer_types[number] != "full":
        return ()
    own, at = f"layers.{number}.indexer", f"model.layers.{number}.self_attn.indexer.index_kpool_compress"
    return (
        *indexer(number),
        Slot(f"{own}.pool_gate", Role.INDEXER_WEIGHTS, f"{at}_gate"),
        Slot(f"{own}.pool_places", Role.SCALE, f"{at}_ape"),
    )


def _connection(number: int, kind: str) -> tuple[Slot, ...]:
    at = f"model.layers.{number}"
    return tuple(
        Slot(
            f"layers.{number}.hc_{kind}_{name}",
            Role.STREAMS,
            f"{at}.{kind}_hc.{name}",
            (Get(f"{at}.hc_{kind}_{name}"), Get(f"{at}.{kind}_hc.{name}")),
        )
        for name in CONNECTION
    )


def predictions(config: Config) -> tuple[tuple[Slot, ...], ...]:
    """Layers of one hidden state, which choose for themselves."""
    layers = zip(config.layer_types, config.indexer_types, config.mlp_layer_types, strict=True)
    wanted = ("full", "sparse")
    alike = [at for at, (kind, *rest) in enumerate(layers) if kind != LINEAR and tuple(rest) == wanted]
    return appended(config, _plain, twin=alike[-1]) if alike else ()


def _plain(config: Config, number: int) -> tuple[Slot, ...]:
    """A decoder layer without streams."""
    return tuple(slot for slot in layer(config, number) if slot.role is not Role.STREAMS)


def skipped(config: Config) -> Mapping[str, str]:
    """What text does not need."""
    return {r"(model\.)?visual\..*": "vision: only text is converted", **prediction_layers(config)}


GLM5_NEXT = Family(
    name="glm5_next",
    classes=("Glm5NextForConditionalGeneration",),
    model_type="glm5_next_text",
    shape=shape,
    layer=layer,
    ends=ends,
    known=SHAPE_KEYS
    | LATENT_KEYS
    | ROUTING_KEYS
    | KDA_KEYS
    | {
        "hc_eps",
        "hc_mult",
        "hc_sinkhorn_iters",
        "index_head_dim",
        "index_kpool",
        "index_kpool_always_select_tail",
        "index_n_heads",
        "index_skip_topk_offset",
        "index_topk",
        "index_topk_freq",
        "index_topk_pattern",
        "indexer_types",
        "linear_attn_config",
        "linear_lower_bound",
        "mlp_layer_types",
        "swiglu_limit",
    },
    says={
        "first_k_dense_replace": (3,),
        "mhc": (True,),
        "mla_use_nope": (True,),
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
    },
    skipped=skipped,
    predictions=predictions,
    renamed=(("model.language_model.", "model."),),
    attention_gives=3,
    chosen=chosen,
)
