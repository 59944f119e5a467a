"""How the compared versions ran, what they said, and the record that makes it repeatable: tables and JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from moequant.escape import plain, shown, size
from moequant.evaluate import Ran
from moequant.evaluate.environment import Record
from moequant.report.style import line, table
from moequant.runtimes.llama_cpp.serving import Sample

QUOTED = "average"
"""The prompt whose first token is quoted."""

SHOWN = 200
"""Characters of a sample in the terminal."""

SHORT = 12
"""Digits of a hash in tables; the JSON has all."""


def ran_tables(ran: Sequence[Ran]) -> Iterator[RenderableType]:
    """Speeds and memory of what llama.cpp ran, and samples side by side; nothing when nothing ran."""
    if any(one.serving for one in ran):
        yield _speeds(ran)
    for number in range(max((len(one.samples) for one in ran), default=0)):
        yield _sample(ran, number)
    for one in ran:
        if not one.samples:
            yield line(f"{one.name}: no samples, the whole model does not fit the free memory\n")


def _speeds(ran: Sequence[Ran]) -> Table:
    made = table(
        "in llama.cpp",
        "",
        "load",
        "first token",
        "prompt tokens/s",
        "tokens/s",
        "token p50",
        "token p95",
        "memory",
    )
    for name, *cells in speeds(ran):
        made.add_row(name, *cells)
    (first, *_) = (one.serving for one in ran if one.serving)
    made.caption = (
        f"threads: {first.threads}, context: {first.n_ctx}, a process each; first token after the {QUOTED} "
        "prompt, prompt tokens/s of the longest; memory: what the process grew by, at most"
    )
    made.caption_justify = "left"
    return made


def speeds(ran: Sequence[Ran]) -> list[tuple[str, ...]]:
    """A row a version that llama.cpp ran: name, load, first token, speeds, latencies, memory."""
    return [
        (
            one.name,
            _time(one.serving.load_seconds),
            _time(one.serving.first_token(QUOTED)),
            f"{one.serving.prompt_speed:,.1f}",
            "" if one.serving.speed is None else f"{one.serving.speed:,.1f}",
            _time(one.serving.latency(0.5)),
            _time(one.serving.latency(0.95)),
            size(one.serving.bytes),
        )
        for one in ran
        if one.serving is not None
    ]


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.2f} ms"


def _sample(ran: Sequence[Ran], number: int) -> Table:
    shown = [one for one in ran if one.samples]
    first = shown[0].samples[number]
    cut = f", the last of {first.fed + first.cut:,}" if first.cut else ""
    made = table(f"after the {first.prompt} prompt ({first.fed:,} tokens{cut})", "", "as base", "")
    made.columns[2].justify = "left"
    made.columns[2].overflow = "fold"
    for one in shown:
        sample = one.samples[number]
        text = plain(sample.text)
        short = text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
        made.add_row(one.name, as_base(first, sample, one is shown[0]), Text(short))
    return made


def as_base(base: Sample, sample: Sample, itself: bool = False) -> str:
    """How many tokens are the baseline's before the first other one."""
    return "" if itself else f"{same_tokens(base, sample)} of {len(base.ids)}"


def same_tokens(base: Sample, sample: Sample) -> int:
    """Tokens in common before the first that differs."""
    pairs = list(zip(base.ids, sample.ids, strict=False))
    return next((at for at, (one, two) in enumerate(pairs) if one != two), len(pairs))


def record_table(record: Record) -> Table:
    """The record as lines of a name and a value."""
    made = table("record", "", "")
    made.columns[1].justify = "left"
    made.columns[1].overflow = "fold"
    for name, value in record_rows(record):
        made.add_row(name, line(value))
    return made


def record_rows(record: Record, digits: int = SHORT) -> list[tuple[str, str]]:
    """(name, value) of everything in the record, hashes cut to `digits`."""
    rows = []
    for origin in record.origins:
        types = ", ".join(f"{count} {name}" for name, count in origin.precision.items())
        files = ", ".join(f"{name} {digest[:digits]}" for name, digest in origin.files.items())
        revision = origin.revision or "revision unknown"
        rows.append((shown(origin.path), f"{origin.kind}, {revision}; tensors: {types}; SHA-256: {files}"))
    for name, value in record.settings.items():
        rows.append((name, str(value)[:digits] if name.endswith("SHA-256") else plain(str(value))))
    rows += [*record.machine.items()]
    rows.append(("versions", ", ".join(f"{name} {value}" for name, value in record.libraries.items())))
    rows.append(("date", record.date))
    rows.append(("command", record.command or "called from Python"))
    return rows


def ran_value(one: Ran) -> dict[str, Any]:
    """One version's samples and figures for the JSON; seconds and bytes."""
    value: dict[str, Any] = {"name": one.name, "samples": [asdict(sample) for sample in one.samples]}
    if (found := one.serving) is not None:
        value |= {
            "context": found.n_ctx,
            "threads": found.threads,
            "load_seconds": found.load_seconds,
            "first_token_seconds": {
                sample.prompt: found.first_token(sample.prompt) for sample in found.samples
            },
            "prompt_tokens_per_second": found.prompt_speed,
            "tokens_per_second": found.speed,
            "token_seconds": {"p50": found.latency(0.5), "p95": found.latency(0.95)},
            "bytes": found.bytes,
            "process_bytes": found.process_bytes,
        }
    return value


def record_value(record: Record) -> dict[str, Any]:
    """The record for the JSON."""
    value = asdict(record)
    for origin in value["origins"]:
        origin["path"] = shown(origin["path"])
    return value
