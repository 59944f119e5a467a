"""vLLM's own loader finds a place for every tensor of every expert, of folders in static FP8 and in AWQ."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moequant.checkpoint import Checkpoint, open_checkpoint
from moequant.containers.folders import awq, compressed_tensors
from moequant.containers.folders.plan import modules
from moequant.containers.folders.read import FolderWeights
from moequant.evaluate.open_source import open_source
from moequant.statistics.calibrate import calibrate
from moequant.values import Weight
from tests.clients.environments import VLLM
from tests.containers.folders.cases import quantized
from tests.containers.folders.test_inputs import rows

SCRIPT = Path(__file__).with_name("vllm_loaded.py")
SMALL = {
    "mixtral": {"intermediate_size": 384},
    "qwen3_moe": {"moe_intermediate_size": 128},
    "qwen2_moe": {"moe_intermediate_size": 128},
}
FORMS = {"FP8": {"scheme": "FP8"}, "awq": {"layout": "awq", "group_size": 64}}
CASES = [(family, form) for family in SMALL for form in FORMS if (family, form) != ("qwen2_moe", "FP8")]
FUSED = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj", "o_proj": "o_proj", "down_proj": "down_proj"}
WITH = {"q_proj": ("q_proj", "k_proj", "v_proj"), "gate_proj": ("gate_proj", "up_proj")}


def crc32(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def expected(reader: FolderWeights, sides: dict[str, Weight]) -> dict[str, Any]:
    """What vLLM has to hold of a layer in FP8, out of the folder's own tensors."""

    def stored(side: str, ending: str) -> list[Tensor]:
        return [reader.tensor(f"{module}.{ending}") for module in modules(sides[side])]

    def numbers(side: str, ending: str) -> list[float]:
        return [float(value) for value in stored(side, ending)]

    both = zip(stored("gate", "weight"), stored("up", "weight"), strict=True)
    codes = [[torch.cat([gate.view(torch.uint8), up.view(torch.uint8)]) for gate, up in both]]
    codes.append(stored("down", "weight"))
    inputs = [numbers("gate", "input_scale"), numbers("down", "input_scale")]
    assert inputs[0] == numbers("up", "input_scale")
    scales = [list(pair) for pair in zip(*(numbers(s, "weight_scale") for s in ("gate", "up")), strict=True)]
    return {
        "inputs": inputs,
        "used": [max(each) for each in inputs],
        "scales": [scales, numbers("down", "weight_scale")],
        "codes": [list(map(crc32, side)) for side in codes],
    }


def held(reader: FolderWeights, parts: tuple[str, ...], suffix: str) -> int:
    """Of modules in AWQ that vLLM makes one of: outputs side by side, scales in bf16."""
    whole = torch.cat([reader.tensor(f"{part}.{suffix}") for part in parts], 1)
    return crc32(whole.bfloat16() if suffix == "scales" else whole)


def layers_of(checkpoint: Checkpoint) -> list[dict[str, Weight]]:
    """By layer, the products of its experts."""
    found = dict[int, dict[str, Weight]]()
    for weight in checkpoint.weights:
        if weight.is_expert and weight.layer is not None:
            found.setdefault(weight.layer, {})[weight.name.rpartition(".")[2]] = weight
    return list(found.values())


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model, the folder that was made of it, and what vLLM has loaded of it."""

    checkpoint: Checkpoint
    folder: Path
    layers: list[dict[str, Any]]
    linears: dict[str, list[int]]


@pytest.fixture(scope="module")
def loaded(tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Loaded]:
    """All families and forms, by one process."""
    VLLM.required()
    checkpoints = {family: open_checkpoint(tiny(family, **SMALL[family])) for family in SMALL}
    root = tmp_path_factory.mktemp("loaded")
    outs = {(family, form): root / f"{family}-{form}" for family, form in CASES}
    for (family, form), out in outs.items():
        seen = calibrate(checkpoints[family], rows("text")) if form == "FP8" else None
        quantized(checkpoints[family].path, out, seen, quantize_attention=True, **FORMS[form])
    told = VLLM.told(SCRIPT, *outs.values())
    return {
        case: Loaded(checkpoints[case[0]], out, one["layers"], one["linears"])
        for (case, out), one in zip(outs.items(), told, strict=True)
    }


@pytest.mark.parametrize("family", [family for family, form in CASES if form == "FP8"])
def test_vllm_loads_every_expert_and_takes_the_largest_number(
    loaded: dict[tuple[str, str], Loaded], family: str
) -> None:
    """The number that it takes for a layer is the one that `compare` rounds by."""
    found = loaded[family, "FP8"]
    reader, layers = compressed_tensors.open_folder(found.folder), layers_of(found.checkpoint)
    wanted = [expected(reader, sides) for sides in layers]
    assert found.layers == wanted
    assert all(
        each["scales"][0][expert][0] == each["scales"][0][expert][1] for each in wanted for expert in (0, 1)
    )
    inputs = open_source(found.folder, found.checkpoint).inputs
    assert inputs is not None
    used = [[inputs[sides[side].name].number for side in ("gate", "down")] for sides in layers]
    assert used == [each["used"] for each in wanted]


@pytest.mark.parametrize("family", SMALL)
def test_vllm_loads_every_tensor_of_awq(loaded: dict[tuple[str, str], Loaded], family: str) -> None:
    """Of every expert, and of every other module that is quantized; router, head and norms are none."""
    found = loaded[family, "awq"]
    reader, wanted = awq.open_folder(found.folder), []
    for sides in layers_of(found.checkpoint):
        gates, ups, downs = (modules(sides[side]) for side in ("gate", "up", "down"))
        products = list(zip(gates, ups, strict=True)), [(down,) for down in downs]
        wanted.append(
            {
                suffix: [[held(reader, parts, suffix) for parts in side] for side in products]
                for suffix in ("qweight", "qzeros", "scales")
            }
        )
    assert found.layers == wanted
    linears = {}
    for name in (name.removesuffix(".qweight") for name in reader.files if name.endswith(".qweight")):
        block, _, last = name.rpartition(".")
        if ".experts." not in name and last in FUSED:
            parts = tuple(f"{block}.{each}" for each in WITH.get(last, (last,)))
            tensors = [held(reader, parts, suffix) for suffix in ("qweight", "qzeros", "scales")]
            linears[f"{block}.{FUSED[last]}"] = tensors
    assert found.linears == linears
    assert any("self_attn.qkv_proj" in name for name in linears)
    assert any("shared_expert.gate_up_proj" in name for name in linears) == (family == "qwen2_moe")
