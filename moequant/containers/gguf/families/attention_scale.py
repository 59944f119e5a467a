"""How a stretched rotation scales latent attention: what is rotated by one number, attention by another.

llama.cpp has one key that multiplies what is rotated, and one from which some graphs make the scale of
attention. Together they say any two numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from moequant.containers.gguf.families.base import Key
from moequant.containers.gguf.families.keys import grown, yarn_factor
from moequant.families import Config

BOTH = ("deepseek2", "deepseek32", "mistral4")
"""Graphs that read both keys."""

ROTATED = ("glm-dsa",)
"""Those that scale attention as they scale what is rotated, and have no key for more. All others leave
attention alone."""

TOLERANCE = 1e-6
"""Two scales are the same in float32."""


def wanted(config: Config) -> tuple[float, float]:
    """What transformers multiplies by: rotated queries and keys each, and all of attention by the square of
    the second."""
    found = config.rope_parameters or {}
    kind, factor = found.get("rope_type", "default"), float(found.get("factor") or 1.0)
    if kind == "default":
        return 1.0, 1.0
    turned = yarn_factor(found, factor) if kind == "yarn" else 1.0
    return turned, grown(factor, found.get("mscale_all_dim") or 0.0)


def scales(config: Config, arch: str) -> tuple[Key, ...]:
    """The two keys, where the graph would not do so without them."""
    graph = _graph(config, arch)
    part = wanted(config)[0] / graph.rotated
    return (
        *([Key("rope.scaling.yarn_log_multiplier", "f32", 0.1 * graph.grows)] if graph.grows else []),
        *([Key("rope.scaling.attn_factor", "f32", part)] if abs(part - 1) > TOLERANCE else []),
    )


def unscaled(config: Config, arch: str) -> Iterator[str]:
    """A complaint when the graph would scale attention otherwise."""
    attention, own = wanted(config)[1], _graph(config, arch).attention
    if abs(own - attention) > TOLERANCE:
        found = config.rope_parameters
        yield (
            f"rope scaling {found['rope_type']!r} with mscale {found.get('mscale')!r}, mscale_all_dim "
            f"{found.get('mscale_all_dim')!r}, attention_factor {found.get('attention_factor')!r}: attention "
            f"is scaled by {attention**2:.4g}, in llama.cpp's {arch!r} by {own**2:.4g}, and no key changes it"
        )


@dataclass(frozen=True, slots=True)
class _Graph:
    """What a graph does: `rotated` multiplies queries and keys where no key says so, `grows` is the
    mscale_all_dim that it is told, 0 for none, and then `attention` is what it scales attention by."""

    rotated: float = 1.0
    grows: float = 0.0
    attention: float = 1.0


def _graph(config: Config, arch: str) -> _Graph:
    """With the second key chosen so that attention is scaled as in transformers, if there is a way.

    llama.cpp takes mscale to be 1; in `deepseek2`, to be mscale_all_dim, unless that is 1. It undoes a
    linear scaling of what is rotated, but not of attention.
    """
    found = config.rope_parameters or {}
    kind, factor = found.get("rope_type", "default"), float(found.get("factor") or 1.0)
    if kind not in ("yarn", "linear"):
        return _Graph()
    part, attention = wanted(config)
    base = part * (grown(factor) if kind == "linear" else 1.0)
    grows = 0.0
    if arch in BOTH and factor > 1 and abs(attention - base) > TOLERANCE:
        grows = (attention / base - 1) / (0.1 * math.log(factor))
    own = base * grown(factor, grows) if arch in (*BOTH, *ROTATED) else 1.0
    if kind == "linear":
        return _Graph(1.0, grows, own)
    first = grows if grows and arch == "deepseek2" and grows != 1 else 1.0
    return _Graph(grown(factor, first) / grown(factor, grows), grows, own)
