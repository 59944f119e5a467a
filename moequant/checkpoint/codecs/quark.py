"""AMD Quark's quantization config: which numbers it says a weight holds.

| `dtype` | stored as |
|---|---|
| fp4, `scale_format` e8m0 | MXFP4: bytes of two codes, `weight_scale` U8 for 32 weights |
| fp6_e2m3, fp6_e3m2, `scale_format` e8m0 | MXFP6: four codes in three bytes, scales likewise |
| fp8_e4m3, fp8_e5m2 | FP8: `weight_scale` for all, a row or a block |
| int8 | INT8: for all or a row |
| int4, uint4, in groups | as AWQ: words I32 [in, out / 8], scales [groups, out] |

Other integers are refused, as are weights that were quantized twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moequant.errors import CheckpointError

Config = Mapping[str, Any]

_READ = {
    "fp4": (4, "float"),
    "fp6_e2m3": (6, "float"),
    "fp6_e3m2": (6, "float"),
    "fp8_e4m3": (8, "float"),
    "fp8_e5m2": (8, "float"),
    "int8": (8, "int"),
    "int4": (4, "int"),
    "uint4": (4, "int"),
}

_ALONE = ("per_tensor", "per_channel", "per_block")
"""What is not in groups."""


def check(raw: Config) -> None:
    """CheckpointError for numbers, or a way to store them, that is not read."""
    told = [("global_quant_config", raw.get("global_quant_config")), *_named(raw, "layer_quant_config")]
    for where, layer in told:
        scheme(f"quantization_config.{where}", layer or {})
    stored = (raw.get("export") or {}).get("weight_format", "real_quantized")
    if stored != "real_quantized":
        raise CheckpointError(
            f"quantization_config.export.weight_format is {stored}, expected real_quantized; give the "
            "unquantized checkpoint"
        )


def scheme(
    source: str, layer: Config
) -> tuple[str, int | None, str | None, tuple[int, int] | None, bool | None, str]:
    """The source, bits, kind, block and symmetry of weights under `layer`, the entry of a config for some
    modules or for all, and what it calls the numbers; None where it says nothing. CheckpointError for numbers
    that are not read."""
    weight = layer.get("weight")
    if not weight:
        return source, None, None, None, None, ""
    if isinstance(weight, list):
        if len(weight) > 1:
            raise _refused(source, " then ".join(str(one.get("dtype")) for one in weight))
        weight = weight[0]
    dtype, how = str(weight.get("dtype")), weight.get("qscheme")
    blocks = {
        "per_tensor": (0, 0),
        "per_channel": (1, 0),
        "per_group": (1, int(weight.get("group_size") or 0)),
        "per_block": tuple(weight.get("block_size") or (0, 0)),
    }
    # Whole numbers in groups Quark turns before it packs them.
    unread = {"int8": ("per_group",), "int4": _ALONE, "uint4": _ALONE}.get(dtype, ())
    small = dtype.startswith(("fp4", "fp6"))
    if (
        dtype not in _READ
        or (small and weight.get("scale_format") != "e8m0")
        or how not in blocks
        or how in unread
    ):
        raise _refused(source, f"{dtype} {how}, scale_format {weight.get('scale_format')}")
    bits, kind = _READ[dtype]
    rows, columns = blocks[how]
    symmetric = weight.get("symmetric") is not False
    return source, bits, kind, (int(rows), int(columns)), symmetric, dtype


def _named(raw: Config, key: str) -> list[tuple[str, Any]]:
    return [(f"{key}[{name!r}]", layer) for name, layer in (raw.get(key) or {}).items()]


def _refused(source: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{source}: weights are {what}, expected fp4 or fp6 with scales of e8m0, fp8, int8 for rows, or int4 "
        "in groups; give the unquantized checkpoint"
    )
