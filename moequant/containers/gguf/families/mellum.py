"""llama.cpp's `mellum`: layers with a window are rotated with the base of the others and without scaling."""

from __future__ import annotations

from collections.abc import Iterator

from moequant.containers.gguf.families.base import Export, Key, only
from moequant.containers.gguf.families.keys import experts, head_widths, rope, sizes, windows
from moequant.families import Config

ARCH = "mellum"


def keys(config: Config) -> tuple[Key, ...]:
    """Keys of the file."""
    return (
        *sizes(config),
        *experts(config, config.moe_intermediate_size),
        *windows(config),
        *head_widths(config),
        *rope(config, _parameters(config)),
    )


def _parameters(config: Config) -> dict[str, object]:
    """Rotary parameters of the layers that look at everything; of the others where there are none."""
    kinds = config.layer_types
    kind = "full_attention" if "full_attention" in kinds else "sliding_attention"
    return {k: v for k, v in config.rope_parameters[kind].items() if k != "partial_rotary_factor"}


def complaints(config: Config) -> Iterator[str]:
    """What the graph takes for granted."""
    yield from only(config, ARCH, "hidden_act", "silu")
    yield from only(config, ARCH, "attention_bias", False)
    yield from only(config, ARCH, "norm_topk_prob", True)
    if "dense" in config.mlp_layer_types:
        yield f"config key mlp_layer_types: llama.cpp's {ARCH!r} has experts in every layer"
    used = {kind: config.rope_parameters[kind] for kind in set(config.layer_types)}
    if len({each["rope_theta"] for each in used.values()}) > 1:
        yield f"config key rope_parameters: llama.cpp's {ARCH!r} has one rope_theta for all layers"
    if any(each.get("partial_rotary_factor", 1.0) != 1.0 for each in used.values()):
        yield f"config key rope_parameters: llama.cpp's {ARCH!r} rotates whole heads"
    if used.get("sliding_attention", {}).get("rope_type", "default") != "default":
        yield f"config key rope_parameters: llama.cpp's {ARCH!r} scales no layer with a window"


MELLUM = Export(ARCH, keys, complaints, own_head=True)
