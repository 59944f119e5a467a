"""Phi-3.5-MoE: layer norms, biases everywhere but in experts, a SparseMixer router of two experts."""

from moequant.families.base import Config, Family, Slot
from moequant.families.blocks import SHAPE_KEYS, Experts, attention, bias, moe_shape, router
from moequant.families.blocks import ends as named_ends


def layer(config: Config, number: int) -> tuple[Slot, ...]:
    """One decoder layer."""
    own, at = f"layers.{number}", f"model.layers.{number}"
    stored = "block_sparse_moe"
    return (
        *attention(number, biased=True),
        bias(f"{own}.attn_norm", f"{at}.input_layernorm"),
        bias(f"{own}.ffn_norm", f"{at}.post_attention_layernorm"),
        router(number, f"{stored}.gate", "mlp.router"),
        *Experts(config.intermediate_size, f"{stored}.experts", ("w1", "w3", "w2")).slots(number),
    )


def ends(config: Config) -> tuple[Slot, ...]:
    """Embedding, final norm and head."""
    return (*named_ends(config), bias("norm", "model.norm"), bias("head", "lm_head"))


PHIMOE = Family(
    name="phimoe",
    classes=("PhimoeForCausalLM", "PhiMoEForCausalLM"),
    model_type="phimoe",
    shape=moe_shape,
    layer=layer,
    ends=ends,
    known=SHAPE_KEYS
    | {
        "num_local_experts",
        "num_experts",
        "num_experts_per_tok",
        "lm_head_bias",
        "input_jitter_noise",  # of training; in evaluation router_jitter_noise is a threshold of the choice
        "original_max_position_embeddings",
    },
)
