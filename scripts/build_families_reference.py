"""Writes docs/families.md from the families themselves.

    python scripts/build_families_reference.py            write it
    python scripts/build_families_reference.py --check    fail when the one there is out of date

A family's row says what the code says: its class, llama.cpp's name of the architecture, what is left out on
purpose, and what llama.cpp computes a little differently. Only the models that people know are listed here.
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import CONFIG_MAPPING

from moequant.containers.folders import mxfp4
from moequant.containers.gguf.families import EXPORTS
from moequant.containers.gguf.nextn import refusal
from moequant.families import FAMILIES, Config, Family
from moequant.families.base import PREDICTION, nothing_predicted
from moequant.families.config import one_by_one

PAGE = Path(__file__).parents[1] / "docs" / "families.md"

MODELS = {
    "afmoe": "Trinity",
    "bailing_hybrid": "Ling 3.0 tiny, flash",
    "cohere2_moe": "North-Mini-Code",
    "dbrx": "DBRX 132B",
    "deepseek_v2": "DeepSeek-V2, V2.5, V2-Lite, Coder-V2",
    "deepseek_v3": "DeepSeek-V3, R1, V3.1; Kimi K2",
    "deepseek_v32": "DeepSeek-V3.2",
    "deepseek_v4": "DeepSeek-V4 Flash, Pro",
    "dots1": "dots.llm1",
    "ernie4_5_moe": "ERNIE-4.5 21B-A3B, 300B-A47B, also as Paddle stores them",
    "exaone_moe": "K-EXAONE 236B-A23B",
    "gemma4": "Gemma 4 26B-A4B",
    "glm4_moe": "GLM-4.5, 4.6, 4.7, Air",
    "glm4_moe_lite": "GLM-4.7-Flash",
    "glm5_next": "GLM-5.3-Flash (text)",
    "glm_moe_dsa": "GLM-5, 5.1, 5.2",
    "gpt_oss": "gpt-oss 20b, 120b",
    "granitemoe": "Granite 3 MoE",
    "granitemoe_swa": "Granite SWA",
    "granitemoehybrid": "Granite 4.0-H",
    "granitemoeshared": "Granite 3 MoE with shared experts",
    "hunyuan_v1_moe": "Hunyuan-A13B",
    "hy_v3": "Hy3",
    "hy_v4": "Hy4",
    "jamba": "Jamba 1.5, 1.6, 1.7",
    "kimi_k25": "Kimi K2.5, K2.6",
    "kimi_linear": "Kimi-Linear 48B-A3B",
    "laguna": "Laguna",
    "lfm2_moe": "LFM2-8B-A1B, LFM2.5",
    "llama": "Llama 2, 3 (dense)",
    "llama4": "Llama 4 Scout, Maverick",
    "mellum": "Mellum 2",
    "mimo_v2_flash": "MiMo-V2-Flash, V2.5, V2.6-Flash (text)",
    "minimax_m2": "MiniMax M2, M2.5",
    "minimax_m3": "MiniMax M3 (text)",
    "mistral": "Mistral 7B, Nemo (dense)",
    "mistral4": "Mistral Small 4",
    "mixtral": "Mixtral 8x7B, 8x22B",
    "nemotron_h": "Nemotron 3 Nano, Super",
    "olmoe": "OLMoE 1B-7B",
    "phimoe": "Phi-3.5-MoE",
    "qwen2_moe": "Qwen1.5-MoE, Qwen2-57B-A14B",
    "qwen3": "Qwen3 (dense)",
    "qwen3_5_moe": "Qwen3.5 and 3.6 35B-A3B, 122B-A10B, 397B-A17B",
    "qwen3_moe": "Qwen3 30B-A3B, 235B-A22B, Coder",
    "qwen3_next": "Qwen3-Next 80B-A3B",
    "qwen3_vl_moe": "Qwen3-VL 30B-A3B, 235B-A22B (text)",
    "qwen4_exp": "Qwen3.8-Flash-Next (text)",
    "solar_open": "Solar-Open",
    "step3p7": "Step-3.5-Flash, 3.7-Flash (text)",
    "switch_transformers": "Switch Transformers: google/switch-base-8 and larger",
}
"""What people call the models of a family, by its name in the code."""

NEEDED = {
    "lfm2_moe": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "gemma4": {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64},
    "qwen4_exp": {"rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 0.25}},
}
"""What a config class cannot be made without, or takes otherwise than all releases, by family."""

HEAD = """# Families

These are the families of models that moequant converts. The columns say:

- **class**: `architectures` in the model's config.json.
- **llama.cpp**: what llama.cpp calls the architecture; *no* where the family cannot become a GGUF file.
- **folder**: whether it can become a [folder](safetensors.md) for vLLM and transformers. A folder needs
  releases that store experts one by one. gpt-oss is the exception: its experts are written in the layout
  of its release, in `MXFP4A16` alone.
- **left out**: parts of the model that are not converted. Folders hold copies of them.
- **llama.cpp differs**: where llama.cpp computes something else than transformers. Reports say it too.

For each family the tests build a tiny model with transformers and convert it. In llama.cpp the logits
of its F32 file equal those of transformers. Switch Transformers have an encoder and a decoder, and no server
but transformers: [limits](limits.md#switch-transformers) says what a row of text means for them.

All families are read in bf16, f16 and f32. They are also read quantized: as FP8 (DeepSeek's blocks,
compressed-tensors), MXFP4, NVFP4, and int2 to int8 (compressed-tensors, GPTQ, AWQ); also where ModelOpt,
auto-round or AMD Quark made them. Families with a name in the column *llama.cpp* are also read from GGUF
files. `moequant/checkpoint/codecs/` says what each codec decodes.

Layers that predict the token after the next (multi-token prediction, MTP) are kept, as llama.cpp's NextN
blocks for drafting, unless the table lists them as left out, with the reason. Folders hold copies of them.
`--no-mtp` leaves them out of both.

This page is written by `scripts/build_families_reference.py`.

| models | class | llama.cpp | folder | left out | llama.cpp differs |
|---|---|---|---|---|---|
"""


def default_config(family: Family) -> Config:
    """The config that its class makes of what it cannot do without."""
    return CONFIG_MAPPING[family.model_type](**NEEDED.get(family.name, {}))


def row(family: Family) -> str:
    """One family's line of the table."""
    config, way = default_config(family), EXPORTS.get(family.name)
    folder = one_by_one(family, config)
    described = int(family.predictions is not nothing_predicted)
    refused = None if way is None else refusal(way, described)
    kept = {"computed from the config", *([] if refused else [PREDICTION])}
    left = dict.fromkeys(why for why in family.skipped(config).values() if why not in kept)
    shown = (f"{why}: {refused}" if why == PREDICTION else why for why in left)
    warned = "; ".join(way.told(config)) if way is not None else ""
    cells = (
        MODELS[family.name],
        ", ".join(f"`{name}`" for name in family.classes),
        f"`{way.arch}`" if way is not None else "no",
        "`MXFP4A16`" if family.name == mxfp4.FAMILY else "yes" if folder else "no",
        "; ".join(shown),
        warned,
    )
    return f"| {' | '.join(cells)} |"


def page() -> str:
    """The whole page."""
    return HEAD + "\n".join(row(family) for family in sorted(FAMILIES, key=lambda family: family.name)) + "\n"


if __name__ == "__main__":
    text = page()
    if "--check" in sys.argv:
        sys.exit(0 if PAGE.read_text(encoding="utf-8") == text else f"{PAGE}: out of date; run this script")
    PAGE.write_text(text, encoding="utf-8")
