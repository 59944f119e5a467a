"""Folders of real models' shapes without weights: config, headers, and files that hold nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

QWEN3_30B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "intermediate_size": 6144,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
    "norm_topk_prob": True,
    "torch_dtype": "bfloat16",
}


def qwen3_30b(folder: Path, layers: int = 48) -> Path:
    """Qwen3-30B-A3B, 61 GB that take no room on the disk, or its first layers."""
    made = QWEN3_30B | {"num_hidden_layers": layers}
    hidden, width, heads = made["hidden_size"], made["moe_intermediate_size"], made["head_dim"]
    ends = {"model.embed_tokens": (151936, hidden), "lm_head": (151936, hidden), "model.norm": (hidden,)}
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in ends.items()}
    for layer in range(layers):
        own = f"model.layers.{layer}"
        rows = {"q": 32 * heads, "k": 4 * heads, "v": 4 * heads}
        shapes |= {f"{own}.self_attn.{x}_proj.weight": (count, hidden) for x, count in rows.items()}
        shapes[f"{own}.self_attn.o_proj.weight"] = (hidden, 32 * heads)
        shapes |= {f"{own}.self_attn.{x}_norm.weight": (heads,) for x in "qk"}
        shapes |= {f"{own}.{x}_layernorm.weight": (hidden,) for x in ("input", "post_attention")}
        shapes[f"{own}.mlp.gate.weight"] = (128, hidden)
        for expert in range(128):
            at = f"{own}.mlp.experts.{expert}"
            shapes |= {f"{at}.{x}_proj.weight": (width, hidden) for x in ("gate", "up")}
            shapes[f"{at}.down_proj.weight"] = (hidden, width)
    return sparse(folder, made, shapes)


def sparse(folder: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Path:
    """A folder of bf16 tensors of these shapes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2
        for length in shape:
            size *= length
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return folder
