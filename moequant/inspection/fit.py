"""Where a model goes on a machine: which layers and experts on the GPU, in system memory, on the disk.

Everything that a token always needs (attention, shared experts, norms, head, KV cache) goes to the GPU
first, then the experts of as many layers as still fit, from the last layer back, which is what llama.cpp's
`--n-cpu-moe N` does: it keeps the experts of the first N layers in system memory. Decoding one token reads
every weight that it uses once, so bytes over bandwidth bound its speed from above.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from moequant.containers.gguf.header import Header
from moequant.containers.gguf.read import read_header
from moequant.containers.gguf.roles import is_embedding, is_tied
from moequant.errors import CheckpointError, PlanError
from moequant.escape import of_cache, shown
from moequant.hub import HubModel, Model, located
from moequant.inspection.values import PresetFile
from moequant.runtimes.llama_cpp.kv_cache import (
    Load,
    compute_bytes,
    experts_used,
    host_compute_bytes,
    kv_bytes,
)
from moequant.runtimes.llama_cpp.overrides import experts_on_cpu

RESERVE = 2**30
"""Bytes of GPU memory left to the driver and its context: llama.cpp's own default margin (`-fitt 1024`)."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """Bytes, and bytes per second; experts may spill to the disk when it has a bandwidth.

    PlanError for a bandwidth that is no positive number.
    """

    vram: int
    ram: int
    vram_bandwidth: float = 900e9
    ram_bandwidth: float = 60e9
    disk_bandwidth: float | None = None

    def __post_init__(self) -> None:
        """See the class."""
        for name in ("vram_bandwidth", "ram_bandwidth", "disk_bandwidth"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                option = f"--{name.replace('_', '-')}"
                raise PlanError(f"{option} {value / 1e9:g}: a number of GB/s above 0 was expected")


@dataclass(frozen=True, slots=True)
class Share:
    """What one memory holds, in bytes; `read` of it are read for one token of an empty context.

    `kv_read` more are read for a token at the end of a full one.
    """

    weights: int = 0
    experts: int = 0
    kv: int = 0
    compute: int = 0
    read: float = 0.0
    kv_read: float = 0.0

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.experts + self.kv + self.compute


@dataclass(frozen=True, slots=True)
class Placement:
    """What is where: `gpu_layers` as `-ngl` counts them, experts of the first `cpu_moe` layers not there.

    `disk` are bytes of those experts that do not fit in memory, `lacking` bytes that have no place.
    """

    layers: int
    gpu_layers: int
    cpu_moe: int
    gpu: Share
    ram: Share
    disk: int
    lacking: int
    speed: float
    speed_full: float

    @property
    def fits(self) -> bool:
        """Whether every byte has a place."""
        return self.lacking == 0

    @property
    def all_on_gpu(self) -> bool:
        """Whether no layer computes in system memory."""
        return self.fits and self.gpu_layers > self.layers and self.cpu_moe == 0


@dataclass(frozen=True, slots=True)
class Candidate:
    """One file that could be served: a preset of a checkpoint, or the GGUF file that was given.

    `kl` is the KL divergence that the preset's plan expects; None when that is not known.
    """

    name: str
    file: str
    file_bytes: int
    weight_bits: float
    kl: float | None
    placement: Placement
    command: str
    override: str | None


@dataclass(frozen=True, slots=True)
class Fit:
    """The answer: all candidates, largest first; the best that fits; the best that needs no system memory."""

    path: Path
    hardware: Hardware
    load: Load
    candidates: tuple[Candidate, ...]
    best: Candidate | None
    fastest: Candidate | None
    is_checkpoint: bool


def fit(model: Model, hardware: Hardware, load: Load, min_speed: float = 0.0) -> Fit:
    """Place a GGUF file, or every preset of a Hugging Face folder or model of the Hub, on the hardware.

    `best` is the file of least expected KL divergence among those that fit and whose bound of the
    decode speed is at least `min_speed` tokens per second; `fastest` the same among those that the GPU
    holds alone. Raises what reading the model raises, and PlanError for a context that the model lacks.
    """
    if not 0 <= min_speed < math.inf:
        raise PlanError(f"--min-speed {min_speed:g}: tokens per second were expected, 0 or more")
    place, name = located(model), ""
    if isinstance(place, HubModel) and place.file:
        from moequant.hub.fetch import gguf_header

        header = gguf_header(place)
        place = header.path
        files = iter([PresetFile(place.name, header, None)])
    elif isinstance(place, HubModel) or place.is_dir():
        from moequant.hub.fetch import headers  # torch
        from moequant.inspection.presets import preset_files

        folder = headers(place)
        place = folder.path
        name = shown(place if of_cache(place) else place.resolve()).rpartition("/")[2]
        files = preset_files(folder)
    else:
        files = iter([PresetFile(place.name, read_header(place), None)])
    found = []
    for file in files:
        load = load.within(file.header.count("context_length"))
        path = f"{name}-{file.name}.gguf" if name else str(place)
        found.append(_candidate(path, file, hardware, load))
    found.sort(key=lambda candidate: -candidate.file_bytes)
    good = [c for c in found if c.placement.fits and c.placement.speed >= min_speed]
    alone = [c for c in good if c.placement.all_on_gpu]
    return Fit(place, hardware, load, tuple(found), _least_kl(good), _least_kl(alone), bool(name))


def _least_kl(candidates: list[Candidate]) -> Candidate | None:
    """The first of least expected KL divergence; where that is not known, only if there is no other."""
    return min(candidates, key=lambda c: (c.kl is None, c.kl or 0.0), default=None)


def place(header: Header, hardware: Hardware, load: Load) -> Placement:
    """The placement with most on the GPU.

    Raises PlanError when the cache of the architecture is not described, and CheckpointError for a file
    without layers, or whose keys are not those of its tensors.
    """
    if not header.layers:
        raise CheckpointError(f"{header.path}: no layers in it; give the file of a whole model")
    limit = header.count("context_length")
    if limit and load.ctx > limit:
        raise PlanError(
            f"{header.path}: --ctx {load.ctx:,} is more than the model's context; give --ctx {limit} or less"
        )
    model = _Model.of(header, load.within(limit))
    if not model.head + sum(model.dense) + sum(model.active):
        raise CheckpointError(f"{header.path}: no weight that a token would read; make it again")
    placement = model.placement(0, model.layers, hardware)
    for gpu_layers, cpu_moe in model.options() if hardware.vram else ():
        tried = model.placement(gpu_layers, cpu_moe, hardware)
        if tried.gpu.total + RESERVE <= hardware.vram:
            placement = tried
            break
    return placement


@dataclass(frozen=True, slots=True)
class _Model:
    """Bytes by layer, and outside of the layers: `embedding` (always system memory) and `head`."""

    load: Load
    embedding: int
    head: int
    dense: tuple[int, ...]
    experts: tuple[int, ...]
    active: tuple[float, ...]
    kv: tuple[int, ...]
    compute: int
    host_compute: int
    largest: int

    @classmethod
    def of(cls, header: Header, load: Load) -> _Model:
        layers = header.layers
        dense, experts, active = [0] * layers, [0] * layers, [0.0] * layers
        embedding = head = largest = 0
        tied = is_tied(header.tensors)
        running = layers - header.count("nextn_predict_layers")
        for tensor in header.tensors:
            layer = tensor.layer
            if layer is not None and layer >= running:
                continue  # read for drafting alone
            if layer is None:
                first = "embd" in tensor.name
                embedding += tensor.bytes if first else 0
                # A tied embedding is loaded a second time, as the head.
                head += tensor.bytes if not first or (tied and is_embedding(tensor)) else 0
            elif tensor.is_expert:
                experts[layer] += tensor.bytes
                active[layer] += tensor.bytes * experts_used(header, layer, tensor.shape[0]) / tensor.shape[0]
                largest = max(largest, tensor.bytes)
            else:
                dense[layer] += tensor.bytes
        return cls(
            load,
            embedding,
            head,
            tuple(dense),
            tuple(experts),
            tuple(active),
            kv_bytes(header, load),
            compute_bytes(header, load),
            host_compute_bytes(header, load),
            largest,
        )

    @property
    def layers(self) -> int:
        return len(self.dense)

    def options(self) -> Iterator[tuple[int, int]]:
        """(gpu_layers, cpu_moe) from everything on the GPU to nothing but the head there."""
        for cpu_moe in range(self.layers + 1):
            if cpu_moe == 0 or self.experts[cpu_moe - 1]:
                yield self.layers + 1, cpu_moe
        for gpu_layers in range(self.layers, 0, -1):
            yield gpu_layers, self.layers

    def placement(self, gpu_layers: int, cpu_moe: int, hardware: Hardware) -> Placement:
        """What goes where when `-ngl gpu_layers` and `--n-cpu-moe cpu_moe` are given."""
        first = min(self.layers + 1 - gpu_layers, self.layers)
        moved = gpu_layers and (cpu_moe or first)
        # A prompt's batch is computed on the GPU: experts in system memory visit it one tensor at a time.
        gpu = self._share(range(first, self.layers), range(max(first, cpu_moe), self.layers), gpu_layers > 0)
        gpu_compute = (
            (self.compute + (self.largest if moved and any(self.experts) else 0)) if gpu_layers else 0
        )
        host = self.host_compute if gpu_layers and not first else self.compute
        ram = self._share(range(first), range(max(first, cpu_moe)), gpu_layers == 0)
        gpu = replace(gpu, compute=gpu_compute)
        ram = replace(ram, compute=host, weights=ram.weights + self.embedding)
        over = max(ram.total - hardware.ram, 0)
        disk = min(over, ram.experts) if hardware.disk_bandwidth else 0
        slow = sum(self.active[: max(first, cpu_moe)]) * (disk / ram.experts if disk else 0.0)
        # All sequences share one pass over the weights; the bound is for one sequence alone.
        seconds = gpu.read / hardware.vram_bandwidth + (ram.read - slow) / hardware.ram_bandwidth
        seconds += slow / (hardware.disk_bandwidth or 1.0)
        full = seconds + gpu.kv_read / hardware.vram_bandwidth + ram.kv_read / hardware.ram_bandwidth
        ram = replace(ram, experts=ram.experts - disk, read=ram.read - slow)
        return Placement(self.layers, gpu_layers, cpu_moe, gpu, ram, disk, over - disk, 1 / seconds, 1 / full)

    def _share(self, dense: range, experts: range, head: bool) -> Share:
        """The layers `dense` and the experts of the layers `experts`, with the head or without."""
        weights = sum(self.dense[i] for i in dense) + (self.head if head else 0)
        kv = sum(self.kv[i] for i in dense)
        return Share(
            weights=weights,
            experts=sum(self.experts[i] for i in experts),
            kv=kv,
            read=weights + sum(self.active[i] for i in experts),
            kv_read=kv / self.load.parallel,
        )


def _candidate(file: str, made: PresetFile, hardware: Hardware, load: Load) -> Candidate:
    header = made.header
    placement = place(header, hardware, load)
    return Candidate(
        name=made.name,
        file=file,
        file_bytes=header.file_bytes,
        weight_bits=header.bits,
        kl=made.kl,
        placement=placement,
        command=command(file, placement, load, any(tensor.is_expert for tensor in header.tensors)),
        override=override(placement),
    )


def command(file: str, placement: Placement, load: Load, has_experts: bool) -> str:
    """The llama-server command line for a placement (facts of b11434: common/arg.cpp)."""
    words = ["llama-server", "-m", file, "-ngl"]
    # More than there are means all of them; 99 is what people recognise.
    words.append(
        str(
            placement.gpu_layers
            if placement.gpu_layers <= placement.layers
            else max(99, placement.layers + 1)
        )
    )
    if has_experts and placement.gpu_layers and placement.cpu_moe >= placement.layers:
        words.append("--cpu-moe")
    elif has_experts and placement.gpu_layers and placement.cpu_moe:
        words += ["--n-cpu-moe", str(placement.cpu_moe)]
    # Without -np the server would make four slots that share one cache.
    words += ["-c", str(load.ctx * load.parallel), "-np", str(load.parallel), "-fa", "on"]
    if load.cache_type != "f16":
        words += ["-ctk", load.cache_type, "-ctv", load.cache_type]
    return shlex.join(words)


def override(placement: Placement) -> str | None:
    """The same experts as `--n-cpu-moe` by name, to edit layer by layer: the argument of `-ot`."""
    if not placement.gpu_layers or not placement.cpu_moe:
        return None
    return experts_on_cpu(range(placement.cpu_moe))
