"""DeepSeek-V3.2 and GLM-5: DeepSeek-V3's layers, in which a small indexer chooses the tokens that attention
looks at. In GLM-5.2 some layers look at those that an earlier layer chose."""

from __future__ import annotations

from moequant.families.base import Config, Family, Slot
from moequant.families.blocks import SHAPE_KEYS, bias, ends, gated_ffn, linear, moe_shape, norm, seen, value
from moequant.families.deepseek_v3 import ROUTER_SAYS, ROUTING_KEYS, prediction_layers, sparse_ffn
from moequant.families.mla import LATENT_KEYS, latent_attention
from moequant.families.predictions import appended
from moequant.values import Role


def layer(config: Config, number: int) -> tuple[Slot, ...]:
    """One decoder layer."""
    kinds = value(config, "indexer_types") or ["full"] * config.num_hidden_layers
    dense = config.mlp_layer_types[number] != "sparse"
    return (
        *latent_attention(config, number),
        *(indexer(number) if kinds[number] == "full" else ()),
        *(gated_ffn(number) if dense else sparse_ffn(config, number)),
    )


def indexer(number: int) -> tuple[Slot, ...]:
    """What chooses tokens: it is fed what attention is fed, and the queries' latent."""
    at = "self_attn.indexer"
    into = seen(number, "attn.input", "self_attn.kv_a_proj_with_mqa")
    latent = seen(number, "attn.q_latent", "self_attn.q_b_proj")
    own, weights = f"layers.{number}.indexer", f"model.layers.{number}.{at}.weights_proj.weight"
    return (
        *linear(number, "indexer.q_b", Role.INDEXER, f"{at}.wq_b", latent),
        *linear(number, "indexer.k", Role.INDEXER, f"{at}.wk", into),
        norm(number, "indexer.k_norm", f"{at}.k_norm"),
        bias(f"{own}.k_norm", f"model.layers.{number}.{at}.k_norm"),
        Slot(f"{own}.weights", Role.INDEXER_WEIGHTS, weights),
    )


def predictions(config: Config) -> tuple[tuple[Slot, ...], ...]:
    """Layers behind the last, each with an indexer of its own."""
    kinds = value(config, "indexer_types") or ["full"]
    last = max(number for number, kind in enumerate(kinds) if kind == "full")
    return appended(config, layer, twin=last if len(kinds) > 1 else None)


def chosen(config: Config) -> int:
    """The most tokens that a layer looks at, where layers pass on which; no bound where none does."""
    return int(config.index_topk if "shared" in config.indexer_types else config.max_position_embeddings)


KNOWN = (
    SHAPE_KEYS
    | LATENT_KEYS
    | ROUTING_KEYS
    | {
        "first_k_dense_replace",
        "mlp_layer_types",
        "index_topk",
        "index_head_dim",
        "index_n_heads",
        "num_experts",
        "partial_rotary_factor",
    }
)

DEEPSEEK_V32 = Family(
    name="deepseek_v32",
    classes=("DeepseekV32ForCausalLM",),
    model_type="deepseek_v32",
    shape=moe_shape,
    layer=layer,
    ends=ends,
    known=KNOWN,
    says={**ROUTER_SAYS, "rope_interleave": (True,), "indexer_rope_interleave": (False,)},
    skipped=prediction_layers,
    predictions=predictions,
)

GLM_MOE_DSA = Family(
    name="glm_moe_dsa",
    classes=("GlmMoeDsaForCausalLM",),
    model_type="glm_moe_dsa",
    shape=moe_shape,
    layer=layer,
    ends=ends,
    known=KNOWN
    | {
        "indexer_types",
        "index_topk_freq",
        "index_skip_topk_offset",
        "index_topk_pattern",
        "index_share_for_mtp_iteration",
    },
    says={**ROUTER_SAYS, "rope_interleave": (True,), "indexer_rope_interleave": (True,)},
    skipped=prediction_layers,
    predictions=predictions,
    attention_gives=3,
    chosen=chosen,
)
