"""`inspect` as a terminal report and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moequant.escape import described, of_cache, shown, size
from moequant.inspection import Inspection
from moequant.report.style import line, table


def inspection_report(found: Inspection) -> RenderableType:
    """What a person asks about a model, in the order they ask it."""
    parts: list[RenderableType] = [line(shown(found.path), style="bold"), _facts(found), _roles(found)]
    if found.presets:
        parts += [_presets(found), line("KL is what the plan expects, before anything is measured.\n")]
    parts.append(_support(found))
    parts += [line(f"note: {note}") for note in found.notes]
    return Group(*parts)


def inspection_json(found: Inspection) -> dict[str, Any]:
    """All of it for a machine: numbers are exact, sizes in bytes."""
    plain: dict[str, Any] = asdict(found) | {"bits": found.bits, **described(found.path)}
    plain["types"] = dict(found.types)
    for role in plain["roles"]:
        role["types"] = dict(role["types"])
    return plain


def count(number: float) -> str:
    """Parameters as model cards say them: 30.5 B, 9.2 M."""
    for unit in ("", " k", " M", " B"):
        if number < 1000:
            return f"{number:,.0f}" if not unit else f"{number:.2f}{unit}"
        number /= 1000
    return f"{number:.2f} T"


def _facts(found: Inspection) -> Table:
    made = table("", "", "")
    made.show_header = False
    made.columns[1].justify = "left"
    made.columns[1].overflow = "fold"
    rows: list[tuple[str, str]] = [
        ("commit", (of_cache(found.path) or ("", "", ""))[1]),
        ("architecture", found.architecture),
        ("family", f"{found.family} (moequant has a table for it)" if found.family else ""),
        ("layers", _say(found.layers)),
        ("experts", _experts(found)),
        ("context", _say(found.context, " tokens")),
        ("parameters", f"{count(found.parameters)}, {count(found.active)} active per token"),
        ("weights", f"{size(found.bytes)}, {found.bits:.2f} bits per weight: {_types(found.types)}"),
        ("read per token", size(found.active_bytes)),
        ("file" if found.kind == "gguf" else "files", f"{found.file_bytes:,} bytes"),
        ("made by", found.made_by or ""),
        ("tokenizer", found.tokenizer),
    ]
    for name, value in rows:
        if value:
            made.add_row(name, value)
    return made


def _experts(found: Inspection) -> str:
    if not found.experts:
        return "none: a dense model"
    used = f", {found.experts_per_token} per token" if found.experts_per_token else ""
    shared = f", {found.shared_experts} shared" if found.shared_experts else ""
    return f"{found.experts} per layer{used}{shared}"


def _types(types: tuple[tuple[str, int], ...]) -> str:
    return ", ".join(f"{name} {size(count)}" for name, count in types)


def _say(value: int | None, unit: str = "") -> str:
    return f"{value:,}{unit}" if value else "not said in the headers"


def _roles(found: Inspection) -> Table:
    made = table("", "role", "tensors", "parameters", "size", "share", "types")
    made.columns[5].justify = "left"
    for role in found.roles:
        types = ", ".join(f"{name} x{tensors}" for name, tensors in role.types)
        share = f"{role.bytes / found.bytes:.1%}"
        made.add_row(role.role, f"{role.tensors:,}", count(role.parameters), size(role.bytes), share, types)
    return made


def _presets(found: Inspection) -> Table:
    made = table("as GGUF by moequant convert", "type", "bytes", "size", "bits", "of the checkpoint", "KL")
    for preset in sorted(found.presets, key=lambda preset: -preset.file_bytes):
        made.add_row(
            preset.name,
            f"{preset.file_bytes:,}",
            size(preset.file_bytes),
            f"{preset.bits:.2f}",
            f"{preset.file_bytes / found.file_bytes:.1%}",
            "" if preset.kl is None else f"{preset.kl:.4f}",
        )
    return made


def _support(found: Inspection) -> Table:
    made = table("support", "", "", "")
    made.show_header = False
    made.columns[1].justify = made.columns[2].justify = "left"
    made.columns[2].overflow = "fold"
    missing = Text("\n").join(line(reason) for reason in found.missing or ("moequant convert",))
    made.add_row("moequant", "no" if found.missing else "yes", missing)
    for runtime in found.runtimes:
        made.add_row(runtime.name, {True: "yes", False: "no", None: "?"}[runtime.supported], runtime.note)
    return made
