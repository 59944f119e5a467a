"""Dense Llama and Mistral: no experts to win anything on, converted all the same."""

from collections.abc import Mapping

from moequant.families.base import Config, Family, Slot
from moequant.families.blocks import SHAPE_KEYS, attention, ends, gated_ffn, shape, value


def layer(config: Config, number: int) -> tuple[Slot, ...]:
    """One decoder layer."""
    heads = attention(number, biased=value(config, "attention_bias", False))
    return (*heads, *gated_ffn(number, biased=value(config, "mlp_bias", False)))


def computed(config: Config) -> Mapping[str, str]:
    """What old checkpoints hold though the model computes it."""
    return {r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq": "computed from the config"}


LLAMA = Family(
    name="llama",
    classes=("LlamaForCausalLM",),
    model_type="llama",
    shape=shape,
    layer=layer,
    ends=ends,
    known=SHAPE_KEYS,
    skipped=computed,
)

MISTRAL = Family(
    name="mistral",
    classes=("MistralForCausalLM",),
    model_type="mistral",
    shape=shape,
    layer=layer,
    ends=ends,
    known=SHAPE_KEYS,
    skipped=computed,
)
