"""The generated domains: the same bytes for the same seed, and text that is what it claims to be."""

import csv
import io
import itertools
import json
import re
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moequant.text import bundled
from scripts import generators
from scripts.generators.__main__ import write

SIZE = 30_000
domains = st.sampled_from(sorted(generators.DOMAINS))


@given(domains, st.integers(0, 50), st.integers(1, 20_000), st.integers(1, 20_000))
def test_more_bytes_only_append(domain: str, seed: int, size: int, more: int) -> None:
    texts = generators.generate(domain, seed, size)
    longer = generators.generate(domain, seed, size + more)
    assert longer[: len(texts)] == texts
    assert sum(len(text.encode()) for text in texts) >= size > sum(len(text.encode()) for text in texts[:-1])


@given(domains, st.integers(0, 50), st.integers(1, 20_000))
def test_the_bytes_it_gave_ask_for_the_same_again(domain: str, seed: int, size: int) -> None:
    texts = generators.generate(domain, seed, size)
    assert generators.generate(domain, seed, sum(len(text.encode()) for text in texts)) == texts


@pytest.mark.parametrize("domain", sorted(generators.DOMAINS))
def test_seeds_and_documents_differ(domain: str) -> None:
    one, two = generators.generate(domain, 1, SIZE), generators.generate(domain, 2, SIZE)
    assert len(set(one)) == len(one)
    assert not set(one) & set(two)


def test_the_bundled_text_is_what_they_give(tmp_path: Path) -> None:
    write(tmp_path)
    calib = bundled.path("calib")
    for split in generators.SPLITS:
        for domain in generators.DOMAINS:
            made, held = (
                {file.name: file.read_bytes() for file in (root / split / domain).iterdir()}
                for root in (tmp_path, calib)
            )
            assert made == held and made, f"{split}/{domain}: run python -m scripts.generators"


def test_json_parses() -> None:
    kinds = set()
    for text in generators.generate("json", 3, SIZE):
        values = (
            [json.loads(line) for line in text.splitlines()]
            if text.startswith('{"ts"')
            else [json.loads(text)]
        )
        kinds |= {next(iter(value)) if isinstance(value, dict) else "list" for value in values}
    assert len(kinds) >= 7


def test_csv_rows_have_as_many_cells_as_the_header() -> None:
    dialects = set()
    for text in generators.generate("csv", 3, SIZE):
        lines = text.splitlines()
        delimiter = max(",;\t|", key=lines[0].count)
        dialects.add((delimiter, "\r\n" in text, text.startswith('"')))
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
        assert len(rows) > 4
        assert {len(row) for row in rows} == {len(rows[0])}
    assert len(dialects) >= 8


def test_logs_come_in_every_format() -> None:
    text = "\n".join(generators.generate("logs", 3, SIZE))
    for pattern in (
        r'^\S+ - \S+ \[\d\d/[A-Z][a-z]{2}/\d{4}:\d\d:\d\d:\d\d \+0000\] "[A-Z]+ /\S+ HTTP/1\.1" \d{3} \d+ "',
        r"^[A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d \w+ [\w/]+\[\d+\]: ",
        r"^\[ *\d+\.\d{6}\] (pci|usb|EXT4|eth|Out)",
        r"^Traceback \(most recent call last\):\n(  File .*\n){2,}\w+(Error): ",
        r"^java\.lang\.\w+: .*\n(\tat [\w.]+\(\w+\.java:\d+\)\n){2,}",
        r'^time=\S+ level=[a-z]+ msg=".*" service=\w+ trace_id=[0-9a-f]{32} duration=[\d.]+ms$',
        r"^\[ *\d+/400\] Building",
        r"^\w+_total\{host=\"[\w-]+\",state=\"\w+\"\} \d+ \d{13}$",
    ):
        assert re.search(pattern, text, re.MULTILINE), pattern


def value(term: str) -> Fraction | None:
    """The exact value of a term of numbers, signs and brackets; None for anything else."""
    if match := re.fullmatch(r"\s*([0-9a-f]+) \(base (\d+)\)\s*", term):
        return Fraction(int(match[1], int(match[2])))
    if not re.fullmatch(r"[\d\s+\-*/^()]*\d[\s)]*", term) or term.count("(") != term.count(")"):
        return None
    exact = re.sub(r"\d+", r"Fraction(\g<0>)", term.strip()).replace("^", "**")
    return Fraction(eval(exact))


def chains(line: str) -> list[tuple[list[Fraction | None], int]]:
    """Of each `a = b = …` in a line: the values of its sides, and the modulus they are under (or 0)."""
    modulus = re.search(r" mod (\d+)$", line)
    plain = re.sub(r"^[^=]*: | mod \d+$|   \(.*$| \([a-f]\)$", "", line)
    parts = re.split(r"[;,] ", plain)
    return [([value(side) for side in part.split("=")], int(modulus[1]) if modulus else 0) for part in parts]


def test_every_equation_holds() -> None:
    """Chains over several lines (`= …`) are followed; sides with letters in them are passed over."""
    held = 0
    for text in generators.generate("arithmetic", 3, 2 * SIZE):
        for sign in ("\N{MULTIPLICATION SIGN}", "\N{MIDDLE DOT}", "\\times"):
            text = text.replace(sign, "*")
        before: Fraction | None = None
        for line in text.splitlines():
            for sides, modulus in chains(line):
                if line.startswith("= "):
                    sides[0] = before
                for left, right in itertools.pairwise(side for side in sides if side is not None):
                    assert (left - right) % modulus == 0 if modulus else left == right, line
                    held += 1
                before = sides[-1]
    assert held > 1500
