"""GGUF files as sources. That every family's way into a file is gone back, and then forth again, is tested
where every family is converted (`families/test_conversion.py`)."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moequant.cli import app
from moequant.commands.compare import CompareSettings, run
from moequant.commands.convert import Settings, convert
from moequant.commands.route import RouteSettings, route
from moequant.containers.opened import open_model
from moequant.errors import MoequantError, OutputError
from moequant.hub import GgufModel
from moequant.hub.fetch import headers
from moequant.report.summary import Report
from tests import models


def converted(model: Path | GgufModel, out: Path, text: Path, type_: str, **changes: object) -> Report:
    given = {"effort": "fast", "eval_tokens": 0, "overwrite": True} | changes
    return convert(model, out, Settings(type_, text, 2048, text, **given))


@pytest.mark.parametrize("family", models.PREDICTIONS)
def test_layers_that_predict_are_kept(tmp_path: Path, text: Path, family: str) -> None:
    folder = models.as_released(models.build(tmp_path / "model", family), family)
    first, second = tmp_path / "1.gguf", tmp_path / "2.gguf"
    converted(folder, first, text, "F32", self_check=False)
    said = " ".join(converted(GgufModel(first, folder), second, text, "F32", self_check=False).notes)
    assert first.read_bytes() == second.read_bytes() and "kept: llama.cpp drafts with it" in said


def test_blocks_of_the_same_type_are_taken_over(tiny, tmp_path: Path, text: Path) -> None:
    """Also those that the file has in another order of rows than transformers, or cut."""
    for family in ("mixtral", "deepseek_v3"):
        first, second = tmp_path / f"{family}-1.gguf", tmp_path / f"{family}-2.gguf"
        converted(tiny(family), first, text, "Q8_0", self_check=False)
        report = converted(GgufModel(first, tiny(family)), second, text, "Q8_0")
        assert first.read_bytes() == second.read_bytes()
        said = " ".join(report.notes)
        assert "quantized already" in said and "Q8_0 tensors" in said, said


def test_a_quantized_source_is_rounded_from_what_it_decodes_to(tiny, tmp_path: Path, text: Path) -> None:
    """And the comparison is with the file."""
    first, second = tmp_path / "q8.gguf", tmp_path / "q4.gguf"
    converted(tiny("qwen3_moe"), first, text, "Q8_0", self_check=False)
    report = converted(GgufModel(first, tiny("qwen3_moe")), second, text, "Q4_K_M", eval_tokens=1024)
    assert report.comparison is not None and 0 < report.comparison.kl_mean.value < 0.5
    assert report.model == first and "the file that was read" in str(report.checked)


def test_config_and_tokenizer_may_lie_beside_the_file(tiny, tmp_path: Path, text: Path) -> None:
    beside = tmp_path / "beside"
    shutil.copytree(tiny("mixtral"), beside, ignore=shutil.ignore_patterns("*.safetensors*"))
    converted(tiny("mixtral"), beside / "a.gguf", text, "BF16", self_check=False)
    found = run(beside / "a.gguf", [beside / "a.gguf"], CompareSettings(eval=text, eval_tokens=1024))
    assert found.measured[0].comparison.kl_mean.value == 0
    routed = route(beside / "a.gguf", RouteSettings(text, 1024))
    assert routed.checkpoint.gguf == beside / "a.gguf"
    with pytest.raises(OutputError, match="is read by this run"):
        converted(beside / "a.gguf", beside / "a.gguf", text, "Q4_0")


def test_what_is_no_source_is_refused(tiny, tmp_path: Path, text: Path) -> None:
    folder, file, out = tiny("mixtral"), tmp_path / "a.gguf", tmp_path / "b.gguf"
    converted(folder, file, text, "F32", self_check=False)
    other = shutil.copytree(folder, tmp_path / "other", ignore=shutil.ignore_patterns("*.safetensors"))
    refusals = {
        "--config FOLDER or --config OWNER/NAME": lambda: converted(file, out, text, "F32"),
        "has no config.json": lambda: converted(GgufModel(file, tmp_path), out, text, "F32"),
        "no such file": lambda: converted(GgufModel(tmp_path / "c.gguf", folder), out, text, "F32"),
        "only GGUF files": lambda: convert(
            GgufModel(file, folder), tmp_path / "b", Settings(calib=text, format="safetensors")
        ),
        "block_count is 2, not 1": lambda: (
            models.edit_config(other, num_hidden_layers=1),
            converted(GgufModel(file, other), out, text, "F32"),
        ),
        "another model": lambda: converted(GgufModel(file, tiny("qwen3_moe")), out, text, "F32"),
    }
    for said, attempt in refusals.items():
        with pytest.raises(MoequantError, match=re.escape(said)) as caught:
            attempt()
        assert "\n" not in str(caught.value) and not out.exists()


def test_where_file_and_config_differ_the_report_says_so(tiny, tmp_path: Path, text: Path) -> None:
    file = tmp_path / "a.gguf"
    converted(tiny("mixtral"), file, text, "F32", self_check=False)
    other = shutil.copytree(tiny("mixtral"), tmp_path / "o", ignore=shutil.ignore_patterns("*.safetensors"))
    models.edit_config(other, max_position_embeddings=2048)
    notes = open_model(headers(GgufModel(file, other))).notes
    assert "llama.context_length = 1024" in notes[1]


def test_the_command_line_takes_a_file_and_its_config(tiny, tmp_path: Path, text: Path) -> None:
    file, out = tmp_path / "a.gguf", tmp_path / "b.gguf"
    converted(tiny("mixtral"), file, text, "F32", self_check=False)
    given = ["convert", str(file), "--config", str(tiny("mixtral")), "-o", str(out), "--dry-run"]
    found = CliRunner().invoke(app, given)
    assert found.exit_code == 0 and "a.gguf as" in found.output, found.output
    wrong = CliRunner().invoke(app, ["convert", str(tiny("mixtral")), *given[2:]])
    assert wrong.exit_code == 1 and "--config goes with a GGUF file" in wrong.output
