"""`fit` of folders as a terminal report and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moequant.escape import described, shown
from moequant.inspection.served import AS_IT_IS, FolderFit, Served
from moequant.report.fit import Shell, gib, speed
from moequant.report.style import line, table

_SMALL_PRINT = (
    "Figures follow vLLM's code (0.32) and were not measured on a GPU; kernels that pad weights take more. "
    "Speeds are upper bounds. KL is what tables expect, before anything is measured."
)


def served_report(found: FolderFit) -> RenderableType:
    """The candidates, what one GPU holds of the best, and the commands that make and start it."""
    parts: list[RenderableType] = [_heading(found), _candidates(found)]
    if found.best is None:
        parts.append(line(nothing_serves(found)))
    else:
        parts += _chosen(found, found.best)
    parts += [line(f"note: {note}") for note in found.notes]
    return Group(*parts, line(_SMALL_PRINT))


def served_json(found: FolderFit) -> dict[str, Any]:
    """All of it for a machine, in bytes, bytes per second and tokens per second."""
    serving = found.serving
    return {
        **described(found.path),
        "format": "safetensors",
        "gpus": {**asdict(found.gpus), "count": serving.tp, "room": found.gpus.room},
        "load": {"ctx": serving.ctx, "parallel": serving.parallel, "cache_type": serving.cache_type},
        "best": found.best.name if found.best else None,
        "nothing_fits": None if found.best else nothing_serves(found),
        "candidates": [_json(each) for each in found.candidates],
        "notes": list(found.notes),
    }


def nothing_serves(found: FolderFit) -> str:
    """One line: the smallest candidate and how much memory it lacks."""
    small = min(found.candidates, key=lambda each: each.lacking)
    name = "the folder" if small.name == AS_IT_IS else small.name
    there = all(each.name == AS_IT_IS for each in found.candidates)
    ways = (
        "a shorter --ctx or --cache-type fp8"
        if there
        else "a shorter --ctx, --cache-type fp8 or smaller --schemes"
    )
    return (
        f"nothing fits: {name} ({gib(small.file_bytes)}) needs {gib(small.lacking)} more on each GPU; more "
        f"GPUs (--tp), {ways} may help"
    )


def _json(served: Served) -> dict[str, Any]:
    made = asdict(served)
    made["gpu"]["total"] = served.gpu.total
    return made | {"fits": served.fits}


def _heading(found: FolderFit) -> Text:
    serving, gpus = found.serving, found.gpus
    times = f" x {serving.parallel} sequences" if serving.parallel > 1 else ""
    count = f"{serving.tp} GPUs" if serving.tp > 1 else "a GPU"
    return line(
        f"{shown(found.path)} in vLLM on {count} of {gib(gpus.vram)} ({gpus.bandwidth / 1e9:g} GB/s), "
        f"{gib(gpus.room)} of it taken; {serving.ctx:,} tokens of context{times}, cache {serving.cache_type}",
        style="bold",
    )


def _candidates(found: FolderFit) -> Table:
    made = table("", "scheme", "size", "bits", "KL", "each GPU", "tokens in cache", "tokens/s")
    for each in found.candidates:
        made.add_row(
            each.name,
            gib(each.file_bytes),
            f"{each.weight_bits:.2f}",
            "" if each.kl is None else f"{each.kl:.4f}",
            gib(each.gpu.total),
            f"{each.gpu.tokens:,}",
            f"≤ {speed(each.speed)}" if each.fits else f"{gib(each.lacking)} too much",
        )
    return made


def _chosen(found: FolderFit, chosen: Served) -> list[RenderableType]:
    made = table(f"best that fits: {chosen.name}", "", "each GPU")
    for name, count in (
        ("weights that every token uses", chosen.gpu.weights),
        ("experts", chosen.gpu.experts),
        ("KV cache", chosen.gpu.kv),
        ("room to compute (estimate)", chosen.gpu.compute),
        ("CUDA graphs and the like (guess)", chosen.gpu.reserve),
        ("together", chosen.gpu.total),
        ("of", found.gpus.room),
    ):
        made.add_row(name, gib(count))
    bound = f"at most {speed(chosen.speed)} tokens/s, {speed(chosen.speed_full)} with the context full"
    lines: list[RenderableType] = [made, line(f"read per token: {gib(round(chosen.gpu.read))}; {bound}\n")]
    lines += [] if chosen.convert is None else [Shell(chosen.convert)]
    return [*lines, Shell(chosen.command)]
