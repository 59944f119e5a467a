"""Layer-major streaming: all batches cross a layer, then its weights make room for the next.

At any moment the weights of one decoder layer are in memory, or of some of its experts where it is too large
(`passage`). Every tensor is read once a pass, and hidden states wait between layers in memory or on disk.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from moequant.checkpoint import Checkpoint, load
from moequant.errors import CheckpointError, foreign
from moequant.files import scratch
from moequant.forward.calls import Skeleton, beside
from moequant.forward.experts import EXPERTS
from moequant.forward.hidden import Hidden, InMemory, OnDisk
from moequant.forward.joined import span
from moequant.forward.lookup import looked_up
from moequant.forward.memory import ONE, Versions, chunks, usable_bytes
from moequant.forward.model import Provider, empty_model, fill, own_buffers, release, some_experts, using
from moequant.forward.passage import Passage, Way
from moequant.forward.resources import FREE, Resources
from moequant.forward.taps import Enough, Recorder, recording, watch
from moequant.values import Role, Site, Weight

ENDS = frozenset({Role.NORM, Role.BIAS, Role.STREAMS})
"""Roles of the weights behind the last layer and in front of the head."""

R = TypeVar("R", bound=Recorder)
T = TypeVar("T")


@dataclass(slots=True)
class Reader:
    """Loads weights and counts what it reads; keeps them when `keep` says that the model fits."""

    keep: bool = False
    bytes: int = 0
    reads: dict[str, int] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    _counting: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, weight: Weight) -> Tensor:
        """The weight's values in the checkpoint's dtype, see `checkpoint.load`."""
        if weight.name in self.kept:
            return self.kept[weight.name]
        values = load(weight)
        keep = self.keep and weight.origin.rows is None  # another pass looks up other rows
        with self._counting:  # the next layer is read by a thread of its own
            self.bytes += values.numel() * values.element_size()
            self.reads[weight.name] = self.reads.get(weight.name, 0) + 1
            if keep:
                self.kept[weight.name] = values
        return values


def sites(weights: Iterable[Weight]) -> tuple[Site, ...]:
    """Every site of the weights, once."""
    return tuple({weight.site.name: weight.site for weight in weights if weight.site is not None}.values())


class LayerStream:
    """The layers of a checkpoint, one at a time, and rows of tokens that cross them together.

    `ids` i64 [rows, n]. `whole` runs the model with its head, otherwise up to the final norm; `experts`
    names the registered function that runs the MoE blocks. Recorders are told of `watched`, by default of
    the sites of all weights. Use as a context manager; hidden states are the caller's (`new_hidden`), so
    that several versions of the stream can cross the same layer. `among` says how many versions of weights
    are in memory together, and of hidden states; it decides what is in memory, never what comes out.

    Of tables that tokens look rows up in, the stream's `checkpoint` has the rows of `ids` alone; `tables` are
    those tables as they are, by name.

    Batches are dealt to ranks: each has the hidden states of `mine` alone, and lets those alone cross.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        ids: Tensor,
        resources: Resources = FREE,
        provider: Provider = load,
        whole: bool = False,
        experts: str = EXPERTS,
        watched: Iterable[Site] | None = None,
        among: Versions = ONE,
    ) -> None:
        self.resources, self.provider, self.whole = resources, provider, whole
        self.model = empty_model(checkpoint, experts, resources.device)
        watch(self.model, sites(checkpoint.weights) if watched is None else watched)
        self.batches = list(torch.split(ids, max(1, resources.batch_tokens // ids.shape[1])))
        self.mine = resources.ranks.mine(len(self.batches))
        self.tables = {weight.name: weight for weight in checkpoint.weights if weight.is_table}
        self.checkpoint = looked_up(checkpoint, self.model, self.batches, resources.device, resources.share)
        self._unfit = f"{checkpoint.path}: transformers cannot run the model that config.json describes"
        with foreign(CheckpointError, self._unfit):
            self.skeleton = Skeleton(
                self.model,
                self.model if whole else self.model.get_submodule(checkpoint.family.decoder),
                checkpoint.family.layers_at,
                [batch.to(resources.device) for batch in self.batches],
                beside(checkpoint, ids.shape[1]),
            )
        self._ahead: dict[str, Future[Tensor]] = {}
        self._disk = ThreadPoolExecutor(1)
        self._kept, self._rooms = ExitStack(), 0
        self._folder: Path | None = None
        self._among, self._limit = among, resources.share
        usable = usable_bytes(self._limit, resources.device)
        if resources.reads_ahead and usable is not None:
            usable //= 2
        self._chunks = [chunks(self.weights(layer), among.weights, usable) for layer in range(self.n_layers)]

    @property
    def n_layers(self) -> int:
        """Decoder layers."""
        return len(self.skeleton.layers)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes [rows, n, h] of every batch's hidden states; [rows, n, streams, h] where those are more, or
        [rows, n, streams · h]."""
        shape = self.checkpoint.shape
        ends: tuple[int, ...] = (shape.streams, shape.hidden)
        if shape.streams == 1 or shape.in_a_row:
            ends = (shape.streams * shape.hidden,)
        return [(*batch.shape, *ends) for batch in self.batches]

    def span(self, layer: int) -> slice:
        """The tokens of a row that the layer computes with; it passes on the states of the others."""
        return span(self.skeleton.layers[layer], self.batches[0].shape[1])

    def tokens(self, layer: int, batch: int) -> tuple[int, int]:
        """Rows and tokens of a row, of those that the layer computes with."""
        rows, length = self.batches[batch].shape
        return rows, len(range(length)[self.span(layer)])

    def __enter__(self) -> LayerStream:
        return self

    def __exit__(self, *error: object) -> None:
        self._disk.shutdown(cancel_futures=True)
        self._kept.close()

    def weights(self, layer: int | None) -> tuple[Weight, ...]:
        """The weights of a decoder layer, or those outside all layers."""
        return tuple(weight for weight in self.checkpoint.weights if weight.layer == layer)

    def chunks(self, layer: int) -> tuple[range, ...]:
        """The experts that come into memory at a time; () where the layer is there as a whole."""
        return self._chunks[layer]

    def resident(self, layer: int) -> tuple[Weight, ...]:
        """The weights of a layer that are in memory while it is crossed."""
        return tuple(each for each in self.weights(layer) if not (each.is_expert and self.chunks(layer)))

    def experts(self, layer: int) -> tuple[Weight, ...]:
        """The weights of a layer's routed experts."""
        return tuple(each for each in self.weights(layer) if each.is_expert and each.runs)

    def new_hidden(self, folder: Path, among: int | None = None) -> Hidden:
        """Room for the hidden states: see `room`."""
        return self.room(folder, self.shapes, among)

    def inside(self, folder: Path, layer: int, width: int, among: int | None = None) -> Hidden:
        """Room for so many numbers [n, width] a token that the layer computes with: see `room`."""
        every = (self.tokens(layer, batch) for batch in range(len(self.batches)))
        return self.room(folder, [(rows * tokens, width) for rows, tokens in every], among)

    def room(self, folder: Path, shapes: Sequence[tuple[int, ...]], among: int | None = None) -> Hidden:
        """Room for a tensor of its own shape a batch: in memory when half of the limit holds them and the
        others, so many as there are `among` them (None: all that crossing layers takes), else under
        `folder`."""
        if among is None:
            among = self._among.states * (3 if any(self._chunks) else 1)
        needed = 4 * sum(math.prod(shape) for shape in shapes)
        if self._limit is None or among * needed <= self._limit // 2:
            return InMemory(shapes)
        return OnDisk(folder, shapes)

    def embed(self, hidden: Hidden, provider: Provider | None = None) -> None:
        """Fill `hidden` with what the first layer is fed; `provider` has other weights than the stream's."""
        embedding = self._outside(Role.EMBEDDING)
        self._fill(embedding, provider)
        with torch.inference_mode():
            for batch, states in enumerate(self.skeleton.embed()):
                if batch in self.mine:
                    hidden.put(0, batch, states)
        release(self.model, embedding)

    def layers(self, first: int = 0, experts: bool = True) -> Iterator[int]:
        """Each decoder layer in turn, from `first`, with its `resident` weights in memory; without `experts`
        those of routed experts are left to the caller."""

        def wanted(layer: int) -> tuple[Weight, ...]:
            return tuple(weight for weight in self.resident(layer) if experts or not weight.is_expert)

        for layer in range(first, self.n_layers):
            self._fill(wanted(layer))
            if layer + 1 < self.n_layers and self.resources.reads_ahead:
                self._read_ahead(wanted(layer + 1))
            yield layer
            release(self.model, self.weights(layer))

    def refill(
        self, layer: int, provider: Provider, filled: Callable[[list[Weight]], None] = lambda weights: None
    ) -> None:
        """The layer's resident weights from elsewhere instead of those that are in memory.

        `filled` is told, parameter by parameter, of the weights that are in it.
        """
        release(self.model, self.weights(layer))
        own_buffers(self.model, self.weights(layer))
        parameters: dict[str, list[Weight]] = {}
        for weight in self.resident(layer):
            parameters.setdefault(weight.place.param, []).append(weight)
        for weights in parameters.values():
            fill(self.model, weights, provider, None, self.resources.device)
            filled(weights)

    def part(self, layer: int, experts: range, provider: Provider | None = None) -> nn.Module:
        """The layer's module of experts with these alone, read from the stream's provider or from another."""
        weights = self.experts(layer)
        module = self.model.get_submodule(weights[0].place.param.rpartition(".")[0])
        return some_experts(module, weights, experts, provider or self.provider, self.resources.device)

    def cross(self, layer: int, hidden: Hidden, make: Callable[[int], R], into: Hidden | None) -> Iterator[R]:
        """`mine` through the layer with its present weights, each with its own recorder `make(batch)`.

        Outputs go to `into` as what is fed to the next layer (None: nowhere). Recorders
        come back in the order of the batches, whatever the threads do. Experts that are not resident are
        read.
        """
        passage = self._passage(layer, [(hidden, into)], make)
        if not self.chunks(layer):
            yield from passage.through()
            return
        passage.reach()
        for experts in self.chunks(layer):
            passage.multiply(self.part(layer, experts), experts)
        yield from passage.leave()

    def enter(
        self, layer: int, ways: Sequence[tuple[Hidden, Hidden | None]], make: Callable[[int], R]
    ) -> Passage[R]:
        """The batches of ways (hidden states, and where they go) that have the present weights in common:
        behind the layer, or in front of its experts where those come some at a time. The caller lets all
        `chunks` multiply them, and `leave`s."""
        passage = self._passage(layer, ways, make)
        if self.chunks(layer):
            passage.reach()
        else:
            passage.told.extend(passage.through())
        return passage

    def _passage(
        self, layer: int, ways: Sequence[tuple[Hidden, Hidden | None]], make: Callable[[int], R]
    ) -> Passage[R]:
        rooms = self._for_experts if self.chunks(layer) else lambda layer: None
        return Passage(self, layer, [Way(*way, rooms(layer)) for way in ways], make)

    def _for_experts(self, layer: int) -> tuple[Hidden, Hidden]:
        """Room for what experts are fed and give."""
        (width,) = {each.n_in for each in self.experts(layer) if each.site and each.site.side == "experts"}
        if self._folder is None:
            self._folder = self._kept.enter_context(scratch())
        self._rooms += 1
        fed, gave = (
            self.inside(self._folder / f"{self._rooms}-{name}", layer, width) for name in ("fed", "gave")
        )
        return fed, gave

    def run(
        self, layer: int, batch: int, hidden: Hidden, told: Recorder | None, module: nn.Module | None = None
    ) -> Tensor | None:
        """One batch through the layer, or `module` in its place; None when the recorder had enough."""
        states = hidden.get(layer, batch).to(self.resources.device)
        with foreign(CheckpointError, self._unfit), torch.inference_mode(), recording(told):
            try:
                return self.skeleton.call(layer, batch).run(module or self.skeleton.layers[layer], states)
            except Enough:
                return None

    def shared(self, work: Callable[[int], T]) -> Iterator[T]:
        """`work(batch)` for every batch, in their order, on every rank; each is worked at by one."""
        return self.resources.ranks.in_turn(self.each(work), len(self.batches))

    def each(self, work: Callable[[int], T], numbers: Sequence[int] | None = None) -> Iterator[T]:
        """`work(batch)` for `mine`, or for other numbers, a few at a time; results in their order."""
        # More threads than cores would only wait; torch's own threads would wait for each other.
        workers = self.resources.workers
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as running:
            waiting = deque[Future[T]]()
            try:
                for batch in self.mine if numbers is None else numbers:
                    waiting.append(running.submit(work, batch))
                    if len(waiting) > workers:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                running.shutdown(cancel_futures=True)

    def finish(
        self, hidden: Hidden, make: Callable[[int], R], provider: Provider | None = None
    ) -> Iterator[tuple[R, Any]]:
        """The end of the forward pass for `mine`, one by one: its recorder and what the model returns."""
        with self.ends(provider):
            for batch in self.mine:
                told = make(batch)
                with recording(told):
                    result = self.end(batch, hidden)
                yield told, result

    @contextmanager
    def ends(self, provider: Provider | None = None) -> Iterator[None]:
        """Inside the block the weights behind the layers are in memory, and `end` can be called."""
        roles = ENDS | ({Role.OUTPUT, Role.EMBEDDING} if self.whole else set())
        ends = self._outside(*roles)
        self._fill(ends, provider)
        self.tie()
        try:
            yield
        finally:
            release(self.model, ends)
            self.tie()

    def end(self, batch: int, hidden: Hidden, **asked: Any) -> Any:
        """What the model returns for a batch that has crossed all layers, its forward being `asked` so."""
        with torch.inference_mode():
            states = hidden.get(self.n_layers, batch).to(self.resources.device)
            return self.skeleton.finish(batch, states, **asked)

    def tie(self) -> None:
        """Where one matrix is embedding and head, the head is what the embedding is now."""
        if self.whole and self.checkpoint.tied:
            self.model.get_output_embeddings().weight = self.model.get_input_embeddings().weight

    @contextmanager
    def only(self, tokens: Tensor) -> Iterator[None]:
        """Inside the block the head, which is in memory, has logits of these tokens alone, i64 [s]."""
        head = self.model.get_output_embeddings()
        path = next(name for name, module in self.model.named_modules() if module is head)
        whole = {f"{path}.{name}": values for name, values in head.named_parameters()}
        with using(self.model, {name: values[tokens.to(values.device)] for name, values in whole.items()}):
            yield

    def _outside(self, *roles: Role) -> tuple[Weight, ...]:
        """Weights of these roles outside all layers, the embedding only when something computes with it."""
        found = [weight for weight in self.weights(None) if weight.role in roles]
        if Role.OUTPUT in roles and not self.checkpoint.tied:
            found = [weight for weight in found if weight.role is not Role.EMBEDDING]
        return tuple(found)

    def _fill(self, weights: tuple[Weight, ...], other: Provider | None = None) -> None:
        if other is not None:
            fill(self.model, weights, other, None, self.resources.device)
            return
        ahead, self._ahead = self._ahead, {}

        def provider(weight: Weight) -> Tensor:
            return ahead.pop(weight.name).result() if weight.name in ahead else self.provider(weight)

        fill(self.model, weights, provider, None, self.resources.device)

    def _read_ahead(self, weights: tuple[Weight, ...]) -> None:
        self._ahead = {weight.name: self._disk.submit(self.provider, weight) for weight in weights}
