"""Seeded text for the structured domains of the calibration set: JSON, CSV, logs, arithmetic.

Experts that specialise in machine-written text see none of it in prose. `python -m scripts.generators`
writes such text into `calib/`, where it is read like any other; the demo model trains on more of it.

Everything here is standard library only. The same `(domain, seed, size)` gives the same bytes on
every machine: only integer arithmetic, `random.Random` and correctly rounded float operations.
"""

from collections.abc import Callable
from random import Random

from scripts.generators import arithmetic, logs, records, tables

DOMAINS: dict[str, Callable[[Random], str]] = {
    "arithmetic": arithmetic.document,
    "csv": tables.document,
    "json": records.document,
    "logs": logs.document,
}

SPLITS = {"text": (1, 16_000), "eval": (2, 4_000)}
"""Folder of `calib/` → seed and size of each domain there: about what the written domains have."""


def generate(domain: str, seed: int, size: int) -> tuple[str, ...]:
    """Whole documents of `domain`, as many as it takes to hold at least `size` bytes of UTF-8.

    A larger size only appends documents, and asking for exactly the bytes of an earlier answer
    gives that answer again. Raises KeyError for a domain that has no generator.
    """
    document, rng = DOMAINS[domain], Random(f"{domain}/{seed}")
    documents: list[str] = []
    written = 0
    while written < size:
        documents.append(document(rng))
        written += len(documents[-1].encode())
    return tuple(documents)
