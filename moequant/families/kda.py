"""Kimi delta attention (Kimi Linear, 2025): a gated delta net whose state decays channel by channel, with a
convolution of their own over queries, keys and values, and a gated norm behind it."""

from __future__ import annotations

from moequant.families.base import Get, Slot
from moequant.families.blocks import linear, norm, released, seen
from moequant.values import Role
from moequant.values.ops import Ops, Part, Squeezed

KDA_KEYS = frozenset({"layer_types", "linear_conv_kernel_dim", "linear_head_dim", "linear_num_heads"})
"""Config keys of such layers."""

LINEAR = "linear_attention"
"""What `layer_types` calls a layer with a state."""


def delta_attention(number: int, width: int, rates: Ops = (), *, narrow: bool = False) -> tuple[Slot, ...]:
    """A layer's norms and its delta attention, `width` channels wide. `rates` make a vector of the logarithms
    of decay rates. Decay and gate come through a `narrow` product each, or straight from the input."""
    at = f"model.layers.{number}.self_attn"
    into = seen(number, "attn.input", "self_attn.q_proj")
    out = seen(number, "ssm.output", "self_attn.o_proj")
    forget = (
        *_gate(number, "f", "forget_gate.", narrow),
        Slot(f"layers.{number}.ssm.dt", Role.BIAS, f"{at}.forget_gate.dt_bias"),
        Slot(f"layers.{number}.ssm.a", Role.STATE, f"{at}.forget_gate.A_log", ops=rates),
    )
    return (
        norm(number, "attn_norm", "input_layernorm"),
        *linear(number, "attn_q", Role.ATTN_Q, "self_attn.q_proj", into),
        *linear(number, "attn_k", Role.ATTN_K, "self_attn.k_proj", into),
        *linear(number, "attn_v", Role.ATTN_V, "self_attn.v_proj", into),
        *(_kernel(number, each, width) for each in "qkv"),
        *released(forget, ".forget_gate.", "."),
        *linear(number, "ssm.beta", Role.SSM_IN, "self_attn.b_proj", into),
        *_gate(number, "g", "", narrow),
        norm(number, "ssm.norm", "self_attn.o_norm"),
        *linear(number, "ssm.out", Role.SSM_OUT, "self_attn.o_proj", out, adds=True),
        norm(number, "ffn_norm", "post_attention_layernorm"),
    )


def _gate(number: int, name: str, within: str, narrow: bool) -> tuple[Slot, ...]:
    """What makes decay ("f") or gate ("g") of a layer's input: in one product, or in two."""
    into = seen(number, "attn.input", "self_attn.q_proj")
    at = f"self_attn.{within}{name}"
    if not narrow:
        return linear(number, f"ssm.{name}_a", Role.SSM_IN, f"{at}_proj", into)
    inner = seen(number, f"ssm.{name}", f"{at}_b_proj")
    return (
        *linear(number, f"ssm.{name}_a", Role.SSM_IN, f"{at}_a_proj", into),
        *linear(number, f"ssm.{name}_b", Role.SSM_IN, f"{at}_b_proj", inner),
    )


def _kernel(number: int, name: str, width: int) -> Slot:
    """A kernel for every channel of queries, keys or values: stored as [n, 1, K] or [n, K], in transformers
    one behind the other."""
    at = f"model.layers.{number}.self_attn"
    begin = "qkv".index(name) * width
    ops = (Squeezed(-2), Part(begin, begin + width))
    own = f"{at}.{name}_conv1d.weight"
    ways = (Get(own, (Squeezed(-2),), 1), Get(own, (), width), Get(f"{at}.conv1d.weight", ops))
    return Slot(f"layers.{number}.ssm.conv_{name}", Role.CONV, f"{at}.conv1d.weight", ways, ops)
