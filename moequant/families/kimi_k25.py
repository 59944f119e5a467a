"""Kimi-K2.5 and K2.6: DeepSeek-V3 beside an eye; the text model alone is read. Kimi-K2 is DeepSeek-V3."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from moequant.families.base import Config
from moequant.families.deepseek_v3 import DEEPSEEK_V3, prediction_layers


def skipped(config: Config) -> Mapping[str, str]:
    """What text does not need."""
    eye = r"(model\.)?(vision_tower|mm_projector|multi_modal_projector)\..*"
    return {eye: "vision", **prediction_layers(config)}


KIMI_K25 = replace(
    DEEPSEEK_V3,
    name="kimi_k25",
    classes=("KimiK25ForConditionalGeneration", "Kimi_K25ForConditionalGeneration"),
    skipped=skipped,
    renamed=(
        # transformers 5 saves the text's layers under the name that the eye's have.
        ("language_model.model.blocks.", "model.layers."),
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
        ("model.language_model.", "model."),
    ),
)
