"""dots.llm1: q/k norms in every head, dense layers first, then DeepSeek-V3's router and shared experts."""

from moequant.families.base import Config, Family, Slot
from moequant.families.blocks import SHAPE_KEYS, attention, ends, gated_ffn, moe_shape
from moequant.families.deepseek_v3 import ROUTER_SAYS, ROUTING_KEYS, sparse_ffn


def layer(config: Config, number: int) -> tuple[Slot, ...]:
    """One decoder layer."""
    heads = attention(number, qk_norm=True, biased=True)
    dense = number < config.first_k_dense_replace
    return (*heads, *(gated_ffn(number) if dense else sparse_ffn(config, number)))


DOTS1 = Family(
    name="dots1",
    classes=("Dots1ForCausalLM",),
    model_type="dots1",
    shape=moe_shape,
    layer=layer,
    ends=ends,
    known=SHAPE_KEYS | ROUTING_KEYS | {"first_k_dense_replace"},
    # The release calls its scores "noaux_tc", which DeepSeek calls the way of choosing; they are sigmoids.
    says={**ROUTER_SAYS, "scoring_func": ("sigmoid", "noaux_tc")},
)
