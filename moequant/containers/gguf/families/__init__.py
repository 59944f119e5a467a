"""One file for each family's way into GGUF."""

from __future__ import annotations

from collections.abc import Mapping

from moequant.containers.gguf.families.base import Computed, Export, FileTensor, Key
from moequant.containers.gguf.families.deepseek2 import DEEPSEEK_V3
from moequant.containers.gguf.families.gpt_oss import GPT_OSS
from moequant.containers.gguf.families.llama import LLAMA, MIXTRAL
from moequant.containers.gguf.families.names import COMMON
from moequant.containers.gguf.families.olmoe import OLMOE
from moequant.containers.gguf.families.qwen2moe import QWEN2_MOE
from moequant.containers.gguf.families.qwen3 import QWEN3, QWEN3_MOE
from moequant.containers.gguf.families.qwen3next import QWEN3_5_MOE, QWEN3_NEXT
from moequant.containers.gguf.families.qwen3vlmoe import QWEN3_VL_MOE

__all__ = ["COMMON", "EXPORTS", "Computed", "Export", "FileTensor", "Key"]

EXPORTS: Mapping[str, Export] = {
    "deepseek_v3": DEEPSEEK_V3,
    "gpt_oss": GPT_OSS,
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": MIXTRAL,
    "olmoe": OLMOE,
    "qwen2_moe": QWEN2_MOE,
    "qwen3": QWEN3,
    "qwen3_5_moe": QWEN3_5_MOE,
    "qwen3_moe": QWEN3_MOE,
    "qwen3_next": QWEN3_NEXT,
    "qwen3_vl_moe": QWEN3_VL_MOE,
}
"""By the family's name."""
