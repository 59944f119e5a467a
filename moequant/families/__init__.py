"""Model families: one file each, data and tiny functions; `find` picks one by the class in config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moequant.errors import FamilyError
from moequant.families.base import Config, Family, Get, Slot
from moequant.families.config import text_config
from moequant.families.deepseek_v2 import DEEPSEEK_V2
from moequant.families.deepseek_v3 import DEEPSEEK_V3
from moequant.families.deepseek_v32 import DEEPSEEK_V32, GLM_MOE_DSA
from moequant.families.glm4_moe import GLM4_MOE, SOLAR_OPEN
from moequant.families.glm4_moe_lite import GLM4_MOE_LITE
from moequant.families.gpt_oss import GPT_OSS
from moequant.families.kimi_k25 import KIMI_K25
from moequant.families.llama import LLAMA, MISTRAL
from moequant.families.minimax_m2 import MINIMAX_M2
from moequant.families.mistral4 import MISTRAL4
from moequant.families.mixtral import MIXTRAL
from moequant.families.olmoe import OLMOE
from moequant.families.qwen3 import QWEN3
from moequant.families.qwen3_moe import QWEN3_MOE

__all__ = ["FAMILIES", "Config", "Family", "Get", "Slot", "find"]

FAMILIES: tuple[Family, ...] = (
    MIXTRAL,
    QWEN3_MOE,
    OLMOE,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    DEEPSEEK_V32,
    GLM_MOE_DSA,
    KIMI_K25,
    GLM4_MOE,
    GLM4_MOE_LITE,
    SOLAR_OPEN,
    MINIMAX_M2,
    MISTRAL4,
    GPT_OSS,
    LLAMA,
    MISTRAL,
    QWEN3,
)


def find(raw: Mapping[str, Any]) -> Family:
    """The family of a `config.json`; FamilyError names the architecture when there is none."""
    architectures = raw.get("architectures") or []
    names = architectures if isinstance(architectures, list) else [architectures]
    if found := [family for family in FAMILIES if any(name in family.classes for name in names)]:
        # Models that also see share a class whatever their text model is.
        kind = text_config(raw).get("model_type")
        return next((family for family in found if family.model_type == kind), found[0])
    known = ", ".join(name for family in FAMILIES for name in family.classes)
    raise FamilyError(
        f"architecture {'/'.join(map(str, names)) or '(none in config.json)'} is not supported yet; "
        f"supported: {known}"
    )
