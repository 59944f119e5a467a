"""Odd values, and damage to JSON and to bytes: what the kinds have in common."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

ODD: tuple[Callable[[], Any], ...] = (
    lambda: None,
    lambda: True,
    lambda: False,
    lambda: 0,
    lambda: -1,
    lambda: 1,
    lambda: 3,
    lambda: 0.5,
    lambda: -0.0,
    lambda: 1e-320,
    lambda: 1e308,
    lambda: float("nan"),
    lambda: float("inf"),
    lambda: float("-inf"),
    lambda: 2**31,
    lambda: 2**63,
    lambda: -(2**63) - 1,
    lambda: 10**399,
    lambda: "",
    lambda: "1",
    lambda: "nan",
    lambda: "x" * 5000,
    lambda: "\x1b[31mred\n\rtwo\u202e\u2028[/bold] $\\bad$",
    lambda: "\ud800",
    lambda: "../../etc/passwd",
    list,
    dict,
    lambda: [None],
    lambda: [1, "a", {}],
    lambda: list(range(2000)),
    lambda: {"a": {"b": []}},
    lambda: {"": None},
    lambda: nested(50),
)
"""Makers of values that a careless reader trips over."""


def nested(depth: int) -> Any:
    """Lists in lists."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def odd(random: Random, before: Any = None) -> Any:
    """A value in the place of `before`: near it, or from ODD."""
    if isinstance(before, int | float) and not isinstance(before, bool) and random.random() < 0.4:
        return random.choice(
            [
                before + 1,
                before - 1,
                -before,
                before * 2,
                before * 1000,
                str(before),
                [before],
                before * 0.5 if abs(before) < 1e300 else 0.5,
            ]
        )
    if isinstance(before, list) and before and random.random() < 0.4:
        return random.choice([before[1:], before * 2, before[::-1], [*before, None], before[0]])
    if isinstance(before, str) and before and random.random() < 0.3:
        return random.choice([before[1:], before.upper(), before * 300, f"{before}\n", [before]])
    return random.choice(ODD)()


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all values in a document; of long lists, to the first and last."""
    found = [path] if path else []
    if isinstance(value, dict):
        keys: list[Any] = list(value)
    else:
        keys = list(range(len(value))) if isinstance(value, list) else []
    for key in keys if len(keys) < 40 else [*keys[:20], *keys[-20:]]:
        found += places(value[key], (*path, key))
    return found


def change(random: Random, document: Any, times: int = 1, under: tuple[Any, ...] = ()) -> Any:
    """A copy of the document with `times` values replaced, removed or added, all of them below `under`."""
    document = json.loads(json.dumps(document))
    for _ in range(times):
        paths = [path for path in places(document) if path[: len(under)] == under]
        if not paths:
            return document
        *way, last = random.choice(paths)
        holder = document
        for key in way:
            holder = holder[key]
        draw = random.random()
        if draw < 0.15:
            del holder[last]
        elif draw < 0.25 and isinstance(holder, dict):
            holder[f"{last}_more"] = odd(random)
        elif draw < 0.35 and isinstance(holder, list):
            holder.insert(last, odd(random))
        else:
            holder[last] = odd(random, holder[last])
    return document


def text(random: Random, document: Any) -> bytes:
    """A document as JSON, its text damaged in one of the ways that text can be."""
    plain = json.dumps(document).encode()
    cut = random.randrange(len(plain) + 1)
    return random.choice(
        [
            lambda: b"",
            lambda: plain[:cut],
            lambda: plain + plain,
            lambda: b"\xef\xbb\xbf" + plain,
            lambda: plain.decode().encode("utf-16"),
            lambda: b"\0" * 64 + plain,
            lambda: flip(random, plain),
            lambda: b"[" * 100_000,
            lambda: b'{"a":' * 50_000,
            lambda: b"null",
            lambda: b"[]",
            lambda: b'"text"',
            lambda: b"9" * 5000,
            lambda: b'{"a": ' + b"9" * 5000 + b"}",
            lambda: plain[:-1] + b', "a": "\\ud800"}',
            lambda: plain[:-1] + b"," + plain[1:],
        ]
    )()


def flip(random: Random, content: bytes, times: int = 4) -> bytes:
    """A few bytes replaced."""
    found = bytearray(content)
    for _ in range(times if found else 0):
        found[random.randrange(len(found))] = random.choice([0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)])
    return bytes(found)


def any_damage(random: Random, content: bytes) -> bytes:
    """Bytes cut, flipped, doubled, or with a number in their first part made huge."""
    cut = random.randrange(len(content) + 1)
    at = random.randrange(max(1, min(len(content), 4096) - 8))
    huge = random.choice([2**64 - 1, 2**63, 2**60, 2**32, 2**31, 10**12]).to_bytes(8, "little")
    return random.choice(
        [
            lambda: content[:cut],
            lambda: flip(random, content),
            lambda: flip(random, content[:4096], 6) + content[4096:],
            lambda: content[:at] + huge + content[at + 8 :],
            lambda: content + b"more",
            lambda: random.randbytes(200),
            lambda: b"",
        ]
    )()
