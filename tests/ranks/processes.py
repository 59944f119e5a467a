"""`python -m torch.distributed.run … -m tests.ranks.processes WHAT …`: what torchrun starts in tests.

`deal` says what three ranks are told, and then has the last of them fail in a stage; in `lack` it runs out
of memory; `orphan` kills torchrun and goes on; `convert RANK …` is the command with a rank that kills
itself when it has made its second part of the output, `measure RANK …` with one that does so when its
versions of the model have crossed the second layer. Each rank of it finds another amount of memory free,
which is little: all take a few experts at a time, the same.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import typer

from moequant.cli.common import Commands, guarded
from moequant.errors import CheckpointError
from moequant.ranks import Ranks, here

WORK = 1 << 20
"""Bytes that the first rank may work with, and each of the others a quarter of those of the one before."""

small = typer.Typer(cls=Commands, pretty_exceptions_enable=False)


def stage(ranks: Ranks, columns: torch.Tensor) -> list[object]:
    """Every way to share."""

    def work(mine: Sequence[int]) -> list[str]:
        return [f"{number} by {ranks.rank}" for number in mine]

    mine = (columns[:, each] * ranks.count for each in ranks.mine(4))
    in_turn = torch.stack(list(ranks.in_turn(mine, 4)), 1)
    return [
        ranks.dealt((0, 1, 2, 3), (1, 5, 2, 1), work),
        in_turn.tolist(),
        [[each.start, each.stop] for each in ranks.all(ranks.part((9, 1, 1, 9, 10)))],
        ranks.told(lambda: ranks.rank),
    ]


def numbers(ranks: Ranks) -> Iterator[int]:
    """A stage that is read one by one."""
    yield from ranks.all(ranks.rank)


def failing(ranks: Ranks) -> None:
    """The last rank meets an error, the others wait for it."""
    if ranks.rank == ranks.count - 1:
        raise CheckpointError("layers.0: is not finite")
    ranks.wait()


def lacking(ranks: Ranks) -> None:
    """The last rank's memory runs out."""
    if ranks.rank == ranks.count - 1:
        torch.ones(1 << 52)
    ranks.wait()


@small.command()
def deal(out: Path) -> None:
    """What ranks are told, into a file; see `failing` as well."""
    ranks = here()
    columns = torch.arange(12, dtype=torch.bfloat16).view(3, 4)
    found = ranks.together(stage, ranks, columns), list(ranks.together(numbers, ranks))
    out.write_text(repr(found))
    guarded(lambda: ranks.together(failing, ranks))


@small.command()
def orphan(out: Path) -> None:
    """See `stage`; torchrun itself is killed before."""
    ranks = here()
    os.kill(os.getppid(), signal.SIGKILL)
    out.write_text(repr(ranks.together(stage, ranks, torch.arange(12).view(3, 4))))


@small.command()
def lack() -> None:
    """See `lacking`."""
    ranks = here()
    guarded(lambda: ranks.together(lacking, ranks))


def main() -> None:
    """See the module."""
    if sys.argv[1] in ("convert", "measure"):
        convert(sys.argv[1])
    else:
        small()


def convert(stage: str) -> None:
    """See the module. What is imported here takes seconds, in every process that only talks."""
    from moequant.cli import app
    from moequant.plan.figures import Crossing
    from moequant.rounding import layerwise
    from moequant.rounding.parts import Parts

    layerwise.rounding_work = lambda ram: WORK >> 2 * int(os.environ["RANK"])
    sys.argv[1], doomed, add, finish = "convert", sys.argv.pop(2), Parts.add, Crossing.finish

    def adding(self: Parts, results: list[object]) -> None:
        if self.count == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        add(self, results)  # type: ignore[arg-type]

    def finishing(self: Crossing, layer: int) -> None:
        if layer == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        finish(self, layer)

    if os.environ["RANK"] == doomed and stage == "measure":
        Crossing.finish = finishing  # type: ignore[method-assign]
    elif os.environ["RANK"] == doomed:
        Parts.add = adding  # type: ignore[method-assign, assignment]
    app()


if __name__ == "__main__":
    main()
