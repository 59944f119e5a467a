"""Mixtral: llama's attention, experts named w1 (gate), w3 (up) and w2 (down)."""

from moequant.families.base import Config, Family, Slot
from moequant.families.blocks import SHAPE_KEYS, Experts, attention, ends, moe_shape, router


def layer(config: Config, number: int) -> tuple[Slot, ...]:
    """One decoder layer."""
    experts = Experts(config.intermediate_size, "block_sparse_moe.experts", ("w1", "w3", "w2"))
    return (*attention(number), router(number, "block_sparse_moe.gate"), *experts.slots(number))


MIXTRAL = Family(
    name="mixtral",
    classes=("MixtralForCausalLM",),
    model_type="mixtral",
    shape=moe_shape,
    layer=layer,
    ends=ends,
    known=SHAPE_KEYS | {"num_local_experts", "num_experts", "num_experts_per_tok"},
)
