"""The engine: experts, rows, importance, tiles, threads and refusals, for every format alike."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moequant import formats
from moequant.errors import FormatError
from moequant.formats import engine
from moequant.formats.base import Effort, Format
from moequant.formats.kernel import TILE, kernel
from tests.formats import ggml
from tests.formats.checks import importances, weights

ALL = pytest.mark.parametrize("fmt", formats.FORMATS.values(), ids=lambda f: f.name)
COMPILER_IS_OLD_FASHIONED = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script_method.*:DeprecationWarning"
)
SOME = pytest.mark.parametrize("name", ["F16", "Q4_0", "Q4_K", "Q6_K"])


@ALL
def test_numbers_are_ggmls(fmt: Format) -> None:
    name, block, block_bytes = ggml.traits(fmt)
    assert (name.upper(), block, block_bytes) == (fmt.name.upper(), fmt.block, fmt.block_bytes)
    assert formats.get(fmt.name) is fmt
    assert fmt.bits == 8 * block_bytes / block


@ALL
@settings(max_examples=6)
@given(st.lists(st.integers(1, 3), max_size=2), st.integers(1, 3), st.integers(1, 2), st.integers(0, 99))
def test_any_shape_is_its_rows(fmt: Format, lead: list[int], rows: int, blocks: int, seed: int) -> None:
    n_in = blocks * fmt.block
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*lead, rows, n_in, generator=g)
    importance = torch.rand(*lead, n_in, generator=g) + 0.1
    packed = formats.quantize(fmt, x, importance, "fast")
    assert packed.dtype == torch.uint8
    assert packed.shape == (*lead, rows, fmt.row_bytes(n_in))
    back = formats.dequantize(fmt, packed)
    assert back.shape == x.shape
    assert back.dtype == torch.float32
    one = (0,) * len(lead)
    alone = formats.quantize(fmt, x[one], importance[one], "fast")
    assert torch.equal(alone, packed[one])


@SOME
def test_experts_have_their_own_importance(name: str) -> None:
    x = weights("gauss", rows=12, columns=512).view(3, 4, 512)
    importance = torch.stack([importances("spiky", 512, seed) for seed in range(3)])
    together = formats.quantize(name, x, importance)
    alone = [formats.quantize(name, x[e], importance[e]) for e in range(3)]
    assert torch.equal(together, torch.stack(alone))


@SOME
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_their_f32_values(name: str, dtype: torch.dtype) -> None:
    x = weights("gauss", rows=4, columns=512).to(dtype)
    assert torch.equal(formats.quantize(name, x), formats.quantize(name, x.float()))


@SOME
def test_memory_order_does_not_matter(name: str) -> None:
    x = weights("gauss", rows=64, columns=512).view(4, 16, 512)
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert not turned.is_contiguous()
    importance = importances("mild", 512).expand(4, -1)
    assert torch.equal(formats.quantize(name, turned, importance), formats.quantize(name, x, importance))


@ALL
def test_bytes_may_start_anywhere(fmt: Format) -> None:
    packed = formats.quantize(fmt, weights("gauss", rows=1, columns=256), effort="fast")
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), packed.flatten()])[1:].view(1, -1)
    assert torch.equal(formats.dequantize(fmt, shifted), formats.dequantize(fmt, packed))


@SOME
def test_threads_do_not_change_bytes(name: str) -> None:
    x = weights("gauss", rows=300, columns=1024)  # several tiles and a piece
    before = torch.get_num_threads()
    one, many = (formats.quantize(name, x, effort="fast", threads=n) for n in (1, 3))
    assert torch.equal(one, many)
    assert torch.equal(formats.dequantize(name, one, threads=1), formats.dequantize(name, one, threads=3))
    assert torch.get_num_threads() == before


@ALL
def test_only_ratios_of_importance_count(fmt: Format) -> None:
    x = weights("gauss", rows=4, columns=512)
    importance = importances("mild", 512)
    packed = formats.quantize(fmt, x, importance)
    for factor in (2.0**-60, 2.0**60):
        assert torch.equal(formats.quantize(fmt, x, importance * factor), packed)
    flat = formats.quantize(fmt, x, torch.full((512,), 3.0))
    assert torch.equal(flat, formats.quantize(fmt, x))


@ALL
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_importance_of_zero_does_not_make_zeros(fmt: Format, share: float) -> None:
    x = weights("gauss", rows=4, columns=1024)
    importance = importances("mild")
    importance[: int(1024 * share)] = 0
    back = formats.dequantize(fmt, formats.quantize(fmt, x, importance))
    dead = importance == 0
    lost = (back - x)[:, dead].square().sum() / x[:, dead].square().sum()
    free = (formats.dequantize(fmt, formats.quantize(fmt, x)) - x)[:, dead].square().sum()
    assert lost < 1
    assert lost <= 1.5 * free / x[:, dead].square().sum() + 1e-6


@SOME
def test_magnitude_can_be_overridden(name: str) -> None:
    x, v = weights("heavy", columns=512), importances("mild", 512)
    fmt = formats.get(name)
    assert torch.equal(formats.quantize(fmt, x, v, magnitude=fmt.magnitude), formats.quantize(fmt, x, v))
    if fmt.block > 1:
        q = {p: formats.dequantize(fmt, formats.quantize(fmt, x, v, magnitude=p)) for p in (0.0, 2.0)}
        plain, squared = v.expand_as(x), v * x.square()
        assert (plain * (q[0.0] - x).square()).sum() < (plain * (q[2.0] - x).square()).sum()
        assert (squared * (q[2.0] - x).square()).sum() < (squared * (q[0.0] - x).square()).sum()


@ALL
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_weights_are_refused_with_their_position(fmt: Format, bad: float) -> None:
    x = torch.zeros(3, 5, 2 * fmt.block)
    x[2, 3, fmt.block] = bad
    with pytest.raises(FormatError, match=rf"expert 2, row 3, column {fmt.block}:"):
        formats.quantize(fmt, x)


def test_a_bad_weight_in_a_late_tile_is_found() -> None:
    x = torch.zeros(2, 300, 1024)
    x[1, 250, 1000] = torch.nan
    with pytest.raises(FormatError, match="expert 1, row 250, column 1000:"):
        formats.quantize("Q4_K", x, effort="fast")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -1.0])
def test_bad_importance_is_refused_with_its_position(bad: float) -> None:
    importance = torch.ones(2, 512)
    importance[1, 300] = bad
    with pytest.raises(FormatError, match="expert 1, column 300:"):
        formats.quantize("Q4_K", torch.zeros(2, 4, 512), importance)


@pytest.mark.parametrize("name", ["Q4_1", "Q8_0", "IQ4_XS", "TQ2_0"])
def test_importance_that_no_f32_holds_spoils_nothing(name: str) -> None:
    fmt, x, importance = formats.get(name), weights("gauss", 3, 256), torch.ones(256, dtype=torch.float64)
    importance[5], importance[130] = 1e300, 1e36
    back = formats.dequantize(fmt, formats.quantize(fmt, x, importance))
    assert float((back - x)[:, [5, 130]].square().sum()) < 0.3 * float(x[:, [5, 130]].square().sum())
    assert float((back - x).square().sum()) < 0.8 * float(x.square().sum())


@pytest.mark.parametrize("threads", [1, 2])
def test_inference_mode_changes_nothing(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # so that threads are started
    x = weights("gauss", 16, 1024)
    known = formats.quantize(formats.get("Q4_K"), x)
    with torch.inference_mode():
        packed = formats.quantize(formats.get("Q4_K"), x.clone(), threads=threads)
        assert torch.equal(packed, known)
        assert formats.dequantize(formats.get("Q4_K"), packed, threads=threads).shape == x.shape


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(FormatError, match="256 weights at a time and cannot hold rows of 300"):
        formats.quantize("Q4_K", torch.zeros(4, 300))
    with pytest.raises(FormatError, match=r"must be \[3, 256\].* not \[256\]"):
        formats.quantize("Q4_K", torch.zeros(3, 4, 256), torch.ones(256))
    with pytest.raises(FormatError, match="whole 144-byte blocks"):
        formats.dequantize("Q4_K", torch.zeros(4, 143, dtype=torch.uint8))
    with pytest.raises(FormatError, match="no format is called 'Q4_X'; did you mean "):
        formats.get("Q4_X")


def test_kernels_run_compiled_on_whole_tiles_only() -> None:
    calls = []

    @kernel
    def twice(x: torch.Tensor) -> torch.Tensor:
        calls.append(torch.compiler.is_compiling())
        return 2 * x

    assert torch.equal(twice(torch.ones(5)), torch.full((5,), 2.0))
    assert calls == [False]
    twice.__dict__["_cpu"] = lambda x: 3 * x  # what a compiler would return
    assert torch.equal(twice(torch.ones(TILE["cpu"])), torch.full((TILE["cpu"],), 3.0))


@COMPILER_IS_OLD_FASHIONED
def test_without_a_compiler_large_tensors_are_packed_eagerly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = formats.get("NVFP4")

    def encode(x: torch.Tensor, w: torch.Tensor, effort: Effort) -> torch.Tensor:
        if x.numel() >= TILE["cpu"]:
            raise RuntimeError("InvalidCxxCompiler: no working C++ compiler found\nand more")
        return whole.encode(x, w, effort)

    x = weights("gauss", rows=300, columns=1024)
    expected = formats.quantize(whole, x, effort="fast")
    monkeypatch.setattr(engine, "COMPILE_FROM", 1)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(engine.quantize(replace(whole, encode=encode), x, effort="fast"), expected)
    assert "the encoder cannot be compiled here and runs slower: InvalidCxxCompiler" in caplog.text


@COMPILER_IS_OLD_FASHIONED
def test_compiled_tiles_are_as_good_as_eager_ones(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    x = weights("gauss", rows=1200, columns=1024)  # whole tiles, and a piece to fill up
    eager = formats.quantize("MXFP4", x)
    monkeypatch.setattr(engine, "COMPILE_FROM", 1)
    with caplog.at_level(logging.INFO):
        compiled = formats.quantize("MXFP4", x)
    assert "MXFP4: the encoder was compiled in" in caplog.text
    lost = [float((formats.dequantize("MXFP4", p) - x).square().sum()) for p in (eager, compiled)]
    assert lost[1] == pytest.approx(lost[0], rel=1e-3)
    # Least squares round differently compiled; hardly any block may notice.
    assert (eager != compiled).float().mean() < 0.01


def test_what_has_loops_is_not_compiled(caplog: pytest.LogCaptureFixture) -> None:
    large, cpu = 1 << 30, torch.device("cpu")
    with caplog.at_level(logging.INFO):
        assert not engine.compiles(formats.get("Q4_K"), large, 1.0, "default", cpu)
    assert "compiled" not in caplog.text


@pytest.mark.parametrize("fmt", [f for f in formats.FORMATS.values() if f.gain != 1], ids=lambda f: f.name)
def test_gain_undoes_the_shrinking_of_least_squares(fmt: Format) -> None:
    """The same codes with scales that are `gain` times as large, and closer to the weights' own size."""
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(5))
    plain = formats.dequantize(fmt, formats.quantize(replace(fmt, gain=1.0), x))
    raised = formats.dequantize(fmt, formats.quantize(fmt, x))
    shrunk, back = float((plain * x).sum() / (x * x).sum()), float((raised * x).sum() / (x * x).sum())
    assert abs(back / shrunk - fmt.gain) < 0.01
    assert shrunk < back < 1.01
