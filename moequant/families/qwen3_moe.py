"""Qwen3-MoE: q/k norms in every head; layers without experts where the config says so."""

from moequant.families.base import Config, Family, Slot
from moequant.families.blocks import SHAPE_KEYS, Experts, attention, ends, gated_ffn, moe_shape, router

ROUTING_KEYS = frozenset(
    {
        "num_local_experts",
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "norm_topk_prob",
        "decoder_sparse_step",
        "mlp_only_layers",
    }
)
"""Config keys that say where Qwen's experts are, and how a router weighs them."""


def is_sparse(config: Config, number: int) -> bool:
    """Whether a layer has experts."""
    listed = number in (config.mlp_only_layers or ())
    return not listed and (number + 1) % config.decoder_sparse_step == 0


def layer(config: Config, number: int) -> tuple[Slot, ...]:
    """One decoder layer."""
    heads = attention(number, qk_norm=True, biased=config.attention_bias)
    if not is_sparse(config, number):
        return (*heads, *gated_ffn(number))
    return (*heads, router(number), *Experts(config.moe_intermediate_size).slots(number))


QWEN3_MOE = Family(
    name="qwen3_moe",
    classes=("Qwen3MoeForCausalLM",),
    model_type="qwen3_moe",
    shape=moe_shape,
    layer=layer,
    ends=ends,
    known=SHAPE_KEYS | ROUTING_KEYS | {"use_sliding_window", "max_window_layers"},
    says={"qkv_bias": (False,), "use_qk_norm": (True,), "shared_expert_intermediate_size": (0, None)},
)
