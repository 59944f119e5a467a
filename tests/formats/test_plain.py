"""F32, F16 and BF16 against ggml, torch and their own limits."""

from __future__ import annotations

import pytest
import torch

from moequant import formats
from moequant.errors import FormatError
from moequant.formats.base import Format
from moequant.formats.plain import BF16, F16, F32
from tests.formats import ggml
from tests.formats.checks import same_bits, weights

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FORMATS = pytest.mark.parametrize("fmt", [F32, F16, BF16], ids=lambda f: f.name)


@FORMATS
def test_bytes_are_ggmls(fmt: Format) -> None:
    x = weights("heavy", rows=8, columns=96)
    assert torch.equal(formats.quantize(fmt, x), ggml.quantize(fmt, x))


@FORMATS
def test_same_dtype_is_lossless(fmt: Format) -> None:
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(4, 5, 64, generator=g) * 10).to(DTYPES[fmt.name])
    x[0, 0, :4] = torch.tensor([0.0, -0.0, 1e-40, 6e-8]).to(x.dtype)
    assert same_bits(formats.dequantize(fmt, formats.quantize(fmt, x)), x.float())


@pytest.mark.parametrize("fmt", [F16, BF16], ids=lambda f: f.name)
def test_every_pattern_decodes_like_ggml(fmt: Format) -> None:
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.uint8).view(256, -1)
    ours = formats.dequantize(fmt, patterns)
    assert same_bits(ours, ggml.dequantize(fmt, patterns))


@FORMATS
def test_the_limit_is_the_last_finite_value(fmt: Format) -> None:
    last = torch.tensor([[fmt.limit, -fmt.limit]])
    assert torch.isfinite(formats.dequantize(fmt, formats.quantize(fmt, last))).all()
    beyond = torch.nextafter(last.double().float(), torch.tensor([[torch.inf, -torch.inf]]))
    assert torch.isinf(beyond.to(DTYPES[fmt.name])).all()
    with pytest.raises(FormatError, match="expert 0, row 0, column 0"):
        formats.quantize(fmt, beyond)
