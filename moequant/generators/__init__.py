"""Seeded text for the structured domains of the calibration set: JSON, CSV, logs, arithmetic.

Experts that specialise in machine-written text see none of it in prose. Such text is cheap to make
in any amount and dull to store, so it is generated when it is read; `calib/manifest.json` lists the
seed, the size and the hash of what must come out.

Everything here is standard library only. The same `(domain, seed, size)` gives the same bytes on
every machine: only integer arithmetic, `random.Random` and correctly rounded float operations.
"""

from collections.abc import Callable
from random import Random

from moequant.errors import CorpusError
from moequant.generators import arithmetic, logs, records, tables

DOMAINS: dict[str, Callable[[Random], str]] = {
    "arithmetic": arithmetic.document,
    "csv": tables.document,
    "json": records.document,
    "logs": logs.document,
}


def generate(domain: str, seed: int, size: int) -> tuple[str, ...]:
    """Whole documents of `domain`, as many as it takes to hold at least `size` bytes of UTF-8.

    A larger size only appends documents, and asking for exactly the bytes of an earlier answer
    gives that answer again. Raises CorpusError for a domain that has no generator.
    """
    if domain not in DOMAINS:
        raise CorpusError(
            f"no generator for domain {domain!r}; there is one for each of {', '.join(DOMAINS)}"
        )
    rng = Random(f"{domain}/{seed}")
    documents: list[str] = []
    written = 0
    while written < size:
        documents.append(DOMAINS[domain](rng))
        written += len(documents[-1].encode())
    return tuple(documents)
