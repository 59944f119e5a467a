"""The kernels compiled for GPUs that are not there: nothing spills, none takes more than it took.

`python -m benchmarks run kernel-counts --targets 90 --tokens 1 --record` writes what is compared with.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moequant.kernels import KERNEL_FORMATS

triton = pytest.importorskip("triton", reason="Triton is not installed")
kernel_counts = pytest.importorskip("benchmarks.kernel_counts")

RECORDED = json.loads(Path(__file__).with_name("counts.json").read_text(encoding="utf-8"))
MORE = 1.05


@pytest.mark.parametrize("name", KERNEL_FORMATS)
def test_no_kernel_grows_or_spills(name: str) -> None:
    row = kernel_counts.count(name, 1, "90")
    assert row["spilled"] == 0
    if RECORDED["triton"] == triton.__version__:
        assert row["instructions"] <= MORE * RECORDED[name]


@pytest.mark.parametrize("target", ["80", "86", "89", "100", "120", "gfx942"])
@pytest.mark.parametrize("tokens", [2, 16])
def test_every_target_compiles(tokens: int, target: str) -> None:
    row = kernel_counts.count(
        "IQ4_XS", tokens, target
    )  # it uses every instruction that has a name of its own
    assert row["spilled"] == 0
    assert row["instructions"] > 0


def test_units_are_told_apart() -> None:
    names = {"IMAD.MOV.U32": "product", "IDP.4A.S8.S8": "product", "LDG.E.128": "load", "LOP3.LUT": "integer"}
    assert {name: kernel_counts.unit_of(name) for name in names} == names


def test_a_loop_is_what_is_jumped_back_over() -> None:
    sass = "\n".join(
        f"        /*{at:04x}*/                   {text} ;"
        for at, text in [(0, "MOV R1, R2"), (16, "IMAD R1, R1, R1, R1"), (32, "@!P0 BRA 0x10"), (48, "EXIT")]
    )
    assert kernel_counts.loop_of(sass) == ("IMAD", "BRA")
