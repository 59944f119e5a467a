"""OLMoE: q/k norms over all heads at once."""

from moequant.families.base import Config, Family, Slot
from moequant.families.blocks import SHAPE_KEYS, Experts, attention, ends, moe_shape, router


def layer(config: Config, number: int) -> tuple[Slot, ...]:
    """One decoder layer."""
    experts = Experts(config.intermediate_size)
    heads = attention(number, qk_norm=True, biased=config.attention_bias)
    return (*heads, router(number), *experts.slots(number))


OLMOE = Family(
    name="olmoe",
    classes=("OlmoeForCausalLM",),
    model_type="olmoe",
    shape=moe_shape,
    layer=layer,
    ends=ends,
    known=SHAPE_KEYS
    | {"num_local_experts", "num_experts", "num_experts_per_tok", "norm_topk_prob", "clip_qkv"},
)
