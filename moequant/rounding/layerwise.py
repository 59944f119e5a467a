"""All weights of a checkpoint in one coupled pass, in the memory that there is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from moequant.checkpoint import Checkpoint
from moequant.files import scratch
from moequant.forward.stream import LayerStream, Resources
from moequant.progress import available_bytes
from moequant.rounding.coupled import Coupled, Plain, Result, Rounding, Streams

BATCHES = 8
"""The least number of batches, where there are as many rows."""


def round_checkpoint(
    checkpoint: Checkpoint,
    ids: Tensor,
    formats: Mapping[str, str],
    plain: Plain,
    rounding: Rounding,
    resources: Resources,
) -> Iterator[Result]:
    """Every weight packed in its format of `formats`, in the checkpoint's order; `ids` i64 [rows, n].

    Hidden states lie in a temporary folder where memory is limited, Grams in a quarter of the memory
    that there is or may be used, and in not more than 4 GiB.
    """
    memory = resources.ram or available_bytes() or 16 << 30
    resources = replace(resources, batch_tokens=min(resources.batch_tokens, ids.numel() // BATCHES))
    rounding = replace(rounding, gram_bytes=min(4 << 30, memory // 4))
    with (
        scratch() as folder,
        LayerStream(checkpoint, ids, resources) as stream,
    ):
        yield from Coupled(stream, formats, plain, rounding).run(Streams.under(folder, stream))
