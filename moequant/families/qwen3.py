"""Dense Qwen3: Qwen3-MoE without the experts."""

from moequant.families.base import Config, Family, Slot
from moequant.families.blocks import SHAPE_KEYS, attention, ends, gated_ffn, shape


def layer(config: Config, number: int) -> tuple[Slot, ...]:
    """One decoder layer."""
    return (*attention(number, qk_norm=True, biased=config.attention_bias), *gated_ffn(number))


QWEN3 = Family(
    name="qwen3",
    classes=("Qwen3ForCausalLM",),
    model_type="qwen3",
    shape=shape,
    layer=layer,
    ends=ends,
    known=SHAPE_KEYS | {"use_sliding_window", "max_window_layers"},
    says={"qkv_bias": (False,), "use_qk_norm": (True,)},
)
