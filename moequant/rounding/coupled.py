"""Rounding coupled to the forward pass: a full-precision and a quantized stream cross the layers together.

At each layer, group by group in the order of execution, weights are rounded under the
Hessian of what the quantized stream feeds them (`shrinkage`, `feedback`), towards a target
that also undoes what earlier rounding did to their inputs (`target`). The next group and
the next layer see the layer as it was rounded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moequant import formats
from moequant.formats import Effort, Format, engine
from moequant.forward.hidden import Hidden
from moequant.forward.model import fill, held, release, replace_memory
from moequant.forward.stream import LayerStream
from moequant.forward.taps import recorder
from moequant.rounding.feedback import Options, Rounded, outputs_lost, round_to_hessian, usable
from moequant.rounding.paired import Capture, Grams, Pair, Seen
from moequant.rounding.recall import Kept
from moequant.rounding.shrinkage import Trial, shrink
from moequant.rounding.target import Coupling
from moequant.rounding.twosided import even_fisher
from moequant.statistics.fisher import Fishers, gather
from moequant.values import ExpertLoss, Packed, Role, Site, Weight
from moequant.values.ops import put

UNROUNDED = ("F32", "F16", "BF16")

MIXED = (Role.ATTN_OUT, Role.SSM_OUT)
"""Roles of the last product of what mixes tokens: attention, or a recurrence."""

FISHER_TOKENS = 49_152
"""Tokens whose gradients are taken at effort best."""

Result = tuple[Packed, ExpertLoss]

Plain = Callable[[Weight, str], Result]
"""Packs a weight in a format without any Hessian."""


@dataclass(frozen=True, slots=True)
class Rounding:
    """How weights are rounded.

    `coupling` None keeps targets as they are; `trial` chooses how Hessians are shrunk; `gram_bytes` bounds
    the Grams, `kept_bytes` what spares a second computation of attention (`recall`). The gradients of the
    first `fisher_tokens` say which outputs the loss feels (`fisher`); 0 does without.
    """

    coupling: Coupling | None = field(default_factory=Coupling)
    options: Options = field(default_factory=Options)
    trial: Trial = field(default_factory=Trial)
    gram_bytes: int = 4 << 30
    kept_bytes: int = 1 << 30
    fisher_tokens: int = 0

    @classmethod
    def of(cls, effort: Effort, coupled: bool = True) -> Rounding:
        """What an effort means; at `best` codes are searched for longer, under the Fisher as well."""
        options = Options(effort="best", rounds=6) if effort == "best" else Options(effort=effort)
        tokens = FISHER_TOKENS if effort == "best" else 0
        return cls(Coupling() if coupled else None, options, fisher_tokens=tokens)


@dataclass(frozen=True, slots=True)
class Streams:
    """Hidden states in full precision, and those of the model as it is rounded so far."""

    exact: Hidden
    rounded: Hidden

    @classmethod
    def under(cls, folder: Path, stream: LayerStream) -> Streams:
        """Room for both, spilled to sub-folders of `folder` where memory is limited."""
        both = folder / "exact", folder / "rounded"
        for each in both:
            each.mkdir()
        return cls(*(stream.new_hidden(each) for each in both))


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer while it is rounded: its number, a copy with the original weights, the norm in its middle,
    and what its attention makes of every batch."""

    index: int
    original: nn.Module
    middle: str
    kept: Kept

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

    def run(self, streams: Streams) -> Iterator[Result]:
        """Every weight, packed, in the order of the checkpoint. `streams` are filled on the way.

        CheckpointError when Fishers are asked for and the model does not fit into memory.
        """
        if self.rounding.fisher_tokens and self.fishers is None:
            yield from replace(self, fishers=self._gather()).run(streams)
            return
        stream = self.stream
        outside = stream.weights(None)
        for weight in outside:
            if weight.role is Role.EMBEDDING:
                result = self._embedding(weight)
                self._embed(result, streams)
            elif weight.role is not Role.OUTPUT and weight.name in self.formats:
                result = self.plain(weight, self.formats[weight.name])
            else:
                continue
            if result is not None:
                yield result
        copies = [copy.deepcopy(layer) for layer in stream.skeleton.layers]  # empty: on the meta device
        for index in stream.layers():
            share(stream.skeleton.layers[index], copies[index])
            layer = Layer(index, copies[index], self._middle(index), self._kept(index))
            yield from self._layer(layer, streams)
            copies[index] = nn.Identity()
        for weight in stream.checkpoint.weights:  # what is behind the layers, and not run
            if weight.layer is not None and not weight.runs and weight.name in self.formats:
                yield self.plain(weight, self.formats[weight.name])
        for weight in outside:
            if weight.role is Role.OUTPUT and weight.name in self.formats:
                yield self._head(weight, streams)

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
        hessian = even_fisher(self.fishers.embedding[None], self.rounding.options.own_fisher)
        values = self.stream.provider(weight)[None].to(hessian.device).float()
        found = round_to_hessian(fmt, values, hessian, self.rounding.options)
        return joined(weight, [judged(weight, fmt, values, found, hessian)])

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
            return Kept()
        last = inside(index, ends[0].place.param).removesuffix(".weight")
        others = 1 if self.stream.checkpoint.family.chosen is None else 2
        return Kept(last, others=0 if ends[0].role is Role.SSM_OUT else others)

    def _layer(self, layer: Layer, streams: Streams) -> list[Result]:
        weights = self.stream.weights(layer.index)
        done: dict[str, Result] = {}
        groups: dict[str, list[Weight]] = {}  # in the order in which their sites are first met
        for weight in weights:
            if weight.name not in self.formats:
                continue
            name = self.formats[weight.name]
            if weight.site is None or name in UNROUNDED or name == weight.origin.shipped:
                done[weight.name] = self.plain(weight, self.formats[weight.name])
            else:
                groups.setdefault(weight.site.name, []).append(weight)
        layers = layer.original, self.stream.skeleton.layers[layer.index]
        with reporting(layer, self.stream.model), layer.kept.used_by(*layers):
            for group in groups.values():
                done |= self._group(layer, group, streams)
                self._replace([done[weight.name][0] for weight in group])
            self._leave(layer, streams)
        return [done[weight.name] for weight in weights if weight.name in done]

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
        streams.exact.drop(index)
        streams.rounded.drop(index)

    def _group(self, layer: Layer, group: list[Weight], streams: Streams) -> dict[str, Result]:
        """Round weights that share their inputs, as many experts at a time as the Grams' memory allows."""
        first = group[0]
        rows = 3 * first.n_in + (first.shape[-2] if first.adds else 0)
        at_once = max(1, self.rounding.gram_bytes // (4 * rows * first.n_in))
        parts: dict[str, list[Result]] = {weight.name: [] for weight in group}
        for begin in range(0, first.matrices, at_once):
            experts = range(begin, min(begin + at_once, first.matrices))
            grams = self.collect(layer, first, experts, streams)
            hessian: Tensor | None = None
            shared = self._shared(group, experts, grams)
            for weight in group:
                result, hessian = self._round(weight, experts, grams, hessian, shared.get(weight.name))
                parts[weight.name].append(result)
        return {weight.name: joined(weight, parts[weight.name]) for weight in group}

    def collect(self, layer: Layer, weight: Weight, experts: range, streams: Streams) -> Grams:
        """Grams of these experts of the group of `weight`."""
        assert weight.site is not None
        site, routed = weight.site, f"layers.{layer.index}.experts.input" if weight.is_expert else ""
        grams = Grams.empty(len(experts), weight, self.stream.resources.device)
        block = layer.part(site.module) if weight.is_expert else None

        def work(batch: int) -> Pair:
            exact, rounded = (Capture(site, routed, layer.middle, inner) for inner in (False, True))
            told = layer.kept.recorders(batch, exact, rounded)
            self.stream.run(layer.index, batch, streams.exact, told[0], layer.original)
            self.stream.run(layer.index, batch, streams.rounded, told[1])
            residual = None
            if weight.role in MIXED:
                shape = (*self.stream.batches[batch].shape, -1)
                both = (as_fed(site, each.inputs).view(shape) for each in (exact, rounded))
                layer.kept.keep(batch, *both)
                before = [each.get(layer.index, batch) for each in (streams.exact, streams.rounded)]
                residual = (before[0] - before[1]).flatten(0, -2).to(self.stream.resources.device)
            elif weight.adds and exact.residual is not None and rounded.residual is not None:
                residual = exact.residual - rounded.residual
            return Pair(exact, rounded, residual)

        with torch.inference_mode():
            for batch, pair in enumerate(self.stream.each(work)):
                for expert, seen in pair.seen(weight, block):
                    if expert in experts:
                        grams.add(expert - experts.start, batch % 2, seen)
        return grams

    def _head(self, weight: Weight, streams: Streams) -> Result:
        """The output head, fed by the final norm."""
        stream, name = self.stream, self.formats[weight.name]
        if name in UNROUNDED or weight.site is None:
            return self.plain(weight, name)
        norms = [each for each in stream.weights(None) if each.role in (Role.NORM, Role.BIAS)]
        fill(stream.model, norms, device=stream.resources.device)
        norm = stream.model.get_submodule(weight.site.module)
        grams = Grams.empty(1, weight, stream.resources.device)
        with torch.inference_mode():
            for batch in range(len(stream.batches)):
                both = [
                    norm(hidden.get(stream.n_layers, batch).to(stream.resources.device)).flatten(0, -2)
                    for hidden in (streams.rounded, streams.exact)
                ]
                grams.add(0, batch % 2, Seen(*both))
        release(stream.model, norms)
        result, _ = self._round(weight, range(1), grams)
        return joined(weight, [result])

    def _target(self, weight: Weight, experts: range, grams: Grams) -> Tensor:
        """What these experts are rounded towards: f32 [E, out, in]."""
        values = self.stream.provider(weight)
        stack = values if values.ndim == 3 else values[None]
        values = stack[experts.start : experts.stop].to(grams.cross.device)
        coupling = self.rounding.coupling
        return values.float() if coupling is None else coupling.target(values, grams)

    def _shared(self, group: list[Weight], experts: range, grams: Grams) -> dict[str, Tensor]:
        """By weight, scales that it has in common with others of its group."""
        found: dict[str, Tensor] = {}
        for name in {self.formats[weight.name] for weight in group}:
            fmt, members = formats.get(name), [w for w in group if self.formats[w.name] == name]
            if fmt.shared is None or not fmt.shared.across or len(members) == 1:
                continue
            rows = torch.cat([self._target(weight, experts, grams) for weight in members], 1)
            first, second = (half.diagonal(dim1=1, dim2=2).double() for half in grams.halves)
            d = engine.shared_scales(fmt, rows, usable(first + second), self.rounding.options.effort)
            parts = torch.split(d, [weight.shape[-2] for weight in members], 1)
            found |= {weight.name: part for weight, part in zip(members, parts, strict=True)}
        return found

    def _round(
        self,
        weight: Weight,
        experts: range,
        grams: Grams,
        hessian: Tensor | None = None,
        shared: Tensor | None = None,
    ) -> tuple[Result, Tensor]:
        """These experts of a weight; also the shrunk Hessian, for weights that share inputs."""
        fmt, options = formats.get(self.formats[weight.name]), self.rounding.options
        target = self._target(weight, experts, grams)
        if hessian is None:
            hessian = shrink(fmt, target, grams.halves, grams.tokens, self.rounding.trial).hessian
        felt = None if self.fishers is None else self.fishers.outputs.get(weight.name)
        fisher = None if felt is None else felt[experts.start : experts.stop]
        found = round_to_hessian(fmt, target, hessian, options, fisher, shared)
        own = (first + second for first, second in zip(*grams.halves, strict=True))
        return judged(weight, fmt, target, found, own, grams.tokens), hessian


def judged(
    weight: Weight,
    fmt: Format,
    target: Tensor,
    found: Rounded,
    hessians: Iterable[Tensor],
    tokens: Tensor | None = None,
) -> Result:
    """Experts target f32 [E, out, in] as they were rounded, and what each lost under its Hessian [in, in]."""
    each = list(zip(target, found.data, strict=True))
    both = [
        (outputs_lost(fmt, values, data, hessian), ((values @ hessian) * values).sum().double().cpu())
        for (values, data), hessian in zip(each, hessians, strict=True)
    ]
    lost, energy = (torch.stack(part) for part in zip(*both, strict=True))
    loss = ExpertLoss(
        weight=weight.name,
        role=weight.role,
        layer=weight.layer,
        format=fmt.name,
        error=(lost / energy.clamp_min(torch.finfo(torch.float64).tiny)).nan_to_num(),
        tokens=tokens if weight.is_expert else None,
        fallbacks=tuple(bad.reason for bad in found.fallbacks),
    )
    return Packed(weight, fmt.name, found.data.cpu()), loss


def decoded(packed: Packed) -> Tensor:
    """The values that a runtime will see, f32, shape of the weight."""
    return formats.dequantize(formats.get(packed.format), packed.data).reshape(packed.weight.shape)


def joined(weight: Weight, parts: list[Result]) -> Result:
    """One weight of parts that hold some experts each."""
    data = torch.cat([packed.data for packed, _ in parts]).reshape(*weight.shape[:-1], -1)
    losses = [loss for _, loss in parts]
    tokens = [loss.tokens for loss in losses if loss.tokens is not None]
    return Packed(weight, parts[0][0].format, data), ExpertLoss(
        weight=weight.name,
        role=weight.role,
        layer=weight.layer,
        format=losses[0].format,
        error=torch.cat([loss.error for loss in losses]),
        tokens=torch.cat(tokens) if tokens else None,
        fallbacks=tuple(reason for loss in losses for reason in loss.fallbacks),
    )


def share(module: nn.Module, other: nn.Module) -> None:
    """Give `other`, a copy of `module`, the parameters and buffers that `module` has now."""
    # Buffers as well: a router's correction decides where tokens go.
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        parent, _, leaf = name.rpartition(".")
        setattr(other.get_submodule(parent), leaf, tensor)
