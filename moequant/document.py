"""What every result is as JSON: one object with its schema, for machines (docs/json.md)."""

from __future__ import annotations

import json
from typing import Any

SCHEMA = 1
"""The version of what --json prints (docs/json.md). It grows when something is renamed, removed or means
something else, not when something is added."""


def document(command: str, value: dict[str, Any]) -> str:
    """The JSON of what a command found. Numbers that JSON has not (NaN, infinity) are null."""
    return json.dumps(_finite({"schema": SCHEMA, "command": command, **value}), indent=1, ensure_ascii=False)


def _finite(value: Any) -> Any:
    """The same without numbers that are none; keys as text."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {str(key): _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value
