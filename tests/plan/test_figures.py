"""Measuring that was stopped goes on: nothing finished is done again, and the numbers are the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moequant import formats
from moequant.checkpoint import Checkpoint, load, open_checkpoint
from moequant.errors import OutputError
from moequant.forward.resources import Resources
from moequant.plan.figures import Figures
from moequant.plan.measure import Probing, measure
from moequant.plan.probes import divergences
from moequant.statistics.calibrate import calibrate
from moequant.text.corpus import Rows
from moequant.values import Weight
from tests import models
from tests.commands.killed import SMALL

VERSIONS = [
    {name: "Q4_0"}
    for name in ("embedding", "layers.0.attn_q", "layers.1.experts.down", "layers.2.attn_out", "head")
]
"""One that starts in front of the layers, one in each, and one behind them."""


class Stopped(Exception):
    """What ends a run in the middle."""


class Asked:
    """Rounds weights, says which, and stops in front of that which is called `until`."""

    def __init__(self, until: str = "") -> None:
        self.until, self.names = until, dict[str, None]()

    def __call__(self, weight: Weight, name: str) -> Tensor:
        if weight.name == self.until:
            raise Stopped
        self.names[weight.name] = None  # experts may come one by one
        return formats.dequantize(name, formats.quantize(name, load(weight), None, "fast"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(models.build(tmp_path_factory.mktemp("model") / "model", "qwen3_moe", **SMALL))


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(5, models.VOCAB, (2, 32), generator=torch.Generator().manual_seed(0))


def figures(folder: Path, run: str = "run") -> Figures:
    return Figures(folder / "plan", run, "again")


def states(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.f32"))


@pytest.mark.parametrize("ram", [None, 0], ids=["in memory", "on disk"])
def test_a_crossing_goes_on_at_the_layer_where_it_stopped(
    checkpoint: Checkpoint, ids: Tensor, tmp_path: Path, ram: int | None
) -> None:
    use = Resources(ram=ram, threads=1)

    def crossed(asked: Asked) -> list[float]:
        return divergences(checkpoint, ids, VERSIONS, asked, use, figures(tmp_path))

    whole = divergences(checkpoint, ids, VERSIONS, Asked(), use)
    for until, left, done in (
        ("layers.1.experts.down", 1, ["embedding", "layers.0.attn_q"]),
        ("layers.2.attn_out", 2, ["layers.1.experts.down"]),
        ("head", 3, ["layers.2.attn_out"]),
    ):
        asked = Asked(until)
        with pytest.raises(Stopped):
            crossed(asked)
        assert list(asked.names) == done, "what was finished is not rounded again"
        assert states(tmp_path) == [f"hidden-{left:04d}.f32"], "those in front of it are needed no more"
    assert sorted(figures(tmp_path).every("kl", range(5))) == [0, 1, 2, 3]
    last = Asked()
    assert crossed(last) == whole and list(last.names) == ["head"]
    assert not states(tmp_path), "they are needed no more"
    nobody = Asked("head")
    assert crossed(nobody) == whole and not nobody.names


def test_hidden_states_that_are_damaged_are_refused(
    checkpoint: Checkpoint, ids: Tensor, tmp_path: Path
) -> None:
    with pytest.raises(Stopped):
        divergences(checkpoint, ids, VERSIONS, Asked("layers.2.attn_out"), figures=figures(tmp_path))
    path = figures(tmp_path).folder / "hidden-0002.f32"
    sound = path.read_bytes()
    path.write_bytes(sound[:100] + bytes([sound[100] ^ 1]) + sound[101:])
    with pytest.raises(OutputError, match=r"hidden-0002\.f32: hidden states are damaged; again"):
        divergences(checkpoint, ids, VERSIONS, Asked(), figures=figures(tmp_path))


def flipped(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"0.1", b"0.3"))


def moved(path: Path) -> None:
    path.write_bytes(path.with_name("kl-0001.safetensors").read_bytes())


@pytest.mark.parametrize(
    ("harm", "says"), [(flipped, "differs"), (moved, "another place"), (None, "another run")]
)
def test_figures_that_are_damaged_or_of_another_place_or_run_are_refused(
    tmp_path: Path, harm: Callable[[Path], None] | None, says: str
) -> None:
    some = figures(tmp_path)
    for number, value in enumerate((0.1, 0.25)):
        some.keep(value, "kl", number)
    assert some.every("kl", range(4)) == {0: 0.1, 1: 0.25} and some.kept("kl", 7) is None
    assert figures(tmp_path).within("probes").kept("kl", 0) is None
    if harm is not None:
        harm(some.folder / "kl-0000.safetensors")
    with pytest.raises(OutputError, match=rf"kl-0000\.safetensors: cannot be continued .*{says}.*; again"):
        figures(tmp_path, "run" if harm else "other").kept("kl", 0)


def test_errors_of_weights_are_sampled_once(
    checkpoint: Checkpoint, ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probing = Probing(sample=1 << 8, effort="fast")
    rows = Rows(ids, ("text",) * len(ids), "random ids", ids.numel())
    calibration, kept = calibrate(checkpoint, rows), figures(tmp_path)
    whole = measure(checkpoint, calibration, None, probing)
    keep, left = Figures.keep, 7

    def stopping(self: Figures, value: object, kind: str, number: int | None = None) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise Stopped
        keep(self, value, kind, number)

    with monkeypatch.context() as patched:
        patched.setattr(Figures, "keep", stopping)
        with pytest.raises(Stopped):
            measure(checkpoint, calibration, None, probing, figures=kept)
    first = {path: path.stat().st_mtime_ns for path in kept.folder.glob("errors-*")}
    assert len(first) == 6
    assert measure(checkpoint, calibration, None, probing, figures=kept) == whole
    assert {path: path.stat().st_mtime_ns for path in first} == first, "they are not sampled again"
