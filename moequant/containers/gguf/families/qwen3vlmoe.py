"""llama.cpp's `qwen3vlmoe`: `qwen3moe` with positions of three parts, which are one and the same in text."""

from __future__ import annotations

from collections.abc import Iterator

from moequant.containers.gguf.families.base import Export, Key, only
from moequant.containers.gguf.families.keys import head_dim, rope_sections, turned_by_time
from moequant.containers.gguf.families.qwen3 import moe_keys
from moequant.families import Config

ARCH = "qwen3vlmoe"

SECTIONS = (24, 20, 20)
"""The class's own sections."""

DEEPSTACK = (8, 16, 24)
"""The class's own layers of the vision tower whose outputs are added to the first layers'."""


def keys(config: Config) -> tuple[Key, ...]:
    """Keys of the file; a vision file beside it needs the number of deepstack layers."""
    stacked = getattr(config, "deepstack_visual_indexes", DEEPSTACK)
    return (
        *moe_keys(config),
        rope_sections(config, head_dim(config)),
        Key("n_deepstack_layers", "u32", len(stacked)),
    )


def complaints(config: Config) -> Iterator[str]:
    """What the graph takes for granted."""
    yield from only(config, ARCH, "hidden_act", "silu")
    yield from only(config, ARCH, "attention_bias", False)
    yield from only(config, ARCH, "decoder_sparse_step", 1)
    yield from only(config, ARCH, "mlp_only_layers", [], None)


def warnings(config: Config) -> tuple[str, ...]:
    """What llama.cpp computes a little differently."""
    return turned_by_time(config, head_dim(config), SECTIONS)


QWEN3_VL_MOE = Export(ARCH, keys, complaints, warnings=warnings)
