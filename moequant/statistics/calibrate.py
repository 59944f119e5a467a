"""The calibration pass: text through the model, layer by layer, every weight's inputs measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from pathlib import Path

import torch

from moequant.checkpoint import Checkpoint, load, not_finite
from moequant.errors import CheckpointError
from moequant.files import scratch
from moequant.forward.hidden import OnDisk, settled
from moequant.forward.model import AT_ONCE, Provider
from moequant.forward.resources import FREE, Resources
from moequant.forward.stream import LayerStream
from moequant.progress import Bar
from moequant.statistics.journal import Journal
from moequant.statistics.moments import Moments
from moequant.statistics.store import combine
from moequant.text.corpus import Rows
from moequant.values import Calibration, Site


def calibrate(
    checkpoint: Checkpoint,
    rows: Rows,
    resources: Resources = FREE,
    provider: Provider = load,
    journal: Journal | None = None,
    watched: Iterable[Site] | None = None,
) -> Calibration:
    """Route `rows` through the checkpoint and collect the moments of every weight's inputs, or of `watched`.

    With a `journal`, finished layers are kept and a run that was killed goes on after them,
    with the same result. Batches are dealt to ranks. Raises CheckpointError naming the tensor
    when the activations are not finite because a weight is not.
    """
    given = None if watched is None else tuple(watched)
    return resources.ranks.together(_calibrated, checkpoint, rows, resources, provider, journal, given)


def _calibrated(
    checkpoint: Checkpoint,
    rows: Rows,
    resources: Resources,
    provider: Provider,
    journal: Journal | None,
    watched: Iterable[Site] | None,
) -> Calibration:
    """The same, by every rank."""
    ranks = resources.ranks
    parts = journal.finished() if journal else []
    with (
        _folder(journal) as folder,
        LayerStream(checkpoint, rows.ids, resources, provider, watched=watched) as stream,
    ):
        if len(parts) > stream.n_layers:  # the end of the forward pass is the last part
            return _join(parts)
        hidden = OnDisk(folder, stream.shapes) if journal else stream.new_hidden(folder)
        domains = tuple(dict.fromkeys(rows.domains))
        make = _recorders(checkpoint, rows, domains, stream)
        if not parts:
            stream.embed(hidden)

        def total(recorders: Iterable[Moments], layer: int) -> Calibration:
            # One by one: the sums of all batches of a wide layer would be gigabytes.
            mine = (_part(recorder, layer, rows, domains) for recorder in recorders)
            every = ranks.in_turn(mine, len(stream.batches))
            if layer < stream.n_layers:
                every = _counted(every, bar, stream.n_layers)
            found = reduce(lambda one, two: combine([one, two]), every)
            if not all(torch.isfinite(stats.moment).all() for stats in found.inputs.values()):
                _blame(checkpoint)
            states = [hidden] if layer < stream.n_layers else []  # the end of the pass feeds nobody
            if not journal:
                for each in states:
                    each.drop(layer)
                return found
            with settled(states, layer + 1, ranks):
                if ranks.first:
                    journal.add(layer, found)
            return found

        with _progress(rows, stream.n_layers, done=len(parts)) as bar:
            for layer in stream.layers(len(parts)):
                parts.append(total(stream.cross(layer, hidden, make, hidden), layer))
            parts.append(total((recorder for recorder, _ in stream.finish(hidden, make)), stream.n_layers))
    return _join(parts)


def _recorders(
    checkpoint: Checkpoint, rows: Rows, domains: tuple[str, ...], stream: LayerStream
) -> Callable[[int], Moments]:
    """A recorder for every batch, which knows the domain of each of its rows."""
    index = torch.tensor([domains.index(domain) for domain in rows.domains])
    by_batch = torch.split(index, [len(batch) for batch in stream.batches])
    return lambda batch: Moments(checkpoint.n_experts, by_batch[batch], len(domains))


def _part(moments: Moments, layer: int, rows: Rows, domains: tuple[str, ...]) -> Calibration:
    """One batch's sums in one layer."""
    routes = tuple(replace(route, layer=layer) for route in moments.routes.values())
    count = len(moments.domains)
    return Calibration(routes, moments.inputs, count, count * rows.ids.shape[1], rows.source, domains)


def _join(layers: list[Calibration]) -> Calibration:
    """The statistics of all layers as one; every layer saw the same text."""
    return replace(
        layers[0],
        routes=tuple(route for layer in layers for route in layer.routes),
        inputs={name: stats for layer in layers for name, stats in layer.inputs.items()},
    )


@contextmanager
def _folder(journal: Journal | None) -> Iterator[Path]:
    """Where hidden states may lie: with the journal, or in a folder that goes with the run."""
    if journal:
        yield journal.folder
    else:
        with scratch() as folder:
            yield folder


def _progress(rows: Rows, layers: int, done: int) -> Bar:
    """A bar that counts a token when it has crossed all layers."""
    tokens = rows.ids.numel()
    return Bar("calibrate", tokens, "tok", done=tokens * done // layers)


def _counted(parts: Iterator[Calibration], bar: Bar, layers: int) -> Iterator[Calibration]:
    for part in parts:
        yield part
        bar.update(part.tokens / layers)


def _blame(checkpoint: Checkpoint) -> None:
    """Name the tensor that makes the activations non-finite: read only when they are."""
    for weight in checkpoint.weights:
        for part in weight.bands(AT_ONCE) if weight.is_table else (weight,):
            if found := not_finite(part, load(part)):
                raise CheckpointError(found)
    raise CheckpointError(
        "activations overflow during calibration, though all weights are finite; please report the model"
    )
