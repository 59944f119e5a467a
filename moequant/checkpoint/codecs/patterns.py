"""Names and regular expressions that a config names modules with; no expression that may take for ever is
run."""

from __future__ import annotations

import re
import re._parser as _parser  # type: ignore[import-untyped, import-not-found, unused-ignore]
from functools import cache
from typing import Any

from moequant.errors import CheckpointError

_SERVED = {
    "wq_a": "fused_wqa_wkv",
    "wkv": "fused_wqa_wkv",
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
}
"""What vLLM calls the modules of DeepSeek-V4: configs that were adapted to it say so."""

_MOST_REPEATS = 5
"""Of n characters, so many `.*` in a row may take n**5 / 120 steps."""


def names_of(module: str) -> tuple[str, ...]:
    """A module's names, the first its own."""
    before, dot, last = module.rpartition(".")
    return (module, f"{before}{dot}{_SERVED[last]}") if last in _SERVED else (module,)


@cache
def compiled(pattern: str) -> re.Pattern[str]:
    """A regular expression; one that is none ("*", for example) is taken as a plain name.

    CheckpointError for one that may take for ever on a name, such as (a+)+$.
    """
    try:
        tree = _parser.parse(pattern)
        found = re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return re.compile(re.escape(pattern))
    if _repeats(tree) > _MOST_REPEATS:
        raise CheckpointError(
            f"quantization_config: the pattern {pattern[:100]!r} repeats what repeats, or more than "
            f"{_MOST_REPEATS} times; matching it may take for ever; write it simpler"
        )
    return found


def _repeats(tree: Any, repeated: bool = False) -> float:
    """How many repeats a parsed expression has; infinite when in one there is another, or a choice."""
    found = 0.0
    for operator, content in tree:
        repeats = operator in (_parser.MAX_REPEAT, _parser.MIN_REPEAT) and content[1] > 1
        if repeated and (repeats or operator is _parser.BRANCH):
            return float("inf")
        if operator is not _parser.ATOMIC_GROUP:  # what it has matched is never tried again
            found += repeats + sum(_repeats(each, repeated or repeats) for each in _inside(content))
    return found


def _inside(content: Any) -> list[Any]:
    """The expressions inside a part of one."""
    if isinstance(content, _parser.SubPattern):
        return [content]
    return [found for each in content for found in _inside(each)] if isinstance(content, list | tuple) else []
