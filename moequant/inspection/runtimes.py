"""Which runtimes know a model: architectures by name, as llama.cpp b11434 and transformers know them."""

from __future__ import annotations

import gguf

from moequant.errors import few
from moequant.inspection.values import Runtime

_NEWER = frozenset(
    "qwen4exp deepseek32 deepseek4 glm5-next minimax-m3 minimax-01 granite_swa hy_v3 hy_v4 kimi-k3 dots3note "
    "cohere2moe laguna mellum bailingmoe3 maple".split()
)
"""MoE architectures of llama.cpp b11434 that gguf-py 0.19 does not name."""

GGUF_ARCH = {
    "AfmoeForCausalLM": "afmoe",
    "Cohere2MoeForCausalLM": "cohere2moe",
    "DbrxForCausalLM": "dbrx",
    "DeepseekV2ForCausalLM": "deepseek2",
    "DeepseekV32ForCausalLM": "deepseek32",
    "DeepseekV3ForCausalLM": "deepseek2",
    "DeepseekV4ForCausalLM": "deepseek4",
    "Dots1ForCausalLM": "dots1",
    "Ernie4_5_MoeForCausalLM": "ernie4_5-moe",
    "ExaoneMoEForCausalLM": "exaone-moe",
    "ExaoneMoeForCausalLM": "exaone-moe",
    "Gemma4ForConditionalGeneration": "gemma4",
    "Glm4MoeForCausalLM": "glm4moe",
    "Glm4MoeLiteForCausalLM": "deepseek2",
    "GlmMoeDsaForCausalLM": "glm-dsa",
    "GptOssForCausalLM": "gpt-oss",
    "GraniteMoeForCausalLM": "granitemoe",
    "GraniteMoeHybridForCausalLM": "granitehybrid",
    "GraniteMoeSharedForCausalLM": "granitemoe",
    "HYV3ForCausalLM": "hy_v3",
    "HunYuanMoEV1ForCausalLM": "hunyuan-moe",
    "JambaForCausalLM": "jamba",
    "KimiLinearForCausalLM": "kimi-linear",
    "LagunaForCausalLM": "laguna",
    "Lfm2MoeForCausalLM": "lfm2moe",
    "Llama4ForCausalLM": "llama4",
    "Llama4ForConditionalGeneration": "llama4",
    "LlamaForCausalLM": "llama",
    "MellumForCausalLM": "mellum",
    "MiMoV2FlashForCausalLM": "mimo2",
    "MiniMaxM2ForCausalLM": "minimax-m2",
    "MistralForCausalLM": "llama",
    "MixtralForCausalLM": "llama",
    "NemotronHForCausalLM": "nemotron_h_moe",
    "OlmoeForCausalLM": "olmoe",
    "Qwen2MoeForCausalLM": "qwen2moe",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3moe",
    "Qwen3NextForCausalLM": "qwen3next",
    "Qwen3VLMoeForConditionalGeneration": "qwen3vlmoe",
    "Qwen3_5MoeForCausalLM": "qwen35moe",
    "Qwen3_5MoeForConditionalGeneration": "qwen35moe",
    "Qwen4ExpForCausalLM": "qwen4exp",
    "Qwen4ExpForConditionalGeneration": "qwen4exp",
    "SolarOpenForCausalLM": "glm4moe",
}
"""transformers' class -> llama.cpp's architecture, as its converter maps them."""


def arch_known(arch: str) -> tuple[bool, str]:
    """Whether llama.cpp runs an architecture, and how that is known."""
    if arch in gguf.MODEL_ARCH_NAMES.values():
        return True, f"architecture {arch!r} (named in gguf-py)"
    if arch in _NEWER:
        return True, f"architecture {arch!r}, newer than gguf-py 0.19: llama.cpp b11434 or later"
    return False, f"architecture {arch!r} is unknown to gguf-py and to llama.cpp b11434"


def checkpoint_runtimes(architecture: str, model_type: str, convertible: bool) -> tuple[Runtime, ...]:
    """What is known about serving a Hugging Face checkpoint of that class."""
    arch = GGUF_ARCH.get(architecture)
    if arch is None:
        llama = Runtime("llama.cpp", False, f"no converter for {architecture} is known")
    else:
        ok, note = arch_known(arch)
        by = "moequant convert" if convertible else "its own converter (moequant cannot yet)"
        llama = Runtime("llama.cpp", ok, f"{note}, as GGUF by {by}")
    return (
        llama,
        _transformers(model_type),
        Runtime("vLLM", None, "not checked here: it has its own list of classes"),
    )


def gguf_runtimes(arch: str, types: tuple[str, ...]) -> tuple[Runtime, ...]:
    """What is known about serving a GGUF file of that architecture with those types."""
    ok, note = arch_known(arch)
    foreign = [name for name in types if name.startswith("type ")]
    if foreign:
        ok, note = False, f"{note}; {few(foreign)} is no type of llama.cpp's: the file is from a fork"
    return (
        Runtime("llama.cpp", ok, note),
        Runtime("transformers", None, "reads some GGUF files by dequantizing them; not checked here"),
        Runtime("vLLM", None, "MoE models from GGUF need its plugin vllm-gguf-plugin; not checked here"),
    )


def _transformers(model_type: str) -> Runtime:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    known = model_type in CONFIG_MAPPING_NAMES
    verb = "knows" if known else "does not know"
    return Runtime("transformers", known, f"{transformers.__version__} {verb} model_type {model_type!r}")
