"""Model families: one file each, data and tiny functions; `find` picks one by the class in config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moequant.errors import FamilyError
from moequant.families.base import Config, Family, Get, Slot
from moequant.families.dbrx import DBRX
from moequant.families.deepseek_v3 import DEEPSEEK_V3
from moequant.families.gemma4 import GEMMA4
from moequant.families.gpt_oss import GPT_OSS
from moequant.families.granite import (
    GRANITE_MOE,
    GRANITE_MOE_HYBRID,
    GRANITE_MOE_SHARED,
    GRANITE_MOE_SWA,
)
from moequant.families.llama import LLAMA, MISTRAL
from moequant.families.llama4 import LLAMA4
from moequant.families.mixtral import MIXTRAL
from moequant.families.olmoe import OLMOE
from moequant.families.qwen3 import QWEN3
from moequant.families.qwen3_moe import QWEN3_MOE

__all__ = ["FAMILIES", "Config", "Family", "Get", "Slot", "find"]

FAMILIES: tuple[Family, ...] = (
    MIXTRAL,
    QWEN3_MOE,
    OLMOE,
    DEEPSEEK_V3,
    GPT_OSS,
    DBRX,
    LLAMA4,
    GEMMA4,
    GRANITE_MOE,
    GRANITE_MOE_SHARED,
    GRANITE_MOE_HYBRID,
    GRANITE_MOE_SWA,
    LLAMA,
    MISTRAL,
    QWEN3,
)


def find(raw: Mapping[str, Any]) -> Family:
    """The family of a `config.json`; FamilyError names the architecture when there is none."""
    architectures = raw.get("architectures") or []
    names = architectures if isinstance(architectures, list) else [architectures]
    for family in FAMILIES:
        if any(name in family.classes for name in names):
            return family
    known = ", ".join(name for family in FAMILIES for name in family.classes)
    raise FamilyError(
        f"architecture {'/'.join(map(str, names)) or '(none in config.json)'} is not supported yet; "
        f"supported: {known}"
    )
