"""Which folders of a model GPUs hold when vLLM serves it: as it is stored, in one scheme, or mixed.

With tensor parallelism every GPU holds its part of every weight and of the cache; all of them are alike, so
one is counted. Decoding a token reads every weight that it uses once: bytes over bandwidth bound its speed.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moequant.checkpoint import Checkpoint, Folder
from moequant.checkpoint.codecs import RELEASED as RELEASED_IN
from moequant.containers.folders import mxfp4
from moequant.containers.folders.container import FolderContainer
from moequant.containers.folders.plan import KEPT, FolderSettings, check_tp
from moequant.containers.gguf.sizes import Budget
from moequant.containers.opened import open_model
from moequant.errors import FamilyError, PlanError
from moequant.escape import of_cache, shown
from moequant.hub import HubModel, Model, located
from moequant.plan.folder_curve import FolderPoints
from moequant.plan.folders import FolderMenu, bounds
from moequant.runtimes.vllm import memory
from moequant.runtimes.vllm.memory import RESERVE, UTILIZATION, Serving
from moequant.values import Plan

AS_IT_IS, MIXED = "as it is", "mixed"
"""Names of the candidates that are not one scheme."""

RELEASED = "MXFP4A16"
"""The scheme of a family whose experts loaders take only as they are released."""


@dataclass(frozen=True, slots=True)
class Gpus:
    """GPUs that are alike: bytes of memory and bytes per second of each, and the share of memory that vLLM
    may take. How many they are, `Serving.tp` says.

    PlanError for what is no such number.
    """

    vram: int
    bandwidth: float = 900e9
    utilization: float = UTILIZATION

    def __post_init__(self) -> None:
        """See the class."""
        if self.vram < 1:
            raise PlanError(f"--vram {self.vram}: vLLM serves from GPU memory, such as 24GiB")
        if not 0 < self.bandwidth < math.inf:
            raise PlanError(
                f"--vram-bandwidth {self.bandwidth / 1e9:g}: a number of GB/s above 0 was expected"
            )
        if not 0 < self.utilization <= 1:
            raise PlanError(
                f"--utilization {self.utilization:g}: a share above 0 and of at most 1 was expected"
            )

    @property
    def room(self) -> int:
        """Bytes that vLLM takes of one (`request_memory` in v1/worker/utils.py)."""
        return math.ceil(self.vram * self.utilization)


@dataclass(frozen=True, slots=True)
class OnGpu:
    """What one GPU holds, in bytes: experts, other weights, the cache with all contexts full, room to compute
    and the reserve.

    `tokens` are those that the cache has room for, with all that is left. A token of an empty context reads
    `read` bytes, one at the end of a full one `kv_read` more.
    """

    experts: int
    weights: int
    kv: int
    compute: int
    reserve: int
    tokens: int
    read: float
    kv_read: float

    @property
    def total(self) -> int:
        """All of it."""
        return self.experts + self.weights + self.kv + self.compute + self.reserve


@dataclass(frozen=True, slots=True)
class Served:
    """One folder that could be served. `kl` is the KL divergence that tables expect, None when it is not
    known; `lacking` are bytes that one GPU is short of. `convert` makes the folder: None where it is there.
    Speeds are tokens per second at most, for one sequence of an empty and of a full context."""

    name: str
    file_bytes: int
    weight_bits: float
    kl: float | None
    gpu: OnGpu
    lacking: int
    speed: float
    speed_full: float
    convert: str | None
    command: str

    @property
    def fits(self) -> bool:
        """Whether every GPU has room."""
        return self.lacking == 0


@dataclass(frozen=True, slots=True)
class FolderFit:
    """The answer: all candidates, largest first, and the one of least expected loss that fits."""

    path: Path
    gpus: Gpus
    serving: Serving
    candidates: tuple[Served, ...]
    best: Served | None
    notes: tuple[str, ...]


def fit_folder(
    model: Model, gpus: Gpus, serving: Serving, schemes: str | None = None, gpu: float | None = None
) -> FolderFit:
    """Place a model folder, or one of the Hub, on GPUs: as it is stored and, where it is stored as models are
    released, in every scheme of `schemes` (by commas) that runs on compute capability `gpu`, and in the
    largest mixture that fits. Of an FP8 release schemes are tried that make it smaller.

    `best` is the folder of least expected KL divergence among those that fit. Raises what reading the model
    raises; PlanError for a load that it cannot have and for unknown schemes.
    """
    from moequant.hub.fetch import headers  # torch

    place = located(model)
    if place.file if isinstance(place, HubModel) else place.is_file():
        raise PlanError(f"{place}: vLLM serves folders; give one, or leave --format safetensors out")
    folder: Folder = headers(place)
    checkpoint = open_model(folder)
    serving = serving.within(checkpoint.shape.context)
    found = _Model(checkpoint, gpus, serving)
    candidates, notes = [found.as_it_is()], list(found.notes())
    if found.is_released:
        settings = FolderSettings(schemes=schemes, gpu=gpu, tp=serving.tp)
        try:
            made = list(found.quantized(settings, notes))
        except FamilyError as error:
            made = []
            notes.append(str(error))
        smaller = [each for each in made if found.is_plain or each.file_bytes < candidates[0].file_bytes]
        if len(smaller) < len(made):
            notes.append(
                "an FP8 release: schemes that would make it larger are left out; KL is to the release"
            )
        candidates += smaller
    elif schemes is not None:
        raise PlanError(f"--schemes: {shown(folder.path)} is quantized already; leave it out")
    else:
        notes.append(
            "quantized already, so no other scheme is tried here; moequant plan --format safetensors has "
            "their sizes, and convert makes them"
        )
    candidates.sort(key=lambda each: -each.file_bytes)
    good = [each for each in candidates if each.fits]
    best = min(good, key=lambda each: (each.kl is None, each.kl or 0.0), default=None)
    return FolderFit(folder.path, gpus, serving, tuple(candidates), best, tuple(notes))


class _Model:
    """A checkpoint on these GPUs."""

    def __init__(self, checkpoint: Checkpoint, gpus: Gpus, serving: Serving) -> None:
        memory.check(checkpoint, serving)
        experts = [w for w in checkpoint.weights if w.is_expert and w.runs and len(w.shape) == 3]
        check_tp(checkpoint, experts, serving.tp)
        self.checkpoint, self.gpus, self.serving = checkpoint, gpus, serving
        self.stored = memory.stored_bytes(checkpoint.weights)
        batch = serving.batch(gpus.vram)
        self._compute = memory.compute_bytes(checkpoint, serving, batch)
        self._kv = memory.cache_bytes(checkpoint, serving, batch)
        self._weights = sum(weight.numel for weight in checkpoint.weights)
        path = checkpoint.source
        self.name = shown(path if of_cache(path) else path.resolve()).rpartition("/")[2]

    @property
    def is_plain(self) -> bool:
        """Whether the checkpoint holds floats only."""
        return all(each.codec.name == "plain" for w in self.checkpoint.weights for each in w.origin.stored)

    @property
    def is_released(self) -> bool:
        """Whether it holds floats, or FP8 as a release; gpt-oss in its MXFP4 has no other scheme."""
        kinds = {each.codec.name for w in self.checkpoint.weights for each in w.origin.stored}
        return self.is_plain or (kinds <= {*RELEASED_IN} and self.checkpoint.family.name != mxfp4.FAMILY)

    def notes(self) -> Iterator[str]:
        """What is not counted."""
        for reason, count in self.checkpoint.skipped.items():
            yield f"not counted: {count:,} tensors ({reason})"

    def as_it_is(self) -> Served:
        """The folder that is there."""
        path = self.checkpoint.source
        served = shown(path) if of_cache(path) else str(path)
        kl = 0.0 if self.is_released else None
        return self._candidate(AS_IT_IS, self.checkpoint.source_bytes, kl, self.stored, served, None)

    def quantized(self, settings: FolderSettings, notes: list[str]) -> Iterator[Served]:
        """What `convert --format safetensors` can make of it; `notes` get why a scheme is not among it.
        FamilyError where nothing is."""
        if self.checkpoint.family.name == mxfp4.FAMILY:
            released = replace(settings, scheme=RELEASED, schemes=None, gpu=None)
            folder = FolderContainer(self.checkpoint, released)
            yield self._made(folder, folder.plan, RELEASED, None, ("--scheme", RELEASED))
            return
        folder = FolderContainer(self.checkpoint, settings)
        menu = FolderMenu.of(folder.checkpoint, settings)
        known = menu.prior(folder.checkpoint.weights, folder.checkpoint.n_layers)
        points = FolderPoints(menu, folder.size, known)
        for scheme in menu.allowed:
            try:
                point = points.of_scheme(scheme)
            except PlanError as error:
                notes.append(f"{scheme.name}: {error}")
                continue
            assert point.plan is not None
            yield self._made(folder, point.plan, scheme.name, point.predicted, ("--scheme", scheme.name))
        mixed = self._mixed(points)
        if mixed is not None:
            told = ["--size", str(folder.size(mixed))]
            told += [] if settings.schemes is None else ["--schemes", settings.schemes]
            told += [] if settings.gpu is None else ["--gpu", f"{settings.gpu:g}"]
            yield self._made(folder, mixed, MIXED, mixed.kl, told)

    def _mixed(self, points: FolderPoints) -> Plan | None:
        """The plan of least loss that fits, by tables; None when none does, or nothing need be rounded."""
        low, size = bounds(points.menu, points.size, points.known)
        while True:
            (point,) = points.of([Budget("what fits", file_bytes=size)])
            assert point.plan is not None
            over = self._load(self._bytes(point.plan)).total - self.gpus.room
            if over <= 0:
                return point.plan if any(each.format not in KEPT for each in point.plan.choices) else None
            if size == low:
                return None
            size = max(low, min(size, point.file_bytes) - over * self.serving.tp)

    def _bytes(self, plan: Plan) -> Mapping[str, int]:
        """By weight, what a plan's folder takes: floats in 16 bits."""
        return {
            choice.weight: self.stored.get(choice.weight, 0) if choice.format in KEPT else choice.bytes
            for choice in plan.choices
        }

    def _made(
        self, folder: FolderContainer, plan: Plan, name: str, kl: float | None, told: Sequence[str]
    ) -> Served:
        path = self.checkpoint.source
        model, out = shown(path) if of_cache(path) else str(path), f"{self.name}-{name}/"
        words = ["moequant", "convert", model, "-o", out, "--format", "safetensors", *told]
        words += ["--tp", str(self.serving.tp)] if self.serving.tp > 1 else []
        return self._candidate(name, folder.size(plan), kl, self._bytes(plan), out, shlex.join(words))

    def _candidate(
        self,
        name: str,
        file_bytes: int,
        kl: float | None,
        sizes: Mapping[str, int],
        path: str,
        convert: str | None,
    ) -> Served:
        load, bandwidth = self._load(sizes), self.gpus.bandwidth
        return Served(
            name,
            file_bytes,
            8 * sum(sizes[weight.name] for weight in self.checkpoint.weights) / self._weights,
            kl,
            load,
            max(0, load.total - self.gpus.room),
            bandwidth / load.read,
            bandwidth / (load.read + load.kv_read),
            convert,
            command(path, self.serving, self.gpus),
        )

    def _load(self, sizes: Mapping[str, int]) -> OnGpu:
        """What one GPU holds when weights take these bytes."""
        experts = dense = 0
        read = 0.0
        for weight in self.checkpoint.weights:
            size = memory.bytes_on_gpu(weight, sizes[weight.name], self.checkpoint, self.serving.tp)
            if weight.is_expert:
                experts += size
            else:
                dense += size
            read += size * memory.active_share(weight, self.checkpoint.shape)
        left = self.gpus.room - experts - dense - self._compute - RESERVE
        every = sum(memory.cell_bytes(self.checkpoint, self.serving).values())
        return OnGpu(
            experts,
            dense,
            self._kv,
            self._compute,
            RESERVE,
            max(0, left // every),
            read,
            self._kv / self.serving.parallel,
        )


def command(path: str, serving: Serving, gpus: Gpus) -> str:
    """The line that starts vLLM so."""
    words = ["vllm", "serve", path, "--max-model-len", str(serving.ctx)]
    words += ["--max-num-seqs", str(serving.parallel)]
    if serving.tp > 1:
        words += ["--tensor-parallel-size", str(serving.tp)]
    if serving.cache_type != "auto":
        words += ["--kv-cache-dtype", serving.cache_type]
    if gpus.utilization != UTILIZATION:
        words += ["--gpu-memory-utilization", f"{gpus.utilization:g}"]
    return shlex.join(words)
