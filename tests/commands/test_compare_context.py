"""Comparing in long contexts: rows longer than llama-perplexity's, and quantized keys and values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moequant.commands.compare import CompareSettings, run
from moequant.errors import CorpusError, MoequantError, PlanError
from moequant.forward.resources import Resources
from moequant.runtimes.llama_cpp.engine import Llama
from moequant.runtimes.llama_cpp.session import PIECE
from moequant.text import bundled, corpus
from moequant.text.rows import load_encoder

LONG = 1200
"""Tokens in a row: two pieces of llama.cpp and a part of a third, and twice the usual row."""


@pytest.fixture(scope="module")
def folder() -> Path:
    """A trained model: what lies far behind decides what it says next."""
    return bundled.path("demo")


@pytest.fixture(scope="module")
def file(demo_file: Path) -> Path:
    return demo_file


def settings(**changes: object) -> CompareSettings:
    plain = CompareSettings(eval_tokens=2 * LONG, ctx=LONG, sample_tokens=0, resources=Resources(threads=1))
    return replace(plain, **changes)


def test_a_long_row_is_scored_as_transformers_scores_it(folder: Path, file: Path) -> None:
    """The second half of a row of 1,200 tokens, each token behind all that precede it in the row."""
    found = run(folder, [file], settings())
    assert found.tokens == 2 * LONG and found.record.settings["context"] == LONG
    one = found.measured[0].comparison
    assert one.tokens == 2 * (LONG - LONG // 2 - 1)
    rows = corpus.pack(corpus.read(None, "evaluation"), load_encoder(folder), LONG, 2 * LONG, 0, None)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    half = LONG // 2
    with torch.no_grad():
        logs = model(input_ids=rows.ids).logits[:, half:-1].log_softmax(-1)
    expected = float(-logs.gather(-1, rows.ids[:, half + 1 :, None]).mean())
    assert abs(one.base_perplexity.value / torch.tensor(expected).exp() - 1) < 1e-3
    short = run(folder, [file], settings(ctx=None)).measured[0].comparison
    assert abs(short.base_perplexity.value / one.base_perplexity.value - 1) > 1e-2, (
        "other rows, other figures"
    )


def test_llama_cpp_scores_long_rows_alike_and_shows_what_its_cache_costs(folder: Path, file: Path) -> None:
    ours = run(folder, [file], settings(exact=True)).measured[0].comparison
    exact = run(file, [file], settings(engine="llama.cpp", model=folder))
    kept = run(file, [file], settings(engine="llama.cpp", cache_type="q8_0"))
    theirs = exact.measured[0].comparison
    assert theirs.tokens == ours.tokens and theirs.kl_mean.value == 0
    assert abs(theirs.perplexity.value / ours.perplexity.value - 1) < 1e-3
    lost = kept.measured[0].comparison
    assert abs(lost.base_perplexity.value / theirs.base_perplexity.value - 1) < 1e-6, "the baseline keeps f32"
    assert 1e-7 < lost.kl_mean.value < 0.01
    assert kept.record.settings["keys and values"] == "q8_0, the baseline's f32"


def test_pieces_are_the_logits_of_the_whole(file: Path) -> None:
    ids = torch.randint(4, 500, (LONG,), generator=torch.Generator().manual_seed(0)).tolist()
    with Llama(file, n_ctx=LONG, threads=1) as model:
        whole = torch.from_numpy(model.logits(ids))
        parts = list(model.pieces(ids, LONG // 2))
    assert [at for at, _ in parts] == [LONG // 2, 2 * PIECE]
    assert torch.equal(torch.cat([torch.from_numpy(part) for _, part in parts]), whole[LONG // 2 :])


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"ctx": 1 << 20}, CorpusError, "; raise --eval-tokens, or give a smaller --ctx$"),
        (
            {"ctx": 1 << 20, "engine": "llama.cpp"},
            CorpusError,
            "; raise --eval-tokens, or give a smaller --ctx$",
        ),
        (
            {"ctx": None, "eval_tokens": 500},
            CorpusError,
            r"1024 are the least \(2 rows of 512\); raise --eval-tokens$",
        ),
        ({"ctx": 5000, "eval_tokens": 10_000}, CorpusError, "the model's context is .*smaller --ctx"),
        ({"ctx": 5000, "eval_tokens": 10_000, "engine": "llama.cpp"}, CorpusError, "smaller --ctx"),
        ({"cache_type": "q8_0"}, PlanError, "--engine llama.cpp"),
        ({"ctx": 2}, PlanError, "rows of 16 tokens or more"),
        ({"ctx": 2, "engine": "llama.cpp"}, PlanError, "rows of 16 tokens or more"),
    ],
)
def test_what_cannot_be_scored_is_one_line(
    file: Path, changes: dict[str, object], kind: type[MoequantError], message: str
) -> None:
    model = bundled.path("demo")
    ours = changes.get("engine") != "llama.cpp"
    with pytest.raises(kind, match=message):
        run(model if ours else file, [file], settings(**changes))
