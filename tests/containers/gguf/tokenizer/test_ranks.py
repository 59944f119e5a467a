"""Vocabularies without merges: tiktoken files and tekken.json, with tiktoken itself as the oracle."""

import base64
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.models import BPE

from moequant.containers.gguf.tokenizer.bpe import byte_letters
from moequant.containers.gguf.tokenizer.ranks import rebuilt_merges
from moequant.containers.gguf.tokenizer.spec import Kind, read_tokenizer
from moequant.errors import TokenizerError
from tests.clients.llama import Llama
from tests.containers.gguf.tokenizer import folders
from tests.containers.gguf.tokenizer.families import FAMILIES, KIMI, QWEN2, TEKKEN
from tests.containers.gguf.tokenizer.test_spec import write
from tests.containers.gguf.tokenizer.texts import texts


def ranks_of(family: str, folder: Path) -> dict[bytes, int]:
    """The ranks of a byte-level BPE trained with a family's splitting; special tokens are left out."""
    trained = folders.train_byte_level(folder, FAMILIES[family].pre_tokenizer)
    vocab = json.loads((trained / "tokenizer.json").read_text())["model"]["vocab"]
    bytes_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    words = [word for word in sorted(vocab, key=vocab.get) if word not in (folders.EOS, folders.BOS)]
    return {bytes(bytes_of[letter] for letter in word): rank for rank, word in enumerate(words)}


def save_ranks(folder: Path, name: str, ranks: Mapping[bytes, int], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    (folder / name).write_text("".join(lines))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def wrong_classes(folder: Path, oracle: tiktoken.Encoding, first: int, path: Path) -> set[str]:
    """Classes of text for which libllama's ids differ from tiktoken's, whose ranks start at id `first`."""
    special = tuple(sorted(oracle.special_tokens_set))
    with Llama(write(read_tokenizer(folder), path), vocab_only=True) as ours:
        return {
            kind
            for kind, some in texts(7, 25, special).items()
            for text in some
            if [i + first for i in oracle.encode(text, allowed_special="all")] != ours.tokenize(text)
        }


def test_kimi(tmp_path: Path) -> None:
    ranks = ranks_of("kimi", tmp_path / "trained")
    n = len(ranks)
    names = {n: "[BOS]", n + 1: "[EOS]", n + 2: "<|im_end|>", n + 3: "<|im_user|>", n + 17: "<|im_middle|>"}
    listed = {str(i): {"content": name, "special": True} for i, name in names.items()}
    config = {"added_tokens_decoder": listed, "bos_token": "[BOS]", "eos_token": "[EOS]"}
    folder = save_ranks(tmp_path / "kimi", "tiktoken.model", ranks, **config)
    spec = read_tokenizer(folder)
    assert (spec.model, spec.pre, len(spec.tokens), spec.add_bos) == ("gpt2", "kimi-k2", n + 256, False)
    assert (spec.tokens[n + 2], spec.tokens[n + 255]) == ("<|im_end|>", f"<|reserved_token_{n + 255}|>")
    assert set(spec.types[n:]) == {Kind.CONTROL}
    assert spec.ids == {"bos": n, "eos": n + 1, "eot": n + 2}
    special = {name: i for i, name in names.items()}
    oracle = tiktoken.Encoding("kimi", pat_str=KIMI, mergeable_ranks=ranks, special_tokens=special)
    wrong = wrong_classes(folder, oracle, 0, tmp_path / "v.gguf")
    # As the note says: combining marks and 々.
    assert wrong and not wrong & {"words", "code", "contractions", "punctuation", "numbers", "whitespace"}
    assert any("combining marks" in note for note in spec.notes)


def test_hunyuan(tmp_path: Path) -> None:
    ranks = ranks_of("qwen 3", tmp_path / "trained")
    n = len(ranks)
    folder = save_ranks(tmp_path / "hunyuan", "hy.tiktoken", ranks, eos_token="<|eos|>", pad_token="<|pad|>")
    (folder / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": n + 3}))
    spec = read_tokenizer(folder)
    assert (spec.pre, len(spec.tokens)) == ("qwen2", n + 210)
    assert spec.tokens[n + 2 : n + 6] == ("<|bos|>", "<|eos|>", "<|pad|>", "<|extra_0|>")
    assert spec.tokens[-1] == "<|extra_204|>"
    assert spec.ids == {"bos": n + 2, "eos": n + 3, "padding": n + 4}
    special = {"<|bos|>": n + 2, "<|eos|>": n + 3, "<|extra_0|>": n + 5}
    oracle = tiktoken.Encoding("hunyuan", pat_str=QWEN2, mergeable_ranks=ranks, special_tokens=special)
    assert wrong_classes(folder, oracle, 0, tmp_path / "v.gguf") == set()


def save_tekken(folder: Path, ranks: Mapping[bytes, int], kept: int, special: int, **change: Any) -> Path:
    """A tekken.json whose first `kept` entries and `special` special tokens make up the vocabulary."""
    names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    content = {
        "config": {
            "pattern": TEKKEN,
            "default_vocab_size": kept + special,
            "default_num_special_tokens": special,
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
            for token, rank in ranks.items()
        ],
        "special_tokens": [
            {"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(names)
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tekken.json").write_text(json.dumps({**content, **change}))
    return folder


def test_tekken(tmp_path: Path) -> None:
    """Entries beyond the vocabulary's size are left out, as in Mistral's own files."""
    ranks = ranks_of("mistral", tmp_path / "trained")
    kept = dict(list(ranks.items())[:-100])
    folder = save_tekken(tmp_path / "mistral", ranks, len(kept), 20)
    spec = read_tokenizer(folder)
    assert (spec.pre, len(spec.tokens), spec.add_bos) == ("tekken", len(kept) + 20, True)
    assert spec.tokens[1:6] == ("<s>", "</s>", "[INST]", "[/INST]", "<SPECIAL_5>")
    assert spec.ids == {"bos": 1, "eos": 2, "unknown": 0}
    oracle = tiktoken.Encoding("tekken", pat_str=TEKKEN, mergeable_ranks=kept, special_tokens={})
    wrong = wrong_classes(folder, oracle, 20, tmp_path / "v.gguf")
    assert wrong and wrong <= {"marks", "scripts", "emoji", "mixture", "any unicode"}
    with Llama(tmp_path / "v.gguf", vocab_only=True) as ours:
        assert ours.tokenize("[INST]", add_special=True) == [1, 3]


@given(st.randoms(use_true_random=False))
def test_rebuilt_merges_give_tiktokens_ids(r: random.Random) -> None:
    ranks = {bytes([byte]): byte for byte in range(256)}
    for _ in range(r.randint(1, 40)):
        left, right = (r.choice([*(b"a", b"b", b"c"), *list(ranks)[256:]]) for _ in "lr")
        ranks.setdefault(left + right, len(ranks))
    letters = byte_letters()
    vocab = {"".join(letters[byte] for byte in token): rank for token, rank in ranks.items()}
    merging = BPE(vocab=vocab, merges=rebuilt_merges(ranks), ignore_merges=True)
    oracle = tiktoken.Encoding("x", pat_str=r"(?s).+", mergeable_ranks=ranks, special_tokens={})
    text = "".join(r.choices("abc", k=20))
    assert [token.id for token in merging.tokenize(text)] == oracle.encode(text)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("!!!! 7", "base64"),
        ("YWI=", "line 257"),
        ("YWI= x", "line 257"),
        (" 5", "line 257"),
        ("YWI= 5", "share a rank"),
    ],
)
def test_broken_rank_files_are_named(line: str, message: str, tmp_path: Path) -> None:
    folder = save_ranks(tmp_path, "tiktoken.model", {bytes([b]): b for b in range(256)}, eos_token="[EOS]")
    with (folder / "tiktoken.model").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(TokenizerError, match=message):
        read_tokenizer(folder)


def test_a_missing_byte_is_named(tmp_path: Path) -> None:
    folder = save_ranks(tmp_path, "tiktoken.model", {bytes([b]): b for b in range(255)}, eos_token="[EOS]")
    with pytest.raises(TokenizerError, match="0xFF"):
        read_tokenizer(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": None}, "default_vocab_size"),
        ({"vocab": {}}, "vocab is {}"),
        ({"special_tokens": [5]}, "special_tokens is 5"),
        ({"special_tokens": [{"rank": "x"}]}, "rank is 'x'"),
        ({"vocab": [{"rank": 0, "token_bytes": 3}]}, "token_bytes is 3"),
    ],
)
def test_broken_tekken_files_are_named(change: Any, message: str, tmp_path: Path) -> None:
    folder = save_tekken(tmp_path, {bytes([b]): b for b in range(256)}, 256, 9, **change)
    with pytest.raises(TokenizerError, match=message):
        read_tokenizer(folder)
