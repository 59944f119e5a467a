"""Model families: one file each, data and tiny functions; `find` picks one by the class in config.json."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from moequant.errors import FamilyError, one_line
from moequant.families.afmoe import AFMOE
from moequant.families.bailing_hybrid import BAILING_HYBRID
from moequant.families.base import Config, Family, Get, Slot
from moequant.families.cohere2_moe import COHERE2_MOE
from moequant.families.config import text_config
from moequant.families.dbrx import DBRX
from moequant.families.deepseek_v2 import DEEPSEEK_V2
from moequant.families.deepseek_v3 import DEEPSEEK_V3
from moequant.families.deepseek_v4 import DEEPSEEK_V4
from moequant.families.deepseek_v32 import DEEPSEEK_V32, GLM_MOE_DSA
from moequant.families.dots1 import DOTS1
from moequant.families.ernie4_5_moe import ERNIE4_5_MOE
from moequant.families.exaone_moe import EXAONE_MOE
from moequant.families.gemma4 import GEMMA4
from moequant.families.glm4_moe import GLM4_MOE, SOLAR_OPEN
from moequant.families.glm4_moe_lite import GLM4_MOE_LITE
from moequant.families.glm5_next import GLM5_NEXT
from moequant.families.gpt_oss import GPT_OSS
from moequant.families.granite import (
    GRANITE_MOE,
    GRANITE_MOE_HYBRID,
    GRANITE_MOE_SHARED,
    GRANITE_MOE_SWA,
)
from moequant.families.hunyuan_v1_moe import HUNYUAN_V1_MOE
from moequant.families.hy_v3 import HY_V3
from moequant.families.hy_v4 import HY_V4
from moequant.families.jamba import JAMBA
from moequant.families.kimi_k25 import KIMI_K25
from moequant.families.kimi_linear import KIMI_LINEAR
from moequant.families.laguna import LAGUNA
from moequant.families.lfm2_moe import LFM2_MOE
from moequant.families.llama import LLAMA, MISTRAL
from moequant.families.llama4 import LLAMA4
from moequant.families.mellum import MELLUM
from moequant.families.mimo_v2_flash import MIMO_V2_FLASH
from moequant.families.minimax_m2 import MINIMAX_M2
from moequant.families.minimax_m3 import MINIMAX_M3
from moequant.families.mistral4 import MISTRAL4
from moequant.families.mixtral import MIXTRAL
from moequant.families.nemotron_h import NEMOTRON_H
from moequant.families.olmoe import OLMOE
from moequant.families.phimoe import PHIMOE
from moequant.families.qwen2_moe import QWEN2_MOE
from moequant.families.qwen3 import QWEN3
from moequant.families.qwen3_5_moe import QWEN3_5_MOE
from moequant.families.qwen3_moe import QWEN3_MOE
from moequant.families.qwen3_next import QWEN3_NEXT
from moequant.families.qwen3_vl_moe import QWEN3_VL_MOE
from moequant.families.qwen4_exp import QWEN4_EXP
from moequant.families.step3p7 import STEP3P7
from moequant.families.switch_transformers import SWITCH_TRANSFORMERS

__all__ = ["FAMILIES", "Config", "Family", "Get", "Slot", "architectures", "find", "nearest"]

FAMILIES: tuple[Family, ...] = (
    MIXTRAL,
    QWEN3_MOE,
    OLMOE,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    DEEPSEEK_V32,
    GLM_MOE_DSA,
    DEEPSEEK_V4,
    KIMI_K25,
    GLM4_MOE,
    GLM4_MOE_LITE,
    SOLAR_OPEN,
    MINIMAX_M2,
    MISTRAL4,
    GPT_OSS,
    DOTS1,
    ERNIE4_5_MOE,
    HUNYUAN_V1_MOE,
    HY_V3,
    EXAONE_MOE,
    MELLUM,
    LAGUNA,
    AFMOE,
    COHERE2_MOE,
    MIMO_V2_FLASH,
    LFM2_MOE,
    NEMOTRON_H,
    JAMBA,
    DBRX,
    LLAMA4,
    GEMMA4,
    GRANITE_MOE,
    GRANITE_MOE_SHARED,
    GRANITE_MOE_HYBRID,
    GRANITE_MOE_SWA,
    PHIMOE,
    LLAMA,
    MISTRAL,
    QWEN3,
    QWEN2_MOE,
    QWEN3_VL_MOE,
    QWEN3_NEXT,
    QWEN3_5_MOE,
    QWEN4_EXP,
    STEP3P7,
    MINIMAX_M3,
    KIMI_LINEAR,
    BAILING_HYBRID,
    HY_V4,
    GLM5_NEXT,
    SWITCH_TRANSFORMERS,
)


def architectures(raw: Mapping[str, Any]) -> list[str]:
    """The classes that a `config.json` names; none where it names something else."""
    told = raw.get("architectures") or []
    return [one_line(name, 200) for name in (told if isinstance(told, list) else [told])]


def find(raw: Mapping[str, Any]) -> Family:
    """The family of a `config.json`; FamilyError names the architecture when there is none."""
    names = architectures(raw)
    if found := [family for family in FAMILIES if any(name in family.classes for name in names)]:
        # Models that also see share a class whatever their text model is.
        kind = text_config(raw).get("model_type")
        return next((family for family in found if family.model_type == kind), found[0])
    wanted = "/".join(names[:10]) or "(none in config.json)"
    if raw.get("is_encoder_decoder") is True:
        raise FamilyError(
            f"architecture {wanted} has an encoder and a decoder: of those only "
            f"{SWITCH_TRANSFORMERS.classes[0]} is read, and llama.cpp has no such architecture with experts"
        )
    near = nearest(names[0]) if names else None
    raise FamilyError(
        f"architecture {wanted} is not supported yet"
        + (f"; the nearest that is: {near.name} ({near.classes[0]})" if near else "")
        + "; `moequant inspect` says what differs, docs/families.md lists all"
    )


def nearest(architecture: str) -> Family | None:
    """The family whose class has the name most like this one; None when none is near."""
    by_class = {name: family for family in FAMILIES for name in family.classes}
    found = get_close_matches(architecture, by_class, n=1, cutoff=0.4)
    return by_class[found[0]] if found else None
