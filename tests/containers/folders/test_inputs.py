"""Numbers that scale inputs: each expert's own, the layer's where it saw little, and named where it saw
nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from safetensors.torch import load_file, save_file

from moequant import Settings, convert
from moequant.checkpoint import open_checkpoint
from moequant.containers.folders import compressed_tensors, inputs
from moequant.containers.folders.plan import modules
from moequant.errors import PlanError, VerifyError
from moequant.evaluate.open_source import open_source
from moequant.statistics import store
from moequant.statistics.calibrate import calibrate
from moequant.text.corpus import Rows
from moequant.values import InputStats
from tests import models
from tests.containers.folders.cases import folder_of, quantized
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


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_has_the_number_of_its_inputs(tiny, tmp_path: Path, family: str) -> None:
    model = tiny(family, **FAMILIES[family])
    checkpoint = open_checkpoint(model)
    calibration = calibrate(checkpoint, rows("text"))
    for scheme in ("NVFP4", "NVFP4A16"):
        made, _ = quantized(model, tmp_path / scheme, calibration, scheme=scheme, quantize_attention=True)
    theirs, plain = (compressed_tensors.open_folder(tmp_path / s) for s in ("NVFP4", "NVFP4A16"))
    named, numbers = {}, {}
    for weight in made.checkpoint.weights:
        if len(weight.shape) < 2 or not theirs.is_quantized(weight) or weight.site is None:
            continue
        assert torch.equal(theirs.load(weight), plain.load(weight)), "weights are the same"
        seen = calibration.inputs[weight.site.name]
        assert seen.peak is not None
        own, most, tokens = seen.peak, seen.peak.max(), seen.tokens.double()
        expected = 2688 / ((tokens * own + 32 * most) / (tokens + 32))
        for number, module in enumerate(modules(weight)):
            named[f"{module}.input_global_scale"] = expected[number].float()[None]
        numbers[weight.name] = min(expected.float().tolist())
    there = {name for name in theirs.tensors if "input_global" in name}
    assert there == set(named) and set(theirs.tensors) - there == set(plain.tensors)
    assert all(torch.equal(theirs.tensor(name), value) for name, value in named.items())
    parsed = QuantizationConfig(
        **json.loads((tmp_path / "NVFP4/config.json").read_text())["quantization_config"]
    )
    (group,) = parsed.config_groups.values()
    preset = preset_name_to_scheme("NVFP4", ["Linear"])
    assert group.input_activations is not None and preset.input_activations is not None
    assert group.input_activations.model_dump(exclude={"zp_dtype"}) == preset.input_activations.model_dump(
        exclude={"zp_dtype"}
    )
    # One number serves all experts of a layer, as in FlashInfer's kernels: the one that cuts off least.
    for ours in (True, False):
        if not ours:
            (tmp_path / "NVFP4" / "moequant.json").unlink()  # as if another tool had written it
        source = open_source(tmp_path / "NVFP4", checkpoint)
        assert source.inputs is not None
        told = {name: inputs.number for name, inputs in source.inputs.items() if inputs.numbers == "NVFP4"}
        assert told == numbers
    # What is stored for an expert that another tool left out is an error, and no guess.
    last = next(name for name in named if ".experts.0." in name)
    files = theirs.files[last]
    damage(tmp_path / "NVFP4" / files, last, torch.tensor([float("nan")]))
    with pytest.raises(VerifyError, match=rf"{last} is nan, expected a number above 0"):
        open_source(tmp_path / "NVFP4", checkpoint)


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
