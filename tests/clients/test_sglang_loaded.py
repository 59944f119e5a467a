"""SGLang's own loader finds a place for every tensor of every expert of our folders, or says why it does not.

It runs in a virtual environment of its own that `tests/clients/sglang_env.sh` makes, without kernels and
without a GPU; without it the tests skip and say so.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moequant.checkpoint import open_checkpoint
from moequant.statistics.calibrate import calibrate
from tests.clients.environments import SGLANG
from tests.containers.folders.cases import quantized
from tests.containers.folders.test_inputs import rows

SCRIPT = Path(__file__).with_name("sglang_loaded.py")

SIZES = {"hidden_size": 256, "moe_intermediate_size": 256}
PRODUCTS = ("gate_proj", "up_proj", "down_proj")

LOADED = ("W4A16", "W8A16", "FP8_BLOCK", "FP8_DYNAMIC", "FP8", "NVFP4A16")
DROPPED = "MXFP4A16"
REFUSED = {
    "W3A16": "is supported for the following bits",
    "W8A8": "implemented only for NPU",
    "NVFP4": "Torch not compiled with CUDA",  # nothing is refused: it asks what the GPU is
}
"""What SGLang 0.5.23 says of a mixture of experts."""

STORED = ("weight", "weight_packed", "weight_scale", "weight_global_scale", "input_scale")


@pytest.fixture(scope="module")
def told(tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By scheme: the folder of a Qwen3-MoE, and what SGLang holds of it or says."""
    SGLANG.required()
    model, root = tiny("qwen3_moe", **SIZES), tmp_path_factory.mktemp("sglang")
    calibration = calibrate(open_checkpoint(model), rows("text"))
    folders = {scheme: root / scheme for scheme in (*LOADED, *REFUSED, DROPPED)}
    for scheme, out in folders.items():
        quantized(model, out, calibration, scheme=scheme)
    found = SGLANG.told(SCRIPT, *folders.values(), HF_HUB_OFFLINE="1", PYTHONPATH="")
    return {scheme: (out, found[str(out)]) for scheme, out in folders.items()}


@pytest.mark.parametrize("scheme", LOADED)
def test_every_tensor_of_every_expert_has_its_place(told: dict[str, Any], scheme: str) -> None:
    out, held = told[scheme]
    assert isinstance(held, dict), held
    stored = load_file(out / "model.safetensors")
    modules = {name.rpartition(".")[0] for name in stored if ".experts." in name}
    seen = set()
    for name, parameter in held.items():
        block, _, own = name.rpartition(".")
        side, _, suffix = own.partition("_")
        if suffix not in STORED:
            continue  # orders of columns and biases, which our folders do not have, and shapes
        for expert, crc in enumerate(parameter["crc32"]):
            products = PRODUCTS[:2] if side == "w13" else PRODUCTS[2:]
            parts = [f"{block}.{expert}.{each}" for each in products]
            values = [stored[f"{part}.{suffix}"] for part in parts]
            assert crc == crc32(as_held(values, parameter)), (name, expert)
            seen |= {*parts}
    assert seen == modules, "experts of all layers"


def as_held(values: list[Tensor], parameter: dict[str, Any]) -> Tensor:
    """One expert's tensors in the shape and the type that SGLang has for them."""
    dtype, shape = getattr(torch, parameter["dtype"].removeprefix("torch.")), parameter["shape"][1:]
    if values[0].numel() == 1:
        # Static scales of FP8's inputs: one for both products, which are fed the same.
        values = [each.reshape(1) for each in (values if shape else values[:1])]
    whole = torch.cat(values)
    if list(whole.shape) != shape and whole.dim() == 2:
        whole = whole.T  # its kernels of integers want channels first
    assert not shape or list(whole.shape) == shape
    return whole.to(dtype)


def crc32(values: Tensor) -> int:
    return zlib.crc32(values.contiguous().view(-1).view(torch.uint8).numpy())


@pytest.mark.parametrize("scheme", REFUSED)
def test_what_it_does_not_take(told: dict[str, Any], scheme: str) -> None:
    assert REFUSED[scheme] in told[scheme][1]


def test_codes_of_mxfp4_are_dropped(told: dict[str, Any]) -> None:
    """SGLang's parameter is called `weight`, what is stored `weight_packed`: without an error it stays 0.
    When this fails, docs/safetensors.md says too little of SGLang."""
    _, held = told[DROPPED]
    for name, parameter in held.items():
        if name.endswith(("w13_weight", "w2_weight")):
            nothing = crc32(torch.zeros(parameter["shape"][1:], dtype=torch.uint8))
            assert parameter["crc32"] == [nothing] * parameter["shape"][0]
