"""SentencePiece's own file: libllama gives the ids of the tokenizer.json that transformers makes of it."""

import json
import struct
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from moequant.containers.gguf.tokenizer.spec import Kind, read_tokenizer
from moequant.errors import TokenizerError
from tests.clients.llama import Llama
from tests.containers.gguf.tokenizer import folders
from tests.containers.gguf.tokenizer.test_spec import write
from tests.containers.gguf.tokenizer.texts import texts

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6


def number(value: int) -> bytes:
    """A number of seven bits a byte, the lowest first."""
    low, high = value & 127, value >> 7
    return bytes([low | 128]) + number(high) if high else bytes([low])


def field(key: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return number(key << 3) + number(value)
    return number(key << 3 | 2) + number(len(value)) + value


def spm_file(tokens: list[str], trainer: bytes, normalizer: bytes) -> bytes:
    """A model whose first tokens are <unk>, <s>, </s> and the bytes; later ones merge in their order."""
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256]
    pieces = b""
    for i, text in enumerate(tokens):
        kind = kinds[i] if i < len(kinds) else NORMAL
        score = number(2 << 3 | 5) + struct.pack("<f", -float(i))
        pieces += field(1, field(1, text.encode()) + score + field(3, kind))
    return pieces + field(2, trainer) + field(3, normalizer)


BPE, BYTE_FALLBACK = field(3, 2), field(35, 1)


@pytest.mark.parametrize("prefix", [True, False])
def test_ids(prefix: bool, tmp_path: Path) -> None:
    normalizer = folders.LLAMA_NORMALIZER if prefix else folders.ESCAPE
    reference = folders.sentencepiece_style(tmp_path / "reference", normalizer, None, every_split=True)
    theirs = Tokenizer.from_file(str(reference / "tokenizer.json"))
    vocab = theirs.get_vocab()
    folder = tmp_path / "folder"
    folder.mkdir()
    keeps_blanks = field(3, int(prefix)) + field(4, 0)
    content = spm_file(sorted(vocab, key=vocab.__getitem__), BPE + BYTE_FALLBACK, keeps_blanks)
    (folder / "tokenizer.model").write_bytes(content)
    added = {str(len(vocab) + 1): {"content": "<|tool|>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    spec = read_tokenizer(folder)
    assert (spec.model, spec.space_prefix, spec.add_bos, spec.notes) == ("llama", prefix, True, ())
    assert spec.ids == {"bos": 1, "eos": 2, "unknown": 0}
    assert (spec.types[0], spec.types[1], spec.types[3]) == (Kind.UNKNOWN, Kind.CONTROL, Kind.BYTE)
    assert (spec.tokens[-1], spec.types[-2]) == ("<|tool|>", Kind.UNUSED)
    with Llama(write(spec, tmp_path / "v.gguf"), vocab_only=True) as ours:
        for some in texts(7, 60).values():
            for text in some:
                assert ours.tokenize(text, add_special=True) == theirs.encode(text).ids


def test_what_llama_cpp_leaves_out_is_noted(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(spm_file(["<unk>", "<s>", "</s>"], BPE, field(2, b"map")))
    notes = " ".join(read_tokenizer(tmp_path).notes)
    assert "NFKC" in notes and "runs of blanks" in notes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Unigram"),
        (spm_file(["a"], field(3, 1), b""), "Unigram"),
        (field(2, BPE), "no tokens"),
        (b"\x0a\xff\xff\xff\xff\x7f", "ends too early"),
        (b"\x0a", "not a SentencePiece model"),
        (b"\xff" * 40, "64 bits"),
        (b"\x0f", "wire type 7"),
        (spm_file(["a", "a"], BPE, b""), "both 'a'"),
        (field(1, field(1, b"\xff")) + field(2, BPE), "not a SentencePiece model"),
        (field(1, field(1, b"a") + field(3, 99)) + field(2, BPE), "not a SentencePiece model"),
    ],
)
def test_broken_files_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(TokenizerError, match=message):
        read_tokenizer(tmp_path)
