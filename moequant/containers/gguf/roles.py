"""What the tensors of a GGUF file do, by their names: of any architecture, whoever wrote it."""

from __future__ import annotations

import re
from collections.abc import Iterable

from moequant.containers.gguf.header import TensorInfo

ROLES = (
    ("embedding", r"(token_embd|per_layer_token_embd|position_embd|token_types)\b"),
    ("output", r"output\.(weight|bias)"),
    ("router", r"blk\.\d+\.(ffn_gate_inp\b|ffn_gate_tid2eid|exp_probs_b)"),
    ("expert gate", r"blk\.\d+\.ffn_gate_(ch|)exps\b"),
    ("expert up", r"blk\.\d+\.ffn_up_(ch|)exps\b"),
    ("expert gate+up", r"blk\.\d+\.ffn_gate_up_(ch|)exps\b"),
    ("expert down", r"blk\.\d+\.ffn_down_(ch|)exps\b"),
    ("shared expert", r"blk\.\d+\.ffn_\w+_shexp\b"),
    ("dense ffn", r"blk\.\d+\.ffn_(gate|up|down|gate_up)\b"),
    ("norm", r".*norm(_\d)?\b"),
    ("attention", r"blk\.\d+\.(attn_|indexer)"),
    ("recurrent", r"blk\.\d+\.(ssm_|shortconv|time_mix|channel_mix)"),
    ("next token", r"blk\.\d+\.nextn"),
)
"""A role, and a regular expression of the names that have it; the first that matches counts."""


def role_of(name: str) -> str:
    """What a tensor of that name does."""
    return next((role for role, pattern in ROLES if re.match(pattern, name)), "other")


def is_tied(tensors: Iterable[TensorInfo]) -> bool:
    """Whether the embedding is the head as well: there is no other."""
    return all(tensor.name != "output.weight" for tensor in tensors)


def is_embedding(tensor: TensorInfo) -> bool:
    """Whether it is the embedding of tokens, which is the head too when the file has none."""
    return tensor.name == "token_embd.weight"
