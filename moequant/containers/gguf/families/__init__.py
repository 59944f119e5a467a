"""One file for each family's way into GGUF."""

from __future__ import annotations

from collections.abc import Mapping

from moequant.containers.gguf.families.base import Computed, Export, FileTensor, Key
from moequant.containers.gguf.families.dbrx import DBRX
from moequant.containers.gguf.families.deepseek2 import DEEPSEEK_V3
from moequant.containers.gguf.families.gemma4 import GEMMA4
from moequant.containers.gguf.families.gpt_oss import GPT_OSS
from moequant.containers.gguf.families.granite import GRANITE_MOE, GRANITE_MOE_HYBRID, GRANITE_MOE_SWA
from moequant.containers.gguf.families.llama import LLAMA, MIXTRAL
from moequant.containers.gguf.families.llama4 import LLAMA4
from moequant.containers.gguf.families.names import COMMON
from moequant.containers.gguf.families.olmoe import OLMOE
from moequant.containers.gguf.families.qwen3 import QWEN3, QWEN3_MOE

__all__ = ["COMMON", "EXPORTS", "Computed", "Export", "FileTensor", "Key"]

EXPORTS: Mapping[str, Export] = {
    "dbrx": DBRX,
    "deepseek_v3": DEEPSEEK_V3,
    "gemma4": GEMMA4,
    "gpt_oss": GPT_OSS,
    "granitemoe": GRANITE_MOE,
    "granitemoehybrid": GRANITE_MOE_HYBRID,
    "granitemoeshared": GRANITE_MOE,
    "granitemoe_swa": GRANITE_MOE_SWA,
    "llama": LLAMA,
    "llama4": LLAMA4,
    "mistral": LLAMA,
    "mixtral": MIXTRAL,
    "olmoe": OLMOE,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
}
"""By the family's name."""
