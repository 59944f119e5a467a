"""JSON as programs write it: answers of services, settings, schemas, events, tool calls, maps."""

import json
from collections.abc import Callable
from datetime import timedelta
from random import Random
from typing import Any

from scripts.generators import words

Json = dict[str, Any] | list[Any]


def _order(rng: Random) -> Json:
    """A shop's order with nested customer, lines and totals, all amounts in cents and adding up."""
    lines: list[dict[str, Any]] = [
        {
            "sku": words.slug(rng),
            "name": words.thing(rng),
            "qty": rng.randrange(1, 9),
            "unit": rng.randrange(90, 9_000),
        }
        for _ in range(rng.randrange(1, 6))
    ]
    total = sum(line["qty"] * line["unit"] for line in lines)
    tax = total * rng.choice((5, 7, 19, 21, 25)) // 100
    placed = words.moment(rng)
    return {
        "id": rng.randrange(10_000, 10_000_000),
        "placed_at": placed.isoformat(),
        "status": rng.choice(words.STATES),
        "customer": {
            "name": words.name(rng),
            "email": words.email(rng),
            "address": {
                "street": f"{rng.randrange(1, 200)} {rng.choice(words.STREETS)} Street",
                "city": words.city(rng),
                "postcode": rng.choice((None, f"{rng.randrange(1_000, 99_999):05d}")),
            },
        },
        "lines": lines,
        "totals": {"net": total, "tax": tax, "gross": total + tax, "currency": rng.choice(words.CURRENCIES)},
        "notes": rng.choice((None, [], [words.note(rng)], [words.note(rng), words.note(rng)])),
    }


def _settings(rng: Random) -> Json:
    """The configuration of a service: flags, limits, hosts, retries."""
    name = rng.choice(words.SERVICES)
    settings: dict[str, Any] = {
        "$schema": f"https://example.org/schemas/{name}/v{rng.randrange(1, 9)}.json",
        "service": name,
        "listen": {"host": rng.choice(("0.0.0.0", "127.0.0.1", "::1")), "port": rng.randrange(1024, 65_536)},
        "log": {
            "level": rng.choice(("debug", "info", "warning", "error")),
            "format": rng.choice(("json", "text")),
        },
        "upstreams": [
            {
                "url": f"https://{rng.choice(words.SERVICES)}.{words.slug(rng)}.example.net/v1",
                "timeoutMs": rng.randrange(1, 60) * 250,
                "retry": {
                    "max": rng.randrange(6),
                    "backoff": words.decimal(rng, 4, 2),
                    "jitter": rng.random() < 0.5,
                },
            }
            for _ in range(rng.randrange(1, 4))
        ],
        "limits": {f"max_{rng.choice(words.NOUNS)}s": 2 ** rng.randrange(3, 20) for _ in range(3)},
    }
    for _ in range(rng.randrange(1, 5)):
        settings.setdefault("features", {})[words.slug(rng)] = rng.choice((True, False, None, "beta"))
    return settings


def _geography(rng: Random) -> Json:
    """GeoJSON (RFC 7946): points and rings with properties."""
    features = []
    for _ in range(rng.randrange(1, 4)):
        lon, lat = words.decimal(rng, 360, 4) - 180, words.decimal(rng, 180, 4) - 90
        geometry: dict[str, Any] = {"type": "Point", "coordinates": [round(lon, 4), round(lat, 4)]}
        if rng.random() < 0.5:
            corners = ((0, 0), (0.01, 0), (0.01, 0.02), (0, 0.02), (0, 0))
            ring = [[round(lon + dx, 4), round(lat + dy, 4)] for dx, dy in corners]
            geometry = {"type": "Polygon", "coordinates": [ring]}
        properties = {
            "name": words.city(rng),
            "population": rng.randrange(200, 3_000_000),
            "ref": words.slug(rng),
        }
        features.append({"type": "Feature", "geometry": geometry, "properties": properties})
    return {"type": "FeatureCollection", "features": features}


def _schema(rng: Random) -> Json:
    """A JSON Schema of an invented object."""
    kinds: tuple[Callable[[], dict[str, Any]], ...] = (
        lambda: {"type": "string", "minLength": rng.randrange(1, 9), "description": words.note(rng)},
        lambda: {"type": "integer", "minimum": 0, "exclusiveMaximum": rng.randrange(10, 10_000)},
        lambda: {"type": "number", "multipleOf": 0.01, "default": words.decimal(rng, 100, 2)},
        lambda: {"type": "boolean", "default": rng.random() < 0.5},
        lambda: {"enum": rng.sample(words.STATES, 4)},
        lambda: {"type": "array", "items": {"type": "string", "format": "uuid"}, "uniqueItems": True},
        lambda: {"anyOf": [{"type": "null"}, {"$ref": f"#/$defs/{rng.choice(words.NOUNS)}"}]},
    )
    names = rng.sample(words.NOUNS, rng.randrange(3, 7))
    return {
        "$id": f"https://example.org/{words.slug(rng)}.schema.json",
        "title": words.thing(rng).title(),
        "type": "object",
        "properties": {name: rng.choice(kinds)() for name in names},
        "required": sorted(names[:2]),
        "additionalProperties": False,
    }


def _tool_call(rng: Random) -> Json:
    """One exchange of a language model with a tool, arguments as a JSON string inside JSON."""
    arguments = {"query": words.note(rng), "limit": rng.randrange(1, 50), "city": words.city(rng)}
    call = f"call_{words.hexadecimal(rng, 12)}"
    tool = f"{rng.choice(('find', 'list', 'update'))}_{rng.choice(words.NOUNS)}"
    rows = [{"id": words.uuid(rng), "title": words.thing(rng)} for _ in range(rng.randrange(1, 4))]
    return [
        {"role": "user", "content": f"Is it true that {words.note(rng)}?"},
        {
            "role": "assistant",
            "tool_calls": [
                {
                    "id": call,
                    "type": "function",
                    "function": {"name": tool, "arguments": json.dumps(arguments)},
                }
            ],
        },
        {"role": "tool", "tool_call_id": call, "content": json.dumps({"total": len(rows), "rows": rows})},
    ]


def _tree(rng: Random, depth: int = 3) -> dict[str, Any]:
    """A folder tree, nested at random."""
    kept: list[dict[str, Any]] = []
    for _ in range(rng.randrange(1, 4)):
        if depth and rng.random() < 0.45:
            kept.append(_tree(rng, depth - 1))
        else:
            suffix = rng.choice(("txt", "png", "csv", "tar.gz", "md", "log"))
            kept.append({"name": f"{words.slug(rng)}.{suffix}", "size": rng.randrange(10**7), "mode": "0644"})
    return {
        "name": rng.choice(words.NOUNS),
        "modified": words.moment(rng).date().isoformat(),
        "children": kept,
    }


def _page(rng: Random) -> Json:
    """One page of a listing, with links to the next."""
    rows = [
        {"id": words.uuid(rng), "owner": words.email(rng), "score": words.decimal(rng, 1, 3), "tags": tags}
        for tags in (rng.sample(words.ADJECTIVES, rng.randrange(4)) for _ in range(rng.randrange(2, 7)))
    ]
    cursor = words.hexadecimal(rng, 20)
    return {
        "data": rows,
        "meta": {"page": rng.randrange(1, 90), "per_page": len(rows), "total": rng.randrange(90, 9_000)},
        "links": {
            "self": "/items?cursor=" + cursor,
            "next": rng.choice((None, "/items?cursor=" + cursor[::-1])),
        },
    }


def _event_lines(rng: Random) -> str:
    """JSON Lines: a stream of small events, one a line."""
    moment, lines = words.moment(rng), []
    for sequence in range(rng.randrange(6, 14)):
        moment += timedelta(milliseconds=rng.randrange(1, 90_000))
        event = {
            "ts": moment.isoformat(timespec="milliseconds"),
            "seq": sequence,
            "type": f"{rng.choice(words.NOUNS)}.{rng.choice(words.VERBS)}",
            "actor": rng.choice((None, words.ascii_only(words.name(rng)).replace(" ", "_"))),
            "payload": {rng.choice(words.NOUNS): rng.randrange(1000), "ok": rng.random() < 0.9},
        }
        lines.append(json.dumps(event, separators=(",", ":")))
    return "\n".join(lines) + "\n"


def document(rng: Random) -> str:
    """One JSON text, or one stream of JSON lines, laid out in one of the usual ways."""
    if rng.random() < 0.15:
        return _event_lines(rng)
    value = rng.choice((_order, _settings, _geography, _schema, _tool_call, _tree, _page))(rng)
    layout: dict[str, Any] = rng.choice(
        ({"indent": 2}, {"indent": 2}, {"indent": 4}, {"indent": "\t"}, {}, {"separators": (",", ":")})
    )
    return json.dumps(value, ensure_ascii=rng.random() < 0.2, **layout) + "\n"
