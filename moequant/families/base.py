"""What a model family is: tables of tensor names and of config keys.

A family says, for every tensor of a checkpoint, what it does, what GGUF calls it and
where transformers keeps it; and for every key of `config.json`, which GGUF key it
becomes or which values the runtime implements. Whatever no table names is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Literal

from moequant.values import Role

Config = Mapping[str, Any]


class Part(Enum):
    """Which rows of the transformers parameter a weight is."""

    WHOLE = auto()
    FIRST_HALF = auto()
    SECOND_HALF = auto()


@dataclass(frozen=True, slots=True)
class Rule:
    """One kind of tensor. In names `{l}` is the layer and `{e}` the expert.

    `param` is the name in a transformers 5 model, which checkpoints may use too; `stored`
    is the name in checkpoints that keep every expert as a tensor of its own. `rope` names
    the config key with the number of heads whose rows llama.cpp wants interleaved.
    `input` names the module whose input activations this weight multiplies, when they
    are not simply those of the module that holds it.
    """

    gguf: str
    role: Role
    param: str
    part: Part = Part.WHOLE
    stored: str | None = None
    rope: str | None = None
    input: str | None = None


@dataclass(frozen=True, slots=True)
class Key:
    """A config key that becomes a GGUF key (`{arch}.` is put before it)."""

    config: str
    gguf: str
    kind: Literal["u32", "f32", "bool"]
    default: Any = None


@dataclass(frozen=True, slots=True)
class Family:
    """A model family as tables.

    `fixed` maps config keys to the only values that the runtime implements; of a list,
    every element must be one of them.
    """

    name: str
    architectures: tuple[str, ...]
    gguf_arch: str
    rules: tuple[Rule, ...]
    keys: tuple[Key, ...]
    fixed: Mapping[str, tuple[Any, ...]]
    experts_key: str | None = None
    ignored: tuple[str, ...] = ()


def attention(*, rope: bool = False, qk_norm: bool = False) -> tuple[Rule, ...]:
    """Norms and projections of llama-style attention; q, k and v multiply the same activations."""
    block, layer, shared = "blk.{l}.", "model.layers.{l}.", "model.layers.{l}.self_attn.q_proj"
    rules = [
        Rule(block + "attn_norm.weight", Role.NORM, layer + "input_layernorm.weight"),
        Rule(
            block + "attn_q.weight",
            Role.ATTN_Q,
            layer + "self_attn.q_proj.weight",
            rope="num_attention_heads" if rope else None,
        ),
        Rule(
            block + "attn_k.weight",
            Role.ATTN_K,
            layer + "self_attn.k_proj.weight",
            rope="num_key_value_heads" if rope else None,
            input=shared,
        ),
        Rule(block + "attn_v.weight", Role.ATTN_V, layer + "self_attn.v_proj.weight", input=shared),
        Rule(block + "attn_output.weight", Role.ATTN_OUT, layer + "self_attn.o_proj.weight"),
        Rule(block + "ffn_norm.weight", Role.NORM, layer + "post_attention_layernorm.weight"),
    ]
    if qk_norm:
        rules += [
            Rule(block + "attn_q_norm.weight", Role.NORM, layer + "self_attn.q_norm.weight"),
            Rule(block + "attn_k_norm.weight", Role.NORM, layer + "self_attn.k_norm.weight"),
        ]
    return tuple(rules)


def experts(stored_block: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """Router and experts of a gated MoE block; `stored_block` is its name in per-expert checkpoints."""
    block, params = "blk.{l}.", "model.layers.{l}.mlp."
    stored = "model.layers.{l}." + stored_block
    one = stored + ".experts.{e}."
    return (
        Rule(
            block + "ffn_gate_inp.weight",
            Role.ROUTER,
            params + "gate.weight",
            stored=stored + ".gate.weight",
        ),
        Rule(
            block + "ffn_gate_exps.weight",
            Role.GATE,
            params + "experts.gate_up_proj",
            Part.FIRST_HALF,
            stored=one + gate + ".weight",
        ),
        Rule(
            block + "ffn_up_exps.weight",
            Role.UP,
            params + "experts.gate_up_proj",
            Part.SECOND_HALF,
            stored=one + up + ".weight",
        ),
        Rule(
            block + "ffn_down_exps.weight",
            Role.DOWN,
            params + "experts.down_proj",
            stored=one + down + ".weight",
        ),
    )


def dense_ffn() -> tuple[Rule, ...]:
    """A gated feed-forward block without experts; gate and up multiply the same activations."""
    block, params = "blk.{l}.", "model.layers.{l}.mlp."
    return (
        Rule(block + "ffn_gate.weight", Role.DENSE_GATE, params + "gate_proj.weight"),
        Rule(
            block + "ffn_up.weight",
            Role.DENSE_UP,
            params + "up_proj.weight",
            input=params + "gate_proj",
        ),
        Rule(block + "ffn_down.weight", Role.DENSE_DOWN, params + "down_proj.weight"),
    )


def ends() -> tuple[Rule, ...]:
    """Embedding, final norm and output head."""
    return (
        Rule("token_embd.weight", Role.EMBEDDING, "model.embed_tokens.weight"),
        Rule("output_norm.weight", Role.NORM, "model.norm.weight"),
        # The head's input is observed where it is made, so that nobody computes logits to see it.
        Rule("output.weight", Role.OUTPUT, "lm_head.weight", input="model.norm:out"),
    )


SHAPE_KEYS = (
    Key("max_position_embeddings", "context_length", "u32"),
    Key("hidden_size", "embedding_length", "u32"),
    Key("num_hidden_layers", "block_count", "u32"),
    Key("intermediate_size", "feed_forward_length", "u32"),
    Key("num_attention_heads", "attention.head_count", "u32"),
    Key("num_key_value_heads", "attention.head_count_kv", "u32"),
    Key("rms_norm_eps", "attention.layer_norm_rms_epsilon", "f32"),
    Key("vocab_size", "vocab_size", "u32"),
)
"""Shape and norm keys that every llama-like family writes."""

HARMLESS = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "auto_map",
        "bos_token_id",
        "chunk_size_feed_forward",
        "cross_attention_hidden_size",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "label2id",
        "max_window_layers",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "torch_dtype",
        "transformers_version",
        "unsloth_fixed",
        "use_cache",
    }
)
"""Config keys that never change what inference computes, in any family: the one list of them."""
