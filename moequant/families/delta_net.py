"""Gated delta net (Yang et al. 2024): linear attention with a state for every value head, a convolution over
queries, keys and values, and a gated norm behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from moequant.families.base import PREDICTION, Config, Get, Slot
from moequant.families.blocks import linear, norm, seen
from moequant.families.predictions import Layer, beside
from moequant.values import Role
from moequant.values.ops import Squeezed

DELTA_KEYS = frozenset(
    {
        "linear_conv_kernel_dim",
        "linear_key_head_dim",
        "linear_value_head_dim",
        "linear_num_key_heads",
        "linear_num_value_heads",
        "full_attention_interval",
        "partial_rotary_factor",
        "shared_expert_intermediate_size",
        "mtp_num_hidden_layers",
        "mtp_use_dedicated_embeddings",
        "mamba_ssm_dtype",
    }
)
"""Config keys of models that mix delta nets and gated attention."""

DELTA_SAYS = {"attn_output_gate": (True,), "output_gate_type": ("swish", "silu")}
"""What those classes compute whatever the config says."""

MTP = {r"(model\.)?mtp\..*": PREDICTION}
"""Their layers behind the last, which transformers does not run."""

LINEAR = "linear_attention"
"""What `layer_types` calls a layer with a delta net."""


def full_attention_beside(config: Config, layer: Layer) -> tuple[tuple[Slot, ...], ...]:
    """The layer under `mtp.`, which has gated attention."""
    kinds = list(config.layer_types)
    if set(kinds) == {LINEAR}:
        return ()
    return beside(config, layer, max(number for number, kind in enumerate(kinds) if kind != LINEAR))


@dataclass(frozen=True, slots=True)
class Heads:
    """Key heads, value heads for each of them, and the width of a head of keys and of one of values."""

    keys: int
    each: int
    key_dim: int
    value_dim: int

    @classmethod
    def of(cls, config: Config) -> Self:
        """The heads of a config."""
        keys, values = int(config.linear_num_key_heads), int(config.linear_num_value_heads)
        return cls(keys, values // keys, int(config.linear_key_head_dim), int(config.linear_value_head_dim))

    @property
    def queries_and_keys(self) -> int:
        """Rows of all queries and keys."""
        return 2 * self.keys * self.key_dim


def delta_net(number: int, projections: dict[str, tuple[str, Role]]) -> tuple[Slot, ...]:
    """A layer's norms and its delta net; `projections` are what multiplies its input: (module, role) by our
    names."""
    first = next(iter(projections.values()))[0]
    into = seen(number, "attn.input", f"linear_attn.{first}")
    out = seen(number, "ssm.output", "linear_attn.out_proj")
    at = f"model.layers.{number}.linear_attn"
    conv = f"{at}.conv1d.weight"
    return (
        norm(number, "attn_norm", "input_layernorm"),
        *(
            slot
            for name, (module, role) in projections.items()
            for slot in linear(number, name, role, f"linear_attn.{module}", into)
        ),
        Slot(f"layers.{number}.ssm.conv", Role.CONV, conv, (Get(conv, (Squeezed(-2),)),), (Squeezed(-2),)),
        Slot(f"layers.{number}.ssm.dt", Role.BIAS, f"{at}.dt_bias"),
        Slot(f"layers.{number}.ssm.a", Role.STATE, f"{at}.A_log"),
        norm(number, "ssm.norm", "linear_attn.norm"),
        *linear(number, "ssm.out", Role.SSM_OUT, "linear_attn.out_proj", out, adds=True),
        norm(number, "ffn_norm", "post_attention_layernorm"),
    )
