"""Rounding coupled to the forward pass: a full-precision and a quantized stream cross the layers together.

At each layer, group by group in the order of execution, weights are rounded under the
Hessian of what the quantized stream feeds them (`shrinkage`, `feedback`), towards a target
that also undoes what earlier rounding did to their inputs (`target`). The next group and
the next layer see the layer as it was rounded.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moequant import formats
from moequant.forward.experts import Route
from moequant.forward.hidden import Hidden, InMemory
from moequant.forward.model import fill, held, release, replace_memory
from moequant.forward.stream import ENDS, LayerStream
from moequant.forward.taps import recorder
from moequant.rounding.feedback import round_to_hessian
from moequant.rounding.paired import Capture, Grams, Pair, Seen
from moequant.rounding.parts import Parts
from moequant.rounding.recall import Kept
from moequant.rounding.results import Result, decoded, joined, judged, lost_by
from moequant.rounding.rounder import UNROUNDED, Plain, Rounder, Rounding
from moequant.rounding.routed import Experts
from moequant.rounding.shrinkage import shrink
from moequant.rounding.streams import ROOMS, Streams
from moequant.rounding.taken import Fed
from moequant.rounding.twosided import even_fisher
from moequant.statistics.fisher import Fishers, gather
from moequant.values import Packed, Role, Site, Weight
from moequant.values.ops import put

MIXED = (Role.ATTN_OUT, Role.OUT_B, Role.SSM_OUT)
"""Roles of the last product of what mixes tokens: attention, or a recurrence."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer while it is rounded: its number, a copy with the original weights, the norm in its middle,
    what is known of its attention and its experts, and where what is finished of it is kept."""

    index: int
    original: nn.Module
    middle: str
    kept: Kept
    parts: Parts | None = None

    def part(self, name: str) -> nn.Module:
        """The original module of that name in the model."""
        return self.original.get_submodule(inside(self.index, name))


def inside(layer: int, name: str) -> str:
    """The name within its layer of a module that the model calls `name`."""
    return name.split(f".{layer}.", 1)[1]


def as_fed(site: Site, seen: Tensor | None) -> Tensor:
    """What a module is fed, of all that is seen of it at a site [.., in]: in the model's order."""
    assert seen is not None
    if not site.ops:
        return seen
    fed = torch.empty_like(seen)
    put(site.ops, fed, seen)
    return fed


@contextmanager
def reporting(layer: Layer, model: nn.Module) -> Iterator[None]:
    """Inside the block the norm in the middle of the layer reports its input, in both versions."""
    if not layer.middle:
        yield
        return

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if (current := recorder()) is not None:
            current.dense(layer.middle, args[0])

    modules = (layer.part(layer.middle), model.get_submodule(layer.middle))
    handles = [module.register_forward_pre_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, slots=True)
class Coupled:
    """One coupled pass over `stream` that rounds every weight of `formats` to its format; others stay.

    `fishers` None: `run` gathers them itself when `rounding` asks for some.
    """

    stream: LayerStream
    formats: Mapping[str, str]
    plain: Plain
    rounding: Rounding
    fishers: Fishers | None = None

    @property
    def rounder(self) -> Rounder:
        """How weights are rounded."""
        return Rounder(self.formats, self.plain, self.rounding, self.fishers)

    def run(self, streams: Streams, parts: Parts | None = None) -> Iterator[Result]:
        """Every weight, packed, in the order of the checkpoint. `streams` are filled on the way.

        With `parts` what is finished is kept there, and nothing comes that was finished before: `streams`
        hold then what is in front of the next layer. CheckpointError when Fishers are asked for and the
        model does not fit into memory.
        """
        if self.rounding.fisher_tokens and self.fishers is None:
            fishers = self.stream.resources.ranks.told(self._gather)
            yield from replace(self, fishers=fishers).run(streams, parts)
            return
        stream, count = self.stream, 0 if parts is None else parts.count
        if not count:
            yield from streams.finished(self._before(streams), 0, parts)
        copies = [copy.deepcopy(layer) for layer in stream.skeleton.layers]  # empty: on the meta device
        for index in stream.layers(max(0, count - 1), experts=False):
            share(stream.skeleton.layers[index], copies[index])
            layer = Layer(index, copies[index], self._middle(index), self._kept(index), parts)
            yield from streams.finished(self._layer(layer, streams), index + 1, parts)
            copies[index] = nn.Identity()
        behind = self._behind(streams)
        if parts is not None:
            parts.add(behind)
        yield from behind

    def _before(self, streams: Streams) -> list[Result]:
        """What is outside of the layers, but for the head; both streams are in front of the first layer."""
        found = []
        for weight in self.stream.weights(None):
            if weight.role is Role.EMBEDDING:
                result = self.stream.resources.ranks.told(lambda one=weight: self._embedding(one))  # type: ignore[misc]
                self._embed(result, streams)
                found += [] if result is None else [result]
            elif weight.role is not Role.OUTPUT and weight.name in self.formats:
                found.append(self.plain(weight, self.formats[weight.name]))
        return found

    def _behind(self, streams: Streams) -> list[Result]:
        """What is behind the layers: what is not run, then the head."""
        wanted = [each for each in self.stream.checkpoint.weights if each.name in self.formats]
        skipped = [each for each in wanted if each.layer is not None and not each.runs]
        heads = [each for each in wanted if each.layer is None and each.role is Role.OUTPUT]
        packed = self.stream.resources.ranks.dealt(
            skipped,
            [each.numel for each in skipped],
            lambda mine: [self.plain(each, self.formats[each.name]) for each in mine],
        )
        return [*packed, *(self._head(each, streams) for each in heads)]

    def _gather(self) -> Fishers:
        stream = self.stream
        ids = torch.cat(stream.batches)
        rows = max(1, self.rounding.fisher_tokens // ids.shape[1])
        return gather(stream.checkpoint, ids[:rows], stream.provider, stream.resources.device)

    def _embedding(self, weight: Weight) -> Result | None:
        """The embedding, None where it stays; its rows under the Fisher of the stream that they enter,
        where there is one.

        One that is the head as well is looked up and multiplied: the Fisher knows only half of that.
        """
        if weight.name not in self.formats:
            return None
        fmt = formats.get(self.formats[weight.name])
        if self.fishers is None or fmt.name in UNROUNDED or self.stream.checkpoint.tied:
            return self.plain(weight, fmt.name)
        hessian = even_fisher(self.fishers.embedding[None])
        values = self.stream.provider(weight)[None].to(hessian.device).float()
        found = round_to_hessian(fmt, values, hessian, self.rounding.options)
        return joined(weight, [judged(weight, fmt, found, lost_by(fmt, values, found, hessian))])

    def _embed(self, packed: Result | None, streams: Streams) -> None:
        """What the first layer is fed by the original embedding and by the packed one."""
        self.stream.embed(streams.exact)
        self.stream.embed(streams.rounded, None if packed is None else lambda weight: decoded(packed[0]))

    def _middle(self, index: int) -> str:
        """The norm in front of the feed-forward block."""
        norms = [each for each in self.stream.weights(index) if each.name == f"layers.{index}.ffn_norm"]
        return norms[0].place.param.removesuffix(".weight") if norms else ""

    def _kept(self, index: int) -> Kept:
        """Where the layer's mixer ends; nowhere when there is no room to keep what that is fed."""
        ends = [weight for weight in self.stream.weights(index) if weight.role in MIXED]
        tokens = sum(batch.numel() for batch in self.stream.batches)
        if not ends or 2 * 4 * tokens * ends[0].n_in > self.rounding.kept_bytes:
            return Kept(index)
        last = inside(index, ends[0].place.param).removesuffix(".weight")
        others = self.stream.checkpoint.family.attention_gives - 1
        every = range(len(self.stream.batches))
        shapes = [(*self.stream.tokens(index, batch), ends[0].n_in) for batch in every]
        mixed = InMemory(shapes), InMemory(shapes)
        return Kept(index, last, 0 if ends[0].role is Role.SSM_OUT else others, mixed)

    def _layer(self, layer: Layer, streams: Streams) -> list[Result]:
        weights, rounder = self.stream.weights(layer.index), self.rounder
        done: dict[str, Result] = {}
        groups: dict[str, list[Weight]] = {}  # in the order in which their sites are first met
        for weight in weights:
            if weight.is_expert and weight.runs:
                groups.setdefault("experts", []).append(weight)
            elif weight.site is not None and rounder.rounds(weight):
                groups.setdefault(weight.site.name, []).append(weight)
            if weight.is_table and weight.name in self.formats:
                done[weight.name] = self._table(weight)
            elif weight.name in self.formats and not rounder.rounds(weight):
                done[weight.name] = self.plain(weight, self.formats[weight.name])
        layers = layer.original, self.stream.skeleton.layers[layer.index]
        with reporting(layer, self.stream.model), layer.kept.used_by(*layers):
            for group in groups.values():
                if group[0].is_expert:
                    done |= self._experts(layer, tuple(group), streams)
                else:
                    done |= self._group(layer, group, streams)
                    self._replace([done[weight.name][0] for weight in group])
            self._leave(layer, streams)
        return [done[weight.name] for weight in weights if weight.name in done]

    def _table(self, weight: Weight) -> Result:
        """A table as a whole; the rounded stream sees the rows of it that its tokens look up."""
        packed, loss = self.plain(self.stream.tables[weight.name], self.formats[weight.name])
        rows = torch.tensor(weight.origin.rows)
        self._replace([Packed(weight, packed.format, packed.data[rows])])
        return packed, loss

    def _experts(self, layer: Layer, weights: tuple[Weight, ...], streams: Streams) -> dict[str, Result]:
        """The routed experts of the layer; the layer is told what they give."""
        fed = self.cross(layer, weights, streams)
        module = layer.part(weights[0].place.param.rpartition(".")[0])
        folder = streams.folder / "inner"
        experts = Experts(self.rounder, self.stream, module, weights, fed, folder, layer.parts)
        names = "exact-sum", "rounded-sum"
        exact, rounded = (self._room(streams, layer, name, fed.width) for name in names)
        sums = exact, rounded
        done = experts.run(sums)
        fed.drop()
        layer.kept.experts = sums
        return done

    def cross(self, layer: Layer, weights: tuple[Weight, ...], streams: Streams) -> Fed:
        """What the experts with these matrices are fed in both streams, which cross the layer up to them."""
        first = [each for each in weights if each.site is not None and each.site.side == "experts"]
        (before,) = {each.site.name for each in first if each.site is not None}
        width = first[0].n_in
        rooms = [self._room(streams, layer, f"{name}-fed", width) for name in ("exact", "rounded")]
        device = self.stream.resources.device
        error = self._room(streams, layer, "residual", self.stream.checkpoint.shape.hidden)
        adds = any(weight.adds and self.rounder.rounds(weight) for weight in weights)

        def work(batch: int) -> tuple[list[Tensor], list[Route], bool]:
            pair = self._pair(layer, batch, before, streams)
            inputs, routes = [], []
            for seen in (pair.exact, pair.rounded):
                assert seen.inputs is not None and seen.index is not None and seen.gates is not None
                inputs.append(seen.inputs)
                routes.append(Route(seen.index, seen.gates))
            if adds and pair.residual is not None:
                error.put(layer.index, batch, pair.residual)
            return inputs, routes, adds and pair.residual is not None

        routes = []
        residual: Hidden | None = error
        for batch, (inputs, both, kept) in enumerate(self.stream.shared(work)):
            for room, fed in zip(rooms, inputs, strict=True):
                room.put(layer.index, batch, fed)
            routes.append((both[0].on(device), both[1].on(device)))
            residual = residual if kept else None
        return Fed(layer.index, width, rooms[0], rooms[1], residual, routes)

    def _room(self, streams: Streams, layer: Layer, name: str, width: int) -> Hidden:
        return self.stream.inside(streams.folder / name, layer.index, width, ROOMS)

    def _pair(self, layer: Layer, batch: int, wanted: str, streams: Streams) -> Pair:
        """One batch through both streams up to that site; the error of the residual stream in the middle."""
        exact, rounded = (Capture(wanted, layer.middle) for _ in range(2))
        told = layer.kept.recorders(batch, exact, rounded)
        self.stream.run(layer.index, batch, streams.exact, told[0], layer.original)
        self.stream.run(layer.index, batch, streams.rounded, told[1])
        residual = None
        if exact.residual is not None and rounded.residual is not None:
            residual = exact.residual - rounded.residual
        return Pair(exact, rounded, residual)

    def _replace(self, packed: list[Packed]) -> None:
        """Let the rounded stream see these weights as they were packed; the copy keeps the original ones."""
        model, sizes = self.stream.model, dict[str, int]()
        for each in packed:
            param = each.weight.place.param
            sizes[param] = sizes.get(param, 0) + each.weight.numel
        for param, size in sizes.items():
            replace_memory(model, param, keep=size < held(model, param).numel())
        for each in packed:
            put(each.weight.place.ops, held(model, each.weight.place.param), decoded(each))

    def _leave(self, layer: Layer, streams: Streams) -> None:
        """Both streams cross the finished layer."""
        index = layer.index

        def work(batch: int) -> None:
            exact, rounded = layer.kept.recorders(batch)
            for hidden, told, module in (
                (streams.exact, exact, layer.original),
                (streams.rounded, rounded, None),
            ):
                out = self.stream.run(index, batch, hidden, told, module)
                assert out is not None  # nobody stops it
                hidden.put(index + 1, batch, out)

        for _ in self.stream.each(work):
            pass
        for each in layer.kept.experts or ():
            each.drop(index)

    def _group(self, layer: Layer, group: list[Weight], streams: Streams) -> dict[str, Result]:
        """Round weights that share their inputs, which every token sees."""
        grams = self.collect(layer, group[0], streams)
        return self._round(group, grams)

    def collect(self, layer: Layer, weight: Weight, streams: Streams) -> Grams:
        """Grams of a weight that every token sees."""
        assert weight.site is not None
        site = weight.site
        grams = Grams.empty(weight.matrices, weight, self.stream.resources.device)

        def work(batch: int) -> list[tuple[int, Seen]]:
            pair = self._pair(layer, batch, site.name, streams)
            if weight.role not in MIXED:
                return list(pair.seen())
            shape = (*self.stream.tokens(layer.index, batch), -1)
            exact, rounded = (as_fed(site, each.inputs).view(shape) for each in (pair.exact, pair.rounded))
            layer.kept.keep(batch, exact, rounded)
            here = self.stream.span(layer.index)
            before = [each.get(layer.index, batch)[:, here] for each in (streams.exact, streams.rounded)]
            residual = (before[0] - before[1]).flatten(0, -2).to(self.stream.resources.device)
            return list(replace(pair, residual=residual).seen())

        return self._sums(grams, self.stream.shared(work))

    def _sums(self, grams: Grams, batches: Iterator[list[tuple[int, Seen]]]) -> Grams:
        """Sums over all batches, one after the other; ranks share them out."""
        ranks = self.stream.resources.ranks
        with torch.inference_mode():
            for batch, found in enumerate(batches):
                for matrix, seen in found:
                    grams.add(matrix, batch % 2, seen, ranks)
            return grams.exchanged(ranks)

    def _head(self, weight: Weight, streams: Streams) -> Result:
        """The output head, fed by what the decoder makes of its last layer's states."""
        stream, name = self.stream, self.formats[weight.name]
        if name in UNROUNDED or weight.site is None:
            return self.plain(weight, name)
        ends = [each for each in stream.weights(None) if each.role in ENDS]
        fill(stream.model, ends, device=stream.resources.device)
        grams = Grams.empty(1, weight, stream.resources.device)

        def seen(batch: int) -> list[tuple[int, Seen]]:
            with torch.inference_mode():
                made = (stream.end(batch, hidden) for hidden in (streams.rounded, streams.exact))
                return [(0, Seen(*(each.last_hidden_state.flatten(0, -2) for each in made)))]

        mine = (seen(batch) for batch in stream.mine)  # the end of the model is crossed by one at a time
        grams = self._sums(grams, stream.resources.ranks.in_turn(mine, len(stream.batches)))
        release(stream.model, ends)
        return self._round([weight], grams)[weight.name]

    def _round(self, group: list[Weight], grams: Grams) -> dict[str, Result]:
        """Weights that share their inputs, of one matrix or of all heads; the first shrinks the Hessian."""
        rounder, first = self.rounder, group[0]

        def values(weight: Weight) -> Tensor:
            whole = self.stream.provider(weight)
            return whole if whole.ndim == 3 else whole[None]

        trial, once = self.rounding.trial, values(first)
        rows = trial.sampled(first.shape[-2])
        sample = rounder.target(once[:, rows], grams.rows(rows))
        hessian = shrink(rounder.format(first), sample, grams.halves, grams.tokens, trial).hessian
        bundles = rounder.bundles(group, grams)

        def work(mine: Sequence[list[Weight]]) -> list[list[Result]]:
            return [
                rounder.round(each, lambda one: once if one is first else values(one), hessian, grams)
                for each in mine
            ]

        costs = [sum(weight.numel for weight in each) for each in bundles]
        dealt = self.stream.resources.ranks.dealt(bundles, costs, work)
        found = {result[0].weight.name: result for each in dealt for result in each}
        return {weight.name: joined(weight, [found[weight.name]]) for weight in group}


def share(module: nn.Module, other: nn.Module) -> None:
    """Give `other`, a copy of `module`, the parameters and buffers that `module` has now."""
    # Buffers as well: a router's correction decides where tokens go.
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        parent, _, leaf = name.rpartition(".")
        setattr(other.get_submodule(parent), leaf, tensor)
