"""Every family's splitting gets llama.cpp's name for it, and libllama then gives Hugging Face's ids."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from moequant.containers.gguf.tokenizer.pre import recognise
from moequant.containers.gguf.tokenizer.spec import read_tokenizer
from moequant.containers.gguf.tokenizer.splittings import TABLE, named
from moequant.errors import TokenizerError
from tests.clients.llama import Llama
from tests.containers.gguf.tokenizer import folders
from tests.containers.gguf.tokenizer.families import BYTES, FAMILIES, QWEN2, SHARED, split, steps
from tests.containers.gguf.tokenizer.test_spec import edit, mismatches, write

SPECIAL = (folders.EOS, folders.BOS)


def test_every_row_belongs_to_a_family() -> None:
    assert {id(named(family.pre)) for family in FAMILIES.values()} == {id(row) for row in TABLE}


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_splitting_of_every_family(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    folder = folders.across_words(tmp_path, family.pre_tokenizer, family.ignore_merges)
    spec = read_tokenizer(folder)
    assert spec.pre == family.pre
    wrong = mismatches(folder, spec, tmp_path / "v.gguf", 10, SPECIAL)
    assert bool(spec.notes) == bool(family.odd)
    assert family.wrong == "*" or set(wrong) <= set(family.wrong.split(","))
    theirs = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with Llama(tmp_path / "v.gguf", vocab_only=True) as ours:
        same = theirs.encode(family.odd, add_special_tokens=False).ids == ours.tokenize(family.odd)
    assert same != bool(family.odd)


@pytest.mark.parametrize("name", sorted(SHARED))
def test_families_that_share_a_splitting(name: str, tmp_path: Path) -> None:
    other, ignore_merges, has_bos, pre = SHARED[name]
    folder = folders.across_words(tmp_path, FAMILIES[other].pre_tokenizer, ignore_merges)
    if not has_bos:
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": folders.EOS}))
    assert read_tokenizer(folder).pre == pre


@pytest.mark.parametrize("name", ["gpt-2", "qwen 3.5", "deepseek 3", "kimi"])
def test_a_vocabulary_trained_with_the_splitting(name: str, tmp_path: Path) -> None:
    """Where words change case no merge reaches across, so that Kimi's known differences do not show."""
    folder = folders.train_byte_level(tmp_path, FAMILIES[name].pre_tokenizer)
    found = mismatches(folder, read_tokenizer(folder), tmp_path / "v.gguf", 20, SPECIAL)
    if name == "kimi":
        assert not found.keys() & {"words", "code", "numbers", "punctuation", "whitespace", "contractions"}
    else:
        assert found == {}


def test_o200k_takes_the_name_that_knows_combining_marks(tmp_path: Path) -> None:
    folder = folders.across_words(tmp_path, FAMILIES["gpt-oss"].pre_tokenizer)
    edit(folder, lambda t: t["model"]["vocab"].update({"qzjx": len(t["model"]["vocab"])}))
    spec = read_tokenizer(folder)
    assert spec.pre == "gpt-4o" and any("combining marks" in note for note in spec.notes)
    assert "marks" in mismatches(folder, spec, tmp_path / "v.gguf", 10)


@pytest.mark.parametrize(
    ("family", "ignore_merges", "pre", "who"),
    [("qwen 3", True, "qwen2", "only Hugging Face"), ("mistral", False, "tekken", "only llama.cpp")],
)
def test_a_token_that_no_merges_make(
    family: str, ignore_merges: bool, pre: str, who: str, tmp_path: Path
) -> None:
    folder = folders.across_words(tmp_path, FAMILIES[family].pre_tokenizer, ignore_merges)
    before = read_tokenizer(folder)
    assert before.pre == pre and not any("whole words" in note for note in before.notes)
    edit(folder, lambda t: t["model"]["vocab"].update({"qzjx": len(t["model"]["vocab"])}))
    spec = read_tokenizer(folder)
    assert [note for note in spec.notes if "1 tokens" in note and who in note and "'qzjx'" in note]
    theirs = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with Llama(write(spec, tmp_path / "v.gguf"), vocab_only=True) as ours:
        assert theirs.encode("qzjx").ids != ours.tokenize("qzjx")


@pytest.mark.parametrize(
    "spelled",
    [
        steps(split(QWEN2.replace(r"\r", "\r").replace(r"\n", "\n"), "Removed", True), BYTES),
        steps(split(QWEN2.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "'(?i:[sdmt]|ll|ve|re)")), BYTES),
        steps(split(QWEN2.replace(r"|\p{N}|", r"|\p{N}{1}|")), BYTES),
    ],
)
def test_other_spellings_of_a_splitting(spelled: dict[str, Any]) -> None:
    assert recognise(spelled) is named("qwen2")


def test_gpt2_words_spelled_out() -> None:
    words = split(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    assert recognise(steps(words, BYTES)) is named("gpt-2")
    assert recognise(steps(split(r"\p{N}"), words, BYTES)) is named("starcoder")


@pytest.mark.parametrize(
    "unknown",
    [
        steps(split(r"\p{Greek}+"), BYTES),
        steps(split(QWEN2, "MergedWithNext"), BYTES),
        steps(split(QWEN2), split(r"\p{Greek}+"), BYTES),
    ],
)
def test_unknown_splitting_prints_it(unknown: dict[str, Any], tmp_path: Path) -> None:
    folder = folders.across_words(tmp_path, unknown)
    regex = unknown["pretokenizers"][0]["pattern"]["Regex"]
    with pytest.raises(TokenizerError) as caught:
        read_tokenizer(folder)
    assert repr(regex)[1:-1] in str(caught.value) and "\n" not in str(caught.value)
