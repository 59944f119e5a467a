"""Several processes give the bytes of one, fail with one line, and go on where a killed run stopped."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from moequant.checkpoint import open_checkpoint
from moequant.cli import app
from moequant.commands.convert import Settings, convert
from moequant.containers.gguf.container import GgufContainer
from moequant.errors import RankError
from moequant.plan.document import plan_from_types, to_json
from moequant.ranks import ALONE, TORCHRUN, deal, joined
from moequant.ranks.wire import packed, unpacked
from tests import models
from tests.commands.killed import SMALL
from tests.forks import python
from tests.ranks import processes

SIZE = "900K"
"""Of a folder, so that types are measured: its probes are dealt."""
SCHEMES = "W4A16_G32,W8A16"

SURROUNDINGS = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
"""Of what torchrun starts."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How torchrun ended: lines of ours on stderr, and everything."""

    code: int
    ours: list[str]
    says: str


def torchrun(count: int, *arguments: object) -> Ended:
    """So many processes of `tests.ranks.processes` with these arguments."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)),
            *("-m", "tests.ranks.processes", *map(str, arguments)),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=models.ROOT,
        env=SURROUNDINGS,
        timeout=300,
    )
    return ended(done)


def forked(count: int, *arguments: object) -> Ended:
    """`torchrun` where ranks are forks of a process that has imported what a command needs."""
    how = ("--nproc-per-node", count, "--start-method", "fork", "--run-path", processes.__file__)
    return ended(python("-m", "torch.distributed.run", *how, *arguments, env=SURROUNDINGS))


def ended(done: subprocess.CompletedProcess[str]) -> Ended:
    ours = [line for line in done.stderr.splitlines() if line.startswith("moequant:")]
    return Ended(done.returncode, ours, done.stderr + done.stdout)


def asked(text: Path, **more: object) -> Settings:
    return Settings(**{"calib": text, "calib_tokens": 1024, "eval_tokens": 0, "self_check": False, **more})


def options(text: Path) -> tuple[object, ...]:
    return "--calib", text, "--calib-tokens", 1024, "--eval-tokens", 0, "--no-self-check"


def test_a_killed_run_of_two_goes_on_alone_and_ends_with_the_bytes_of_one(
    tiny, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With other ranks goes on what the next test kills."""
    model, out, plan = tiny("qwen3_moe", **SMALL), tmp_path / "a.gguf", tmp_path / "plan.json"
    weights = GgufContainer(open_checkpoint(model)).checkpoint.weights
    kept = {each.name for each in weights if each.role.keeps_precision or len(each.shape) < 2}
    types = {each.name: "F32" if each.name in kept else "Q4_0" for each in weights}
    plan.write_text(to_json(plan_from_types(weights, types)))
    given = (model, "-o", out, "--plan", plan, *options(text))
    started = time.monotonic()
    killed = forked(2, "convert", 1, *given)
    assert killed.code and time.monotonic() - started < 120, killed.says
    (line,) = killed.ours
    assert "finished work is kept: give the same command again to continue" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf.journal", "plan.json"]
    parts = list((tmp_path / "a.gguf.journal" / "0").glob("part-*"))
    assert 2 <= len(parts) < 2 + SMALL["num_hidden_layers"], "it was in the middle"
    again = CliRunner().invoke(app, ["convert", *map(str, given)])
    assert again.exit_code == 0, again.output
    assert f"{out}.journal: continues after the work that is finished there" in caplog.messages
    convert(model, tmp_path / "one.gguf", asked(text, plan=plan))
    assert out.read_bytes() == (tmp_path / "one.gguf").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "one.gguf", "plan.json"]


def test_a_folder_of_ranks_that_measured_types_has_the_bytes_of_one(tiny, text: Path, tmp_path: Path) -> None:
    """Two go over to three in the middle; of those one has none of the two whole plans that are measured."""
    model = tiny("deepseek_v3", hidden_size=128, moe_intermediate_size=64, intermediate_size=128)
    given = (model, "-o", tmp_path / "two", "--format", "safetensors", "--size", SIZE)
    given += ("--schemes", SCHEMES, *options(text))
    killed, kept = forked(2, "measure", 1, *given), tmp_path / "two.journal" / "plan" / "probes"
    assert killed.code and (kept / "hidden-0001.f32").exists() and (kept / "reached.safetensors").exists()
    ended = forked(3, "convert", -1, *given)
    assert ended.code == 0, ended.says
    assert ended.ours == [
        f"moequant: {tmp_path}/two.journal: continues after the work that is finished there"
    ]
    convert(model, tmp_path / "one", asked(text, format="safetensors", size=SIZE, schemes=SCHEMES))
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in names:
        assert name == "README.md" or same(tmp_path / "one" / name, tmp_path / "two" / name), name


def same(one: Path, two: Path) -> bool:
    return one.read_bytes() == two.read_bytes()


def test_ranks_tell_each_other_everything_in_order_and_fail_with_one_line(tmp_path: Path) -> None:
    ended = torchrun(3, "deal", tmp_path / "told")
    assert (tmp_path / "told").read_text() == repr(
        (
            [
                ["0 by 2", "1 by 0", "2 by 1", "3 by 2"],
                [[0.0, 3.0, 6.0, 9.0], [12.0, 15.0, 18.0, 21.0], [24.0, 27.0, 30.0, 33.0]],
                [[0, 2], [2, 4], [4, 5]],
                0,
            ],
            [0, 1, 2],
        )
    )
    assert ended.code and ended.ours == ["moequant: layers.0: is not finite"], ended.says
    assert "RankError" not in ended.says


def test_ranks_whose_torchrun_was_killed_end_well(tmp_path: Path) -> None:
    ended = torchrun(2, "orphan", tmp_path / "told")
    assert ended.code == -9 and "Traceback" not in ended.says, ended.says
    assert (tmp_path / "told").read_text().startswith("[['0 by ")


def test_a_rank_without_memory_says_so() -> None:
    ended = forked(2, "lack")
    assert ended.code and len(ended.ours) == 1 and "moequant: memory ran out (" in ended.ours[0], ended.says


@pytest.mark.parametrize("told", [{"WORLD_SIZE": "4"}, {"WORLD_SIZE": "4", "RANK": ""}], ids=str)
def test_what_a_scheduler_sets_starts_no_ranks(told: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An ordinary command waits for nobody where only torchrun's variables are missing."""
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with joined() as ranks:
        assert ranks is ALONE


@pytest.mark.parametrize("told", [{}, {"RANK": "0", "WORLD_SIZE": "two", "LOCAL_RANK": "0"}], ids=str)
def test_half_of_what_torchrun_sets_is_refused(told: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {TORCHRUN: "x", **told}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RankError, match="start with torchrun, or unset TORCHELASTIC_RUN_ID"), joined():
        pytest.fail("nothing starts")


def test_one_process_deals_all_to_itself() -> None:
    assert ALONE.first and ALONE.mine(3) == range(3) and ALONE.part((1, 2)) == range(2)
    assert ALONE.dealt("ab", (1, 2), lambda mine: [each.upper() for each in mine]) == ["A", "B"]
    assert list(ALONE.in_turn(iter("abc"), 3)) == ["a", "b", "c"] and ALONE.all(1) == [1]
    assert ALONE.dealt((), (), lambda mine: [each.upper() for each in mine]) == []


def test_the_dearest_goes_to_whom_has_least() -> None:
    assert deal((1, 5, 2, 1), 3) == [[1], [2], [0, 3]]
    assert deal((1,), 2) == [[0], []]


def test_tensors_arrive_as_they_were_sent() -> None:
    sent = {"a": torch.arange(6, dtype=torch.float64).view(2, 3)[:, 1:], "b": torch.tensor(3), "c": ()}
    sent["d"] = torch.zeros(0, 4, dtype=torch.bfloat16)
    text, parts = packed(sent)
    assert [len(part) for part in parts] == [32, 8, 0] and len(text) < 500
    found = unpacked(text, parts)
    assert all(torch.equal(found[name], sent[name]) for name in "abd") and found["c"] == ()
    assert found["d"].dtype is torch.bfloat16
