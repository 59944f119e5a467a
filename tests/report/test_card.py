"""The card that people publish: what the Hub reads, what users look for, and no place on this machine."""

from __future__ import annotations

import shutil
from dataclasses import replace
from html import unescape
from io import StringIO
from pathlib import Path

import gguf
import pytest
import yaml
from rich.console import Console

from moequant.checkpoint import open_checkpoint
from moequant.commands.convert import Settings, convert_all
from moequant.containers.about import front_matter, licenses
from moequant.errors import OutputError, PlanError
from moequant.report.card import text as write_text
from moequant.report.conversion import Conversion, next_steps
from moequant.report.summary import verdict
from tests.cli.test_cli import run
from tests.commands.test_convert import settings

FRONT = """---
license: other
license_name: tiny
license_link: https://example.org/license
language: [en, "no"]
tags: [tiny, 7]
base_model: acme/Tiny-MoE-1B-Base
pipeline_tag: text-generation
author: {not: text}
---
# Praise
"""


@pytest.fixture(scope="module")
def cached(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as Hugging Face's cache has it, with a card of its own."""
    folder = tmp_path_factory.mktemp("hub") / "models--acme--Tiny-MoE-1B" / "snapshots" / ("0" * 40)
    folder.parent.mkdir(parents=True)
    shutil.copytree(tiny("qwen3_moe", num_hidden_layers=1), folder)
    (folder / "README.md").write_text(FRONT)
    return folder


def test_a_card_has_what_its_readers_look_for(cached: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "made"
    (tmp_path / "made").mkdir()
    (out / "curve.png").write_bytes(b"a picture")
    imatrix, page = out / "imatrix.gguf", out / "page.html"
    wanted = settings(text, "Q4_K_M,Q2_K", card=out, imatrix_out=imatrix, html=page)
    found = convert_all(cached, out, wanted)
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {
        "base_model": "acme/Tiny-MoE-1B",
        "base_model_relation": "quantized",
        "license": "other",
        "license_name": "tiny",
        "license_link": "https://example.org/license",
        "language": ["en", "no"],
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "tags": ["moequant", "gguf", "moe"],
    }
    for report in found.reports:
        name, comparison = report.out.name, report.comparison
        assert comparison is not None and name.startswith("Tiny-MoE-1B-Q")
        (row,) = [line for line in card.splitlines() if line.startswith(f"| {name} |")]
        assert f"{comparison.kl_mean.value:.5f} ± {comparison.kl_mean.error:.5f}" in row
        assert f"{report.bits_per_weight:.2f}" in row and f"{comparison.same_top:.2%}" in row
    for folder, pushed in ((out, True), (tmp_path, False)):
        steps = Console(file=StringIO(), width=500)
        steps.print(next_steps(found, "acme/Tiny-MoE-1B", folder))
        said = steps.file.getvalue()
        assert (f"moequant push YOUR_NAME/Tiny-MoE-1B-GGUF {out}" in said) is pushed, "all lie in one folder"
    statistics = replace(found.reports[0].calibration, source="bundled calibration set, acme/bundled-text")
    bundled = Conversion((replace(found.reports[0], calibration=statistics),))
    assert "of: moequant's bundled calibration set, acme/bundled-text." in write_text(bundled, out)
    first = found.reports[0].comparison
    assert first is not None and f"Measured on {first.tokens:,} tokens of: text.txt." in card
    for words in (
        "| the original |",
        "| KL divergence, mean | KL divergence, 99 % |",
        "from [acme/Tiny-MoE-1B](https://huggingface.co/acme/Tiny-MoE-1B).",
        "llama-server --hf-repo YOUR_NAME/REPOSITORY --hf-file Tiny-MoE-1B-Q4_K_M.gguf",
        "ollama run hf.co/YOUR_NAME/REPOSITORY:Tiny-MoE-1B-Q4_K_M.gguf",
        "lms get",
        "moequant convert acme/Tiny-MoE-1B -o FOLDER --format safetensors\nvllm serve FOLDER",
        "`imatrix.gguf`",
        "(curve.png)",
    ):
        assert words in card, words
    assert "Praise" not in card and f"commit {cached.name}" in card
    for place in (str(tmp_path), str(cached), str(text.parent), "/tmp"):
        assert place not in card, place
    assert gguf.GGUFReader(imatrix).fields["imatrix.datasets"].contents() == ["text.txt"]
    shown = page.read_text(encoding="utf-8")
    top = shown[: shown.index("<h2>")]
    assert all(verdict(report) in unescape(top) for report in found.reports)
    # Tokens, and for each file three projections and what moved.
    assert shown.count('class="cells"') == 9 and "text.txt" in shown
    for report in found.reports:
        raw = report.out.read_bytes() + imatrix.read_bytes() + page.read_bytes()
        assert not any(str(place).encode() in raw for place in (tmp_path, cached.parent, text.parent))


def test_several_files_are_drawn(cached: Path, text: Path, tmp_path: Path) -> None:
    """A card without a picture beside it gets one of the files measured; no file is lost for it."""
    quick = {"self_check": False}
    convert_all(cached, tmp_path / "two", settings(text, "Q8_0,Q4_0", card=tmp_path / "two", **quick))
    assert (tmp_path / "two" / "quality.png").read_bytes().startswith(b"\x89PNG")
    assert "(quality.png)" in (tmp_path / "two" / "README.md").read_text()
    (tmp_path / "quality.png").write_text("precious")
    again = settings(text, "Q8_0,Q4_0", card=tmp_path, **quick)
    with pytest.raises(OutputError, match=r"quality\.png: exists already"):
        convert_all(cached, tmp_path / "three", again)
    assert (tmp_path / "quality.png").read_text() == "precious" and not (tmp_path / "three").exists()


def test_the_card_of_a_folder_says_where_its_base_model_goes(tiny, text: Path, tmp_path: Path) -> None:
    """Config and card name what the model itself was made from: that is not claimed, and no path is told."""
    folder = tmp_path / "Tiny-MoE"
    shutil.copytree(tiny("qwen3_moe", num_hidden_layers=1, _name_or_path="/home/me/base"), folder)
    (folder / "README.md").write_text(FRONT)
    some = (
        "--calib",
        text,
        "--calib-tokens",
        1024,
        "--eval-tokens",
        0,
        "--effort",
        "fast",
        "--no-self-check",
    )
    done = run("convert", folder, "-o", tmp_path / "q.gguf", "-t", "Q8_0", "--card", tmp_path, *some)
    assert done.returncode == 0 and "put the original's name on the Hub into its first lines" in done.stdout
    card = (tmp_path / "README.md").read_text()
    front = card.split("---\n")[1]
    assert not {"base_model", "base_model_relation"} & yaml.safe_load(front).keys()
    filled = yaml.safe_load(front.replace("# base", "base").replace("OWNER", "acme"))
    assert filled["base_model"] == "acme/Tiny-MoE" and filled["base_model_relation"] == "quantized"
    assert "moequant convert OWNER/Tiny-MoE -o FOLDER" in card and "`OWNER` is who published" in card
    assert "/home/me" not in card and str(tmp_path) not in card and "Tiny-MoE-1B-Base" not in card


def test_a_file_says_whose_it_is_as_llama_cpp_does(cached: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "q.gguf"
    convert_all(cached, out, settings(text, "Q8_0", eval_tokens=0, self_check=False))
    fields = gguf.GGUFReader(out).fields
    told = {name: field.contents() for name, field in fields.items() if name.startswith("general.")}
    assert told.pop("general.quantized_by").startswith("moequant ")
    expected = {
        "general.name": "Tiny MoE 1B",
        "general.organization": "Acme",
        "general.basename": "Tiny-MoE",
        "general.license": "other",
        "general.license.name": "tiny",
        "general.license.link": "https://example.org/license",
        "general.base_model.count": 1,
        "general.base_model.0.name": "Tiny MoE 1B Base",
        "general.base_model.0.organization": "Acme",
        "general.base_model.0.repo_url": "https://huggingface.co/acme/Tiny-MoE-1B-Base",
        "general.tags": ["tiny", "text-generation"],
        "general.languages": ["en", "no"],
    }
    assert expected.items() <= told.items(), told
    assert told["general.size_label"]


def test_a_model_without_a_card_is_named_by_its_folder(tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("qwen3_moe", num_hidden_layers=1), tmp_path / "Tiny-MoE")
    assert front_matter(folder) == {} and licenses(open_checkpoint(folder)) == {}
    for bad in ("---\n- a\n---\n", "---\na: [\n---\n", "no front", "---\na: \xff"):
        (folder / "README.md").write_text(bad, encoding="latin-1")
        assert front_matter(folder) == {}
    (folder / "README.md").unlink()
    (tmp_path / "README.md").write_text("---\nlicense: stolen\n---\n")
    (folder / "README.md").symlink_to(tmp_path / "README.md")
    assert front_matter(folder) == {}, "a link out of the folder is not followed"


def test_a_folder_has_its_card_in_any_case(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="--card does not go with a folder"):
        Settings(format="safetensors", card=tmp_path)


def test_a_card_that_is_there_is_kept(cached: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("precious")
    done = run("convert", cached, "-o", tmp_path / "q.gguf", "--card", tmp_path, "--calib", text)
    assert done.returncode == 1 and "README.md: exists already" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
