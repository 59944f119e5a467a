"""The harness of benchmarks: what a run records, what its page shows, and cases on the demo model."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from benchmarks import measure, page
from benchmarks.__main__ import main
from benchmarks.harness import TOOLS, Case, Rows, load
from benchmarks.record import Record
from tests.models import ROOT

CASES = load()


@dataclass(frozen=True)
class Toy:
    """Options of every kind that cases have."""

    count: int = 3
    file: Path = Path("/nowhere/at/all")
    names: tuple[str, ...] = ("a", "b")
    text: str | None = None


def toy(o: Toy) -> Rows:
    """Counts."""
    for at in range(o.count):
        yield {"at": at * 1000, "half": at / 2, "name": o.names[at % len(o.names)]}
    yield {"sum": None}


CASE = Case("toy", "A toy", toy, Toy(1, ROOT), ())


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Record]:
    """`ran(option, …)`: the record of the toy run from the command line."""
    monkeypatch.setattr("benchmarks.__main__.load", lambda: {"toy": CASE})

    def run(*options: str) -> Record:
        main(["run", "toy", "--out", str(tmp_path), *options])
        return Record.read(tmp_path / "toy.json")

    return run


def test_a_record_says_what_ran_on_what(ran: Callable[..., Record]) -> None:
    found = ran("--file", str(ROOT), "--count", "2", "--names", "x", "y", "z")
    assert found.options == {"count": 2, "file": str(ROOT), "names": ["x", "y", "z"], "text": None}
    assert found.command.startswith("python -m benchmarks run toy --out ")
    assert found.commit == (
        subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        or None
    )
    assert found.machine["cpu"] and found.libraries["torch"] == torch.__version__
    assert found.seconds >= 0 and found.date.endswith("+00:00")
    assert found.rows == [
        {"at": 0, "half": 0.0, "name": "x"},
        {"at": 1000, "half": 0.5, "name": "y"},
        {"sum": None},
    ]
    assert found.stale is False or found.commit is None or found.dirty
    assert replace(found, commit=None).stale


def test_the_smoke_run_is_its_own_and_leaves_no_results(
    ran: Callable[..., Record], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ran("--smoke").options["count"] == 1
    (tmp_path / "toy.json").unlink()
    main(["run", "toy", "--smoke"])
    assert "| 0 | 0 | a |" in capsys.readouterr().out
    assert not (ROOT / "benchmarks/results/toy.json").exists()


def test_what_is_missing_is_named(ran: Callable[..., Record]) -> None:
    with pytest.raises(SystemExit, match="toy needs what is not here: /nowhere/at/all"):
        ran()


def test_a_page_has_the_tables_and_keeps_what_people_wrote(
    ran: Callable[..., Record], tmp_path: Path
) -> None:
    path = tmp_path / "toy.md"
    path.write_text("An old page.\n")
    record = ran("--smoke", "--count", "2")
    text = path.read_text()
    assert text.startswith("# A toy\n\n    python -m benchmarks run toy --out ")
    assert record.machine["cpu"] in text and f"torch {torch.__version__}" in text
    table = (
        "| at | half | name |\n|---|---|---|\n| 0 | 0 | a |\n| 1,000 | 0.5 | b |\n\n| sum |\n|---|\n|  |\n"
    )
    assert table in text
    assert text.endswith(f"{page.NOTES}\n\nAn old page.\n")
    ran("--smoke", "--count", "1")
    assert "1,000" not in path.read_text()
    assert path.read_text().endswith(f"{page.NOTES}\n\nAn old page.\n")


def test_figures_are_shown_with_five_digits() -> None:
    shown = [page.shown(value) for value in (1234567, 1234567.8, 0.0123456, None, True, ("a", 1))]
    assert shown == ["1,234,567", "1,234,568", "0.012346", "", "True", "a 1"]


def test_ratios_are_paired_and_turns_alternate() -> None:
    theirs = torch.rand(50, generator=torch.Generator().manual_seed(0)) + 1
    assert measure.ratio(2 * theirs, theirs) == pytest.approx((2, 0), abs=1e-6)
    assert measure.ratio(theirs + torch.tensor([0.0, 0.5]).repeat(25), theirs)[1] > 0.01
    turns: list[str] = []

    def work(name: str, seconds: float) -> Callable[[], float]:
        return lambda: turns.append(name) or seconds + (len(turns) > 4)

    assert measure.alternate({"A": work("A", 1), "B": work("B", 2)}, 3) == {"A": 1, "B": 2}
    assert turns == list("ABABAB")


def test_a_size_between_two_is_interpolated() -> None:
    """On the lowest line of logarithms; what is above every line between others does not count."""
    kl = torch.rand(50, generator=torch.Generator().manual_seed(0)) + 1
    others = {100: 8 * kl, 150: 7 * kl, 200: 2 * kl, 300: kl}
    assert measure.below(kl, 150, others) == pytest.approx((1 / 4, 0), abs=1e-6)
    assert measure.below(kl, 200, others) == pytest.approx((1 / 2, 0), abs=1e-6)
    assert measure.below(kl, 301, others) == (None, None)
    value, error = measure.below(kl.flip(0), 250, others)
    assert value == pytest.approx(1 / 2**0.5) and error is not None and error > 0.01


@pytest.mark.parametrize("name", sorted(CASES))
def test_every_case_explains_itself_and_has_a_smoke_run(name: str) -> None:
    case = CASES[name]
    assert case.explanation and not case.purpose.endswith(".")
    assert case.smoke != case.options, "a smoke run is smaller than the real one"
    assert set(case.missing(case.smoke)) <= TOOLS.keys(), "smoke runs use files of the repository only"


@pytest.mark.parametrize("name", ["landings", "sensitivity"])
def test_a_case_runs(name: str, tmp_path: Path) -> None:
    if missing := CASES[name].missing(CASES[name].smoke):
        pytest.skip(f"{missing} are not on this machine")
    main(["run", name, "--smoke", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))["rows"]
    figures = [value for row in rows for value in row.values() if isinstance(value, float)]
    assert len(figures) > 5 and all(value == value for value in figures)
