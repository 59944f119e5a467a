"""Mistral 4: DeepSeek's latent attention, a softmax router without correction, fused experts; alone, or as
the text model beside an eye."""

from __future__ import annotations

from collections.abc import Mapping

from moequant.families.base import Config, Family
from moequant.families.blocks import SHAPE_KEYS, ends, moe_shape
from moequant.families.deepseek_v2 import layer
from moequant.families.deepseek_v3 import ROUTING_KEYS
from moequant.families.mla import LATENT_KEYS


def skipped(config: Config) -> Mapping[str, str]:
    """What text does not need."""
    return {r"(model\.)?(vision_tower|multi_modal_projector)\..*": "vision"}


MISTRAL4 = Family(
    name="mistral4",
    classes=("Mistral4ForCausalLM", "Mistral3ForConditionalGeneration"),
    model_type="mistral4",
    shape=moe_shape,
    layer=layer,
    ends=ends,
    known=SHAPE_KEYS | LATENT_KEYS | ROUTING_KEYS | {"first_k_dense_replace", "partial_rotary_factor"},
    says={"moe_layer_freq": (1,)},
    skipped=skipped,
    renamed=(
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
        ("model.language_model.", "model."),
    ),
)
