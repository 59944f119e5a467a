"""Tiny random checkpoints of each family, built with transformers, with a tokenizer trained on the spot."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).parents[1]
"""The checkout."""

SHARED = ROOT.parent / "shared"
"""Trained checkpoints and text that some machines have beside the checkout; tests skip without them."""

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
VOCAB = 384

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.08,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}

ABSENT = object()
"""In the place of a value of `COMMON` that a family's config does not have."""

GRANITE = {
    "intermediate_size": 192,
    "num_local_experts": 6,
    "num_experts_per_tok": 3,
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.09,
    "residual_multiplier": 0.22,
    "logits_scaling": 6.0,
    "attention_bias": False,
}

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "mixtral": {
        "intermediate_size": 512,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    "qwen3_moe": {
        "head_dim": 32,
        "intermediate_size": 512,
        "moe_intermediate_size": 256,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "sliding_window": None,
    },
    "olmoe": {
        "num_key_value_heads": 4,
        "intermediate_size": 256,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
    },
    "deepseek_v3": {
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "intermediate_size": 320,
        "moe_intermediate_size": 128,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_shared_experts": 2,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": 96,
        "kv_lora_rank": 64,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 32,
        "v_head_dim": 48,
        "num_mtp_layers": 0,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 256,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    },
    "gpt_oss": {
        "num_hidden_layers": 4,
        "head_dim": 32,
        "intermediate_size": 192,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "sliding_window": 48,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 256,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": True,
        },
    },
    "dbrx": {
        **dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads"), ABSENT),
        **dict.fromkeys(("num_key_value_heads", "max_position_embeddings", "rms_norm_eps"), ABSENT),
        "d_model": 256,
        "n_layers": 2,
        "n_heads": 4,
        "max_seq_len": 1024,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.5, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 192, "moe_num_experts": 6, "moe_top_k": 3},
    },
    "llama4_text": {
        "num_hidden_layers": 4,
        "head_dim": 32,
        "intermediate_size": 192,
        "intermediate_size_mlp": 320,
        "num_local_experts": 6,
        "interleave_moe_layer_step": 2,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
    },
    "gemma4_text": {
        "num_hidden_layers": 3,
        "head_dim": 32,
        "global_head_dim": 64,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "intermediate_size": 320,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": VOCAB,
        "enable_moe_block": True,
        "num_experts": 6,
        "top_k_experts": 3,
        "moe_intermediate_size": 192,
        "sliding_window": 48,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "final_logit_softcapping": 30.0,
        "pad_token_id": 0,
    },
    "granitemoe": GRANITE,
    "granitemoeshared": GRANITE | {"shared_intermediate_size": 320},
    "granitemoe_swa": GRANITE
    | {
        "num_hidden_layers": 4,
        "shared_intermediate_size": 320,
        "sliding_window": 48,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "layer_rope_theta": [0, 10000.0, 10000.0, 10000.0],
    },
    "granitemoehybrid": GRANITE
    | {
        "num_hidden_layers": 3,
        "shared_intermediate_size": 320,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "mamba_n_heads": 8,
        "mamba_n_groups": 2,
        "mamba_d_state": 32,
        "mamba_d_head": 64,
    },
    "llama": {"intermediate_size": 512},
    "qwen3": {"head_dim": 64, "intermediate_size": 512, "sliding_window": None},
}
"""One config a family; shapes are not square where the format allows, so that transposes show."""

TEXT = [
    "The router sends every token to two of its experts and adds their outputs.",
    "def quantize(weights, importance):\n    return round(weights / scale)\n",
    "1 + 2 = 3, 10 * 12 = 120; \u00fcber stra\u00dfe \u4f60\u597d \U0001f600",
] * 20


def tokenizer(vocab: int = VOCAB) -> Tokenizer:
    """A byte-level BPE with Qwen2's split, trained on a few lines."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXT, trainer)
    return made


def build(
    folder: Path,
    family: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    save: Any = None,
    **changes: Any,
) -> Path:
    """Save a random model of `family` in `folder` and return it; `changes` override its config."""
    torch.manual_seed(seed)
    given = COMMON | CONFIGS[family] | changes
    config = AutoConfig.for_model(family, **{key: value for key, value in given.items() if value is not ABSENT})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            if name.endswith(("mlp.gate.weight", "gate_up_proj", "q_proj.weight")):
                parameter.mul_(2.0)
            if "bias" in name or name.endswith("sinks"):
                parameter.normal_(0, 0.2)
            if name.endswith(("router.scale", "per_expert_scale", ".D", "A_log")):
                parameter.add_(torch.randn_like(parameter) * 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.1)
            if name.endswith("layer_scalar"):
                buffer.uniform_(0.5, 1.0)
    model.to(dtype).save_pretrained(folder, **(save or {}))
    tokenizer(config.vocab_size).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": "<|endoftext|>",
                "add_bos_token": False,
            }
        )
    )
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of a saved config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
