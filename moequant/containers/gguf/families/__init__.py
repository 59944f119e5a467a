"""One file for each family's way into GGUF."""

from __future__ import annotations

from collections.abc import Mapping

from moequant.containers.gguf.families.afmoe import AFMOE
from moequant.containers.gguf.families.base import Computed, Export, FileTensor, Key
from moequant.containers.gguf.families.cohere2_moe import COHERE2_MOE
from moequant.containers.gguf.families.dbrx import DBRX
from moequant.containers.gguf.families.deepseek2 import DEEPSEEK_V2, DEEPSEEK_V3, GLM4_MOE_LITE, MISTRAL4
from moequant.containers.gguf.families.deepseek4 import DEEPSEEK_V4
from moequant.containers.gguf.families.deepseek32 import DEEPSEEK_V32, GLM_MOE_DSA
from moequant.containers.gguf.families.dots1 import DOTS1
from moequant.containers.gguf.families.ernie4_5_moe import ERNIE4_5_MOE
from moequant.containers.gguf.families.exaone_moe import EXAONE_MOE
from moequant.containers.gguf.families.gemma4 import GEMMA4
from moequant.containers.gguf.families.glm4_moe import GLM4_MOE
from moequant.containers.gguf.families.glm5_next import GLM5_NEXT
from moequant.containers.gguf.families.gpt_oss import GPT_OSS
from moequant.containers.gguf.families.granite import GRANITE_MOE, GRANITE_MOE_HYBRID, GRANITE_MOE_SWA
from moequant.containers.gguf.families.hunyuan import HUNYUAN_V1_MOE, HY_V3
from moequant.containers.gguf.families.hy_v4 import HY_V4
from moequant.containers.gguf.families.jamba import JAMBA
from moequant.containers.gguf.families.kimi_linear import BAILING_HYBRID, KIMI_LINEAR
from moequant.containers.gguf.families.laguna import LAGUNA
from moequant.containers.gguf.families.lfm2moe import LFM2_MOE
from moequant.containers.gguf.families.llama import LLAMA, MIXTRAL
from moequant.containers.gguf.families.llama4 import LLAMA4
from moequant.containers.gguf.families.mellum import MELLUM
from moequant.containers.gguf.families.mimo2 import MIMO_V2_FLASH
from moequant.containers.gguf.families.minimax_m2 import MINIMAX_M2
from moequant.containers.gguf.families.minimax_m3 import MINIMAX_M3
from moequant.containers.gguf.families.names import COMMON
from moequant.containers.gguf.families.nemotron_h import NEMOTRON_H
from moequant.containers.gguf.families.olmoe import OLMOE
from moequant.containers.gguf.families.qwen2moe import QWEN2_MOE
from moequant.containers.gguf.families.qwen3 import QWEN3, QWEN3_MOE
from moequant.containers.gguf.families.qwen3next import QWEN3_5_MOE, QWEN3_NEXT
from moequant.containers.gguf.families.qwen3vlmoe import QWEN3_VL_MOE
from moequant.containers.gguf.families.qwen4exp import QWEN4_EXP
from moequant.containers.gguf.families.step35 import STEP3P7

__all__ = ["COMMON", "EXPORTS", "OTHERS", "Computed", "Export", "FileTensor", "Key"]

EXPORTS: Mapping[str, Export] = {
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v3": DEEPSEEK_V3,
    "glm4_moe": GLM4_MOE,
    "deepseek_v32": DEEPSEEK_V32,
    "deepseek_v4": DEEPSEEK_V4,
    "glm_moe_dsa": GLM_MOE_DSA,
    "glm4_moe_lite": GLM4_MOE_LITE,
    "gpt_oss": GPT_OSS,
    "kimi_k25": DEEPSEEK_V3,
    "llama": LLAMA,
    "minimax_m2": MINIMAX_M2,
    "dbrx": DBRX,
    "gemma4": GEMMA4,
    "granitemoe": GRANITE_MOE,
    "granitemoehybrid": GRANITE_MOE_HYBRID,
    "granitemoeshared": GRANITE_MOE,
    "granitemoe_swa": GRANITE_MOE_SWA,
    "llama4": LLAMA4,
    "mistral": LLAMA,
    "mistral4": MISTRAL4,
    "mixtral": MIXTRAL,
    "olmoe": OLMOE,
    "qwen2_moe": QWEN2_MOE,
    "qwen3": QWEN3,
    "qwen3_5_moe": QWEN3_5_MOE,
    "qwen3_moe": QWEN3_MOE,
    "qwen3_next": QWEN3_NEXT,
    "qwen3_vl_moe": QWEN3_VL_MOE,
    "qwen4_exp": QWEN4_EXP,
    "solar_open": GLM4_MOE,
    "dots1": DOTS1,
    "ernie4_5_moe": ERNIE4_5_MOE,
    "hunyuan_v1_moe": HUNYUAN_V1_MOE,
    "hy_v3": HY_V3,
    "exaone_moe": EXAONE_MOE,
    "mellum": MELLUM,
    "laguna": LAGUNA,
    "afmoe": AFMOE,
    "cohere2_moe": COHERE2_MOE,
    "mimo_v2_flash": MIMO_V2_FLASH,
    "lfm2_moe": LFM2_MOE,
    "nemotron_h": NEMOTRON_H,
    "jamba": JAMBA,
    "step3p7": STEP3P7,
    "minimax_m3": MINIMAX_M3,
    "kimi_linear": KIMI_LINEAR,
    "bailing_hybrid": BAILING_HYBRID,
    "hy_v4": HY_V4,
    "glm5_next": GLM5_NEXT,
}
"""By the family's name."""

OTHERS: Mapping[str, str] = {
    "phimoe": "llama.cpp's 'phimoe' has RMS norms and a softmax over the chosen experts where the model has "
    "layer norms and SparseMixer: a file would compute something else",
    "switch_transformers": "llama.cpp has no architecture with an encoder, a decoder and experts",
}
"""Families that llama.cpp does not compute: why there is no way."""
