"""Tiny random checkpoints of each family, built with transformers, with a tokenizer trained on the spot."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

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

DELTA_NET = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_conv_kernel_dim": 4,
    "num_hidden_layers": 2,
    "head_dim": 64,
    "moe_intermediate_size": 192,
    "shared_expert_intermediate_size": 128,
    "num_experts": 6,
    "num_experts_per_tok": 3,
}

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 256,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}

KIMI = {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "intermediate_size": 320,
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.827,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 48,
    "num_mtp_layers": 0,
    "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
}

SPARSE = {
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "intermediate_size": 320,
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 48,
    "index_n_heads": 16,
    "index_head_dim": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
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
    "deepseek_v2": {
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "intermediate_size": 320,
        "moe_intermediate_size": 128,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_shared_experts": 2,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.5,
        "first_k_dense_replace": 1,
        "q_lora_rank": 96,
        "kv_lora_rank": 64,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 32,
        "v_head_dim": 48,
        "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "deepseek_v2_lite": {
        "model_type": "deepseek_v2",
        "hidden_size": 96,
        "num_hidden_layers": 27,  # by which llama.cpp knows it; two have experts, each layer takes time
        "num_key_value_heads": 4,
        "intermediate_size": 160,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 2,
        "first_k_dense_replace": 25,
        "q_lora_rank": None,
        "kv_lora_rank": 64,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 32,
        "v_head_dim": 48,
        "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "deepseek_v32": SPARSE
    | {
        "n_group": 4,
        "topk_group": 2,
        "index_topk": 64,
        "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "glm_moe_dsa": SPARSE | {"indexer_types": ["full", "shared", "full"]},
    "glm4_moe": {
        "num_hidden_layers": 3,
        "head_dim": 48,
        "intermediate_size": 320,
        "moe_intermediate_size": 128,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_shared_experts": 1,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 1,
        "use_qk_norm": True,
        "attention_bias": True,
        "num_mtp_layers": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
    },
    "solar_open": {
        "head_dim": 48,
        "moe_intermediate_size": 128,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_shared_experts": 1,
        "rope_parameters": YARN,
    },
    "minimax_m2": {
        "head_dim": 48,
        "intermediate_size": 128,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
    },
    "glm4_moe_lite": {
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "intermediate_size": 320,
        "moe_intermediate_size": 128,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_shared_experts": 1,
        "q_lora_rank": 96,
        "kv_lora_rank": 64,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 48,
        "v_head_dim": 80,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "kimi_k25": KIMI,
    "kimi_k2": KIMI,
    "mistral4": {
        "model_type": "mistral4",
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "intermediate_size": 320,
        "moe_intermediate_size": 128,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 96,
        "kv_lora_rank": 64,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 32,
        "v_head_dim": 48,
        "rope_parameters": YARN
        | {
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 64,
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
    "qwen2_moe": {
        "num_key_value_heads": 4,
        "intermediate_size": 320,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 192,
        "num_experts": 6,
        "num_experts_per_tok": 3,
    },
    "qwen3_vl_moe": {
        "head_dim": 32,
        "intermediate_size": 320,
        "moe_intermediate_size": 192,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
    },
    "qwen3_next": {
        "intermediate_size": 320,
        **DELTA_NET,
    },
    "qwen3_5_moe": DELTA_NET,
    "qwen4_exp": {
        **DELTA_NET,
        "layer_types": ["linear_attention", "indexed_attention"],
        "output_gate_type": "sigmoid",
        "hc_count": 3,
        "hc_lowrank": 64,
        "indexer_n_heads": 8,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 96,
        "indexer_budget": 64,
        "indexer_compress_ratio": 8,
        "ple_layer_ids": [1],
        "ngram_size": 3,
        "heads_per_ngram": 4,
        "ngram_vocab_size_base": 180,
        "make_ngram_vocab_size_divisible_by": 96,
        "split_ngram_parts": 12,
    },
    "dots1": {
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
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "sliding_window": None,
    },
    "ernie4_5_moe": {
        "num_hidden_layers": 3,
        "intermediate_size": 320,
        "moe_intermediate_size": 96,
        "moe_num_experts": 8,
        "moe_k": 3,
        "moe_num_shared_experts": 2,
        "tie_word_embeddings": True,
    },
    "hunyuan_v1_moe": {
        "head_dim": 48,
        "intermediate_size": 128,
        "num_experts": 8,
        "moe_topk": [3, 3],
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "dynamic",
            "rope_theta": 10000.0,
            "alpha": 1000.0,
            "factor": 1.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    },
    "hy_v3": {
        "num_hidden_layers": 3,
        "head_dim": 48,
        "intermediate_size": 320,
        "moe_intermediate_size": 128,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "num_shared_experts": 2,
        "router_scaling_factor": 1.5,
    },
    "exaone_moe": {
        "num_hidden_layers": 5,
        "intermediate_size": 320,
        "moe_intermediate_size": 96,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "num_shared_experts": 2,
        "n_group": 2,
        "topk_group": 1,
        "sliding_window": 48,
        "sliding_window_pattern": 3,
        "first_k_dense_replace": 1,
    },
    "mellum": {
        "num_hidden_layers": 3,
        "head_dim": 48,
        "intermediate_size": 320,
        "moe_intermediate_size": 96,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "sliding_window": 48,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": YARN,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "laguna": {
        "num_hidden_layers": 4,
        "num_attention_heads_per_layer": [4, 8, 8, 4],
        "head_dim": 32,
        "intermediate_size": 320,
        "moe_intermediate_size": 96,
        "shared_expert_intermediate_size": 160,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_routed_scaling_factor": 2.5,
        "sliding_window": 48,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": YARN | {"partial_rotary_factor": 0.5, "attention_factor": 1.0},
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": 20000.0,
                "partial_rotary_factor": 1.0,
            },
        },
    },
    "afmoe": {
        "num_hidden_layers": 5,
        "head_dim": 48,
        "intermediate_size": 320,
        "moe_intermediate_size": 96,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "num_shared_experts": 2,
        "route_scale": 1.5,
        "sliding_window": 48,
        "mup_enabled": True,
    },
    "cohere2_moe": {
        "num_hidden_layers": 5,
        "head_dim": 48,
        "intermediate_size": 96,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "num_shared_experts": 2,
        "first_k_dense_replace": 1,
        "prefix_dense_intermediate_size": 320,
        "sliding_window": 48,
        "logit_scale": 0.25,
        "rms_norm_eps": None,
    },
    "mimo_v2_flash": {
        "num_hidden_layers": 4,
        "head_dim": 48,
        "v_head_dim": 32,
        "intermediate_size": 320,
        "moe_intermediate_size": 96,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "sliding_window": 48,
        "rms_norm_eps": 1e-5,
    },
    "lfm2_moe": {
        "num_hidden_layers": 4,
        "intermediate_size": 320,
        "moe_intermediate_size": 96,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "num_dense_layers": 1,
        "layer_types": ["conv", "conv", "full_attention", "conv"],
    },
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "linear_attention"],
        "head_dim": 48,
        "moe_intermediate_size": 96,
        "moe_shared_expert_intermediate_size": 160,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 1.5,
        "mamba_num_heads": 12,
        "mamba_head_dim": 32,
        "ssm_state_size": 32,
        "n_groups": 2,
        "layer_norm_epsilon": 1e-5,
    },
    "nemotron_h_latent": {
        "model_type": "nemotron_h",
        "layers_block_type": ["linear_attention", "full_attention", "moe"],
        "head_dim": 48,
        "moe_intermediate_size": 96,
        "moe_shared_expert_intermediate_size": 160,
        "moe_latent_size": 64,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "mamba_num_heads": 12,
        "mamba_head_dim": 32,
        "ssm_state_size": 32,
        "n_groups": 2,
    },
    "jamba": {
        "num_hidden_layers": 4,
        "intermediate_size": 96,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "mamba_d_state": 16,
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
    "llama4": {
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
    "gemma4": {
        "num_hidden_layers": 2,
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
        "layer_types": ["sliding_attention", "full_attention"],
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
    "mistral": {"num_hidden_layers": 2, "intermediate_size": 320, "sliding_window": None},
    "qwen3": {"head_dim": 64, "intermediate_size": 512, "sliding_window": None},
    "step3p7": {
        "num_hidden_layers": 5,
        "head_dim": 48,
        "intermediate_size": 320,
        "moe_intermediate_size": 96,
        "share_expert_dim": 160,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_router_scaling_factor": 1.5,
        "sliding_window": 48,
        "num_sliding_attention_heads": 6,
        "layer_types": ["full_attention", *["sliding_attention"] * 3, "full_attention"],
        "mlp_layer_types": ["dense", *["sparse"] * 4],
        "pad_token_id": 0,
        "swiglu_limits": [0, 0, 0, 0.3, 0.3],
        "swiglu_limits_shared": [0, 0, 0, 0, 0.3],
        "rope_parameters": {
            "full_attention": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 2.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 32.0,
                "original_max_position_embeddings": 256,
                "partial_rotary_factor": 0.5,
            },
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": 5000.0,
                "partial_rotary_factor": 1.0,
            },
        },
    },
    "minimax_m3": {
        "num_hidden_layers": 3,
        "head_dim": 48,
        "rotary_dim": 24,
        "intermediate_size": 96,
        "dense_intermediate_size": 320,
        "shared_intermediate_size": 192,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "routed_scaling_factor": 1.5,
        "index_n_heads": 2,
        "index_head_dim": 32,
        "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
    },
    "kimi_linear": {
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 320,
        "moe_intermediate_size": 96,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "n_shared_experts": 2,
        "kv_lora_rank": 64,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 32,
        "v_head_dim": 48,
        "linear_head_dim": 32,
        "linear_num_heads": 4,
        "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    },
    "bailing_hybrid": {
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 320,
        "moe_intermediate_size": 96,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "n_shared_experts": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "head_dim": 32,
        "layer_group_size": 2,
        "kv_lora_rank": 64,
        "q_lora_rank": 96,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 32,
        "v_head_dim": 48,
        "num_mtp_layers": 0,
    },
    "hy_v4": SPARSE
    | {
        "first_k_dense_replace": ABSENT,
        "indexer_types": ["full", "shared", "full"],
        "hc_mult": 3,
        "swiglu_limit": 0.5,
        "routed_scaling_factor": 1.5,
    },
    "glm5_next": {
        **{key: SPARSE[key] for key in SPARSE.keys() - {"first_k_dense_replace", "rope_parameters"}},
        "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "qk_rope_head_dim": 0,
        "linear_head_dim": 32,
        "linear_num_heads": 4,
        "index_kpool": 8,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 5,
        "swiglu_limit": 0.5,
        "routed_scaling_factor": 1.5,
    },
    "deepseek_v4": {
        "num_hidden_layers": 4,
        "num_key_value_heads": 1,
        "head_dim": 96,
        "q_lora_rank": 64,
        "moe_intermediate_size": 128,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "layer_types": [
            "heavily_compressed_attention",
            "compressed_sparse_attention",
            "sliding_attention",
            "compressed_sparse_attention",
        ],
        "mlp_layer_types": ["hash_moe", "hash_moe", "moe", "moe"],
        "partial_rotary_factor": 1 / 6,
        "rope_parameters": dict(YARN),
        "sliding_window": 48,
        "o_groups": 2,
        "o_lora_rank": 96,
        "index_n_heads": 16,  # with few, many entries have a score of 0, and none is the better one
        "index_head_dim": 64,
        "index_topk": 8,
        "hc_sinkhorn_iters": 5,
        "swiglu_limit": 0.5,
    },
}
"""One config a family, of the model type that it is called after, or says; shapes are not square where the
format allows, so that transposes show."""

_QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 256,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
VISION: Mapping[str, Mapping[str, Any]] = {
    "qwen3_vl_moe": _QWEN_VISION,
    "qwen3_5_moe": _QWEN_VISION,
    "qwen4_exp": {key: value for key, value in _QWEN_VISION.items() if key != "deepstack_visual_indexes"},
    "kimi_k25": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "pos_emb_height": 4,
        "pos_emb_width": 4,
    },
    "mistral4": {
        "model_type": "pixtral",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 16,
        "image_size": 28,
    },
    "llama4": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vision_output_dim": 48,
        "projector_input_dim": 48,
        "projector_output_dim": 48,
        "image_size": 28,
    },
    "gemma4": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "position_embedding_size": 16,
    },
    "step3p7": {"width": 32, "layers": 1, "heads": 2, "image_size": 28, "patch_size": 14},
    "minimax_m3": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
    },
    "glm5_next": {
        "depth": 1,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 48,
        "out_hidden_size": 48,
        "projection_intermediate_size": 48,
        "image_size": 28,
    },
}
"""Vision towers of families whose checkpoints have one: the smallest."""

WHOLE: Mapping[str, str] = {"mistral4": "mistral3", "minimax_m3": "minimax_m3_vl"}
"""What the model with its vision tower is called, where that is not the family's name."""

MUP = {"init_method": "mup", "normalization_function": "rmsnorm"}

SIGMOID = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1, "ep_size": 1}

RELEASES: Mapping[str, Mapping[str, Any]] = {
    "qwen2_moe": {"max_window_layers": 1, "sliding_window": 512, "use_sliding_window": False},
    "qwen3_vl_moe": {"norm_topk_prob": True},
    "qwen3_next": {"full_attention_interval": 2, "layer_types": None, "use_sliding_window": False},
    "qwen3_5_moe": {
        "attn_output_gate": True,
        "full_attention_interval": 2,
        "mamba_ssm_dtype": "float32",
        "mlp_only_layers": [],
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
    },
    "qwen4_exp": {
        "attn_output_gate": True,
        "layer_types": ["linear_attention", "full_attention"],
        "mamba_ssm_dtype": "float32",
        "mlp_only_layers": [],
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
    },
    "deepseek_v2": {
        "scoring_func": "softmax",
        "moe_layer_freq": 1,
        "ep_size": 1,
        "seq_aux": True,
        "aux_loss_alpha": 0.001,
        "pretraining_tp": 1,
        "head_dim": None,
        "qk_head_dim": None,
    },
    "deepseek_v3": {**SIGMOID, "num_nextn_predict_layers": 1, "num_mtp_layers": None, "head_dim": None},
    "glm4_moe": {"num_nextn_predict_layers": 1, "num_mtp_layers": None},
    "glm4_moe_lite": {
        **SIGMOID,
        "num_nextn_predict_layers": 1,
        "first_k_dense_replace": 1,
        "mlp_layer_types": None,
    },
    "solar_open": {"first_k_dense_replace": 0, "use_qk_norm": False, "intermediate_size": 320},
    "minimax_m2": {
        "attn_type_list": [1, 1],
        "mtp_transformer_layers": 1,
        "num_mtp_modules": 3,
        "qk_norm_type": "per_layer",
        "rotary_dim": 24,
        "scoring_func": "sigmoid",
        "shared_intermediate_size": 0,
        "use_mtp": True,
        "use_qk_norm": True,
        "use_routing_bias": True,
        "partial_rotary_factor": None,
    },
    "deepseek_v32": {**SIGMOID, "num_nextn_predict_layers": 1, "mlp_layer_types": None, "layer_types": None},
    "glm_moe_dsa": {
        **SIGMOID,
        "num_nextn_predict_layers": 1,
        "mlp_layer_types": None,
        "layer_types": None,
        "indexer_types": None,
        "index_topk_freq": 2,
        "index_skip_topk_offset": 1,
        "index_share_for_mtp_iteration": True,
        "indexer_rope_interleave": True,
        "moe_router_dtype": "float32",
        "rope_interleave": True,
    },
    "dbrx": {"router_aux_loss_coef": 0.05},
    "llama4": {
        "attn_temperature_tuning": True,
        "cache_implementation": "hybrid",
        "for_llm_compressor": False,
        "layer_types": None,
        "moe_layers": None,
        "no_rope_layers": [],
    },
    "gemma4": {
        "global_head_dim": 64,
        "num_global_key_value_heads": 1,
        "per_layer_config": None,
        "use_bidirectional_attention": "vision",
    },
    "granitemoe": MUP,
    "granitemoeshared": MUP,
    "granitemoehybrid": MUP
    | {
        "layer_types": ["mamba", "attention", "mamba"],
        "position_embedding_type": "nope",
        "time_step_limit": None,
    },
    "kimi_k2": {**SIGMOID, "model_type": "kimi_k2", "num_nextn_predict_layers": 0, "num_mtp_layers": None},
    "kimi_k25": {**SIGMOID, "model_type": "kimi_k2", "num_nextn_predict_layers": 0, "num_mtp_layers": None},
    "dots1": {"scoring_func": "noaux_tc", "moe_layer_freq": 1, "ep_size": 1, "max_window_layers": 62},
    "ernie4_5_moe": {
        "moe_capacity": [64, 64, 64],
        "moe_gate": "topk",
        "moe_use_aux_free": True,
        "num_nextn_predict_layers": 1,
    },
    "hunyuan_v1_moe": {
        "attention_head_dim": 48,
        "cla_share_factor": 2,
        "class_num": 0,
        "dense_list": [4096, 0],
        "eod_token_id": 0,
        "moe_drop_tokens": False,
        "moe_intermediate_size": [128, 128],
        "moe_layer_num_skipped": 0,
        "norm_type": "rms",
        "num_shared_expert": [1, 1],
        "org_vocab_size": VOCAB,
        "pool_type": "last",
        "position_embedding_xdrope": False,
        "use_cla": False,
        "use_mixed_mlp_moe": True,
        "use_qk_norm": True,
        "use_rotary_pos_emb": True,
    },
    "hy_v3": {
        "expert_hidden_dim": 128,
        "first_k_dense_replace": 1,
        "mlp_layer_types": None,
        "moe_router_enable_expert_bias": True,
        "moe_router_use_sigmoid": True,
        "num_nextn_predict_layers": 1,
        "qk_norm": True,
        "route_norm": True,
    },
    "exaone_moe": {
        **SIGMOID,
        "is_moe_layer": [False, True, True, True, True],
        "num_nextn_predict_layers": 1,
        "sliding_window_pattern": "LLG",
    },
    "mellum": {"num_nextn_predict_layers": 1, "num_mtp_layers": None},
    "laguna": {"gating": True, "norm_topk_prob": True, "mlp_only_layers": [0], "decoder_sparse_step": 1},
    "afmoe": {
        "load_balance_coeff": 0.001,
        "n_group": 1,
        "num_expert_groups": 1,
        "num_limited_groups": 1,
        "route_norm": True,
        "score_func": "sigmoid",
        "topk_group": 1,
        "use_grouped_mm": True,
    },
    "cohere2_moe": {
        "first_k_dense_replace": 1,
        "layer_types": None,
        "mlp_layer_types": None,
        "num_nextn_predict_layers": 1,
        "use_gated_activation": True,
        "use_parallel_block": True,
        "use_qk_norm": False,
    },
    "mimo_v2_flash": {
        "add_full_attention_sink_bias": False,
        "add_swa_attention_sink_bias": True,
        "attention_chunk_size": 47,
        "hybrid_layer_pattern": [0, 1, 1, 1],
        "layer_types": None,
        "layernorm_epsilon": 1e-5,
        "mlp_layer_types": None,
        "moe_layer_freq": [0, 1, 1, 1],
        "partial_rotary_factor": 0.334,
        "rms_norm_eps": None,
        "rope_parameters": None,
        "rope_theta": 5000000,
        "routed_scaling_factor": None,
        "scoring_func": "sigmoid",
        "sliding_window": 47,
        "sliding_window_size": 47,
        "swa_head_dim": 48,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_rope_theta": 10000,
        "swa_v_head_dim": 32,
        "topk_method": "noaux_tc",
    },
    "lfm2_moe": {"tie_embedding": True, "tie_word_embeddings": None, "use_pos_enc": True},
    "nemotron_h": {
        "attention_head_dim": 48,
        "hybrid_override_pattern": "ME*EM",
        "layer_types": None,
        "layers_block_type": None,
        "mamba_proj_bias": False,
        "mtp_hybrid_override_pattern": "*E",
        "mtp_layers_block_type": None,
        "norm_eps": 1e-5,
        "num_nextn_predict_layers": 1,
        "partial_rotary_factor": 1.0,
        "rope_theta": 10000,
    },
    "jamba": {
        "calc_logits_for_entire_prompt": False,
        "mamba_inner_layernorms": True,
        "num_logits_to_keep": 1,
    },
    "step3p7": {
        **dict.fromkeys(("num_key_value_heads", "n_routed_experts", "num_experts_per_tok")),
        **dict.fromkeys(("mlp_layer_types", "mtp_layer_types", "mtp_mlp_layer_types", "per_layer_config")),
        **dict.fromkeys(("num_sliding_attention_heads", "query_pre_attn_scalar", "rope_parameters")),
        "att_impl_type": "GQA",
        "attention_other_setting": {
            "attention_type": "sliding_attention",
            "num_attention_heads": 6,
            "num_attention_groups": 2,
            "head_dim": 48,
            "true_head_dim": 48,
        },
        "layer_types": [
            "full_attention",
            *["sliding_attention"] * 3,
            *["full_attention"] * 2,
            "sliding_attention",
        ],
        "max_seq_len": 1024,
        "moe_every_n_layer": 1,
        "moe_layer_offset": 0,
        "moe_layers_enum": "1,2,3,4",
        "moe_num_experts": 8,
        "moe_router_activation": "sigmoid",
        "moe_top_k": 3,
        "need_fp32_gate": True,
        "norm_expert_weight": True,
        "num_attention_groups": 2,
        "num_nextn_predict_layers": 2,
        "partial_rotary_factors": [0.5, 1.0, 1.0, 1.0, 0.5, 0.5, 1.0],
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 2.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 32.0,
            "original_max_position_embeddings": 256,
        },
        "rope_theta": [10000.0, 5000.0, 5000.0, 5000.0, 10000.0, 10000.0, 5000.0],
        "swiglu_limits": [0.0, 0.0, 0.0, 0.3, 0.3, 0.0, 0.0],
        "swiglu_limits_shared": [0.0, 0.0, 0.0, 0.0, 0.3, 0.0, 0.0],
        "use_head_wise_attn_gate": True,
        "use_moe": True,
        "use_moe_router_bias": True,
        "use_qk_norm": False,
        "yarn_only_types": ["full_attention"],
        "zero_centered": True,
    },
    "minimax_m3": {
        **dict.fromkeys(("index_n_heads", "index_head_dim", "index_block_size", "index_topk_blocks")),
        **dict.fromkeys(("index_local_blocks", "layer_types", "mlp_layer_types")),
        "hidden_act": "swigluoai",
        "moe_layer_freq": [0, 1, 1],
        "n_shared_experts": 1,
        "num_mtp_modules": 1,
        "qk_norm_type": "per_head",
        "scoring_func": "sigmoid",
        "sparse_attention_config": {
            "use_sparse_attention": True,
            "sparse_index_dim": 32,
            "sparse_num_index_heads": 2,
            "sparse_topk_blocks": 16,
            "sparse_block_size": 128,
            "sparse_score_type": "max",
            "sparse_local_block": 1,
            "sparse_init_block": 0,
            "sparse_disable_index_value": [0, 1, 1],
            "sparse_attention_freq": [0, 1, 1],
        },
        "use_gemma_norm": True,
        "use_qk_norm": True,
        "use_routing_bias": True,
    },
    "kimi_linear": {
        **dict.fromkeys(("layer_types", "mlp_layer_types", "max_position_embeddings", "n_group")),
        **dict.fromkeys(("linear_head_dim", "linear_num_heads", "linear_conv_kernel_dim")),
        "first_k_dense_replace": 1,
        "head_dim": 72,
        "linear_attn_config": {
            "full_attn_layers": [3],
            "kda_layers": [1, 2, 4],
            "head_dim": 32,
            "num_heads": 4,
            "short_conv_kernel_size": 4,
        },
        "mla_use_nope": True,
        "model_max_length": 1024,
        "moe_layer_freq": 1,
        "moe_renormalize": True,
        "moe_router_activation_func": "sigmoid",
        "num_expert_group": 1,
        "num_nextn_predict_layers": 0,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "use_grouped_topk": True,
    },
    "bailing_hybrid": {
        **dict.fromkeys(("layer_types", "mlp_layer_types")),
        **dict.fromkeys(("linear_head_dim", "linear_num_heads", "linear_conv_kernel_dim")),
        "gated_attention_proj_granularity_type": "head_wise",
        "head_dim": 32,
        "linear_silu": True,
        "moe_router_enable_expert_bias": True,
        "moe_shared_expert_intermediate_size": 96,
        "no_kda_lora": True,
        "num_mtp_layers": None,
        "num_nextn_predict_layers": 1,
        "rope_interleave": True,
        "router_dtype": "fp32",
        "score_function": "sigmoid",
        "use_qk_norm": True,
        "use_qkv_bias": False,
    },
    "hy_v4": {
        "first_k_dense_replace": 1,
        "layer_types": None,
        "mlp_layer_types": None,
        "num_nextn_predict_layers": 1,
    },
    "glm5_next": {
        **dict.fromkeys(("linear_head_dim", "linear_num_heads", "linear_conv_kernel_dim")),
        **dict.fromkeys(("linear_lower_bound", "indexer_types")),
        "index_topk_freq": 1,
        "linear_attn_config": {
            "head_dim": 32,
            "num_heads": 4,
            "short_conv_kernel_size": 4,
            "gate_lower_bound": -5.0,
            "safe_gate": True,
        },
        "mhc": True,
        "mla_use_nope": True,
        "num_nextn_predict_layers": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    },
    "deepseek_v4": {
        **dict.fromkeys(("compress_rates", "layer_types", "mlp_layer_types", "partial_rotary_factor")),
        "compress_ratios": [128, 4, 0, 4, 0],
        "expert_dtype": "fp4",
        "num_hash_layers": 2,
        "num_nextn_predict_layers": 1,
        "rope_parameters": None,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 256,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        "topk_method": "noaux_tc",
    },
}
"""Keys of the text's config as releases have them, where transformers 5 saves others; None: none."""

_APPENDED = {
    "{at}.eh_proj": (256, 512),
    "{at}.enorm": (256,),
    "{at}.hnorm": (256,),
    "{at}.shared_head.norm": (256,),
    "{at}.shared_head.head": (VOCAB, 256),
    "{at}.embed_tokens": (VOCAB, 256),
}
_UNDER_MTP = {
    "mtp.fc": (256, 512),
    "mtp.pre_fc_norm_embedding": (256,),
    "mtp.pre_fc_norm_hidden": (256,),
    "mtp.norm": (256,),
}


@dataclass(frozen=True)
class Prediction:
    """How a release stores a layer that predicts: which layers of the model it is like, under which prefixes,
    and what is around it."""

    like: Mapping[int, str]
    around: Mapping[str, tuple[int, ...]]


def _appended(like: int, number: int, around: Mapping[str, tuple[int, ...]] = _APPENDED) -> Prediction:
    at = f"model.layers.{number}"
    return Prediction({like: f"{at}."}, {name.format(at=at): shape for name, shape in around.items()})


def _step(number: int, heads: int) -> dict[str, tuple[int, ...]]:
    """A layer that predicts with so many heads and a dense block."""
    shapes = {
        "eh_proj": (256, 512),
        "transformer.shared_head.output": (VOCAB, 256),
        "self_attn.q_proj": (heads * 48, 256),
        "self_attn.k_proj": (96, 256),
        "self_attn.v_proj": (96, 256),
        "self_attn.o_proj": (256, heads * 48),
        "self_attn.g_proj": (heads, 256),
        "self_attn.q_norm": (48,),
        "self_attn.k_norm": (48,),
        "mlp.gate_proj": (320, 256),
        "mlp.up_proj": (320, 256),
        "mlp.down_proj": (256, 320),
    }
    norms = ("enorm", "hnorm", "input_layernorm", "post_attention_layernorm", "transformer.shared_head.norm")
    shapes |= dict.fromkeys(norms, (256,))
    return {f"model.layers.{number}.{name}": shape for name, shape in shapes.items()}


_JOINED = {"{at}.eh_proj": (256, 512), "{at}.enorm": (256,), "{at}.hnorm": (256,)}


def _mimo(number: int) -> dict[str, tuple[int, ...]]:
    """A layer that predicts with a window and a dense block, of a model whose last layers have experts."""
    shapes = {
        "eh_proj": (256, 512),
        "self_attn.q_proj": (192, 256),
        "self_attn.k_proj": (192, 256),
        "self_attn.v_proj": (128, 256),
        "self_attn.o_proj": (256, 128),
        "self_attn.attention_sink_bias": (4,),
        "mlp.gate_proj": (320, 256),
        "mlp.up_proj": (320, 256),
        "mlp.down_proj": (256, 320),
    }
    norms = ("enorm", "hnorm", "input_layernorm", "pre_mlp_layernorm", "final_layernorm")
    shapes |= dict.fromkeys(norms, (256,))
    return {f"model.mtp.layers.{number}.{name}": shape for name, shape in shapes.items()}


PREDICTIONS: Mapping[str, Prediction] = {
    "deepseek_v3": _appended(2, 3),
    "deepseek_v32": _appended(2, 3),
    "glm4_moe": _appended(2, 3),
    "glm4_moe_lite": _appended(2, 3),
    "glm_moe_dsa": _appended(2, 3),
    "hy_v3": _appended(2, 3, {**_JOINED, "{at}.final_layernorm": (256,)}),
    "bailing_hybrid": _appended(3, 4, {**_JOINED, "{at}.final_layernorm": (256,)}),
    "cohere2_moe": _appended(4, 5, {**_JOINED, "{at}.shared_head.norm": (256,)}),
    "step3p7": Prediction({}, {**_step(5, 4), **_step(6, 6)}),
    "glm5_next": Prediction(
        {1: "model.language_model.layers.3."},
        {
            name.format(at="model.language_model.layers.3"): shape
            for name, shape in {**_JOINED, "{at}.shared_head.norm": (256,)}.items()
        },
    ),
    "qwen3_next": Prediction({1: "mtp.layers.0."}, _UNDER_MTP),
    "qwen3_5_moe": Prediction({1: "mtp.layers.0."}, _UNDER_MTP),
    "qwen4_exp": Prediction(
        {1: "mtp.layers.0."},
        {
            "mtp.fc_embedding": (256, 256),
            "mtp.fc_hidden": (256, 256),
            "mtp.pre_fc_norm_embedding": (256,),
            "mtp.pre_fc_norm_hidden": (768,),
            "mtp.hyper_connection_mixer.hc_norm": (768,),
            "mtp.hyper_connection_mixer.input_mix_weight_down": (64, 768),
            "mtp.hyper_connection_mixer.input_mix_weight_up": (768, 64),
        },
    ),
    "mimo_v2_flash": Prediction({}, {**_mimo(0), **_mimo(1), **_mimo(2)}),
    "nemotron_h": Prediction(
        {2: "mtp.layers.0.", 3: "mtp.layers.1."},
        {
            "mtp.layers.0.eh_proj": (256, 512),
            "mtp.layers.0.enorm": (256,),
            "mtp.layers.0.hnorm": (256,),
            "mtp.layers.1.final_layernorm": (256,),
        },
    ),
}
"""Families whose layers that predict llama.cpp drafts with."""

WITHIN: Mapping[str, float] = {"gemma4": 2e-2}
"""How far logits of llama.cpp may be off, where it does not compute with float32 alone: GELU is looked up in
a table of half precision."""

_UNFIT = {
    "mtp.fc.weight": (256, 512),
    "mtp.layers.0.input_layernorm.weight": (256,),
    "mtp.norm.weight": (256,),
}

BESIDE: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "deepseek_v4": {"mtp.0.e_proj.weight": (256, 256), "layers.0.ffn.gate.bias": (8,)},
    "hy_v4": {"model.mtp_layers.0.eh_proj.weight": (256, 512)},
    "ernie4_5_moe": {"model.mtp_emb_norm.0.weight": (256,), "model.mtp_linear_proj.0.weight": (256, 512)},
    "exaone_moe": _UNFIT,
    "mellum": _UNFIT,
}
"""Tensors of releases that transformers neither runs nor saves."""

OURS = {
    "BailingMoeV3ForCausalLM": "BailingHybridForCausalLM",
    "KimiK25ForConditionalGeneration": "Kimi_K25ForConditionalGeneration",
}
"""Classes of remote code that transformers has under another name."""

TEXT_ALONE = {"Llama4ForConditionalGeneration": "Llama4ForCausalLM"}
"""Classes whose forward fails in transformers 5.24, on text too; the text model's does not."""

RENAMED: Mapping[str, Mapping[str, str]] = {
    "deepseek_v4": {
        ".attn.norm.": ".attn.kv_norm.",
        "model.embed_tokens.": "embed.",
        "model.hc_head.hc_": "hc_head_",
        "model.": "",
    },
    "kimi_k25": {"language_model.model.blocks.": "language_model.model.layers."},
    "hy_v4": {
        ".hc_pre.hc_attn_layer.": ".hc_attn_layer.hc_pre.",
        ".hc_pre.hc_mlp_layer.": ".hc_mlp_layer.hc_pre.",
        ".hc_pre.hc_head.": ".hc_head.",
        ".mlp.linear_gate.": ".mlp.gate_proj.",
        ".mlp.shared_experts.linear_gate.": ".mlp.shared_experts.gate_proj.",
    },
}
"""What names of tensors contain where transformers 5 saves them, and in releases."""

TRANSPOSED = ("qwen3_vl_moe",)
"""Families whose releases keep stacks of experts transposed, as transformers 5 does not save them."""

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
    vision: bool = True,
    **changes: Any,
) -> Path:
    """Save a random model of `family` in `folder` and return it; `changes` override its config.

    Where the family has a vision tower, the whole is saved; `vision` False saves the text model alone.
    """
    torch.manual_seed(seed)
    given = COMMON | CONFIGS[family] | changes
    given = {key: value for key, value in given.items() if value is not ABSENT}
    vocab, kind = given["vocab_size"], AutoModelForCausalLM
    if family not in VISION:
        config = AutoConfig.for_model(given.pop("model_type", family), **given)
    elif vision:
        tied, kind = given.get("tie_word_embeddings", False), AutoModelForImageTextToText
        config = AutoConfig.for_model(
            WHOLE.get(family, family),
            text_config=given,
            vision_config=VISION[family],
            tie_word_embeddings=tied,
        )
    else:
        config = AutoConfig.for_model(given.pop("model_type", f"{family}_text"), **given)
    model = kind.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            if name.endswith(("mlp.gate.weight", "gate_up_proj", "q_proj.weight")):
                parameter.mul_(2.0)
            if "conv1d" in name:
                parameter.mul_(4.0)
            if "ple.conv1d" in name:
                parameter.normal_(0, 0.3)
            if "bias" in name or name.endswith("sinks"):
                parameter.normal_(0, 0.2)
            if "_hc." in name or "hc_head." in name or "kpool" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            if name.endswith(("router.scale", "per_expert_scale", ".D", "A_log")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith(("e_score_correction_bias", "expert_bias")):
                buffer.normal_(0, 0.1)
            if name.endswith("tid2eid"):
                tables = [torch.randperm(config.n_routed_experts)[: buffer.shape[1]] for _ in buffer]
                buffer.copy_(torch.stack(tables))
            if name.endswith("layer_scalar"):
                buffer.uniform_(0.5, 1.0)
    with warnings.catch_warnings():  # Llama 4's vision tower has complex numbers in a buffer
        warnings.simplefilter("ignore", UserWarning)
        model.to(dtype).save_pretrained(folder, **(save or {}))
    tokenizer(vocab).save(str(folder / "tokenizer.json"))
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


def as_released(folder: Path, family: str) -> Path:
    """Turn what transformers 5 saved into what the release looks like: old rotary keys, keys of its own."""
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    text = raw.get("text_config", raw)
    if "rope_theta" in (rope := dict(text.get("rope_parameters") or {})):  # else one for each kind of layer
        del text["rope_parameters"]
        text["rope_theta"] = rope.pop("rope_theta")
        if (factor := rope.pop("partial_rotary_factor", None)) is not None:
            text["partial_rotary_factor"] = factor
        text["rope_scaling"] = rope if rope.keys() - {"rope_type"} else None
    for key, value in RELEASES.get(family, {}).items():
        text[key] = value
        if value is None:
            del text[key]
    theirs = {ours: theirs for theirs, ours in OURS.items()}
    raw["architectures"] = [theirs.get(name, name) for name in raw["architectures"]]
    path.write_text(json.dumps(raw))
    for old, new in RENAMED.get(family, {}).items():
        file = folder / "model.safetensors"
        tensors = {name.replace(old, new): each for name, each in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    if family in TRANSPOSED:
        file = folder / "model.safetensors"
        stacks = {
            name: each.transpose(1, 2).contiguous() if each.ndim == 3 and ".experts." in name else each
            for name, each in load_file(file).items()
        }
        save_file(stacks, file, {"format": "pt"})
    extra = {name: torch.randn(shape).bfloat16() for name, shape in BESIDE.get(family, {}).items()}
    extra |= predicting(folder, family)
    if extra:
        save_file(extra, folder / "model-mtp.safetensors", {"format": "pt"})
        indexed(folder)
    return folder


def indexed(folder: Path) -> None:
    """Write the index without which nothing beside model.safetensors is read."""
    named = {name: file.name for file in folder.glob("*.safetensors") for name in load_file(file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))


def predicting(folder: Path, family: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """The tensors of a layer that predicts, with values of its own; none where llama.cpp has no such."""
    told, made = PREDICTIONS.get(family), dict[str, torch.Tensor]()
    if told is None:
        return made
    chance = torch.Generator().manual_seed(seed)
    shapes = {name + ".weight" * ("_bias" not in name): shape for name, shape in told.around.items()}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for number, prefix in told.like.items():
            # What predicts has one stream, but for a model that mixes streams by a norm.
            other = "visual" in name or ("hc" in name and ".hc_norm." not in name)
            if (parts := name.partition(f"layers.{number}."))[2] and not other:
                shapes[prefix + parts[2]] = tuple(tensor.shape)
    for name, shape in shapes.items():
        made[name] = (torch.randn(shape, generator=chance) * 0.1).bfloat16()
    return made


def config(family: str, **changes: Any) -> Any:
    """The config object of a tiny model of text alone."""
    given = COMMON | CONFIGS[family] | changes
    return AutoConfig.for_model(given.pop("model_type", family), **given)


def reference(folder: Path) -> PreTrainedModel:
    """The model as transformers loads it, float32, by the class that config.json names."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    cls = getattr(transformers, (OURS | TEXT_ALONE).get(name, name))
    config = cls.config_class.from_pretrained(folder)
    config.model_type = cls.config_class.model_type  # what names of tensors are read by
    return cls.from_pretrained(folder, config=config, dtype=torch.float32, experts_implementation="eager")


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of a saved config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
