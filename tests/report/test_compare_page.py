"""The page of a comparison: whole without a network, every figure in it, in the ink of the page."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from moequant.errors import OutputError
from moequant.evaluate import Ran, Scores, WeightError, difference
from moequant.evaluate.compared import Compared
from moequant.evaluate.environment import Origin, Record
from moequant.evaluate.open_source import Source
from moequant.evaluate.results import RoutingChange
from moequant.evaluate.side_by_side import measured
from moequant.progress import StageCost
from moequant.report.compare_page import page, write
from moequant.report.figures import INK
from moequant.runtimes.llama_cpp.serving import Sample, Serving
from moequant.text.corpus import Rows
from moequant.values import Role

VOID = {"meta", "link", "br", "img"}


def found(layers: int = 3, experts: int = 6, domains: tuple[str, ...] = ("prose", "code")) -> Compared:
    """Two candidates with made-up figures; expert 4 of layer 1 of the second errs far more than others."""
    generator = torch.Generator().manual_seed(0)
    rows = Rows(torch.zeros(4, 8, dtype=torch.int64), (domains * 4)[:4], "made-up <text>", 32)
    made, sources = [], []
    for number, name in enumerate(("a.gguf", "b & c.gguf")):
        nll, kl = torch.rand(2, 12, generator=generator, dtype=torch.float64)
        ones = torch.ones(12, dtype=torch.float64)
        scores = Scores(nll, nll + 0.1 * kl, (number + 1) * kl, ones, ones)
        gone = (None, *(expert / experts for expert in range(1, experts)))
        routing = tuple(
            RoutingChange(layer, 0.01 * layer, (0.0,) * len(domains), gone) for layer in range(layers)
        )
        errors = []
        for layer in range(layers):
            for role in (Role.GATE, Role.UP, Role.DOWN):
                error = 0.01 + 0.001 * torch.rand(experts, generator=generator, dtype=torch.float64)
                if (number, layer, role) == (1, 1, Role.DOWN):
                    error[4] = 1.0
                tokens = torch.arange(experts)
                errors.append(WeightError(f"layers.{layer}.experts.{role}", role, layer, error, tokens))
        types = {error.weight: "Q6_K" if error.role is Role.DOWN else "Q4_K" for error in errors}
        sources.append(Source(Path(name), "GGUF", None, 10**9 * (number + 1), types))
        made.append(measured(name, scores, rows, routing, tuple(errors)))
    return Compared(
        base=Source(Path("model"), "checkpoint", None, 4 * 10**9, {}),
        candidates=tuple(sources),
        measured=tuple(made),
        differences=(difference(*((one.name, one.scores) for one in made)),),
        engine="moequant",
        rounded=True,
        tokens=32,
        domains=domains,
        source="made-up <text>",
        cost=StageCost("compare", 1.0, 10**9),
        ran=ran(),
        record=record(),
    )


def ran() -> tuple[Ran, ...]:
    """The baseline and the last version in transformers, one in llama.cpp; the last says something else."""
    samples = [
        Sample("average", 9, 0, (1, 2, 3), "one\n<two>\x1b[31m"),
        Sample("long", 90, 7, (4, 5), "four"),
    ]
    other = replace(samples[0], ids=(1, 7, 8), text="another")
    timed = [replace(one, seconds=(0.5, 0.1, 0.3)) for one in samples]
    return (
        Ran("model", tuple(samples)),
        Ran("a.gguf", tuple(timed), Serving(2048, 2, 1.5, 10**9, 2 * 10**9, tuple(timed))),
        Ran("b & c.gguf", (replace(other, seconds=(0.2,)), timed[1]), None),
    )


def record() -> Record:
    """One file, whose command line would be markup."""
    origin = Origin(Path("a.gguf"), "GGUF", None, {"a.gguf": "ab" * 32}, {"Q4_K": 6, "Q6_K": 3})
    settings = {"engine": "moequant", "seed": 0, "tokens SHA-256": "cd" * 32}
    machine = {"cpu": "a processor", "gpu": "a card", "driver": "1.2"}
    return Record((origin,), settings, {"torch": "2"}, machine, "2026-11-22", "moequant compare '<b>'")


@pytest.fixture(scope="module")
def text() -> str:
    return page(found())


class Checker(HTMLParser):
    """Every element that is opened is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, (tag, self.open[-3:])
        self.open.pop()


def test_the_page_is_whole_and_needs_no_network(text: str) -> None:
    checker = Checker()
    checker.feed(text)
    assert not checker.open and checker.seen.count("script") == 1
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in text
    )
    # Namespaces and the DTDs of SVG are names, not addresses that a browser opens.
    addresses = re.findall(r"""(?:href|src|url\()\s*=?\s*["']?(\w+:[^"')\s]+)""", text)
    assert all(address.startswith(("data:", "http://www.w3.org/")) for address in addresses), addresses
    assert "@import" not in text


def test_every_figure_is_there_in_the_ink_of_the_page(text: str) -> None:
    # sizes, domains, rerouted, and for each of two candidates types
    assert text.count("<svg") == 5
    # tokens, and for each of two candidates three projections and what moved
    assert text.count('class="cells"') == 9
    assert INK not in text and "currentColor" in text
    assert not re.search(r"<svg [^>]*\b(width|height)=", text), "pictures scale with their column"
    without = page(found(domains=("prose",)))
    assert without.count("<svg") == 4 and "By domain" not in without


def test_names_are_escaped_and_the_damaged_expert_is_marked(text: str) -> None:
    assert "b &amp; c.gguf" in text and "made-up &lt;text&gt;" in text
    marked = re.findall(r'<tr class="mark"><td>([\d.]+)</td><td>(\w+)</td>', text)
    assert marked == [("1.4", "down")]


def test_the_verdict_is_at_the_top(text: str) -> None:
    top = text[: text.index("<h2>")]
    assert top.count("of top tokens kept; 1.0% of tokens take another set of experts;") == 2
    assert "no expert errs more than 4 times the median" in top
    assert "1 expert errs more than 4 times the median" in top


def test_places_of_this_machine_are_not_told(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("text")
    known = found()
    sources = tuple(replace(each, path=tmp_path / each.path) for each in known.candidates)
    made = page(replace(known, source=str(tmp_path / "own.txt"), candidates=sources))
    assert "tokens of own.txt read" in made and str(tmp_path) not in made


def test_a_large_model_is_a_small_page() -> None:
    """94 layers of 256 experts, three projections, two candidates."""
    assert len(page(found(layers=94, experts=256)).encode()) < 2_000_000


def test_the_page_is_written_whole_or_not_at_all(text: str, tmp_path: Path) -> None:
    write(found(), tmp_path / "page.html")
    # The same comparison is the same page, whenever it is drawn.
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == text
    with pytest.raises(OutputError):
        write(found(), tmp_path / "absent" / "page.html")
