"""All weights of a checkpoint in one coupled pass, in the memory that there is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from moequant.checkpoint import Checkpoint
from moequant.files import scratch
from moequant.forward.memory import rounding_work
from moequant.forward.resources import Resources
from moequant.forward.stream import LayerStream
from moequant.rounding.coupled import Coupled
from moequant.rounding.parts import Parts
from moequant.rounding.results import Result
from moequant.rounding.rounder import Plain, Rounding
from moequant.rounding.streams import Streams

BATCHES = 8
"""The least number of batches, where there are as many rows."""


def round_checkpoint(
    checkpoint: Checkpoint,
    ids: Tensor,
    formats: Mapping[str, str],
    plain: Plain,
    rounding: Rounding,
    resources: Resources,
    parts: Parts | None = None,
) -> Iterator[Result]:
    """Every weight packed in its format of `formats`, in the checkpoint's order; `ids` i64 [rows, n].

    Hidden states lie in a temporary folder where memory is limited; so many experts are rounded together as
    memory has room for. With `parts` what is finished is kept there, and nothing comes that was before.
    Batches and experts are dealt to ranks, all of which get every result.
    """
    ranks = resources.ranks
    return ranks.together(_rounded, checkpoint, ids, formats, plain, rounding, resources, parts)


def _rounded(
    checkpoint: Checkpoint,
    ids: Tensor,
    formats: Mapping[str, str],
    plain: Plain,
    rounding: Rounding,
    resources: Resources,
    parts: Parts | None,
) -> Iterator[Result]:
    """The same, by every rank."""
    resources = replace(resources, batch_tokens=min(resources.batch_tokens, ids.numel() // BATCHES))
    # The same on every rank, whatever each finds free: it decides which experts they take at a time.
    work = min(resources.ranks.all(rounding_work(resources.share)))
    options = replace(rounding.options, memory=work)
    rounding = replace(rounding, gram_bytes=work, kept_bytes=work, options=options)
    with (
        scratch() as folder,
        LayerStream(checkpoint, ids, resources) as stream,
    ):
        streams = Streams.under(folder, stream)
        if parts is not None:
            parts.writes = resources.ranks.first
            streams = streams.kept(parts, stream)
        yield from Coupled(stream, formats, plain, rounding).run(streams, parts)
