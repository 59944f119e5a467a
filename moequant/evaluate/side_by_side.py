"""Baseline and candidates side by side through the layers, one layer's weights in memory at a time.

Of every layer first the baseline's weights, then each candidate's: all versions of the hidden
states cross it before the next layer is read. Of a layer that is too large for memory, experts come some at a
time, the baseline's and then each candidate's. Between layers only hidden states wait. At the end logits are
made and scored a few tokens at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from moequant.checkpoint import Checkpoint
from moequant.evaluate.activations import Rounded, listen
from moequant.evaluate.divergence import LOGITS, Scores, join, score_tokens, summarize
from moequant.evaluate.results import Measured, RoutingChange, WeightError
from moequant.files import scratch
from moequant.forward.hidden import Hidden
from moequant.forward.memory import Versions
from moequant.forward.model import Provider, held, of_experts, using
from moequant.forward.passage import Passage
from moequant.forward.resources import FREE, Resources
from moequant.forward.stream import LayerStream
from moequant.forward.taps import Recorder, recording
from moequant.progress import Bar
from moequant.text.corpus import Rows
from moequant.values import Role, Weight
from moequant.values.ops import apply

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
    among = Versions(weights=2, states=len(named))
    with scratch() as folder:
        with LayerStream(checkpoint, rows.ids, resources, base.provider, among=among) as stream:
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
    """The baseline's resident weights of one layer by parameter, held against a candidate's as those arrive.

    With `forget` the baseline's weights go as they were used. `errors` are by weight.
    """

    stream: LayerStream
    kept: dict[str, Tensor]
    tokens: Tensor | None
    errors: dict[str, WeightError]
    forget: bool

    def __call__(self, weights: list[Weight]) -> None:
        """Errors of the weights that make up a parameter."""
        param = weights[0].place.param
        values = held(self.stream.model, param)
        for weight in weights:
            one, two = (apply(weight.place.ops, each) for each in (self.kept[param], values))
            tokens = self.tokens if weight.is_expert else None
            self.errors[weight.name] = _error(weight, one, two, tokens)
        if self.forget:
            del self.kept[param]


@dataclass(slots=True)
class _Crossing:
    """A version on its way across a layer: its errors by weight, and of its experts' the `_sums` so far.

    `kept` are its resident weights by parameter: the baseline's, to hold others against them, and where
    experts come some at a time everybody's, to go on with behind the experts.
    """

    version: _Running
    passage: Passage[_Chosen]
    kept: dict[str, Tensor]
    errors: dict[str, WeightError] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)

    @property
    def chosen(self) -> Tensor | None:
        """Which experts every token was sent to, i16 [tokens, k], None in a dense layer."""
        found = [one.index for one in self.passage.told if one.index is not None]
        return torch.cat(found) if found else None


def _cross(stream: LayerStream, layer: int, base: _Running, others: list[_Running], rows: Rows) -> None:
    """All versions across one layer; every candidate's weights are held against the baseline's."""
    apart = bool(stream.chunks(layer))
    first = _enter(stream, layer, base)
    chosen, tokens, kept = first.chosen, None, first.kept
    if chosen is not None:
        tokens = _sent(chosen, stream.checkpoint.n_experts)
    crossing = [first]
    for version in others:
        errors: dict[str, WeightError] = {}
        beside = _Beside(stream, kept, tokens, errors, not apart and version is others[-1])
        stream.refill(layer, version.provider, beside)
        crossing.append(_enter(stream, layer, version, errors))
    for experts in stream.chunks(layer):
        _multiply(stream, layer, crossing, experts)
    for each in crossing:
        with using(stream.model, each.kept if apart else {}):
            deque(each.passage.leave(), 0)
        each.version.hidden.drop(layer)
    for each in crossing[1:]:
        _told(stream, layer, each, tokens)
        if chosen is not None and (found := each.chosen) is not None:
            moved = _moved(chosen, found, stream.checkpoint.n_experts)
            each.version.routing.append(_change(layer, (chosen != found).any(1), moved, rows))


def _enter(
    stream: LayerStream, layer: int, version: _Running, errors: dict[str, WeightError] | None = None
) -> _Crossing:
    """A version, whose weights are there now, behind the layer or in front of its experts."""
    ways = [(version.hidden, version.hidden)]
    passage = stream.enter(layer, ways, lambda batch: _Chosen(version.rounded))
    kept = {}
    if errors is None or stream.chunks(layer):
        kept = {one.place.param: held(stream.model, one.place.param) for one in stream.resident(layer)}
    return _Crossing(version, passage, kept, {} if errors is None else errors)


def _multiply(stream: LayerStream, layer: int, crossing: list[_Crossing], experts: range) -> None:
    """Some experts in all versions, each candidate's held against the baseline's."""
    exact: nn.Module | None = None
    for each in crossing:
        with using(stream.model, each.kept):  # biases, and norms behind experts
            module = stream.part(layer, experts, each.version.provider)
            each.passage.multiply(module, experts)
        if exact is None:
            exact = module
            continue
        for weight in stream.experts(layer):
            sums = each.sums.setdefault(weight.name, torch.zeros(2, weight.matrices, dtype=torch.float64))
            one, two = of_experts(exact, weight), of_experts(module, weight)
            sums[:, experts.start : experts.stop] = _sums(weight.of(experts), one, two)


def _told(stream: LayerStream, layer: int, crossing: _Crossing, tokens: Tensor | None) -> None:
    """The errors of a version's weights in the layer, in the model's order."""
    for weight in stream.weights(layer):
        if weight.name in crossing.sums:
            crossing.errors[weight.name] = _as_error(weight, crossing.sums[weight.name], tokens)
        crossing.version.errors.append(crossing.errors[weight.name])


def _moved(chosen: Tensor, found: Tensor, experts: int) -> tuple[float | None, ...]:
    """Of the tokens that `chosen`, i16 [tokens, k], sends to each expert, the share that `found` does not."""
    lost = torch.stack([~(found == one[:, None]).any(1) for one in chosen.unbind(1)], 1)
    pairs = zip(_sent(chosen[lost], experts).tolist(), _sent(chosen, experts).tolist(), strict=True)
    return tuple(one / all_ if all_ else None for one, all_ in pairs)


def _sent(chosen: Tensor, experts: int) -> Tensor:
    """How many tokens each expert is sent, i64 [E]."""
    return torch.bincount(chosen.flatten().long(), minlength=experts)[:experts]


def _change(layer: int, changed: Tensor, moved: tuple[float | None, ...], rows: Rows) -> RoutingChange:
    """`changed` bool [tokens], of all that the layer's router sees, as shares, by domain too."""
    by_row = changed.view(len(rows.ids), -1).double().mean(1)
    by_domain = tuple(float(by_row[_of(rows, domain)].mean()) for domain in dict.fromkeys(rows.domains))
    return RoutingChange(layer, float(by_row.mean()), by_domain, moved)


def _of(rows: Rows, domain: str) -> Tensor:
    """Which rows are of that domain: bool [rows]."""
    return torch.tensor([one == domain for one in rows.domains])


def _error(weight: Weight, base: Tensor, candidate: Tensor, tokens: Tensor | None) -> WeightError:
    """Relative squared error of every expert of a weight, tensors [E, out, in], [out, in] or [n]."""
    return _as_error(weight, _sums(weight, base, candidate), tokens)


def _as_error(weight: Weight, sums: Tensor, tokens: Tensor | None) -> WeightError:
    error, total = sums
    return WeightError(weight.name, weight.role, weight.layer, error / total.clamp_min(1e-300), tokens)


def _sums(weight: Weight, base: Tensor, candidate: Tensor) -> Tensor:
    """Squared errors and squares of every expert, of tensors on one device: f64 [2, E] on the CPU."""
    shape = (weight.matrices, *weight.shape[-2:]) if weight.shape[1:] else (1, 1, *weight.shape)
    error, total = sums = torch.zeros(2, weight.matrices, dtype=torch.float64, device=base.device)
    rows = max(1, AT_ONCE // shape[-1])
    for expert, both in enumerate(zip(base.reshape(shape), candidate.reshape(shape), strict=True)):
        for one, two in zip(*(torch.split(each, rows) for each in both), strict=True):
            exact = one.float()
            error[expert] += (exact - two).square().sum(dtype=torch.float64)
            total[expert] += exact.square().sum(dtype=torch.float64)
    return sums.cpu()


def _finish(stream: LayerStream, base: _Running, others: list[_Running], folder: Path) -> None:
    """Final hidden states [rows, n, h] of all versions, under `folder` where memory is limited; what remains
    is the head."""
    shapes = [(*batch.shape, stream.checkpoint.shape.hidden) for batch in stream.batches]
    for number, version in enumerate((base, *others)):
        final = stream.room(folder / f"{number}-final", shapes)
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
