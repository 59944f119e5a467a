"""What rounding has finished: of a layer that was not finished, the experts that are rounded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moequant.checkpoint import Checkpoint, open_checkpoint
from moequant.errors import OutputError
from moequant.forward.resources import Resources
from moequant.forward.stream import LayerStream
from moequant.rounding import rounder
from moequant.rounding.coupled import Coupled
from moequant.rounding.diagonal import Quantizer
from moequant.rounding.parts import Parts
from moequant.rounding.results import Result
from moequant.rounding.streams import Streams
from moequant.statistics.calibrate import calibrate
from tests.rounding.test_coupled import QUICK, rows, types

ONE_BY_ONE = replace(QUICK, gram_bytes=1)


class Killed(Exception):
    """The process dies."""


class Dying(Parts):
    """Parts of a process that dies behind the piece number `left`."""

    left = 0

    def add_piece(self, side: str, experts: range, results: list[Result]) -> None:
        super().add_piece(side, experts, results)
        self.left -= 1
        if not self.left:
            raise Killed


class Run:
    """Conversions of one model, whose parts lie in `folder`."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.checkpoint: Checkpoint = open_checkpoint(model)
        self.text, self.folder = rows(), folder
        self.formats = types(self.checkpoint, "Q4_0")
        self.plain = Quantizer(calibrate(self.checkpoint, self.text)).pack

    def parts(self, kind: type[Parts] = Parts) -> Parts:
        return kind(self.folder / "0", self.checkpoint.weights, self.formats, "run", "begin again")

    def __call__(self, work: Path, parts: Parts | None) -> dict[str, Result]:
        work.mkdir()
        with LayerStream(self.checkpoint, self.text.ids, Resources(threads=1)) as stream:
            streams = Streams.under(work, stream)
            if parts is not None:
                streams = streams.kept(parts, stream)
            done = Coupled(stream, self.formats, self.plain, ONE_BY_ONE).run(streams, parts)
            return {packed.weight.name: (packed, loss) for packed, loss in done}


@pytest.fixture
def run(tiny, tmp_path: Path) -> Run:
    return Run(tiny("qwen3_moe", num_experts=4, num_hidden_layers=2), tmp_path)


@pytest.mark.parametrize("died", [1, 3, 8])
def test_killed_within_a_layer_its_finished_experts_are_not_rounded_again(
    run: Run, tmp_path: Path, died: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path / "whole", None)
    parts = run.parts(Dying)
    assert isinstance(parts, Dying)
    parts.left = died
    with pytest.raises(Killed):
        run(tmp_path / "killed", parts)
    assert len(list(tmp_path.glob("0/piece-*"))) == died

    rounded = []
    round_to_hessian = rounder.round_to_hessian

    def counted(fmt: object, target: torch.Tensor, *rest: object) -> object:
        rounded.append(tuple(target.shape))
        return round_to_hessian(fmt, target, *rest)

    monkeypatch.setattr(rounder, "round_to_hessian", counted)
    again = run.parts()
    found = run(tmp_path / "again", again)
    matrices = [each for each in run.checkpoint.weights if each.is_expert]
    experts = {(1, count * each.shape[-2], each.n_in) for each in matrices for count in (1, 2)}
    # Of each of two layers four experts: what is fed the block's input as one, and what is fed behind it.
    assert sum(shape in experts for shape in rounded) == 16 - died
    every = {packed.weight.name: (packed, loss) for packed, loss in again.results()}
    assert every.keys() == whole.keys() and found.keys() <= every.keys()
    for name, (packed, loss) in whole.items():
        assert torch.equal(every[name][0].data, packed.data), name
        assert torch.equal(every[name][1].error, loss.error), name
    assert not list(tmp_path.glob("0/piece-*")), "a finished layer needs none"


def test_a_damaged_piece_is_said(run: Run, tmp_path: Path) -> None:
    parts = run.parts(Dying)
    assert isinstance(parts, Dying)
    parts.left = 2
    with pytest.raises(Killed):
        run(tmp_path / "killed", parts)
    piece = min(tmp_path.glob("0/piece-*"))
    sound = piece.read_bytes()
    piece.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    with pytest.raises(OutputError, match=rf"{piece.name}: cannot be continued from .*; begin again"):
        run(tmp_path / "again", run.parts())
