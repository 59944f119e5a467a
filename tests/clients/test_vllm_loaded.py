"""vLLM's own loader finds a place for every tensor of every expert of a folder in static FP8."""

from __future__ import annotations

import json
import subprocess
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from moequant.checkpoint import Checkpoint, open_checkpoint
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


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model, the folder that was made of it, and what vLLM has loaded of every layer."""

    checkpoint: Checkpoint
    folder: Path
    layers: list[dict[str, Any]]


@pytest.fixture(scope="module")
def loaded(tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    """All families, by one process."""
    if not (ENVIRONMENT / "complete").is_file():
        pytest.skip(f"vLLM's environment {ENVIRONMENT} is absent: tests/clients/vllm_env.sh makes it")
    checkpoints = {family: open_checkpoint(tiny(family, **SMALL[family])) for family in SMALL}
    outs = {family: tmp_path_factory.mktemp("loaded") / family for family in SMALL}
    for family, out in outs.items():
        seen = calibrate(checkpoints[family], rows("text"))
        quantized(checkpoints[family].path, out, seen, scheme="FP8", quantize_attention=True)
    run = subprocess.run(
        [ENVIRONMENT / "bin" / "python", SCRIPT, *outs.values()],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    told = json.loads(run.stdout.strip().splitlines()[-1])
    return {
        family: Loaded(checkpoints[family], outs[family], layers)
        for family, layers in zip(SMALL, told, strict=True)
    }


@pytest.mark.parametrize("family", SMALL)
def test_vllm_loads_every_expert_and_takes_the_largest_number(loaded: dict[str, Loaded], family: str) -> None:
    """The number that it takes for a layer is the one that `compare` rounds by."""
    checkpoint, out = loaded[family].checkpoint, loaded[family].folder
    reader, layers = compressed_tensors.open_folder(out), dict[int, dict[str, Weight]]()
    for weight in checkpoint.weights:
        if weight.is_expert and weight.layer is not None:
            layers.setdefault(weight.layer, {})[weight.name.rpartition(".")[2]] = weight
    wanted = [expected(reader, sides) for sides in layers.values()]
    assert loaded[family].layers == wanted
    assert all(
        each["scales"][0][expert][0] == each["scales"][0][expert][1] for each in wanted for expert in (0, 1)
    )
    inputs = open_source(out, checkpoint).inputs
    assert inputs is not None
    used = [[inputs[sides[side].name].number for side in ("gate", "down")] for sides in layers.values()]
    assert used == [each["used"] for each in wanted]
