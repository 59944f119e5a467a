"""GGUF files of real models' shapes: a header, and a hole where 20 to 400 GB of weights would be."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T

from moequant.containers.gguf.read import read_header

Tensors = dict[str, tuple[int, ...]]


def write(path: Path, arch: str, keys: dict[str, Any], tensors: Tensors, kind: T = T.Q4_K) -> Path:
    """A file with those `{arch}.` keys and tensors: matrices as `kind`, or Q8_0 where rows are too short."""
    writer = gguf.GGUFWriter(None, arch)
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(f"{arch}.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{arch}.{key}", value)
        elif isinstance(value, list):
            writer.add_array(f"{arch}.{key}", value)
        else:
            writer.add_uint32(f"{arch}.{key}", value)
    writer.add_tokenizer_model("no_vocab")
    for name, shape in tensors.items():
        block, size = gguf.GGML_QUANT_SIZES[kind]
        used = (
            T.F32
            if len(shape) == 1 or "ffn_gate_inp" in name or "conv1d" in name
            else kind
            if shape[-1] % block == 0
            else T.Q8_0
        )
        block, size = gguf.GGML_QUANT_SIZES[used]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), prod(shape) // block * size, raw_dtype=used)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    data = sum(-(-info.nbytes // 32) * 32 for shard in writer.tensors for info in shard.values())
    with path.open("r+b") as file:
        file.truncate(-(-path.stat().st_size // 32) * 32 + data)
    return path


def changed(file: Path, path: Path, keys: dict[str, Any], shapes: Tensors) -> Path:
    """The shape of a file with other `{arch}.` keys, and other shapes of tensors that have such a name inside
    their own."""
    header = read_header(file)
    own = f"{header.arch}."
    said = {
        name.removeprefix(own): list(value) if isinstance(value, tuple) else value
        for name, value in header.metadata.items()
        if name.startswith(own) and not isinstance(value, str)
    }
    tensors = {
        each.name: next((shape for part, shape in shapes.items() if f".{part}" in each.name), each.shape)
        for each in header.tensors
    }
    return write(path, header.arch, said | keys, tensors)


def gqa(
    path: Path,
    arch: str,
    *,
    layers: int,
    hidden: int,
    heads: int,
    kv: int,
    experts: int,
    used: int,
    ff: int,
    vocab: int,
) -> Path:
    """Mixtral ("llama") and Qwen3-MoE ("qwen3moe") with heads of 128."""
    keys = {
        "context_length": 32768, "embedding_length": hidden, "block_count": layers, "feed_forward_length": ff,
        "attention.head_count": heads, "attention.head_count_kv": kv, "attention.key_length": 128,
        "attention.value_length": 128, "attention.layer_norm_rms_epsilon": 1e-6, "expert_count": experts,
        "expert_used_count": used, "expert_feed_forward_length": ff, "vocab_size": vocab,
        "rope.dimension_count": 128,
    }  # fmt: skip
    tensors: Tensors = {"token_embd.weight": (vocab, hidden), "output_norm.weight": (hidden,)}
    tensors["output.weight"] = (vocab, hidden)
    for layer in range(layers):
        block = {
            "attn_norm": (hidden,), "ffn_norm": (hidden,), "attn_q": (heads * 128, hidden),
            "attn_k": (kv * 128, hidden), "attn_v": (kv * 128, hidden), "attn_output": (hidden, heads * 128),
            **({"attn_q_norm": (128,), "attn_k_norm": (128,)} if arch == "qwen3moe" else {}),
            **_experts(experts, hidden, ff),
        }  # fmt: skip
        tensors |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
    return write(path, arch, keys, tensors)


def mla(path: Path, *, layers: int, hidden: int = 2048, heads: int = 16, vocab: int = 102400) -> Path:
    """DeepSeek-V2-Lite ("deepseek2"): rank 512, rotary 64, one dense layer, shared experts."""
    ff, experts, used, dense = 1408, 64, 6, 10944
    keys = {
        "context_length": 163840, "embedding_length": hidden, "block_count": layers,
        "feed_forward_length": dense,
        "attention.head_count": heads, "attention.head_count_kv": 1, "attention.key_length": 576,
        "attention.value_length": 512, "attention.key_length_mla": 192, "attention.value_length_mla": 128,
        "attention.kv_lora_rank": 512, "attention.layer_norm_rms_epsilon": 1e-6, "expert_count": experts,
        "expert_used_count": used, "expert_feed_forward_length": ff, "expert_shared_count": 2,
        "expert_weights_scale": 1.0, "leading_dense_block_count": 1, "vocab_size": vocab,
        "rope.dimension_count": 64,
    }  # fmt: skip
    tensors: Tensors = {"token_embd.weight": (vocab, hidden), "output_norm.weight": (hidden,)}
    tensors["output.weight"] = (vocab, hidden)
    for layer in range(layers):
        block: Tensors = {
            "attn_norm": (hidden,), "ffn_norm": (hidden,), "attn_q": (heads * 192, hidden),
            "attn_kv_a_mqa": (576, hidden), "attn_kv_a_norm": (512,), "attn_k_b": (heads, 512, 128),
            "attn_v_b": (heads, 128, 512), "attn_output": (hidden, heads * 128),
        }  # fmt: skip
        if layer:
            shared = {"ffn_gate_shexp": (2 * ff, hidden), "ffn_up_shexp": (2 * ff, hidden)}
            block |= _experts(experts, hidden, ff) | shared | {"ffn_down_shexp": (hidden, 2 * ff)}
        else:
            block |= {"ffn_gate": (dense, hidden), "ffn_up": (dense, hidden), "ffn_down": (hidden, dense)}
        tensors |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
    return write(path, "deepseek2", keys, tensors)


def windowed(path: Path, *, layers: int, experts: int = 32) -> Path:
    """gpt-oss: every other layer keeps a window of 128 tokens; biases everywhere, sinks, ff 2880."""
    hidden, heads, kv, ff, vocab = 2880, 64, 8, 2880, 201088
    keys = {
        "context_length": 131072, "embedding_length": hidden, "block_count": layers,
        "feed_forward_length": ff,
        "attention.head_count": heads, "attention.head_count_kv": kv, "attention.key_length": 64,
        "attention.value_length": 64, "attention.sliding_window": 128,
        "attention.layer_norm_rms_epsilon": 1e-5, "expert_count": experts, "expert_used_count": 4,
        "expert_feed_forward_length": ff, "vocab_size": vocab, "rope.dimension_count": 64,
    }  # fmt: skip
    tensors: Tensors = {"token_embd.weight": (vocab, hidden), "output_norm.weight": (hidden,)}
    tensors["output.weight"] = (vocab, hidden)
    for layer in range(layers):
        block: Tensors = {
            "attn_norm.weight": (hidden,), "post_attention_norm.weight": (hidden,),
            "attn_sinks.weight": (heads,), "ffn_gate_inp.bias": (experts,),
            "ffn_gate_exps.bias": (experts, ff), "ffn_up_exps.bias": (experts, ff),
            "ffn_down_exps.bias": (experts, hidden),
            **{f"{name}.weight": shape for name, shape in _experts(experts, hidden, ff).items()},
        }  # fmt: skip
        for name, rows in (("attn_q", heads * 64), ("attn_k", kv * 64), ("attn_v", kv * 64)):
            block |= {f"{name}.weight": (rows, hidden), f"{name}.bias": (rows,)}
        block |= {"attn_output.weight": (hidden, heads * 64), "attn_output.bias": (hidden,)}
        tensors |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    return write(path, "gpt-oss", keys, tensors, T.MXFP4)


def compressed(
    path: Path, *, layers: int, hidden: int, heads: int, rank: int, experts: int, ff: int, top_k: int
) -> Path:
    """DeepSeek-V4: two layers with a window alone, then entries of 4 and 128 tokens in turn; four streams."""
    head, chooses, groups, vocab, mixed = 512, 64, heads // 8, 129280, 4 * hidden
    ratios = [0, 0, *[4, 128] * layers][:layers]
    keys = {
        "context_length": 1048576, "embedding_length": hidden, "block_count": layers,
        "feed_forward_length": ff,
        "attention.head_count": heads, "attention.head_count_kv": 1, "attention.key_length": head,
        "attention.value_length": head, "attention.q_lora_rank": rank, "attention.sliding_window": 128,
        "attention.output_group_count": groups, "attention.output_lora_rank": 1024,
        "attention.compress_ratios": ratios, "attention.compress_rope_freq_base": 160000.0,
        "attention.indexer.head_count": chooses, "attention.indexer.key_length": 128,
        "attention.indexer.top_k": top_k, "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.dimension_count": 64, "expert_count": experts, "expert_used_count": 6, "expert_gating_func": 4,
        "expert_weights_norm": True, "expert_weights_scale": 1.5, "expert_feed_forward_length": ff,
        "expert_shared_count": 1, "hash_layer_count": 0, "swiglu_clamp_exp": [10.0] * layers,
        "swiglu_clamp_shexp": [10.0] * layers, "hyper_connection.count": 4,
        "hyper_connection.sinkhorn_iterations": 20, "hyper_connection.epsilon": 1e-6, "vocab_size": vocab,
    }  # fmt: skip
    tensors: Tensors = {"token_embd.weight": (vocab, hidden), "output_norm.weight": (hidden,)}
    tensors |= {"output.weight": (vocab, hidden), "output_hc_fn.weight": (4, mixed)}
    tensors |= {"output_hc_base.weight": (4,), "output_hc_scale.weight": (1,)}
    for layer, ratio in enumerate(ratios):
        block: Tensors = {
            "attn_norm": (hidden,), "ffn_norm": (hidden,), "attn_sinks": (heads,), "attn_q_a": (rank, hidden),
            "attn_q_a_norm": (rank,), "attn_q_b": (heads * head, rank), "attn_kv": (head, hidden),
            "attn_kv_a_norm": (head,), "attn_output_a": (groups * 1024, heads * head // groups),
            "attn_output_b": (hidden, groups * 1024), "ffn_gate_shexp": (ff, hidden),
            "ffn_up_shexp": (ff, hidden), "ffn_down_shexp": (hidden, ff), **_experts(experts, hidden, ff),
        }  # fmt: skip
        for kind in ("attn", "ffn"):
            block |= {f"hc_{kind}_fn": (24, mixed), f"hc_{kind}_base": (24,), f"hc_{kind}_scale": (3,)}
        made = {"attn": head, "indexer": 128} if ratio == 4 else {"attn": head} if ratio else {}
        for name, width in made.items():
            wide = 2 * width if ratio == 4 else width
            block |= {f"{name}_compressor_kv": (wide, hidden), f"{name}_compressor_gate": (wide, hidden)}
            block |= {f"{name}_compressor_ape": (ratio, wide), f"{name}_compressor_norm": (width,)}
        if ratio == 4:
            block |= {"indexer.proj": (chooses, hidden), "indexer.attn_q_b": (chooses * 128, rank)}
        tensors |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
        tensors[f"blk.{layer}.exp_probs_b.bias"] = (experts,)
    return write(path, "deepseek4", keys, tensors)


def _experts(experts: int, hidden: int, ff: int) -> Tensors:
    return {
        "ffn_gate_inp": (experts, hidden),
        "ffn_gate_exps": (experts, ff, hidden),
        "ffn_up_exps": (experts, ff, hidden),
        "ffn_down_exps": (experts, hidden, ff),
    }
