"""The plan as a JSON document: one row a weight, written for people to read, change and pass back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moequant.containers.gguf.presets import mostly
from moequant.containers.gguf.sizes import aligned, packed_bytes
from moequant.errors import CheckpointError, PlanError
from moequant.files.read import read_text
from moequant.values import Choice, Plan, Weight

VERSION = 2
"""Weights have our names; in version 1 they had those of GGUF."""


def to_json(plan: Plan) -> str:
    """The plan as JSON, one line a weight."""
    head = {
        "moequant_plan": VERSION,
        "target": plan.target,
        "preset": plan.preset,
        "budget": plan.budget,
        "bytes": plan.bytes,
        "predicted_kl": plan.kl,
    }
    rows = (
        json.dumps(
            {
                "weight": choice.weight,
                "format": choice.format,
                "planned": choice.format,
                "bytes": choice.bytes,
                "predicted_kl": choice.kl,
                "reason": choice.reason,
            }
        )
        for choice in plan.choices
    )
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    return "\n".join(["{", *lines, '  "choices": [', ",\n".join(f"    {row}" for row in rows), "  ]", "}\n"])


Aliases = Mapping[str, str]
"""Other names of weights that documents may use, and ours: plans of version 1 had those of GGUF."""

Made = Callable[[tuple[Weight, ...], Mapping[str, str], str], Plan]
"""The plan that gives weights the formats listed under their names, for a file or a folder."""


def from_json(
    text: str,
    weights: tuple[Weight, ...],
    source: str = "plan",
    aliases: Aliases | None = None,
    made: Made | None = None,
) -> Plan:
    """The plan of a document for these weights, in their order; `made` turns formats into a plan, None:
    `plan_from_types`.

    Of each row only `weight` and `format` count; bytes are worked out again, and a row
    whose format is no longer the one that was `planned` has an unknown cost. A plain
    object of tensor names and types, such as `plan_from_types` takes, is a plan too.
    PlanError names the row that is unknown, missing, twice there, or does not fit.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{source}: not JSON ({error}); write one with `moequant plan -o`") from None
    names, made = aliases or {}, made or plan_from_types
    if isinstance(document, dict) and "moequant_plan" not in document:
        return made(weights, {names.get(key, key): value for key, value in document.items()}, source)
    if not isinstance(document, dict) or document["moequant_plan"] not in (1, VERSION):
        raise PlanError(f"{source}: not a plan of version {VERSION}; write one with `moequant plan -o`")
    rows = {names.get(name, name): row for name, row in _rows(document, source).items()}
    types = {name: row["format"] for name, row in rows.items()}
    plan = made(weights, types, source)
    choices = tuple(_restored(choice, rows[choice.weight]) for choice in plan.choices)
    budget = document.get("budget")
    if not isinstance(budget, int) or sum(aligned(choice.bytes) for choice in choices) > budget:
        budget = plan.budget  # edited upwards: what it takes is what was asked for
    return Plan(plan.preset, choices, budget, str(document.get("target") or source))


def read(
    path: Path, weights: tuple[Weight, ...], aliases: Aliases | None = None, made: Made | None = None
) -> Plan:
    """`from_json` of a file; PlanError when it cannot be read."""
    try:
        text = read_text(path)
    except (CheckpointError, UnicodeDecodeError) as error:
        raise PlanError(
            f"{path}: cannot be read ({error}); give a plan that `moequant plan -o` wrote"
        ) from None
    return from_json(text, weights, str(path), aliases, made)


def plan_from_types(weights: tuple[Weight, ...], types: Mapping[str, str], source: str = "types") -> Plan:
    """The plan that gives every weight the ggml type listed under its name; same errors as `from_json`."""
    check_rows(weights, types, source)
    choices = []
    for weight in weights:
        name = types[weight.name]
        check_fit(weight, name, source)
        choices.append(Choice(weight.name, name, packed_bytes(name, weight), f"given by {source}", None))
    taken = sum(aligned(choice.bytes) for choice in choices)
    preset = mostly((choice.format, choice.bytes) for choice in choices)
    return Plan(preset, tuple(choices), taken, source)


def check_rows(weights: tuple[Weight, ...], types: Mapping[str, str], source: str) -> None:
    """PlanError unless every weight has a row, and nothing else has."""
    names = {weight.name for weight in weights}
    if nested := [name for name, value in types.items() if not isinstance(value, str)]:
        raise PlanError(
            f"{source}: {nested[0]!r} holds no type name; give one object of weight names and types"
        )
    if unknown := [name for name in types if name not in names]:
        raise PlanError(f"{source}: {unknown[0]}: the checkpoint has no such weight; remove the row")
    if missing := [weight.name for weight in weights if weight.name not in types]:
        raise PlanError(f"{source}: {missing[0]} is missing; every weight needs a row")


def check_fit(weight: Weight, name: str, source: str) -> None:
    """PlanError naming the row whose format does not exist or cannot hold its weight."""
    fixed = weight.fixed_type
    if fixed is not None and name != fixed:
        raise PlanError(f"{source}: {weight.name}: a {weight.role} stays {fixed}, not {name}; write {fixed}")
    try:
        packed_bytes(name, weight)
    except PlanError as error:
        message = str(error)
        row = message if message.startswith(weight.name) else f"{weight.name}: {message}"
        raise PlanError(f"{source}: {row}; choose another format") from None


def _rows(document: dict[str, Any], source: str) -> dict[str, dict[str, Any]]:
    """The document's rows by weight name."""
    rows: dict[str, dict[str, Any]] = {}
    listed = document.get("choices")
    if not isinstance(listed, list):
        raise PlanError(f"{source}: no list of choices; write a plan with `moequant plan -o`")
    for number, row in enumerate(listed):
        if not isinstance(row, dict) or not all(
            isinstance(row.get(key), str) for key in ("weight", "format")
        ):
            raise PlanError(f"{source}: row {number} of choices needs a weight and a format, both text")
        if row["weight"] in rows:
            raise PlanError(f"{source}: {row['weight']} has two rows; keep one")
        rows[row["weight"]] = row
    return rows


def _restored(choice: Choice, row: dict[str, Any]) -> Choice:
    """The choice with what the document says about it, unless the format was edited."""
    if row.get("planned") != choice.format:
        return Choice(choice.weight, choice.format, choice.bytes, "edited by hand", None)
    kl = row.get("predicted_kl", row.get("damage"))  # "damage" until version 2
    # Whole numbers beyond a double's are nobody's measurement.
    known = float(kl) if isinstance(kl, float) or (isinstance(kl, int) and kl.bit_length() < 64) else None
    return Choice(choice.weight, choice.format, choice.bytes, str(row.get("reason", "")), known)
