"""Tiny random checkpoints of each family, built with transformers, with a tokenizer trained on the spot."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
    "num_hidden_layers": 4,
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
        "num_hidden_layers": 27,
        "num_key_value_heads": 4,
        "intermediate_size": 160,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
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
    "glm_moe_dsa": SPARSE | {"indexer_types": ["full", "shared", "full", "shared"]},
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
        "mlp_layer_types": ["dense", "dense", "sparse"],
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
    "llama": {"intermediate_size": 512},
    "qwen3": {"head_dim": 64, "intermediate_size": 512, "sliding_window": None},
}
"""One config a family, of the model type that it is called after, or says; shapes are not square where the
format allows, so that transposes show."""

VISION: Mapping[str, Mapping[str, Any]] = {
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
}
"""Vision towers of families whose checkpoints have one: the smallest."""

WHOLE: Mapping[str, str] = {"mistral4": "mistral3"}
"""What the model with its vision tower is called, where that is not the family's name."""

SIGMOID = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1, "ep_size": 1}

RELEASES: Mapping[str, Mapping[str, Any]] = {
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
        "rope_interleave": True,
    },
    "kimi_k2": {**SIGMOID, "model_type": "kimi_k2", "num_nextn_predict_layers": 0, "num_mtp_layers": None},
    "kimi_k25": {**SIGMOID, "model_type": "kimi_k2", "num_nextn_predict_layers": 0, "num_mtp_layers": None},
}
"""Keys of the text's config as releases have them, where transformers 5 saves others; None: there is none."""

PREDICTION = {
    "eh_proj.weight": (256, 512),
    "enorm.weight": (256,),
    "hnorm.weight": (256,),
    "shared_head.norm.weight": (256,),
    "shared_head.head.weight": (VOCAB, 256),
    "embed_tokens.weight": (VOCAB, 256),
    "self_attn.o_proj.weight": (256, 256),
}

BESIDE: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    family: {
        f"model.layers.{CONFIGS[family]['num_hidden_layers']}.{name}": shape
        for name, shape in PREDICTION.items()
    }
    for family in ("deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa")
}
"""Tensors of releases that transformers neither runs nor saves."""

OURS = {"KimiK25ForConditionalGeneration": "Kimi_K25ForConditionalGeneration"}
"""Classes of remote code that transformers has under another name."""

RENAMED: Mapping[str, tuple[str, str]] = {
    "kimi_k25": ("language_model.model.blocks.", "language_model.model.layers.")
}
"""What names of tensors contain where transformers 5 saves them, and in releases."""

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
            if "bias" in name or name.endswith("sinks"):
                parameter.normal_(0, 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.1)
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
    rope = dict(text.pop("rope_parameters"))
    text["rope_theta"] = rope.pop("rope_theta")
    if (factor := rope.pop("partial_rotary_factor", None)) is not None:
        text["partial_rotary_factor"] = factor
    text["rope_scaling"] = rope if rope.keys() - {"rope_type"} else None
    for key, value in RELEASES.get(family, {}).items():
        text[key] = value
        if value is None:
            del text[key]
    if family == "kimi_k25":
        raw["architectures"] = ["KimiK25ForConditionalGeneration"]
    path.write_text(json.dumps(raw))
    if old_and_new := RENAMED.get(family):
        file = folder / "model.safetensors"
        tensors = {name.replace(*old_and_new): each for name, each in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    extra = {name: torch.randn(shape).bfloat16() for name, shape in BESIDE.get(family, {}).items()}
    if extra:
        save_file(extra, folder / "model-mtp.safetensors", {"format": "pt"})
    return folder


def reference(folder: Path) -> PreTrainedModel:
    """The model as transformers loads it, float32, by the class that config.json names."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    cls = getattr(transformers, OURS.get(name, name))
    config = cls.config_class.from_pretrained(folder)
    config.model_type = cls.config_class.model_type  # what names of tensors are read by
    return cls.from_pretrained(folder, config=config, dtype=torch.float32, experts_implementation="eager")


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of a saved config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
