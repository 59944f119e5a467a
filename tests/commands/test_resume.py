"""A conversion that was killed, or ran out of disk, goes on where it stopped and ends with the same bytes."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from moequant import errors
from moequant.checkpoint import open_checkpoint
from moequant.commands.convert import Settings, convert, convert_all
from moequant.commands.job import open_jobs
from moequant.commands.journal import GOES_ON, RunJournal, finished_by, journal_of, kept
from moequant.commands.outputs import check_targets
from moequant.commands.route import Outputs, RouteSettings, route
from moequant.errors import (
    CheckpointError,
    CorpusError,
    FamilyError,
    FormatError,
    HubError,
    MoequantError,
    OutputError,
    PlanError,
    RankError,
    ShortageError,
    TokenizerError,
    UnreadableError,
    VerifyError,
)
from moequant.files import Interrupted, scratch
from moequant.forward.hidden import OnDisk
from moequant.hub.fetch import headers
from moequant.plan import Sensitivities
from moequant.plan.document import to_json
from moequant.progress import Listener, Progress, listening
from moequant.rounding.parts import Parts
from moequant.values import ExpertLoss, Packed
from tests.commands.killed import SMALL, state
from tests.forks import python

RUN = {"--type": "Q4_K_M", "--stats": "0123456789abcdef", "model": "m"}


@pytest.fixture
def small(tiny) -> Path:
    return tiny("qwen3_moe", **SMALL)


def fast(text: Path, type_: str | None = "Q4_0", **changes: object) -> Settings:
    usual = {"calib": text, "calib_tokens": 1024, "eval_tokens": 0, "effort": "fast", "self_check": False}
    return Settings(type_, **(usual | changes))


def interrupted_at(stage: str) -> Listener:
    """What interrupts a run when that stage begins."""

    def told(step: Progress) -> None:
        if step.stage == stage:
            raise Interrupted(2)

    return told


KILLS = {
    "gguf": ("0.8",),
    "folder": ("0.85",),
    "sizes": ("0.4", "1/part-0002"),
    "measured": ("plan/probes/hidden-0003", "plan/plans/hidden-0002"),
}
"""Conversions, and when each is killed."""


@pytest.fixture(scope="module")
def killed(tiny, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict, list[dict]]]:
    """What `tests.commands.killed` tells of the undisturbed run and of each kill; all went on well. One
    process for all kinds: what it imports takes seconds."""
    model, work = tiny("qwen3_moe", **SMALL), tmp_path_factory.mktemp("killed")
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = python("-m", "tests.commands.killed", model, text, work, json.dumps(KILLS), env=surroundings)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", KILLS)
def test_killed_anywhere_it_goes_on_with_the_same_bytes(killed, kind: str) -> None:
    _, kills = killed[kind]
    assert len(kills) == len(KILLS[kind])
    for kill in kills:
        assert kill["code"] == -9 and kill["again"]["code"] == 0, kill["again"]["says"]
        assert kill["same"], kill["state"]
    if kind == "sizes":
        assert kills[-1]["parts"] == 2, "of the second file"
        assert not kills[-1]["again"]["layers"]
    elif kind != "measured":  # the first part is what is in front of the layers
        for kill in kills:
            called = kill["again"]["layers"]
            assert all(layer >= kill["parts"] - 1 for layer in called), "finished layers are not run again"
        assert kills[-1]["parts"] > 1


def test_killed_while_types_are_measured_it_crosses_no_finished_layer_again(killed) -> None:
    """Statistics, probes, whole plans and rounding cross the layers one after the other."""
    whole, kills = killed["measured"]
    assert crossings(whole["layers"]) == 4
    for kill, (first, left) in zip(kills, ((2, 3), (1, 2)), strict=True):
        called = kill["again"]["layers"]
        assert (called[0], crossings(called)) == (first, left)
        before = whole["layers"][: -len(called)]
        assert before[-1] == (first - 1) % 3 and before + called == whole["layers"], "whole layers are left"


def crossings(layers: list[int]) -> int:
    """How often it begins at the front, or somewhere behind it."""
    return 1 + sum(after < before for before, after in pairwise(layers))


def test_a_full_disk_keeps_what_is_finished(
    small: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, add, left = tmp_path / "a.gguf", Parts.add, 2

    def full(self: Parts, results: list[tuple[Packed, ExpertLoss]]) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add(self, results)

    with monkeypatch.context() as patched:
        patched.setattr(Parts, "add", full)
        with pytest.raises(OutputError, match=f"No space left on device.*{GOES_ON}"):
            convert(small, out, fast(text))
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf.journal"]
    for settings, says in (
        (fast(text, "Q5_0"), "--type Q4_0, now Q5_0; repeat that command to continue it, or give --fresh"),
        (fast(text, calib_tokens=1536), "--calib-tokens 1024, now 1536"),
        (fast(text, calib=None), "another text for calibration"),
    ):
        with pytest.raises(OutputError, match=says) as error:
            convert(small, out, settings)
        assert "\n" not in str(error.value) and "goes on" not in str(error.value)
    part = tmp_path / "a.gguf.journal" / "0" / "part-0001.safetensors"
    sound = part.read_bytes()
    part.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    with pytest.raises(OutputError, match=r"part-0001\.safetensors: .* \(checksum differs\)"):
        convert(small, out, fast(text))
    part.write_bytes(sound)
    report = convert(small, out, fast(text, ram=1 << 34, imatrix_out=None))
    convert(small, tmp_path / "whole.gguf", fast(text))
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert len(report.losses) == len(report.plan.choices), "also of what was finished before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "whole.gguf"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_model_that_vanishes_costs_nothing_that_is_finished(
    tiny, text: Path, tmp_path: Path, kind: str
) -> None:
    """A disk that was unplugged, a network that was down: when it is back the command goes on."""
    model, away = tmp_path / "model", tmp_path / "away"
    shutil.copytree(tiny("qwen3_moe", **SMALL), model)
    folder = {"format": "safetensors", "group_size": 32}
    settings = fast(text) if kind == "file" else fast(text, None, **folder)
    out, whole = tmp_path / "out" / "a.gguf", tmp_path / "whole" / "a.gguf"
    whole.parent.mkdir()
    out.parent.mkdir()

    def vanish(step: Progress) -> None:
        if (
            step.stage == "quantize"
            and step.done
            and any(out.parent.glob("*.journal/0/part-*"))
            and model.exists()
        ):
            model.rename(away)

    with listening(vanish), pytest.raises(UnreadableError, match=f"cannot be read.*{GOES_ON}"):
        convert(model, out, settings)
    assert [path.name for path in out.parent.iterdir()] == ["a.gguf.journal"]
    away.rename(model)
    convert(model, out, settings)
    convert(model, whole, settings)
    assert state(out.parent) == state(whole.parent)


def test_a_model_that_changes_meanwhile_makes_no_output(tiny, text: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny("qwen3_moe", **SMALL), tmp_path / "model")

    def change(step: Progress) -> None:
        if step.stage == "quantize" and step.done:
            os.utime(model / "model.safetensors")

    (tmp_path / "out").mkdir()
    with (
        listening(change),
        pytest.raises(CheckpointError, match="model: was changed while it was read; give"),
    ):
        convert(model, tmp_path / "out" / "a.gguf", fast(text))
    assert not list((tmp_path / "out").iterdir()), "nor is anything of it worth going on from"


def test_states_that_are_gone_say_how_to_begin_again(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"hidden-0001\.f32: hidden states cannot be read .*; give --fresh"):
        OnDisk(tmp_path, [(1, 2, 3)], "give --fresh").get(1, 0)


def test_a_model_with_a_table_goes_on(tiny, text: Path, tmp_path: Path) -> None:
    """A table of a layer lies beside its part of the journal, as bytes alone."""

    def interrupt(step: Progress) -> None:
        if step.stage == "verify":
            raise Interrupted(2)

    model, out = tiny("qwen4_exp"), tmp_path / "a.gguf"
    with listening(interrupt), pytest.raises(Interrupted):
        convert(model, out, fast(text))
    tables = sorted(tmp_path.glob("a.gguf.journal/0/*.bytes"))
    assert tables
    sound = tables[0].read_bytes()
    tables[0].write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    with pytest.raises(OutputError, match=rf"{tables[0].name}: checksum differs.; give --fresh"):
        convert(model, out, fast(text))
    tables[0].write_bytes(sound)
    convert(model, out, fast(text))
    convert(model, tmp_path / "whole.gguf", fast(text))
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "whole.gguf"]


def test_fresh_begins_again_and_what_is_not_a_journal_is_kept(
    small: Path, text: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "a.gguf.journal"
    RunJournal(folder, RUN).keep_sensitivities(Sensitivities({}, {}, "nowhere"))
    with pytest.raises(OutputError, match=r"left by a run with .*--fresh to begin again"):
        convert(small, tmp_path / "a.gguf", fast(text))
    (folder / "diary").write_text("mine")
    for fresh in (False, True):
        with pytest.raises(OutputError, match="diary: is not of a journal and is kept"):
            convert(small, tmp_path / "a.gguf", fast(text, fresh=fresh))
    (folder / "diary").unlink()
    (folder / "route").symlink_to(tmp_path)
    with pytest.raises(OutputError, match="route: is not of a journal and is kept"):
        convert(small, tmp_path / "a.gguf", fast(text, fresh=True))
    (folder / "route").unlink()
    with pytest.raises(PlanError, match="nothing_like_it"):
        pinned = ("nothing_like_it=Q8_0",)
        convert(small, tmp_path / "a.gguf", fast(text, fresh=True, tensor_type=pinned))
    assert (folder / "plan.safetensors").exists(), "a run that is refused takes nothing away"
    convert(small, tmp_path / "a.gguf", fast(text, fresh=True))
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


@pytest.mark.parametrize(("format_", "type_"), [("gguf", "Q4_0"), ("safetensors", None)])
def test_a_full_disk_is_refused_before_any_work_and_fresh_counts_what_the_old_journal_leaves(
    small: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format_: str, type_: str | None
) -> None:
    out, source = tmp_path / "a.gguf", headers(small)
    RunJournal(tmp_path / "a.gguf.journal", RUN).keep_sensitivities(Sensitivities({}, {}, "nowhere"))
    asked = fast(text, type_, format=format_, group_size=None if type_ else 32)
    (job,) = open_jobs(source, asked)
    usage = shutil.disk_usage(tmp_path)._replace(free=job.size - 1)
    monkeypatch.setattr("moequant.files.targets.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(OutputError, match="are free; make room"):
        check_targets([job], [out], frozenset())
    check_targets(open_jobs(source, replace(asked, fresh=True)), [out], frozenset())


def test_an_output_of_somebody_else_in_the_place_of_a_finished_one_is_kept(
    small: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.gguf"

    def interrupted(*args: object) -> None:
        raise Interrupted(2)

    with monkeypatch.context() as patched:
        patched.setattr("moequant.commands.convert.write_card", interrupted)
        with pytest.raises(Interrupted) as ended:
            convert(small, out, fast(text, card=tmp_path / "README.md"))
    assert ended.value.__notes__ == [GOES_ON]
    made = out.read_bytes()
    assert finished_by(tmp_path / "a.gguf.journal", [out]) == {out}
    out.write_text("mine")
    with pytest.raises(OutputError, match=r"a\.gguf: exists already"):
        convert(small, out, fast(text, card=tmp_path / "README.md"))
    assert out.read_text() == "mine"
    out.write_bytes(made)
    before = out.stat()
    convert(small, out, fast(text, card=tmp_path / "README.md"))
    assert (out.stat().st_ino, out.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns), (
        "it is verified, and not made again"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "a.gguf"]


def test_a_file_that_changes_after_it_was_read_is_another(
    small: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model may be downloaded for hours between the reading of statistics and the journal."""
    first, second = tmp_path / "s", tmp_path / "t"
    for path, tokens in ((first, 1024), (second, 1536)):
        route(small, RouteSettings(calib=text, calib_tokens=tokens), Outputs(stats=path))

    def downloaded(*args: object) -> bool:
        shutil.copy(second, first)
        return True

    out, settings = tmp_path / "a.gguf", fast(text, stats=first)
    with monkeypatch.context() as patched:
        patched.setattr("moequant.commands.convert.is_here", downloaded)
        with listening(interrupted_at("verify")), pytest.raises(Interrupted):
            convert(small, out, settings)
    with pytest.raises(OutputError, match="left by a run with another --stats"):
        convert(small, out, settings)


def test_a_file_beside_the_weights_that_changes_between_two_outputs_is_named(
    tiny, text: Path, tmp_path: Path
) -> None:
    """Else the first file would have the old template, and the second the new one."""
    model = shutil.copytree(tiny("qwen3_moe", **SMALL), tmp_path / "model")
    out, settings = tmp_path / "out" / "{type}.gguf", fast(text, "Q4_0,Q5_0")
    out.parent.mkdir()

    with listening(interrupted_at("quantize Q5_0")), pytest.raises(Interrupted):
        convert_all(model, out, settings)
    template = model / "chat_template.jinja"
    template.write_text("{{ messages }}")
    with pytest.raises(
        OutputError, match=r"model: its tokenizer, .*Q4_0\.gguf was made.*; put them back, or"
    ):
        convert_all(model, out, settings)
    template.unlink()
    convert_all(model, out, settings)
    assert sorted(path.name for path in out.parent.iterdir()) == ["Q4_0.gguf", "Q5_0.gguf"]


def test_what_is_made_in_a_temporary_folder_is_not_continued(small: Path, text: Path, tmp_path: Path) -> None:
    """`moequant demo` makes its file in one: a run that is interrupted must not say that its work is kept."""

    def interrupt(step: Progress) -> None:
        if step.stage == "verify":
            raise Interrupted(2)

    def notes(folder: Path) -> list[str]:
        with listening(interrupt), pytest.raises(Interrupted) as told:
            convert(small, folder / "a.gguf", fast(text))
        return getattr(told.value, "__notes__", [])

    assert notes(tmp_path) == [GOES_ON]
    with scratch(tmp_path) as folder:
        assert notes(folder) == [] and not list(folder.iterdir())


def test_the_root_of_a_disk_is_no_output() -> None:
    with pytest.raises(OutputError, match="/: is a whole disk"):
        journal_of([Path("/")])


KEPT = {OutputError, VerifyError, HubError, RankError, UnreadableError, ShortageError}
"""About the machine: a disk, memory, a network, a file that is away."""

DROPPED = {CheckpointError, FamilyError, TokenizerError, CorpusError, FormatError, PlanError}
"""About the request or the model: the same command would meet them again."""


def test_every_error_either_keeps_what_is_finished_or_not(tmp_path: Path) -> None:
    every = {each for each in vars(errors).values() if isinstance(each, type)}
    assert {each for each in every if issubclass(each, MoequantError)} == KEPT | DROPPED | {MoequantError}
    for kind in KEPT | DROPPED:
        journal = RunJournal(tmp_path / kind.__name__, RUN)
        journal.keep_sensitivities(Sensitivities({}, {}, "nowhere"))
        with pytest.raises(kind) as told, kept(journal):
            raise kind("boom")
        assert journal.folder.exists() == (kind in KEPT) == (GOES_ON in str(told.value))


def test_a_journal_that_nobody_may_look_into_is_kept(tmp_path: Path) -> None:
    """Another user's, or of a disk that fails: a folder that leads to itself is as good."""
    journal = RunJournal(tmp_path / "a.journal", RUN)
    journal.keep_sensitivities(Sensitivities({}, {}, "nowhere"))
    away = journal.folder.rename(tmp_path / "away")
    journal.folder.symlink_to(journal.folder)
    with pytest.raises(OutputError, match=GOES_ON), kept(journal):
        raise OutputError("boom")
    journal.folder.unlink()
    away.rename(journal.folder)
    found = RunJournal(journal.folder, RUN).sensitivities()
    assert found is not None and found.source == "nowhere"


def test_memory_that_runs_short_for_gradients_costs_nothing_that_is_finished(
    small: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program takes it while statistics are collected."""
    plan = tmp_path / "plan.json"
    weights = open_jobs(headers(small), Settings("Q4_0"))[0].plan
    plan.write_text(to_json(weights))
    settings = fast(text, None, effort="best", plan=plan)
    out, layers = tmp_path / "a.gguf", list[list[int]]()

    def taken(step: Progress) -> None:
        if step.stage == "quantize":
            monkeypatch.setattr("moequant.statistics.fisher.free_bytes", lambda device: 1000)

    for _ in range(2):
        monkeypatch.undo()
        with listening(taken), pytest.raises(ShortageError, match=f"effort best holds.*{GOES_ON}"):
            convert(small, out, settings)
        finished = sorted((tmp_path / "a.gguf.journal" / "route").glob("layer-*"))
        layers.append([path.stat().st_mtime_ns for path in finished])
    assert layers[0] and layers[0] == layers[1], "they are not collected again"


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EIO, "Input/output error")])
def test_errors_that_are_not_ours_keep_what_is_finished(tmp_path: Path, error: Exception) -> None:
    journal = RunJournal(tmp_path / "a.journal", RUN)
    journal.keep_sensitivities(Sensitivities({}, {}, "nowhere"))
    with pytest.raises(type(error)) as told, kept(journal):
        raise error
    assert told.value.__notes__ == [GOES_ON] and journal.begun


def test_a_journal_of_nothing_is_not_kept(tmp_path: Path) -> None:
    journal = RunJournal(tmp_path / "a.journal", RUN)
    with pytest.raises(ValueError, match="boom"), kept(journal):
        raise ValueError("boom")
    assert not list(tmp_path.iterdir())
    journal = RunJournal(tmp_path / "a.journal", RUN)
    journal.keep_sensitivities(Sensitivities({"b": {"Q4_0": 0.1}, "a": {}}, {"b": 0.5}, "here", 0.3, 0.1))
    with pytest.raises(OutputError, match=f"boom .{GOES_ON}"), kept(journal):
        raise OutputError("boom")
    found = RunJournal(tmp_path / "a.journal", RUN).sensitivities()
    assert found is not None and list(found.table) == ["b", "a"] and found.linear == 0.3
    with pytest.raises(OutputError, match=r"left by a run with another --stats; repeat"):
        RunJournal(tmp_path / "a.journal", {**RUN, "--stats": "another"})
    (tmp_path / "a.journal" / "run.json").write_text("[")
    with pytest.raises(OutputError, match=r"a\.journal: is damaged; give --fresh"):
        RunJournal(tmp_path / "a.journal", RUN)
    (tmp_path / "a.journal" / "run.json").unlink()
    with pytest.raises(OutputError, match=r"a\.journal: is damaged .no run\.json.; give --fresh"):
        RunJournal(tmp_path / "a.journal", RUN)
    assert (tmp_path / "a.journal" / "plan.safetensors").exists(), "what took hours is not removed unasked"


def test_parts_of_another_place_or_run_are_refused(small: Path, tmp_path: Path) -> None:
    weight = next(each for each in open_checkpoint(small).weights if each.is_expert)
    data = torch.arange(weight.numel // 32 * 18, dtype=torch.int64).to(torch.uint8)
    loss = ExpertLoss(weight.name, weight.role, weight.layer, "Q4_0", torch.rand(4).double(), None, ("why",))
    packed = Packed(weight, "Q4_0", data.view(*weight.shape[:-1], -1))

    def parts(run: str = "run", type_: str = "Q4_0") -> Parts:
        return Parts(tmp_path / "0", [weight], {weight.name: type_}, run, "again")

    parts().add([(packed, loss)])
    ((found, lost),) = parts().results()
    assert torch.equal(found.data, packed.data) and torch.equal(lost.error, loss.error)
    assert (lost.tokens, lost.fallbacks, lost.format) == (None, ("why",), "Q4_0")
    for other in (parts("other"), parts(type_="Q5_0")):
        with pytest.raises(OutputError, match=r"cannot be continued from .*; again"):
            list(other.results())
    parts().add([(packed, loss)])
    first, second = (tmp_path / "0" / f"part-000{number}.safetensors" for number in (0, 1))
    second.write_bytes(first.read_bytes())
    with pytest.raises(OutputError, match="of another part or another run"):
        list(parts().results())
