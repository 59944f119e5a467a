"""Baseline and candidates side by side through the layers, one layer's weights in memory at a time.

Of every layer first the baseline's weights, then each candidate's: all versions of the hidden
states cross it before the next layer is read. Between layers only hidden states wait. At the end
logits are made and scored a few tokens at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from moequant.checkpoint import Checkpoint
from moequant.evaluate.activations import Rounded, listen
from moequant.evaluate.divergence import LOGITS, Scores, join, score_tokens, summarize
from moequant.evaluate.results import Measured, RoutingChange, WeightError
from moequant.files import scratch
from moequant.forward.hidden import Hidden
from moequant.forward.model import Provider, held
from moequant.forward.stream import LayerStream, Resources
from moequant.forward.taps import Recorder, recording
from moequant.progress import Bar
from moequant.text.corpus import Rows
from moequant.values import Role, Weight
from moequant.values.ops import apply

FREE = Resources()

AT_ONCE = 1 << 24
"""Weights whose errors are summed at a time."""


@dataclass(frozen=True, slots=True)
class Version:
    """Weights under a name; `rounded` when the inputs of its products are rounded as a runtime does."""

    name: str
    provider: Provider
    rounded: Rounded | None = None


def compare(
    checkpoint: Checkpoint,
    base: Version,
    candidates: Sequence[Version],
    rows: Rows,
    resources: Resources = FREE,
) -> tuple[Measured, ...]:
    """Score every candidate against `base` on `rows`.

    `checkpoint` says how the model computes and what its weights are; only its headers are
    read. Raises what the providers raise.
    """
    named = [base, *candidates]
    share = None if resources.ram is None else replace(resources, ram=resources.ram // len(named))
    with scratch() as folder:
        with LayerStream(checkpoint, rows.ids, share or resources, base.provider) as stream:
            listen(stream.model, checkpoint)
            first, *others = (
                _Running(one.name, one.provider, stream.new_hidden(folder / str(number)), one.rounded)
                for number, one in enumerate(named)
            )
            _embed(stream, first, others)
            with Bar("compare", stream.n_layers, "layer") as bar:
                for layer in stream.layers():
                    _cross(stream, layer, first, others, rows)
                    bar.update()
            _finish(stream, first, others, folder)
            return tuple(_measured(stream, first, other, rows) for other in others)


@dataclass(slots=True)
class _Running:
    """One set of weights on its way; `outside` are weights outside of the layers that are still in use."""

    name: str
    provider: Provider
    hidden: Hidden
    rounded: Rounded | None
    outside: dict[str, Tensor] = field(default_factory=dict)
    errors: list[WeightError] = field(default_factory=list)
    routing: list[RoutingChange] = field(default_factory=list)

    def load(self, weight: Weight) -> Tensor:
        """A weight outside the layers, read once until it is forgotten."""
        if weight.name not in self.outside:
            self.outside[weight.name] = self.provider(weight)
        return self.outside[weight.name]


class _Chosen(Recorder):
    """A recorder that keeps which experts every token was sent to: `index` i16 [tokens, k], sorted.

    `rounded` is what `activations` looks for.
    """

    def __init__(self, rounded: Rounded | None) -> None:
        self.index: Tensor | None = None
        self.rounded = rounded

    def fed(self, site: str, inputs: Tensor) -> Tensor:
        """See `forward.experts.Rounding`."""
        return inputs if self.rounded is None else self.rounded(site, inputs)

    def routed(self, name: str, hidden: Tensor, index: Tensor, gates: Tensor) -> None:
        """The router's choice, the order within a token forgotten."""
        self.index = index.sort(1).values.to(torch.int16).cpu()


def _embed(stream: LayerStream, base: _Running, others: list[_Running]) -> None:
    embedding = [weight for weight in stream.weights(None) if weight.role is Role.EMBEDDING]
    for version in (base, *others):
        stream.embed(version.hidden, version.load)
        if version is not base:
            version.errors += [_error(one, base.load(one), version.load(one), None) for one in embedding]
            if not stream.checkpoint.tied:
                version.outside.clear()
    if not stream.checkpoint.tied:
        base.outside.clear()


@dataclass(slots=True)
class _Beside:
    """The baseline's weights of one layer by parameter, held against a candidate's as those arrive.

    `tokens` are those of the layer's experts; with `last` the baseline's weights go as they were used.
    """

    stream: LayerStream
    kept: dict[str, Tensor]
    tokens: Tensor | None
    version: _Running
    last: bool

    def __call__(self, weights: list[Weight]) -> None:
        """Errors of the weights that make up a parameter."""
        param = weights[0].place.param
        values = held(self.stream.model, param)
        for weight in weights:
            tokens = self.tokens if weight.is_expert else None
            ops = weight.place.ops
            error = _error(weight, apply(ops, self.kept[param]), apply(ops, values), tokens)
            self.version.errors.append(error)
        if self.last:
            del self.kept[param]


def _cross(stream: LayerStream, layer: int, base: _Running, others: list[_Running], rows: Rows) -> None:
    """All versions across one layer; every candidate's weights are held against the baseline's."""
    chosen, tokens = _route(stream, layer, base), None
    if chosen is not None:
        tokens = torch.bincount(chosen.flatten().long(), minlength=stream.checkpoint.n_experts)
    kept = {one.place.param: held(stream.model, one.place.param) for one in stream.weights(layer)}
    for version in others:
        beside = _Beside(stream, kept, tokens, version, version is others[-1])
        stream.refill(layer, version.provider, beside)
        found = _route(stream, layer, version)
        if chosen is not None and found is not None:
            moved = _moved(chosen, found, stream.checkpoint.n_experts)
            version.routing.append(_change(layer, (chosen != found).any(1), moved, rows))


def _route(stream: LayerStream, layer: int, version: _Running) -> Tensor | None:
    """Cross the layer; which experts every token was sent to, i16 [tokens, k], None in a dense layer."""
    crossing = stream.cross(layer, version.hidden, lambda batch: _Chosen(version.rounded), version.hidden)
    found = [one.index for one in crossing if one.index is not None]
    version.hidden.drop(layer)
    return torch.cat(found) if found else None


def _moved(chosen: Tensor, found: Tensor, experts: int) -> tuple[float | None, ...]:
    """Of the tokens that `chosen`, i16 [tokens, k], sends to each expert, the share that `found` does not."""
    lost = torch.stack([~(found == one[:, None]).any(1) for one in chosen.unbind(1)], 1)
    sent = torch.bincount(chosen.flatten().long(), minlength=experts)
    gone = torch.bincount(chosen[lost].long(), minlength=experts)
    pairs = zip(gone.tolist(), sent.tolist(), strict=True)
    return tuple(one / all_ if all_ else None for one, all_ in pairs)


def _change(layer: int, changed: Tensor, moved: tuple[float | None, ...], rows: Rows) -> RoutingChange:
    """`changed` bool [tokens] as shares, by domain too."""
    by_row = changed.view(rows.ids.shape).double().mean(1)
    by_domain = tuple(float(by_row[_of(rows, domain)].mean()) for domain in dict.fromkeys(rows.domains))
    return RoutingChange(layer, float(by_row.mean()), by_domain, moved)


def _of(rows: Rows, domain: str) -> Tensor:
    """Which rows are of that domain: bool [rows]."""
    return torch.tensor([one == domain for one in rows.domains])


def _error(weight: Weight, base: Tensor, candidate: Tensor, tokens: Tensor | None) -> WeightError:
    """Relative squared error of every expert of a weight, tensors [E, out, in], [out, in] or [n]."""
    shape = (weight.matrices, *weight.shape[-2:]) if weight.shape[1:] else (1, 1, *weight.shape)
    error, total = torch.zeros(2, weight.matrices, dtype=torch.float64)
    rows = max(1, AT_ONCE // shape[-1])
    for expert, both in enumerate(zip(base.reshape(shape), candidate.reshape(shape), strict=True)):
        for one, two in zip(*(torch.split(each, rows) for each in both), strict=True):
            exact = one.float()
            error[expert] += (exact - two).square().sum(dtype=torch.float64)
            total[expert] += exact.square().sum(dtype=torch.float64)
    return WeightError(weight.name, weight.role, weight.layer, error / total.clamp_min(1e-300), tokens)


def _finish(stream: LayerStream, base: _Running, others: list[_Running], folder: Path) -> None:
    """Final hidden states [rows, n, h] of all versions, under `folder` where memory is limited; what remains
    is the head."""
    shapes = [(*batch.shape, stream.checkpoint.shape.hidden) for batch in stream.batches]
    for number, version in enumerate((base, *others)):
        final = stream.room(folder / f"{number}-final", shapes, len(others) + 1)
        ends = stream.finish(version.hidden, lambda batch: _Chosen(None), version.load)
        for batch, (_, result) in enumerate(ends):
            final.put(stream.n_layers + 1, batch, result.last_hidden_state)
        version.hidden.drop(stream.n_layers)
        version.hidden = final
    for weight in stream.weights(None):
        if weight.role is not Role.EMBEDDING:
            for version in others:
                version.errors.append(_error(weight, base.load(weight), version.load(weight), None))


def _measured(stream: LayerStream, base: _Running, version: _Running, rows: Rows) -> Measured:
    role = Role.EMBEDDING if stream.checkpoint.tied else Role.OUTPUT
    (head,) = (weight for weight in stream.weights(None) if weight.role is role)
    heads = [_parameter(one.load(head), stream.resources.device) for one in (base, version)]
    parts = []
    with torch.inference_mode():
        for target, states in _scored(stream, [base.hidden, version.hidden]):
            logits = []
            for one, weight, rounded in zip(states, heads, (base.rounded, version.rounded), strict=True):
                stream.model.get_output_embeddings().weight = weight
                with recording(_Chosen(rounded)):
                    logits.append(stream.skeleton.logits(one.to(stream.resources.device)).cpu())
            parts.append(score_tokens(logits[0], logits[1], target))
    return measured(version.name, join(parts), rows, tuple(version.routing), tuple(version.errors))


def _parameter(values: Tensor, device: str) -> nn.Parameter:
    return nn.Parameter(values.to(device, torch.float32), requires_grad=False)


def _scored(stream: LayerStream, versions: list[Hidden]) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """The next tokens i64 [m] and every version's states [m, h] in front of them, a few tokens at a time."""
    step = max(1, LOGITS // stream.checkpoint.shape.vocab)
    for batch, ids in enumerate(stream.batches):
        states = [hidden.get(stream.n_layers + 1, batch) for hidden in versions]
        for row in range(len(ids)):
            n = ids.shape[1]
            for first in range(n // 2, n - 1, step):
                last = min(first + step, n - 1)
                yield ids[row, first + 1 : last + 1], [one[row, first:last] for one in states]


def measured(
    name: str,
    scores: Scores,
    rows: Rows,
    routing: tuple[RoutingChange, ...] = (),
    errors: tuple[WeightError, ...] = (),
) -> Measured:
    """Scores of all rows' second halves, in order, as figures: of all text and by domain."""
    domains = tuple(dict.fromkeys(rows.domains))
    per_row = len(scores.kl) // len(rows.domains)
    parts = [
        summarize(scores.part(_of(rows, domain).repeat_interleave(per_row)), domain)
        for domain in (domains if len(domains) > 1 else ())
    ]
    return Measured(name, summarize(scores, rows.source), tuple(parts), scores, routing, errors)
