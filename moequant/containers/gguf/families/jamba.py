"""llama.cpp's `jamba`: a layer without key heads is Mamba."""

from __future__ import annotations

from collections.abc import Iterator

from moequant.containers.gguf.families.base import Export, FileTensor, Key, both_kinds, only, square_heads
from moequant.containers.gguf.families.keys import expert_counts, instead, sizes
from moequant.families import Config
from moequant.families.jamba import is_mamba
from moequant.values import Weight
from moequant.values.ops import NegativeExp

ARCH = "jamba"


def keys(config: Config) -> tuple[Key, ...]:
    """Keys of the file."""
    one = int(config.num_key_value_heads)
    heads = [0 if is_mamba(config, number) else one for number in range(config.num_hidden_layers)]
    return (
        *instead(sizes(config), Key("attention.head_count_kv", "u32s", heads)),
        *expert_counts(config),
        Key("ssm.conv_kernel", "u32", int(config.mamba_d_conv)),
        Key("ssm.inner_size", "u32", int(config.mamba_expand * config.hidden_size)),
        Key("ssm.state_size", "u32", int(config.mamba_d_state)),
        Key("ssm.time_step_rank", "u32", int(config.mamba_dt_rank)),
    )


def rates(config: Config, weight: Weight) -> tuple[FileTensor, ...] | None:
    """Decay rates themselves."""
    is_rate = weight.name == f"layers.{weight.layer}.ssm.a"
    return (FileTensor("ssm_a", (NegativeExp(),)),) if is_rate else None


def complaints(config: Config) -> Iterator[str]:
    """What the graph takes for granted."""
    yield from square_heads(config, ARCH)
    yield from only(config, ARCH, "hidden_act", "silu")
    yield from only(config, ARCH, "mamba_expand", 2)
    yield from only(config, ARCH, "mamba_conv_bias", True)
    mixers = (is_mamba(config, number) for number in range(config.num_hidden_layers))
    yield from both_kinds("attn_layer_period", mixers, ARCH)


NAMES = {
    "ssm.x": "ssm_x.weight",
    "ssm.dt": "ssm_dt.weight",
    "ssm.dt.bias": "ssm_dt.bias",
    **{f"ssm.{name}_norm": f"ssm_{name}_norm.weight" for name in ("dt", "b", "c")},
}
"""Tensors that Mamba-2 has not, or has otherwise."""

JAMBA = Export(ARCH, keys, complaints, NAMES, rates)
