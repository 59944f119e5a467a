"""Checkpoints that are quantized already, as what a conversion reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize

from moequant.commands.convert import Settings, convert, open_job
from moequant.commands.job import notes
from moequant.containers.folders.layouts import LAYOUTS
from moequant.inspection.served import Gpus, fit_folder
from moequant.report.served import nothing_serves
from moequant.runtimes.vllm.memory import Serving
from tests.containers.folders.cases import quantized
from tests.evaluate.released import blocks, release

QUICK = Settings(effort="fast", calib_tokens=1024, eval_tokens=0, self_check=False)


@pytest.mark.parametrize(
    ("scheme", "kinds"),
    [("W4A16", "48 int4"), ("W8A8", "48 int8"), ("NVFP4A16", "48 nvfp4"), ("FP8_DYNAMIC", None)],
)
def test_what_was_lost_before_is_said(tiny, tmp_path: Path, scheme: str, kinds: str | None) -> None:
    """But not of FP8, in which many models are released."""
    folder = tmp_path / "model"
    quantized(tiny("qwen3_moe", moe_intermediate_size=128), folder, scheme=scheme)
    said = " ".join(notes(open_job(folder, Settings("Q4_K_M"))))
    assert ("quantized already" in said) == (kinds is not None)
    assert kinds is None or f"({kinds} tensors)" in said


@pytest.mark.parametrize(
    ("settings", "larger"),
    [
        (Settings("Q2_K"), False),
        (Settings("F16"), True),
        (Settings(format="safetensors", bits=3, quantize_attention=True), False),
        (Settings(format="safetensors", bits=8), True),
    ],
)
def test_an_output_that_is_larger_than_its_quantized_source_is_remarked(
    tiny, tmp_path: Path, settings: Settings, larger: bool
) -> None:
    model, folder = tiny("qwen3_moe", moe_intermediate_size=128), tmp_path / "model"
    quantized(model, folder, scheme="W4A16", quantize_attention=True)
    job = open_job(folder, settings)
    said = [note for note in notes(job) if "larger" in note]
    stored = sum(each.bytes for weight in job.model.weights for each in weight.origin.stored)
    told = f"larger than the quantized weights that it is made from: {job.size:,} bytes instead of {stored:,}"
    assert said == ([told] if larger else [])
    assert not any("larger" in note for note in notes(open_job(model, Settings("F32")))), "of bf16"


@pytest.mark.parametrize("layout", ["awq", "gptq"])
def test_codes_of_a_folder_come_through_to_a_file(tiny, tmp_path: Path, layout: str) -> None:
    """Q4_0 is the same numbers, 32 under a scale in f16: no bit is lost on the way, and gguf-py says so."""
    model, folder, out = tiny("qwen3_moe"), tmp_path / "folder", tmp_path / "out.gguf"
    made, _ = quantized(model, folder, layout=layout, group_size=64)
    pins = ("ffn_(gate|up|down)_exps=Q4_0",)
    convert(folder, out, replace(QUICK, type="Q8_0", tensor_type=pins))
    reader = LAYOUTS[made.settings.layout].open(folder)
    tensors = {tensor.name: tensor for tensor in GGUFReader(out).tensors}
    for weight in (weight for weight in made.checkpoint.weights if weight.is_expert):
        tensor = tensors[f"blk.{weight.layer}.ffn_{weight.name.rpartition('.')[2]}_exps.weight"]
        assert tensor.tensor_type.name == "Q4_0"
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)).view(weight.shape)
        for expert in range(weight.matrices):
            stored = reader.stored(weight, expert)
            scales = stored["scales"].double().repeat_interleave(64, 0).T
            codes = values[expert].double() / scales
            assert torch.equal(codes, codes.round()) and -8 <= codes.min() <= codes.max() <= 7
            assert torch.equal((codes * scales).half(), reader.decode(weight, expert))


def test_other_schemes_of_a_quantized_folder_are_not_promised(tiny, tmp_path: Path) -> None:
    """Where nothing fits, no option is named that would be refused."""
    model, folder = tiny("qwen3_moe", moe_intermediate_size=128), tmp_path / "model"
    quantized(model, folder, scheme="W4A16")
    said = [fit_folder(each, Gpus(1 << 20), Serving(512)) for each in (model, folder)]
    assert [found.best for found in said] == [None, None]
    assert ["--schemes" in nothing_serves(found) for found in said] == [True, False]
    assert [any("quantized already" in note for note in found.notes) for found in said] == [False, True]


def test_smaller_schemes_of_an_fp8_release_are_tried(tiny, tmp_path: Path) -> None:
    """Many models are released in FP8 alone; what would be larger than the release is no answer."""
    form, config = (
        blocks,
        {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    )
    folder = tmp_path / "release"
    release(tiny("mixtral"), folder, form, config)
    found = fit_folder(folder, Gpus(1 << 40), Serving(512))
    by_name = {each.name: each for each in found.candidates}
    assert found.best is not None and found.best.name == "as it is" and found.best.kl == 0
    assert {"W4A16", "NVFP4A16"} <= by_name.keys() and not {"FP8_BLOCK", "W8A16"} & by_name.keys()
    whole = by_name.pop("as it is")
    assert all(each.file_bytes < whole.file_bytes and each.kl for each in by_name.values())
    assert (
        "an FP8 release: schemes that would make it larger are left out; KL is to the release" in found.notes
    )
    assert not any("no other scheme" in note for note in found.notes)
