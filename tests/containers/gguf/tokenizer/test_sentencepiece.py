"""SentencePiece-style BPE: scores that make llama.cpp merge as Hugging Face's ranked pairs do."""

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE

from moequant.containers.gguf.tokenizer.bpe import merge_alone
from moequant.containers.gguf.tokenizer.spec import read_tokenizer
from moequant.errors import TokenizerError
from tests.clients.llama import Llama
from tests.containers.gguf.tokenizer import folders
from tests.containers.gguf.tokenizer.test_spec import edit, mismatches, write


@pytest.mark.parametrize("every_split", [False, True])
@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer", "prefix"),
    [
        (folders.LLAMA_NORMALIZER, None, True),
        (folders.ESCAPE, None, False),
        (None, folders.metaspace("never"), False),
    ],
)
def test_sentencepiece_style(
    normalizer: dict[str, Any] | None,
    pre_tokenizer: dict[str, Any] | None,
    prefix: bool,
    every_split: bool,
    tmp_path: Path,
) -> None:
    folder = folders.sentencepiece_style(tmp_path, normalizer, pre_tokenizer, every_split)
    spec = read_tokenizer(folder)
    assert (spec.model, spec.space_prefix, spec.add_bos, spec.notes) == ("llama", prefix, True, ())
    assert mismatches(folder, spec, tmp_path / "v.gguf", 60, ("<s>", "</s>")) == {}
    theirs = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with Llama(tmp_path / "v.gguf", vocab_only=True) as ours:
        assert ours.tokenize("two experts", add_special=True) == theirs.encode("two experts").ids


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_metaspace_differs_only_where_noted(scheme: str, tmp_path: Path) -> None:
    folder = folders.sentencepiece_style(tmp_path, None, folders.metaspace(scheme))
    spec = read_tokenizer(folder)
    assert len(spec.notes) == (2 if scheme == "first" else 1)
    found = mismatches(folder, spec, tmp_path / "v.gguf", 60, ("<s>", "</s>"))
    wrong = [text for some in found.values() for text in some]
    assert wrong
    blank = (" ", "▁")
    after = ("<s>", "</s>") if scheme == "first" else tuple(t + b for t in ("<s>", "</s>") for b in blank)
    assert all(text.startswith(blank) or any(place in text for place in after) for text in wrong)


SPLIT_AT_BLANKS = {
    "type": "Split",
    "pattern": {"String": " "},
    "behavior": "MergedWithPrevious",
    "invert": False,
}


def gemma(folder: Path, with_bos: bool) -> Path:
    """Gemma's shape: blanks are replaced first, line breaks have tokens of their own, and merges."""
    made = folders.sentencepiece_style(folder, folders.ESCAPE, SPLIT_AT_BLANKS)

    def change(content: Any) -> None:
        model = content["model"]
        for text in ("\n", "\n\n", "\n\n\n\n"):
            model["vocab"].setdefault(text, len(model["vocab"]))
        model["merges"] += [["\n", "\n"], ["\n\n", "\n\n"]]
        content["post_processor"] = content["post_processor"] if with_bos else None

    edit(made, change)
    return made


@pytest.mark.parametrize(
    ("with_bos", "model", "pre"), [(True, "gemma4", "gemma4"), (False, "gpt2", "sarvam-moe")]
)
def test_gemma_and_sarvam(with_bos: bool, model: str, pre: str, tmp_path: Path) -> None:
    folder = gemma(tmp_path, with_bos)
    spec = read_tokenizer(folder)
    assert (spec.model, spec.pre, spec.space_prefix, spec.add_bos) == (model, pre, False, with_bos)
    assert (spec.scores is not None, spec.merges is not None, spec.notes) == (with_bos, True, ())
    assert mismatches(folder, spec, tmp_path / "v.gguf", 100, ("<s>", "</s>")) == {}
    theirs = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with Llama(tmp_path / "v.gguf", vocab_only=True) as ours:
        for text in ("two experts", "a\n\n\n\n\n\n\nb \n\n", "\n" * 9):
            assert ours.tokenize(text, add_special=True) == theirs.encode(text).ids
        assert ours.detokenize(ours.tokenize("zwei  Experten\n\n")) == "zwei  Experten\n\n"


def test_what_gemmas_algorithm_does_otherwise_is_noted(tmp_path: Path) -> None:
    folder = gemma(tmp_path, with_bos=True)

    def change(content: Any) -> None:
        model = content["model"]
        for text in ("\nb", "\n\n\n"):
            model["vocab"][text] = len(model["vocab"])
        model["merges"].append(["\n", "b"])

    edit(folder, change)
    spec = read_tokenizer(folder)
    assert len(spec.notes) == 2
    theirs = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with Llama(write(spec, tmp_path / "v.gguf"), vocab_only=True) as ours:
        for text in ("a\nb", "\n\n\n"):
            assert ours.tokenize(text) != theirs.encode(text, add_special_tokens=False).ids


def test_a_very_long_token_takes_no_quadratic_time() -> None:
    """65,536 characters that merge all the way, which took the old reader many minutes."""
    ranks = {("a" * 2**i, "a" * 2**i): i for i in range(16)}
    symbols, last = merge_alone("a" * 2**16, lambda *pair: ranks.get(pair))
    assert symbols == ["a" * 2**16] and last == ("a" * 2**15, "a" * 2**15)


def test_cuts_before_blanks_need_a_vocabulary_without_inner_blanks(tmp_path: Path) -> None:
    folder = folders.sentencepiece_style(tmp_path, None, folders.metaspace("never", split=True))
    with pytest.raises(TokenizerError, match="Metaspace"):
        read_tokenizer(folder)


def test_a_token_that_only_llama_cpp_would_form_is_noted(tmp_path: Path) -> None:
    folder = folders.sentencepiece_style(tmp_path, folders.ESCAPE, None)
    edit(folder, lambda t: t["model"]["vocab"].update({"qj": len(t["model"]["vocab"])}))
    (note,) = read_tokenizer(folder).notes
    assert "1 tokens" in note and "'qj'" in note


@given(
    st.lists(st.text("ab▁", min_size=2, max_size=2), min_size=1, max_size=8, unique=True),
    st.text("ab▁", max_size=12),
)
def test_merging_alone_is_what_the_library_does(seeds: list[str], text: str) -> None:
    merges = [(seed[0], seed[1]) for seed in seeds]
    merges += [(seed, "a") for seed in seeds] + [(left, right) for left in seeds for right in seeds]
    tokens = {"a", "b", "▁", *(left + right for left, right in merges)}
    model = BPE(vocab={token: i for i, token in enumerate(sorted(tokens))}, merges=merges)
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    symbols, _ = merge_alone(text, lambda *pair: ranks.get(pair))
    assert symbols == [token.value for token in model.tokenize(text)]


def test_missing_byte_tokens_are_refused(tmp_path: Path) -> None:
    folder = folders.sentencepiece_style(tmp_path, folders.ESCAPE, None)
    edit(folder, lambda t: t["model"]["vocab"].pop("<0x41>"))
    with pytest.raises(TokenizerError, match="<0x41>"):
        read_tokenizer(folder)


def random_tokenizer(folder: Path, seed: int) -> Path:
    """A tokenizer whose merges, made of earlier tokens, stand in any order, as do its ids."""
    r = random.Random(seed)
    tokens, merges = list("abc▁"), list[tuple[str, str]]()
    while len(merges) < 3 + seed % 30:
        pair = (r.choice(tokens), r.choice(tokens))
        if pair not in merges and len("".join(pair)) < 10:
            merges.append(pair)
            tokens += [] if "".join(pair) in tokens else ["".join(pair)]
    if seed % 2:
        r.shuffle(merges)
    made = folders.sentencepiece_style(
        folder, (folders.ESCAPE, folders.LLAMA_NORMALIZER)[seed % 3 == 0], None
    )
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {token: i for i, token in enumerate([*first, *r.sample(tokens, len(tokens))])}
    edit(made, lambda t: t["model"].update(vocab=vocab, merges=merges))
    return made


def test_random_merges_are_exact_or_noted(tmp_path: Path) -> None:
    exact, differing = 0, 0
    for seed in range(25):
        folder = random_tokenizer(tmp_path / "tokenizer", seed)
        spec = read_tokenizer(folder)
        theirs = Tokenizer.from_file(str(folder / "tokenizer.json"))
        r = random.Random(seed)
        lines = ["".join(r.choices("aaabbc  é", k=r.randint(1, 40))) for _ in range(80)]
        with Llama(write(spec, tmp_path / "v.gguf"), vocab_only=True) as ours:
            same = all(theirs.encode(t, add_special_tokens=False).ids == ours.tokenize(t) for t in lines)
        assert same or spec.notes
        exact += not spec.notes
        differing += not same
    assert exact > 5 and differing > 5
