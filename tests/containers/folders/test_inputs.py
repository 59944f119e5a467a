"""Numbers that scale inputs: each expert's own, the layer's where it saw little, and named where it saw
nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from safetensors.torch import load_file, save_file
from torch import Tensor

from moequant import Settings, convert
from moequant.checkpoint import load, open_checkpoint
from moequant.containers.folders import compressed_tensors, inputs
from moequant.containers.folders.plan import modules
from moequant.errors import PlanError, VerifyError
from moequant.evaluate.open_source import open_source
from moequant.statistics import store
from moequant.statistics.calibrate import calibrate
from moequant.text.corpus import Rows
from moequant.values import InputStats
from tests import models
from tests.containers.folders.cases import folder_of, own_decoder, quantized
from tests.containers.folders.test_schemes import FAMILIES
from tests.statistics import starving


def rows(source: str) -> Rows:
    ids = torch.randint(1, models.VOCAB, (2, 48), generator=torch.Generator().manual_seed(0))
    return Rows(ids, ("text",) * len(ids), source, ids.numel())


def stats(tokens: list[int], peak: list[float] | None) -> InputStats:
    zeros = torch.zeros(len(tokens), dtype=torch.float64)
    table = zeros[:, None]
    peaks = None if peak is None else torch.tensor(peak, dtype=torch.float64)
    return InputStats(torch.tensor(tokens), zeros, zeros, table, table, peaks)


def test_few_tokens_count_little() -> None:
    found = inputs.expected_peak(stats([0, 32, 10**9, 100], [0.0, 1.0, 3.0, 9.0]))
    torch.testing.assert_close(found, torch.tensor([9.0, 5.0, 3.0, 9.0], dtype=torch.float64))
    assert inputs.expected_peak(stats([0, 5], [0.0, 0.0])).tolist() == [1, 1], "nothing but zeros"


SCHEMES: dict[str, tuple[str, Callable[[Tensor], Tensor], Callable[[list[float]], float]]] = {
    "NVFP4": ("input_global_scale", lambda peak: 2688 / peak, min),
    "FP8": ("input_scale", lambda peak: peak / 448, max),
}
"""The tensor that scales inputs, what it is for a largest input, and which of several cuts off least."""


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_has_the_number_of_its_inputs(tiny, tmp_path: Path, family: str, scheme: str) -> None:
    model, out = tiny(family, **FAMILIES[family]), tmp_path / scheme
    ending, of_peak, pick = SCHEMES[scheme]
    checkpoint = open_checkpoint(model)
    calibration = calibrate(checkpoint, rows("text"))
    made, _ = quantized(model, out, calibration, scheme=scheme, quantize_attention=True)
    theirs, ours = compressed_tensors.open_folder(out), own_decoder(out)
    named, numbers = {}, {}
    for weight in made.checkpoint.weights:
        if len(weight.shape) < 2 or not theirs.is_quantized(weight) or weight.site is None:
            continue
        assert torch.equal(theirs.load(weight), ours.load(weight))
        seen = calibration.inputs[weight.site.name]
        assert seen.peak is not None
        own, most, tokens = seen.peak, seen.peak.max(), seen.tokens.double()
        expected = of_peak((tokens * own + 32 * most) / (tokens + 32)).float()
        for number, module in enumerate(modules(weight)):
            named[f"{module}.{ending}"] = expected[number][None]
        numbers[weight.name] = pick(expected.tolist())
    assert {name for name in theirs.tensors if name.endswith(("input_scale", "input_global_scale"))} == set(
        named
    )
    assert all(torch.equal(theirs.tensor(name), value) for name, value in named.items())
    written = json.loads((out / "config.json").read_text())["quantization_config"]
    (group,) = QuantizationConfig(**written).config_groups.values()
    preset = preset_name_to_scheme(scheme, ["Linear"])
    for one, other in zip(
        (group.weights, group.input_activations), (preset.weights, preset.input_activations), strict=True
    ):
        assert one is not None and other is not None
        assert one.model_dump(exclude={"zp_dtype"}) == other.model_dump(exclude={"zp_dtype"})
    # One number serves all experts of a layer, as in vLLM's kernels: the one that cuts off least.
    for is_ours in (True, False):
        if not is_ours:
            (out / "moequant.json").unlink()  # as if another tool had written it
        source = open_source(out, checkpoint)
        assert source.inputs is not None
        told = {name: inputs.number for name, inputs in source.inputs.items() if inputs.numbers}
        assert told == numbers
    # What is stored for an expert that another tool left out is an error, and no guess.
    last = next(name for name in named if ".experts.0." in name)
    damage(out / theirs.files[last], last, torch.tensor([float("nan")]))
    with pytest.raises(VerifyError, match=rf"{last} is nan, expected a number above 0"):
        open_source(out, checkpoint)


def test_numbers_of_inputs_change_no_weight(tiny, tmp_path: Path) -> None:
    model = tiny("mixtral", **FAMILIES["mixtral"])
    checkpoint = open_checkpoint(model)
    calibration = calibrate(checkpoint, rows("text"))
    for scheme in ("NVFP4", "NVFP4A16"):
        quantized(model, tmp_path / scheme, calibration, scheme=scheme)
    one, other = (compressed_tensors.open_folder(tmp_path / scheme) for scheme in ("NVFP4", "NVFP4A16"))
    assert all(torch.equal(one.load(weight), other.load(weight)) for weight in checkpoint.weights)
    assert {name for name in one.tensors if "input_global" not in name} == set(other.tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_fp8_has_one_scale_for_what_vllm_fuses(tiny, tmp_path: Path, family: str) -> None:
    """Of gate and up of an expert, and of q, k and v: vLLM rounds them again to the largest of theirs. The
    scale loses no more than one that just reaches the largest weight."""
    model = tiny(family, **FAMILIES[family])
    checkpoint = open_checkpoint(model)
    calibration = calibrate(checkpoint, rows("text"))
    made, _ = quantized(model, tmp_path / "out", calibration, scheme="FP8", quantize_attention=True)
    reader = compressed_tensors.open_folder(tmp_path / "out")
    scales: dict[tuple[str, int], set[float]] = {}
    for weight in made.checkpoint.weights:
        if len(weight.shape) < 2 or not reader.is_quantized(weight) or weight.site is None:
            continue
        for expert in range(weight.matrices):
            (scale,) = reader.stored(weight, expert)["weight_scale"].tolist()
            scales.setdefault((weight.site.name, expert), set()).add(scale)
        exact, decoded = load(weight).float(), reader.load(weight).float()
        assert ((exact - decoded).square().sum() / exact.square().sum()) < 8e-4
    assert all(len(each) == 1 for each in scales.values())
    assert len({scale for each in scales.values() for scale in each}) > len(scales) / 4


def damage(path: Path, name: str, value: torch.Tensor) -> None:
    save_file(load_file(path) | {name: value}, path)


def test_experts_that_saw_nothing_are_named(tmp_path: Path) -> None:
    model = starving.never_chosen(tmp_path / "model", dead=2)
    settings = Settings(format="safetensors", scheme="NVFP4", calib_tokens=1024, eval_tokens=0, effort="fast")
    (note,) = (n for n in convert(model, tmp_path / "out", settings).notes if "inputs" in n)
    assert note == (
        "inputs never seen, scaled by the layer's largest: layers.0.experts.gate 6, layers.0.experts.gate 7, "
        "layers.0.experts.up 6, layers.0.experts.up 7, layers.0.experts.down 6 and 7 more"
    )


@pytest.mark.parametrize(
    ("scheme", "told"), [("MXFP4A16", True), ("NVFP4A16", False), ("W4A16", False), ("FP8_DYNAMIC", False)]
)
def test_vllm_may_round_inputs_that_a_scheme_leaves(tiny, scheme: str, told: bool) -> None:
    folder = folder_of(tiny("qwen3_moe", **FAMILIES["qwen3_moe"]), scheme=scheme)
    found = inputs.elsewhere(folder.plan, folder.settings.layout)
    assert (found is not None and "10.x and 11.x" in found) == told
    released = folder_of(tiny("gpt_oss"), scheme="MXFP4A16")
    assert inputs.elsewhere(released.plan, released.settings.layout) is None


def test_statistics_must_know_the_largest(tiny, tmp_path: Path) -> None:
    model = tiny("mixtral")
    checkpoint = open_checkpoint(model)
    known = store.stored(checkpoint, calibrate(checkpoint, rows("old text")))
    bare = {name: replace(each, peak=None) for name, each in known.calibration.inputs.items()}
    old = replace(known, calibration=replace(known.calibration, inputs=bare))
    store.save(tmp_path / "new.stats", known)
    store.save(tmp_path / "old.stats", old)
    settings = Settings(
        format="safetensors", scheme="NVFP4", calib_tokens=1024, eval_tokens=0, effort="fast",
        stats=tmp_path / "old.stats",
    )  # fmt: skip
    with pytest.raises(PlanError, match="largest that calibration saw, and old text does not say it; leave"):
        convert(model, tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()
    convert(model, tmp_path / "out", replace(settings, stats=tmp_path / "new.stats"))
    expected = inputs.input_scales(checkpoint, folder_of(model, scheme="NVFP4").plan, known.calibration)
    found = compressed_tensors.open_folder(tmp_path / "out")
    for weight in checkpoint.weights:
        for number, module in enumerate(modules(weight) if weight.name in expected else ()):
            assert found.tensor(f"{module}.input_global_scale") == expected[weight.name][number]
