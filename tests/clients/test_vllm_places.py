"""vLLM's own models and loader give every tensor of our folders its place, whatever the family.

vLLM is asked for the values that it holds of the model in floats, and of each folder that was made of it. So
names, fused modules, targets and what a config ignores are right, or vLLM holds something else.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from moequant.checkpoint import open_checkpoint
from moequant.containers.folders import schemes
from moequant.containers.folders.container import FolderContainer
from moequant.containers.folders.plan import KEPT, FolderSettings
from moequant.plan.folders import FolderMenu
from moequant.statistics.calibrate import calibrate
from tests import models
from tests.clients.environments import VLLM
from tests.containers.folders.cases import convert
from tests.containers.folders.test_inputs import rows

SCRIPT = Path(__file__).with_name("vllm_places.py")

MIXED = "mixed"
"""Every unit of a plan in another scheme than the one before it; every fifth stays as it is."""
MENU = "W4A16_G32,MXFP4A16,NVFP4A16,FP8_DYNAMIC"

WIDE = {"moe_intermediate_size": 128}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 384},
    "qwen3_moe": WIDE,
    "deepseek_v3": WIDE,
    "qwen3_5_moe": WIDE,
    "qwen3_next": {},
    "qwen3_vl_moe": {},
    "glm4_moe": {},
    "glm4_moe_lite": {},
    "minimax_m2": {},
    "deepseek_v32": {},
    "ernie4_5_moe": {},
    "hunyuan_v1_moe": {},
    "dots1": {},
    "nemotron_h": {},
    "lfm2_moe": {},
    "mimo_v2_flash": {},
    "hy_v3": {},
    "laguna": {},
    "exaone_moe": {},
    "afmoe": {},
}
"""Families, and changes of their tiny configs."""

EVERY = (*schemes.PRESETS, "W4A16_G32", "W8A16_CHANNEL")
"""All schemes that are written."""

UNIFORM = {
    "mixtral": EVERY,
    "qwen3_moe": EVERY,
    "deepseek_v3": EVERY,
    "qwen3_5_moe": ("W4A16_G32", "NVFP4A16", "FP8_BLOCK"),
    "glm4_moe": ("MXFP4A16", "FP8_BLOCK"),
    "minimax_m2": ("NVFP4A16", "FP8_BLOCK"),
    "gpt_oss": ("MXFP4A16",),
}
"""Folders in one scheme; what wants multiples of 128 is for experts alone."""

CASES = [(family, MIXED) for family in FAMILIES] + [(f, s) for f, each in UNIFORM.items() for s in each]

DRAFTS = (
    "qwen3_5_moe",
    "qwen3_next",
    "glm4_moe",
    "glm4_moe_lite",
    "deepseek_v32",
    "mimo_v2_flash",
    "hy_v3",
    "nemotron_h",
)
"""Families that vLLM drafts with."""

TWICE = ("embed_tokens.weight", "shared_head.head.weight")
"""Stored with the model and again with the layer that predicts: of other values in our tiny models alone."""

ERROR = {
    "pack-quantized 2": 0.35,
    "pack-quantized 3": 0.06,
    "pack-quantized 4": 8e-3,
    "pack-quantized 5": 3e-3,
    "pack-quantized 6": 8e-4,
    "pack-quantized 7": 2e-4,
    "pack-quantized 8": 1e-4,
    "int-quantized 8": 2e-4,
    "mxfp4-pack-quantized 4": 1.4e-2,
    "nvfp4-pack-quantized 4": 8e-3,
    "float-quantized 8": 1e-3,
}
"""Squared error over square that the schemes may have; a scale or a row in the wrong place makes it 1."""

IN_WIDE_GROUPS = {"W4A16": {"pack-quantized 4": 0.012}}
"""The same of schemes whose groups of weights have 128 columns."""


def folder_of(model: Path, case: str) -> FolderContainer:
    """What a case makes of a model, with its plan."""
    if case != MIXED:
        attention = schemes.find(case).group != 128 and "gpt_oss" not in str(model)
        return FolderContainer(
            open_checkpoint(model), FolderSettings(scheme=case, quantize_attention=attention)
        )
    folder = FolderContainer(open_checkpoint(model), FolderSettings(schemes=MENU))
    weights = folder.checkpoint.weights
    menu = FolderMenu.of(folder.checkpoint, folder.settings)
    types = {}
    for number, unit in enumerate(menu.units(weights, menu.prior(weights, folder.checkpoint.n_layers))):
        names = [option.format for option in unit.options]
        types |= {weight.name: names[number % len(names)] for weight in unit.weights}
    folder.plan = menu.given(weights, types, "test")
    return folder


def numbers(folder: FolderContainer) -> Counter[str]:
    """By scheme, how many numbers of the model are in it."""
    weights = {weight.name: weight for weight in folder.checkpoint.weights}
    found = Counter[str]()
    for choice in folder.plan.choices:
        if choice.format not in KEPT:
            scheme = schemes.find(choice.format)
            found[f"{scheme.format} {scheme.bits}"] += weights[choice.weight].numel
    return found


@pytest.fixture(scope="module")
def told(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[tuple[str, str], tuple[Counter[str], dict[str, Any]]]:
    """Of every case what vLLM should hold, and what it says, all from one process."""
    VLLM.required()
    root = tmp_path_factory.mktemp("places")
    asked, outs, wanted = [], {}, {}
    for family in dict.fromkeys(family for family, _ in CASES):
        made = models.build(root / family / "model", family, **FAMILIES.get(family, {}))
        model = models.as_released(made, family)
        for case in (case for other, case in CASES if other == family):
            folder, out = folder_of(model, case), root / family / case
            wants = case != MIXED and schemes.find(case).scales_inputs
            convert(folder, out, calibrate(folder.checkpoint, rows("text")) if wants else None)
            outs[family, case], wanted[family, case] = out, numbers(folder)
        folders = [str(out) for (other, _), out in outs.items() if other == family]
        asked.append({"model": str(model), "folders": folders, "draft": family in DRAFTS})
    path = root / "cases.json"
    path.write_text(json.dumps(asked))
    said = VLLM.told(SCRIPT, path)
    return {case: (wanted[case], said[str(out)]) for case, out in outs.items()}


@pytest.mark.parametrize(("family", "case"), CASES)
def test_every_tensor_finds_its_place(told, family: str, case: str) -> None:
    wanted, said = told[family, case]
    held = said["model"]
    assert isinstance(held, dict), held
    assert {name: count for name, (count, *_) in held["weights"].items()} == wanted
    limit = ERROR | IN_WIDE_GROUPS.get(case, {})
    assert all(error < limit[name] for name, (_, error, _) in held["weights"].items()), held["weights"]
    assert held["others"] == []


@pytest.mark.parametrize("family", DRAFTS)
def test_layers_that_predict_are_read_as_floats(told, family: str) -> None:
    _, said = told[family, MIXED]
    held = said["draft"]
    assert isinstance(held, dict), held
    assert held["weights"] == {}
    assert [name for name in held["others"] if not name.endswith(TWICE)] == []
