"""int4 and int8 groups: bit for bit what compressed-tensors computes, and scales near the best there are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given
from hypothesis import strategies as st

from moequant import formats
from moequant.errors import FormatError
from moequant.formats import Effort, groups
from moequant.formats.groups import GroupFormat
from moequant.formats.kernel import TILE
from moequant.formats.parts import Parts, Scalar

F16, BF16 = torch.float16, torch.bfloat16
FORMATS = [GroupFormat(bits, group) for bits in groups.BITS for group in groups.GROUPS]


def weights(experts: int, rows: int, n_in: int, seed: int = 0) -> torch.Tensor:
    """Normal weights with a few outliers, as experts have them."""
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(experts, rows, n_in, generator=made) * 0.03
    return torch.where(torch.rand(x.shape, generator=made) < 0.002, 6 * x, x).to(BF16)


def importances(experts: int, n_in: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(experts, n_in, generator=torch.Generator().manual_seed(seed)) ** 4 + 1e-3


def packed(
    fmt: GroupFormat, x: torch.Tensor, w: torch.Tensor | None = None, effort: Effort = "default"
) -> torch.Tensor:
    return formats.quantize(fmt.of_rows(x.shape[-1]), x, w, effort)


def error(fmt: GroupFormat, x: torch.Tensor, data: torch.Tensor, w: torch.Tensor | None) -> torch.Tensor:
    """Squared error over square of each expert, weighted; f64."""
    w = torch.ones(len(x), x.shape[2]) if w is None else w
    off = x.double() - formats.dequantize(fmt.of_rows(x.shape[-1]), data).double()
    return (off.square() * w[:, None]).sum((1, 2)) / (x.double().square() * w[:, None]).sum((1, 2))


def nearest(fmt: GroupFormat, x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Blocks of x with these scales [E, out, groups] and the nearest codes."""
    blocks = x.float().view(*scales.shape, -1)
    s = scales.float()[..., None]
    codes = (blocks / s).round().clamp(fmt.low, fmt.high).flatten(-2).to(torch.int8)
    words = groups.pack(codes, fmt.bits).view(torch.uint8).view(*scales.shape, -1)
    return torch.cat([scales[..., None].view(torch.uint8), words], -1).flatten(-2)


@given(st.sampled_from(groups.BITS), st.integers(1, 4), st.integers(1, 67), st.integers(0, 2**31))
def test_packing_is_that_of_compressed_tensors_and_its_inverse(
    bits: int, rows: int, n_in: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    codes = torch.from_numpy(rng.integers(-(1 << bits - 1), 1 << bits - 1, (rows, n_in), dtype=np.int8))
    words = groups.pack(codes, bits)
    assert torch.equal(words, pack_to_int32(codes, bits))
    assert torch.equal(groups.unpack(words, bits, n_in), codes)
    assert torch.equal(groups.unpack(words, bits, n_in), unpack_from_int32(words, bits, codes.shape))


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_every_code_times_any_scale_decodes_as_compressed_tensors_does(
    fmt: GroupFormat, dtype: torch.dtype
) -> None:
    n_in = 256
    codes = (torch.arange(16 * n_in) % (1 << fmt.bits)).view(16, n_in).to(torch.uint8).view(torch.int8)
    codes = (codes.to(torch.int16) + fmt.low).clamp(fmt.low, fmt.high).to(torch.int8)
    scales = torch.randn(16, fmt.groups(n_in), generator=torch.Generator().manual_seed(0)).to(dtype)
    scales[0], scales[1], scales[2] = 0.0, torch.finfo(dtype).smallest_normal, -0.5
    kind = {"strategy": "channel"} if fmt.group == -1 else {"strategy": "group", "group_size": fmt.group}
    args = QuantizationArgs(num_bits=fmt.bits, type="int", symmetric=True, **kind)
    stored = {
        "weight_packed": groups.pack(codes, fmt.bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor(codes.shape),
    }
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    theirs = BaseCompressor.get_value_from_registry("pack-quantized").decompress(stored, scheme)["weight"]
    ours = groups.decode(fmt, codes, scales)
    assert ours.dtype == theirs.dtype == dtype
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_scales_are_near_the_best_of_many(fmt: GroupFormat) -> None:
    """Within 4 % at 4 bits, 15 % at others, of the error of 800 scales tried for each group, and well below
    absmax."""
    x, w = weights(2, 24, 256), importances(2, 256)
    blocks = x.float().view(2, 24, -1, fmt.size(256))
    per_block = w.view(2, 1, -1, fmt.size(256))
    top = blocks.abs().amax(-1)
    errors, tried = [], []
    for landing in np.linspace(0.8 * fmt.high, 3 * fmt.high, 400):
        for sign in (1, -1):
            scale = fmt.storable(sign * top / landing)
            codes = (blocks / scale[..., None]).round().clamp(fmt.low, fmt.high)
            errors.append((per_block * (blocks - codes * scale[..., None]).square()).sum(-1))
            tried.append(scale)
    best = torch.stack(errors).argmin(0)
    best_scales = torch.stack(tried).gather(0, best[None])[0].to(fmt.scale_dtype)
    found = error(fmt, x, packed(fmt, x, w), w)
    assert (found < error(fmt, x, nearest(fmt, x, best_scales), w) * (1.04 if fmt.bits == 4 else 1.15)).all()
    plain = error(fmt, x, nearest(fmt, x, fmt.storable(top / fmt.high).to(fmt.scale_dtype)), w)
    assert (found < plain * (0.8 if fmt.bits == 4 else 0.97)).all()


def test_more_effort_is_never_worse_and_importance_is_what_counts() -> None:
    fmt, x, w = GroupFormat(4, 64), weights(2, 64, 256), importances(2, 256)
    by_effort = [error(fmt, x, packed(fmt, x, w, effort), w) for effort in ("fast", "default", "best")]
    assert (by_effort[1] <= by_effort[0] * 1.001).all() and (by_effort[2] <= by_effort[1] * 1.001).all()
    blind, aware = packed(fmt, x), packed(fmt, x, w)
    assert (by_effort[1] < error(fmt, x, blind, w) * 0.97).all()
    assert (error(fmt, x, blind, None) < error(fmt, x, aware, None) * 0.99).all()
    # Only ratios matter, also where squares would leave float32's range.
    assert torch.equal(packed(fmt, x, w * 1e-30), packed(fmt, x, w * 1e25))


def test_every_expert_has_its_own_scales() -> None:
    fmt, x, w = GroupFormat(4, 128), weights(3, 40, 256), importances(3, 256)
    together = packed(fmt, x, w)
    for expert in range(3):
        alone = packed(fmt, x[expert : expert + 1], w[expert : expert + 1])
        assert torch.equal(together[expert : expert + 1], alone)
    swapped = packed(fmt, x.transpose(1, 2).contiguous().transpose(1, 2), w)
    assert torch.equal(swapped, together)


def test_the_compiled_search_loses_nothing() -> None:
    """On a whole tile, which is what the engine compiles for."""
    fmt, landings = GroupFormat(4, 128), torch.tensor([-8.6, -10.4, 7.2])
    x = weights(1, TILE["cpu"] // 128, 128)[0].float()
    w = importances(len(x), 128)
    compiled, eager = groups.search(x, w, landings, fmt), groups.search.eager(x, w, landings, fmt)
    assert (compiled != eager).float().mean() < 0.01

    def lost(scale: torch.Tensor) -> torch.Tensor:
        codes = (x / scale[:, None]).round().clamp(fmt.low, fmt.high)
        return (w * (x - codes * scale[:, None]).square()).sum()

    assert torch.allclose(lost(compiled), lost(eager), rtol=1e-5)


def test_scales_for_gptq_are_the_same_in_f16() -> None:
    x = weights(2, 32, 256)
    bf16, both = GroupFormat(4, 64, (BF16,)), GroupFormat(4, 64, (BF16, F16))
    (codes, ours), (other, theirs) = (groups.split(fmt, packed(fmt, x), 256) for fmt in (bf16, both))
    assert theirs.dtype == F16 and torch.equal(ours.float(), theirs.float()) and torch.equal(codes, other)
    # Below f16's normal range they are coarser, and still there.
    small = groups.split(both, packed(both, x.float() * 1e-4), 256)[1]
    assert (small.float().abs() < 2.0**-14).all() and (small != 0).all()


def test_groups_of_zeros_and_of_next_to_nothing() -> None:
    x = torch.zeros(1, 4, 128)
    x[0, 1, 3], x[0, 2] = 1e-30, torch.linspace(-1e-42, 1e-42, 128)
    x[0, 3, 5] = -3.0
    for dtypes in ((BF16,), (F16,), (BF16, F16)):
        fmt = GroupFormat(4, 128, dtypes)
        data = packed(fmt, x)
        codes, scales = groups.split(fmt, data, 128)
        assert scales[0, 0] == 0 and not codes[0, 0].any()
        decoded = formats.dequantize(fmt.of_rows(128), data)
        assert torch.isfinite(decoded).all() and decoded[0, 3, 5] == -3.0 and not decoded[0, 0].any()


@pytest.mark.parametrize("dtypes", [(BF16,), (F16,), (BF16, F16)])
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_blocks_are_what_files_hold(fmt: GroupFormat, dtypes: tuple[torch.dtype, ...]) -> None:
    """The block format is found by its name; codes and scales come out of it as they went in."""
    fmt = GroupFormat(fmt.bits, fmt.group, dtypes)
    rows = fmt.of_rows(96 if fmt.group in (-1, 32) else 256)
    assert formats.get(rows.name) is rows
    n_in = rows.block * (1 if fmt.group == -1 else 2)
    made = torch.Generator().manual_seed(3)
    codes = torch.randint(fmt.low, fmt.high + 1, (2, 5, n_in), generator=made).to(torch.int8)
    scales = fmt.storable(torch.randn(2, 5, fmt.groups(n_in), generator=made)).to(fmt.scale_dtype)
    assert isinstance(rows.view, Scalar)
    unsigned = (codes.to(torch.int16) - fmt.low).to(torch.uint8).view(-1, rows.block)
    none = unsigned[:, :0]
    data = rows.view.pack(Parts(unsigned, none, none, scales.view(-1, 1), none)).view(2, 5, -1)
    assert data.shape[-1] == rows.row_bytes(n_in)
    found = groups.split(fmt, data, n_in)
    assert torch.equal(found[0], codes) and torch.equal(found[1], scales)
    decoded = groups.decode(fmt, codes, scales.to(dtypes[0])).float()
    assert torch.equal(formats.dequantize(rows, data), decoded)
    parts = rows.view.unpack(data.view(-1, rows.block_bytes))
    assert torch.equal(rows.view.pack(parts), data.view(-1, rows.block_bytes))


@pytest.mark.parametrize("name", ["INT4_G128", "INT9_G128_BF16", "INT4_G0_BF16", "INT4_G128_F32"])
def test_other_names_are_no_format(name: str) -> None:
    with pytest.raises(FormatError, match="no format is called"):
        formats.get(name)


def test_what_cannot_be_held_is_refused() -> None:
    fmt = GroupFormat(4, 64)
    with pytest.raises(FormatError, match="multiple of 64, not 96"):
        packed(fmt, torch.ones(1, 2, 96))
    with pytest.raises(FormatError, match=r"must be \[1, 64\], one value per .* not \[64\]"):
        packed(fmt, torch.ones(1, 2, 64), torch.ones(64))
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = torch.ones(3, 5, 64)
        x[2, 4, 17] = bad
        with pytest.raises(FormatError, match="expert 2, row 4, column 17"):
            packed(fmt, x)
    with pytest.raises(FormatError, match="cannot hold weight 600000"):
        packed(GroupFormat(4, 64, (F16,)), torch.full((1, 1, 64), 6e5))
