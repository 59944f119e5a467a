"""The scripts for a lent GPU run whole at tiny shapes in Triton's interpreter: no typo costs time there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.forks import python

ROOT = Path(__file__).parents[2]

pytest.importorskip("triton", reason="Triton is not installed")


def lines_of(script: str, *arguments: str) -> list[dict[str, Any]]:
    surroundings = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = python(f"scripts/gpu/{script}", "--device", "cpu", *arguments, env=surroundings)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_correct() -> None:
    *_, end = lines_of("correct.py", "--only", "INT8")
    assert end["wrong"] == []
    assert end["not run"] == 0


def test_encode() -> None:
    rows = lines_of("encode.py", "--types", "Q4_K", "IQ2_XS", "MXFP4")[1:]
    assert [row["product"] for row in rows[:2]] == ["bfloat16", "float32"]
    assert [row["type"] for row in rows[2:]] == 3 * ["Q4_K"] + 3 * ["IQ2_XS"] + 3 * ["MXFP4"]
    assert all(row["same"] == 1 and row["Mw/s"] > 0 for row in rows[2:])


def test_layer() -> None:
    versions, tiny, *rows = lines_of("layer.py", "--efforts", "fast")
    assert {"torch", "transformers", "on"} <= versions.keys()
    assert tiny["bytes as on the CPU"] == tiny["KL over the CPU's"] == 1
    assert [row["stage"] for row in rows] == ["open", "route", "quantize", "verify", "all"]


def test_bandwidth() -> None:
    types = ["Q4_K", "INT4", "IQ1_S"]
    options = ("--models", "gpt-oss", "--tokens", "1", "16", "--types", *types)
    rows = lines_of("bandwidth.py", *options)[1:]
    assert [row["type"] for row in rows] == 2 * ["BF16", *types]
    assert all(row["GB/s"] > 0 for row in rows)
