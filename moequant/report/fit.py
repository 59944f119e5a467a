"""`fit` as a terminal report and as JSON."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from moequant.escape import described, of_cache, plain, shown
from moequant.inspection.fit import RESERVE, Candidate, Fit, Placement
from moequant.report.style import line, table

GIB = 2**30


def fit_report(found: Fit) -> RenderableType:
    """The candidates, where the chosen one lies, and the command that starts it."""
    parts: list[RenderableType] = [_heading(found), _candidates(found)]
    if found.best is None:
        parts.append(line(nothing_fits(found)))
        return Group(*parts)
    title = "fits" if len(found.candidates) == 1 else "best that fits"
    parts += _chosen(found, found.best, f"{title}: {found.best.name}")
    if found.fastest is not None and found.fastest is not found.best:
        parts += _chosen(found, found.fastest, f"best that the GPU holds alone: {found.fastest.name}")
    parts.append(line(_small_print()))
    return Group(*parts)


def fit_json(found: Fit) -> dict[str, Any]:
    """All of it for a machine, in bytes, bytes per second and tokens per second."""
    return {
        **described(found.path),
        "format": "gguf",
        "hardware": asdict(found.hardware),
        "load": asdict(found.load),
        "best": found.best.name if found.best else None,
        "nothing_fits": None if found.best else nothing_fits(found),
        "best_on_gpu": found.fastest.name if found.fastest else None,
        "candidates": [_candidate_json(candidate) for candidate in found.candidates],
    }


def nothing_fits(found: Fit) -> str:
    """One line: the smallest candidate and how much memory it lacks."""
    fitting = [candidate for candidate in found.candidates if candidate.placement.fits]
    if fitting:
        fast = max(fitting, key=lambda candidate: candidate.placement.speed)
        return (
            f"nothing is as fast as --min-speed asks for; the fastest, {fast.name}, reaches at most "
            f"{speed(fast.placement.speed)} tokens per second"
        )
    small = found.candidates[-1]
    what = (
        f"the smallest, {small.name} ({gib(small.file_bytes)})," if len(found.candidates) > 1 else small.name
    )
    return (
        f"nothing fits: {what} needs {gib(small.placement.lacking)} more system memory; "
        "a shorter --ctx, --cache-type q8_0 or --disk-bandwidth (experts read from the disk) may help"
    )


def gib(count: int) -> str:
    """Bytes in GiB, as graphics cards and memory modules are sold."""
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.2f} MiB"


def _candidate_json(candidate: Candidate) -> dict[str, Any]:
    plain = asdict(candidate)
    for name in ("gpu", "ram"):
        plain["placement"][name]["total"] = getattr(candidate.placement, name).total
    plain["placement"] |= {"fits": candidate.placement.fits, "all_on_gpu": candidate.placement.all_on_gpu}
    return plain


def _heading(found: Fit) -> Text:
    hardware, load = found.hardware, found.load
    times = f" x {load.parallel} sequences" if load.parallel > 1 else ""
    gpu = f"{gib(hardware.vram)} GPU ({hardware.vram_bandwidth / 1e9:g} GB/s) and " if hardware.vram else ""
    return line(
        f"{shown(found.path)} on {gpu}{gib(hardware.ram)} system memory "
        f"({hardware.ram_bandwidth / 1e9:g} GB/s), {load.ctx:,} tokens of context{times}, "
        f"cache {load.cache_type}",
        style="bold",
    )


def _candidates(found: Fit) -> Table:
    first = "type" if found.is_checkpoint else "file"
    made = table("", first, "size", "bits", "KL", "GPU", "system", "disk", "experts on GPU", "tokens/s")
    for candidate in found.candidates:
        place = candidate.placement
        made.add_row(
            candidate.name,
            gib(candidate.file_bytes),
            f"{candidate.weight_bits:.2f}",
            "" if candidate.kl is None else f"{candidate.kl:.4f}",
            gib(place.gpu.total) if place.gpu.total else "",
            gib(place.ram.total),
            gib(place.disk) if place.disk else "",
            _experts(place),
            f"≤ {speed(place.speed)}" if place.fits else f"{gib(place.lacking)} too much",
        )
    return made


def speed(tokens: float) -> str:
    """Tokens per second."""
    return f"{tokens:.1f}" if tokens < 100 else f"{tokens:,.0f}"


def _experts(place: Placement) -> str:
    if not place.gpu.experts and not place.ram.experts and not place.disk:
        return "dense"
    first = max(place.layers + 1 - place.gpu_layers, place.cpu_moe, 0)
    return f"{max(place.layers - first, 0)} of {place.layers} layers"


def _chosen(found: Fit, chosen: Candidate, title: str) -> list[RenderableType]:
    place = chosen.placement
    made = table(title, "", "GPU", "system", "disk")
    rows = (
        ("weights that every token uses", place.gpu.weights, place.ram.weights, 0),
        ("experts, all of them", place.gpu.experts, place.ram.experts, place.disk),
        ("KV cache", place.gpu.kv, place.ram.kv, 0),
        ("compute buffers", place.gpu.compute, place.ram.compute, 0),
        ("left to the driver", RESERVE if place.gpu.total else 0, 0, 0),
    )
    for name, *counts in rows:
        made.add_row(name, *(gib(count) if count else "" for count in counts))
    total = place.gpu.total + (RESERVE if place.gpu.total else 0)
    made.add_row(
        "together", gib(total) if total else "", gib(place.ram.total), gib(place.disk) if place.disk else ""
    )
    read = f"read per token: GPU {gib(round(place.gpu.read))}, system {gib(round(place.ram.read))}"
    bound = f"at most {speed(place.speed)} tokens/s, {speed(place.speed_full)} with the context full"
    lines: list[RenderableType] = [made, line(f"{read}; {bound}\n")]
    if found.is_checkpoint:
        model = shown(found.path) if of_cache(found.path) else str(found.path)
        words = ["moequant", "convert", model, "-o", chosen.file, "--type", chosen.name]
        lines.append(Shell(shlex.join(words)))
    lines.append(Shell(chosen.command))
    if chosen.override:
        lines += [
            line("or, to choose layers yourself, instead of the --…cpu-moe option:"),
            Shell(f"-ot '{chosen.override}'"),
        ]
    return lines


@dataclass(frozen=True, slots=True)
class Shell:
    """A command on one line however long it is, to be copied whole (print with `crop=False`)."""

    line: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Segment(f"  {plain(self.line)}\n\n")


def _small_print() -> str:
    return (
        "Speeds are upper bounds: bytes of the weights that a token uses over each memory's bandwidth. "
        "KL is what the plan expects, before anything is measured. "
        "llama-server without -ngl and -ot options places layers itself (--fit)."
    )
