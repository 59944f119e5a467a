"""The kernels in Triton's interpreter, and compiled where there is a GPU, against float64 products."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from moequant.kernels import KERNEL_FORMATS
from tests.kernels import cases, reference
from tests.models import ROOT

LIMIT = 1e-3
VECTOR_LIMIT = 1e-4
"""Activations of 16 bits and exact sums leave much less than tensor cores do."""
ALIKE_LIMIT = 1e-5
"""With the reference's activations rounded to those 16 bits as well, sums in f32 are all that differs."""

pytest.importorskip("triton", reason="Triton is not installed")


def errors(device: str, **environment: str) -> dict[str, float]:
    """{case: relative error} from a fresh process."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.cases", "--device", device],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def interpreted() -> dict[str, float]:
    return errors("cpu", TRITON_INTERPRET="1")


@pytest.mark.parametrize("name", [case.name for case in cases.cases()])
def test_interpreted(interpreted: dict[str, float], name: str) -> None:
    assert interpreted[name] <= (VECTOR_LIMIT if name.endswith(cases.VECTOR) else LIMIT)
    if name.endswith(cases.VECTOR):
        assert interpreted[name + cases.ROUNDED] <= ALIKE_LIMIT


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_compiled() -> None:
    assert {name: error for name, error in errors("cuda").items() if not error <= LIMIT} == {}


@pytest.mark.parametrize("case", cases.cases()[: 2 * len(KERNEL_FORMATS)], ids=lambda case: case.name)
def test_torch_decodes_the_same_bytes(case: cases.Case) -> None:
    packed, weights = cases.matrix(case)
    decoded = packed.decode().double()
    assert torch.equal(decoded.isnan(), weights.isnan())
    assert torch.equal(decoded.nan_to_num(0.0), weights.float().double().nan_to_num(0.0))


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_like_compressed_tensors(bits: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(-(1 << bits - 1), 1 << bits - 1, (5, 64), dtype=torch.int8)
    assert torch.equal(helpers.pack_to_int32(codes, bits), reference.pack_int32(codes, bits))


def test_importing_the_package_imports_no_triton() -> None:
    code = "import sys, moequant.kernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0
