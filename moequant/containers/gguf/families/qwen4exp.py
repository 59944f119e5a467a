"""llama.cpp's `qwen4exp`: `qwen35moe` with streams, blocks of tokens that an indexer chooses, and a table
of the last tokens, outside of the layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moequant.containers.gguf.families.base import Drafting, Export, FileTensor, Key, only
from moequant.containers.gguf.families.qwen3next import NAMES as DELTA_NET
from moequant.containers.gguf.families.qwen3next import tiled_keys, tiled_parts, tiled_warnings
from moequant.families import Config
from moequant.families.delta_net import LINEAR
from moequant.families.qwen4_exp import Hash
from moequant.values import Role, Weight
from moequant.values.ops import Part

ARCH = "qwen4exp"

PARTS = ("norm", "down", "up")

NAMES = {
    **DELTA_NET,
    **{f"hc_{kind}_{part}": f"hc_{kind}_{part}.weight" for kind in ("attn", "ffn") for part in PARTS},
    **{f"hc_{kind}_inject": f"hc_{kind}_inject.weight" for kind in ("attn", "ffn")},
    **{f"hc_{part}": f"output_hc_{part}.weight" for part in PARTS},
    **{f"nextn.hc_{part}": f"nextn.hc_head_{part}.weight" for part in PARTS},
    "indexer.q_norm": "indexer.q_norm.weight",
    "indexer.k_norm": "indexer.k_norm.weight",
    "ple.key": "ple_key.weight",
    "ple.value": "ple_value.weight",
    "ple.key_norm": "ple_norm_key.weight",
    "ple.query_norm": "ple_norm_query.weight",
    "ple.conv_norm": "ple_norm_conv.weight",
    "ple.conv": "ple_conv1d.weight",
}

MOST_NGRAM, MOST_HEADS, MOST_ROWS = 8, 64, (1 << 31) - 1
"""The longest n-gram, the heads and the rows that llama.cpp has room for."""


def parts(config: Config, weight: Weight) -> tuple[FileTensor, ...] | None:
    """The indexer's matrix in two; the table outside of the layers."""
    own = weight.name.removeprefix(f"layers.{weight.layer}.")
    if own == "indexer.qk":
        queries = int(config.indexer_n_heads * config.indexer_head_dim)
        return (
            FileTensor("indexer.q_proj.weight", (Part(0, queries),), "indexer.q"),
            FileTensor("indexer.k_proj.weight", (Part(queries, weight.shape[0]),), "indexer.k"),
        )
    if weight.role is Role.LOOKUP:
        return (FileTensor("per_layer_token_embd.weight", outside=True),)
    return tiled_parts(config, weight)


def keys(config: Config) -> tuple[Key, ...]:
    """Keys of the file."""
    ratio = int(config.indexer_compress_ratio)
    return (
        *tiled_keys(config),
        Key("hyper_connection.count", "u32", int(config.hc_count)),
        Key("hyper_connection.low_rank", "u32", int(config.hc_lowrank)),
        Key("attention.indexer.head_count", "u32", int(config.indexer_n_heads)),
        Key("attention.indexer.key_length", "u32", int(config.indexer_head_dim)),
        Key("attention.indexer.top_k", "u32", int(config.indexer_budget)),
        Key(
            "attention.compress_ratios",
            "u32s",
            [0 if kind == LINEAR else ratio for kind in config.layer_types],
        ),
        *_ngrams(config),
    )


def _ngrams(config: Config) -> tuple[Key, ...]:
    """How rows of the table are looked up, where there is one."""
    if not config.ple_layer_ids:
        return ()
    number = config.ple_layer_ids[0] - 1
    found, image = Hash.of(config, number), getattr(config, "image_token_id", None)
    return (
        Key("ple.layers", "u32s", [number]),
        Key("ple.ngram_size", "u32", int(config.ngram_size)),
        Key("ple.heads_per_ngram", "u32", int(config.heads_per_ngram)),
        Key("ple.conv_kernel", "u32", int(config.ple_conv_kernel_size)),
        Key("ple.eos_token_id", "u32", _end(config)),
        *([] if image is None else [Key("ple.image_token_id", "u32", int(image))]),
        Key("embedding_length_per_layer_input", "u32", int(config.ple_embed_dim) // len(found.sizes)),
        Key("ple.layer_multipliers", "u64s", list(found.multipliers)),
        Key("ple.head_offsets", "u64s", list(found.offsets)),
        Key("ple.head_vocab_sizes", "u64s", list(found.sizes)),
    )


def _end(config: Config) -> int:
    """The token that no n-gram reaches over: of several the first, as in transformers."""
    end = config.eos_token_id
    return int(end[0] if isinstance(end, list) else end)


def complaints(config: Config) -> Iterator[str]:
    """What the graph takes for granted."""
    yield from only(config, ARCH, "hidden_act", "silu")
    yield from only(config, ARCH, "attention_bias", False)
    yield from only(config, ARCH, "norm_topk_prob", True)
    yield from only(config, ARCH, "linear_value_head_dim", config.linear_key_head_dim)
    gate = config.output_gate_type or config.hidden_act
    if gate != "sigmoid":
        yield f"config key output_gate_type = {gate!r}: llama.cpp's {ARCH!r} implements only 'sigmoid'"
    if (ratio := config.indexer_compress_ratio) < 2:
        yield f"config key indexer_compress_ratio = {ratio}: llama.cpp's {ARCH!r} needs 2 or more"
    if not config.ple_layer_ids:
        return
    if len(config.ple_layer_ids) > 1:
        yield (
            f"config key ple_layer_ids = {list(config.ple_layer_ids)}: llama.cpp's {ARCH!r} has one layer "
            "that looks tokens up"
        )
    yield from only(config, ARCH, "ple_embed_dim", config.hidden_size)
    heads = (config.ngram_size - 1) * config.heads_per_ngram
    if not 2 <= config.ngram_size <= MOST_NGRAM or heads > MOST_HEADS:
        yield (
            f"config keys ngram_size = {config.ngram_size} and heads_per_ngram = {config.heads_per_ngram}: "
            f"llama.cpp's {ARCH!r} reads {MOST_NGRAM} tokens and {MOST_HEADS} heads at most"
        )
    elif sum(Hash.of(config, config.ple_layer_ids[0] - 1).sizes) > MOST_ROWS:
        yield f"config key ngram_vocab_size_base: llama.cpp's {ARCH!r} counts up to {MOST_ROWS:,} rows"


def warnings(config: Config) -> tuple[str, ...]:
    """What llama.cpp's own converter would write, and what is a little different."""
    end = config.eos_token_id
    several = isinstance(end, list) and len(set(end)) > 1 and bool(config.ple_layer_ids)
    told = (
        "of several tokens that end a text, transformers lets n-grams stop at the first, llama.cpp's own "
        "converter at the last: this file computes what transformers computes",
    )
    return (*tiled_warnings(config), *(told if several else ()))


def not_recurrent(config: Config, number: int) -> Mapping[str, Any]:
    """A layer that predicts has attention, which an indexer shows blocks of tokens."""
    ratio = int(config.indexer_compress_ratio)
    return {"attention.recurrent_layers": False, "attention.compress_ratios": ratio}


QWEN4_EXP = Export(ARCH, keys, complaints, NAMES, parts, warnings=warnings, drafting=Drafting(not_recurrent))
