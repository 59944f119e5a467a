"""Kernels are compiled once, however they are called."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._dynamo import config
from torch._dynamo.utils import counters

from moequant import formats
from moequant.formats.engine import Blocks, compiles, encode_blocks
from moequant.formats.kernel import VARIANTS, as_compiled


@pytest.mark.parametrize("name", ["MXFP4", "NVFP4"])
def test_nothing_compiles_after_the_first_tile(name: str) -> None:
    """Torch compiles anew for other numbers of threads, without gradients, and for tensors of inference mode.

    Past eight of these it would warn on the user's terminal and run a kernel uncompiled.
    """
    fmt = formats.get(name)
    assert compiles(fmt, 1 << 30, fmt.magnitude, "default", torch.device("cpu"))
    compiled, threads = counters["frames"]["total"], torch.get_num_threads()
    assert compiled > 0

    def blocks(rows: int) -> Blocks:
        d = None if fmt.shared is None else torch.full((rows, 1), 0.01)
        return Blocks(torch.randn(rows, fmt.block), torch.rand(rows, fmt.block) + 0.1, d)

    def pack(given: Blocks) -> torch.Tensor:
        return encode_blocks(fmt, given, "default", fmt.magnitude, True)

    plain = blocks(700)
    expected = pack(plain)
    try:
        torch.set_num_threads(3)
        assert torch.equal(pack(plain), expected)
        with torch.no_grad():
            assert torch.equal(pack(plain), expected)
        with torch.inference_mode():
            assert torch.equal(pack(plain), expected)
            other = blocks(9_000)
            inside = pack(other)
        assert torch.equal(pack(other), inside)
        assert torch.get_num_threads() == 3, "the caller's threads are its own"
    finally:
        torch.set_num_threads(threads)
    assert counters["frames"]["total"] == compiled


def test_every_thread_may_have_a_version_of_a_kernel_for_each_format() -> None:
    """Torch's limit is a thread's own; kernels that formats share are compiled more often than it allows."""

    def limit(_: int) -> int:
        with as_compiled():
            return config.recompile_limit

    usual = config.recompile_limit
    with ThreadPoolExecutor(2) as pool:
        assert set(pool.map(limit, range(4))) == {VARIANTS}
    assert len(formats.FORMATS) <= VARIANTS and config.recompile_limit == usual
