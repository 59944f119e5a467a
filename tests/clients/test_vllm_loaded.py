"""vLLM's own loader finds a place for every tensor of every expert of a folder in static FP8."""

from __future__ import annotations

import json
import subprocess
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from moequant.checkpoint import open_checkpoint
from moequant.containers.folders import compressed_tensors
from moequant.containers.folders.plan import modules
from moequant.containers.folders.read import FolderWeights
from moequant.evaluate.open_source import open_source
from moequant.statistics.calibrate import calibrate
from moequant.values import Weight
from tests.clients.test_vllm import ENVIRONMENT
from tests.containers.folders.cases import quantized
from tests.containers.folders.test_inputs import rows

SCRIPT = Path(__file__).with_name("vllm_loaded.py")
SMALL = {"mixtral": {"intermediate_size": 384}, "qwen3_moe": {"moe_intermediate_size": 128}}


def expected(reader: FolderWeights, sides: dict[str, Weight]) -> dict[str, Any]:
    """What vLLM has to hold of a layer, out of the folder's own tensors."""

    def stored(side: str, ending: str) -> list[torch.Tensor]:
        return [reader.tensor(f"{module}.{ending}") for module in modules(sides[side])]

    def numbers(side: str, ending: str) -> list[float]:
        return [float(value) for value in stored(side, ending)]

    both = zip(stored("gate", "weight"), stored("up", "weight"), strict=True)
    codes = [[torch.cat([gate.view(torch.uint8), up.view(torch.uint8)]) for gate, up in both]]
    codes.append([down.view(torch.uint8) for down in stored("down", "weight")])
    inputs = [numbers("gate", "input_scale"), numbers("down", "input_scale")]
    assert inputs[0] == numbers("up", "input_scale")
    scales = [list(pair) for pair in zip(*(numbers(s, "weight_scale") for s in ("gate", "up")), strict=True)]
    return {
        "inputs": inputs,
        "used": [max(each) for each in inputs],
        "scales": [scales, numbers("down", "weight_scale")],
        "codes": [[zlib.crc32(each.numpy().tobytes()) for each in side] for side in codes],
    }


@pytest.mark.parametrize("family", SMALL)
def test_vllm_loads_every_expert_and_takes_the_largest_number(tiny, tmp_path: Path, family: str) -> None:
    """The number that it takes for a layer is the one that `compare` rounds by."""
    if not (ENVIRONMENT / "complete").is_file():
        pytest.skip(f"vLLM's environment {ENVIRONMENT} is absent: tests/clients/vllm_env.sh makes it")
    model, out = tiny(family, **SMALL[family]), tmp_path / "out"
    checkpoint = open_checkpoint(model)
    quantized(model, out, calibrate(checkpoint, rows("text")), scheme="FP8", quantize_attention=True)
    run = subprocess.run(
        [ENVIRONMENT / "bin" / "python", SCRIPT, out],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    reader, layers = compressed_tensors.open_folder(out), dict[int, dict[str, Weight]]()
    for weight in checkpoint.weights:
        if weight.is_expert and weight.layer is not None:
            layers.setdefault(weight.layer, {})[weight.name.rpartition(".")[2]] = weight
    wanted = [expected(reader, sides) for sides in layers.values()]
    assert json.loads(run.stdout.strip().splitlines()[-1]) == wanted
    assert all(
        each["scales"][0][expert][0] == each["scales"][0][expert][1] for each in wanted for expert in (0, 1)
    )
    inputs = open_source(out, checkpoint).inputs
    assert inputs is not None
    used = [[inputs[sides[side].name].number for side in ("gate", "down")] for sides in layers.values()]
    assert used == [each["used"] for each in wanted]
