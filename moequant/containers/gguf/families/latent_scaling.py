"""How latent attention grows with the context: transformers multiplies the rotated part of queries and keys
by one number, and attention as a whole by the square of another. Graphs of llama.cpp reach both, or one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from moequant.containers.gguf.families.base import Key
from moequant.containers.gguf.families.keys import grown, rope, yarn_factor
from moequant.families import Config

BOTH = ("deepseek2", "mistral4", "deepseek32")
"""Graphs that multiply attention by what rotated parts are multiplied by, squared, and by a number of the
file: that undoes the first."""

ONE = "glm-dsa"
"""The graph that does so, and reads no number from the file. All others multiply rotated parts alone."""

OWN = ("mscale", "mscale_all_dim", "attention_factor")
"""What configs say of it."""


def scaling_keys(config: Config, arch: str) -> tuple[Key, ...]:
    """Base and scaling of the rotation, and what attention is multiplied by."""
    found = dict(config.rope_parameters or {})
    keys = rope(config, {key: value for key, value in found.items() if key not in OWN})
    kind, factor = found.get("rope_type"), float(found.get("factor") or 1.0)
    if kind not in ("yarn", "linear"):
        return keys
    turned, whole = _scales(config)
    times = turned / grown(factor) if kind == "yarn" else turned
    if arch in BOTH and factor != 1:
        undone = 1.0 if kind == "yarn" else 1.0 + 0.1 * math.log(factor)
        more = whole / turned / undone
        slope = round((more - 1) / math.log(factor), 12)  # so that equal mscales stay what they are
        if slope:
            keys = (*keys, Key("rope.scaling.yarn_log_multiplier", "f32", slope))
        if slope and kind == "yarn":  # its own factor is then divided by what grows; in `deepseek2`, left out
            times = turned if arch == "deepseek2" else times * more
    return keys if math.isclose(times, 1.0) else (*keys, Key("rope.scaling.attn_factor", "f32", times))


def scaling_complaints(config: Config, arch: str) -> Iterator[str]:
    """A complaint about numbers that the graph does not reach."""
    found = config.rope_parameters or {}
    kind = found.get("rope_type")
    if arch in BOTH and kind in ("yarn", "linear") and found.get("factor") != 1:
        return
    turned, whole = _scales(config)
    least = turned if kind == "yarn" and arch in (*BOTH, ONE) else 1.0
    if (kind == "linear" and arch == ONE) or not math.isclose(whole, least):
        said = ", ".join(f"{key} {found.get(key)!r}" for key in OWN)
        yield (
            f"rope scaling {kind!r} with {said}: llama.cpp's {arch!r} would multiply attention by another "
            "number, the file would compute something else"
        )


def _scales(config: Config) -> tuple[float, float]:
    """What transformers multiplies rotated parts by, and the root of what it multiplies attention by."""
    found = config.rope_parameters or {}
    kind, factor = found.get("rope_type", "default"), float(found.get("factor") or 1.0)
    turned = yarn_factor(found, factor) if kind == "yarn" else 1.0
    scaled = kind != "default" and found.get("mscale_all_dim")
    return turned, grown(factor, found["mscale_all_dim"]) if scaled else 1.0
