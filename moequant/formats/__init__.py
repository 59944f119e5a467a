"""Number formats: every ggml weight type and those of safetensors folders, packed and unpacked in torch."""

from __future__ import annotations

from torch import Tensor

from moequant.errors import FormatError, nearest
from moequant.formats import (
    engine,
    float8,
    fp4,
    groups,
    iq1,
    iq2,
    iq3,
    iq4,
    legacy,
    nvfp4,
    plain,
    q2_k,
    q3_k,
    q4_k,
    q6_k,
    ternary,
)
from moequant.formats.base import Effort, Format

FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        plain.F32,
        plain.F16,
        plain.BF16,
        legacy.Q4_0,
        legacy.Q4_1,
        legacy.Q5_0,
        legacy.Q5_1,
        legacy.Q8_0,
        q2_k.Q2_K,
        q3_k.Q3_K,
        q4_k.Q4_K,
        q4_k.Q5_K,
        q6_k.Q6_K,
        iq4.IQ4_NL,
        iq4.IQ4_XS,
        iq3.IQ3_S,
        iq3.IQ3_XXS,
        iq2.IQ2_S,
        iq2.IQ2_XS,
        iq2.IQ2_XXS,
        iq1.IQ1_M,
        iq1.IQ1_S,
        ternary.TQ1_0,
        ternary.TQ2_0,
        fp4.MXFP4,
        fp4.NVFP4,
    )
}


def get(name: str) -> Format:
    """The format of that ggml name, or of one like INT4_G128_BF16; FormatError lists the names that exist."""
    found = FORMATS.get(name) or groups.named(name) or float8.named(name) or nvfp4.named(name)
    if found is None:
        raise FormatError(f"no format is called {name!r}; {nearest(name, FORMATS)}")
    return found


def quantize(
    fmt: Format | str,
    weights: Tensor,
    importance: Tensor | None = None,
    effort: Effort = "default",
    *,
    magnitude: float | None = None,
    threads: int | None = None,
    shared: Tensor | None = None,
    device: str | None = None,
) -> Tensor:
    """Pack weights [..., rows, in] into uint8 [..., rows, row_bytes]; see `engine.quantize`."""
    fmt = get(fmt) if isinstance(fmt, str) else fmt
    return engine.quantize(
        fmt, weights, importance, effort, magnitude=magnitude, threads=threads, shared=shared, device=device
    )


def dequantize(fmt: Format | str, packed: Tensor, *, threads: int | None = None) -> Tensor:
    """Unpack uint8 [..., rows, row_bytes] into f32 [..., rows, in]; see `engine.dequantize`."""
    fmt = get(fmt) if isinstance(fmt, str) else fmt
    return engine.dequantize(fmt, packed, threads=threads)


__all__ = ["FORMATS", "Effort", "Format", "dequantize", "get", "quantize"]
