"""Several sizes in one run: the bytes that each has alone, for the price of what they share once."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from moequant.checkpoint import load
from moequant.commands import convert as line
from moequant.commands.convert import Settings, convert, convert_all
from moequant.commands.outputs import names
from moequant.errors import OutputError, PlanError
from moequant.forward.stream import Reader
from moequant.progress import Progress, listening
from moequant.rounding.diagonal import Quantizer
from moequant.rounding.results import Result
from moequant.values import Weight
from tests.cli.test_cli import run
from tests.commands.killed import state
from tests.commands.test_convert import NARROW, settings

TYPES = "Q5_K_M", "Q4_K_M"


@pytest.fixture(scope="module")
def model(tiny) -> Path:
    return tiny("qwen3_moe", num_hidden_layers=1)


def alone(model: Path, folder: Path, wanted: Sequence[Settings]) -> list[tuple[bytes, str | None]]:
    """The bytes of every file when nothing else is made with it, and what its self-check says."""
    files = []
    for number, each in enumerate(wanted):
        report = convert(model, folder / f"alone-{number}.gguf", each)
        files.append((report.out.read_bytes(), report.checked))
    return files


def whole_loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that transformers loads from now on, weights and all."""
    loads = list[Path]()
    load_whole = PreTrainedModel.from_pretrained.__func__

    def noted(kind: type, folder: Path, *given: object, **options: object) -> object:
        loads.append(folder)
        return load_whole(kind, folder, *given, **options)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(noted))
    return loads


def test_every_file_is_what_it_is_alone_and_shared_stages_run_once(
    tiny, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("qwen3_moe", num_hidden_layers=1, **NARROW, moe_intermediate_size=256)
    wanted = settings(text, ",".join(TYPES), effort="default", calib_tokens=1024, eval_tokens=1024)
    baseline = Reader()
    monkeypatch.setattr(line, "load", baseline)
    loads = whole_loads(monkeypatch)
    found = convert_all(model, tmp_path / "out", wanted)
    own = [f"{stage} {type_}" for type_ in TYPES for stage in ("quantize", "verify", "self-check")]
    assert [cost.name for cost in found.reports[0].stages] == ["open", "route", "plan", *own, "compare"]
    assert baseline.reads and set(baseline.reads.values()) == {1}, "the original crosses once for all"
    assert loads == [model], "transformers reads the original once for all self-checks"
    assert all("compared with transformers" in str(report.checked) for report in found.reports)
    monkeypatch.setattr(line, "load", load)
    outs = [tmp_path / "out" / f"{model.name}-{type_}.gguf" for type_ in TYPES]
    assert [report.out for report in found.reports] == outs
    (last,) = alone(model, tmp_path, wanted.each[-1:])
    assert (outs[-1].read_bytes(), found.reports[-1].checked) == last, (
        "nothing is left over from the files before it"
    )
    summary = found.summary(120)
    assert all(out.name in summary for out in outs)
    for report in found.reports:
        assert report.comparison is not None and f"{report.comparison.same_top:.2%}" in summary
        assert report.file_bytes == report.out.stat().st_size


def test_sizes_that_need_different_things(model: Path, text: Path, tmp_path: Path) -> None:
    """One file that keeps every number behind one that rounds."""
    wanted = settings(text, "Q2_K,F32", eval_tokens=0)
    found = convert_all(model, tmp_path / "a-{type}.gguf", wanted)
    files = [(report.out.read_bytes(), report.checked) for report in found.reports]
    assert [report.out.name for report in found.reports] == ["a-Q2_K.gguf", "a-F32.gguf"]
    assert files == alone(model, tmp_path, wanted.each)


ALIKE = "IQ4_XS", "Q4_K_S", "Q4_K_M"
"""Sizes at which some weights get one type."""


def test_a_weight_is_searched_once_in_a_format_for_all_files(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched, pack = list[tuple[str, str]](), Quantizer.pack

    def noted(self: Quantizer, weight: Weight, kind: str, *together: Sequence[Weight]) -> Result:
        searched.append((weight.name, kind))
        return pack(self, weight, kind, *together)

    wanted = settings(text, ",".join(ALIKE), eval_tokens=0, self_check=False, split_size="500K")
    (tmp_path / "one").mkdir()
    (tmp_path / "each").mkdir()
    monkeypatch.setattr(Quantizer, "pack", noted)
    found = convert_all(model, tmp_path / "one" / "{type}.gguf", wanted).reports
    monkeypatch.setattr(Quantizer, "pack", pack)
    every = [(loss.weight, loss.format) for report in found for loss in report.losses]
    rounded, once = ([each for each in some if each[1] != "F32"] for some in (every, searched))
    assert sorted(once) == sorted(set(rounded)) and len(once) < len(rounded)
    for report, each in zip(found, wanted.each, strict=True):
        own = convert(model, tmp_path / "each" / f"{each.label}.gguf", each)
        assert all(torch.equal(a.error, b.error) for a, b in zip(report.losses, own.losses, strict=True))
    assert state(tmp_path / "one") == state(tmp_path / "each") and len(found[0].parts) > 1


@pytest.mark.parametrize("becomes", ["other bytes", "nothing"])
def test_a_finished_file_that_is_not_what_was_written_is_not_taken_from(
    model: Path, text: Path, tmp_path: Path, becomes: str
) -> None:
    wanted = settings(text, ",".join(ALIKE[:2]), eval_tokens=0, self_check=False)
    first, second = (tmp_path / f"{type_}.gguf" for type_ in ALIKE[:2])

    def damage(step: Progress) -> None:
        if step.stage == f"quantize {ALIKE[1]}" and first.exists():
            data = first.read_bytes()
            first.unlink()
            if becomes == "other bytes":
                first.write_bytes(data[:-200_000] + bytes(200_000))

    with listening(damage):
        convert_all(model, tmp_path / "{type}.gguf", wanted)
    ((own, _),) = alone(model, tmp_path, wanted.each[1:])
    assert second.read_bytes() == own


def test_one_that_fails_leaves_those_before_it(model: Path, text: Path, tmp_path: Path) -> None:
    """The kernel refuses to let files grow past a limit, as a full disk would."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_100_000, limit[1]))
    try:
        options = "--calib", text, "--calib-tokens", 1024, "--effort", "fast", "--eval-tokens", 0
        done = run("convert", model, "-o", tmp_path / "out", "--type", "IQ2_XXS,Q8_0,IQ2_S", *options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    kept = f"{model.name}-IQ2_XXS.gguf"
    assert "cannot be written" in done.stderr and f"(finished before it, and kept: {kept})" in done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [kept, f"{kept}.journal"]
    convert(model, tmp_path / "alone.gguf", settings(text, "IQ2_XXS", eval_tokens=0, calib_tokens=1024))
    assert (tmp_path / "out" / kept).read_bytes() == (tmp_path / "alone.gguf").read_bytes()


def test_names_are_those_that_a_person_expects(tmp_path: Path) -> None:
    def named(out: str, **sizes: str) -> list[str]:
        found = names(Path("models/Tiny-MoE"), tmp_path / out, Settings(**sizes))
        return [str(path.relative_to(tmp_path)) for path in found]

    (tmp_path / "there").mkdir()
    assert named("m.gguf", type="Q4_K_M") == ["m.gguf"]
    assert named("there", type="Q4_K_M") == ["there/Tiny-MoE-Q4_K_M.gguf"]
    assert named("new", size="10G, 12.5GiB") == ["new/Tiny-MoE-10G.gguf", "new/Tiny-MoE-12.5GiB.gguf"]
    assert named("m-{type}.gguf", bpw="3,4.50") == ["m-3bpw.gguf", "m-4.5bpw.gguf"]
    cached = Path("models--Org--Tiny-MoE") / "snapshots" / ("0123456789abcdef" * 3)[:40]
    assert names(cached, tmp_path, Settings())[0].name == "Tiny-MoE-Q4_K_M.gguf"
    with pytest.raises(OutputError, match=r"one name for 2 files; give a folder, or m-{type}\.gguf"):
        named("m.gguf", type="Q4_K_M,Q2_K")
    with pytest.raises(OutputError, match="stands for the size of a GGUF file"):
        named("m-{type}", format="safetensors")


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"type": "Q4_K_M,Q4_K_M"}, "Q4_K_M: is named twice"),
        ({"type": "Q4_K_M,"}, "unknown type ''"),
        ({"type": "Q4_K_M,Q9"}, "unknown type 'Q9'"),
        ({"size": "1G,lots"}, "size 'lots'"),
        ({"bpw": "4,four"}, "four bits per weight"),
        ({"type": "Q4_K_M", "bpw": "3,4"}, "each say how large"),
    ],
)
def test_sizes_that_are_none(sizes: dict[str, str], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        Settings(**sizes)


def test_what_cannot_be_is_refused_before_any_work(model: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f"{model.name}-2M.gguf").write_text("precious")
    for sizes, says in (("1M,2M", "2M.gguf: exists already"), ("1k,3M", "smallest possible file")):
        done = run("convert", model, "-o", tmp_path / "out", "--size", sizes, "--calib", text)
        assert done.returncode == 1 and says in done.stderr and len(done.stderr.splitlines()) == 1
    assert len(list((tmp_path / "out").iterdir())) == 1
    done = run("convert", model, "-o", tmp_path / "new", "--size", "1k,3M", "--calib", text)
    assert done.returncode == 1 and not (tmp_path / "new").exists()
    with pytest.raises(PlanError, match="convert_all writes several"):
        convert(model, tmp_path / "m.gguf", Settings("Q4_K_M,Q2_K"))
    dry = run("convert", model, "-o", tmp_path / "new", "--type", "Q2_K,Q4_K_M", "--dry-run")
    assert dry.returncode == 0 and "as Q2_K:" in dry.stdout and "as Q4_K_M:" in dry.stdout
    assert not (tmp_path / "new").exists()
