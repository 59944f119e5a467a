"""SentencePiece's own file, tokenizer.model: pieces with scores, which llama.cpp's "llama" merges by.

It is a protocol buffer of which only the fields named here are read.
"""

import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from gguf.constants import TokenType as Kind

from moequant.containers.gguf.tokenizer.settings import Settings
from moequant.containers.gguf.tokenizer.vocabulary import Algorithm, Bos, Entry, Source, in_order
from moequant.errors import TokenizerError

Value = int | bytes
Message = dict[int, list[Value]]

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE, _KIND = 1, 2, 3
_MODEL_TYPE, _BPE = 3, 2
_ROLES = {"unknown": (45, "<unk>"), "bos": (46, "<s>"), "eos": (47, "</s>"), "padding": (48, "<pad>")}
_CHARSMAP, _DUMMY_PREFIX, _REMOVE_BLANKS = 2, 3, 4


def read(path: Path, settings: Settings) -> Source:
    """A SentencePiece model; TokenizerError when it is none, or one that does not merge pairs."""
    try:
        model = _message(path.read_bytes())
        pieces = [_message(_bytes(piece)) for piece in model.get(_PIECES, [])]
        trainer, normalizer = (_message(_bytes(_last(model, key, b""))) for key in (_TRAINER, _NORMALIZER))
        table = {i: _piece(piece) for i, piece in enumerate(pieces)}
        scores = [_score(piece) for piece in pieces]
        roles = {
            role: _bytes(_last(trainer, field, b"")).decode() or usual
            for role, (field, usual) in _ROLES.items()
        }
    except (OSError, IndexError, ValueError, struct.error) as error:
        raise TokenizerError(
            f"{path}: not a SentencePiece model ({error}); is the download complete? A tokenizer.json can be "
            "written with transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        ) from error
    if _last(trainer, _MODEL_TYPE, 1) != _BPE:
        raise TokenizerError(f'{path}: a Unigram model; expected BPE, llama.cpp\'s "llama" merges pairs')
    for i, token in settings.tokenizer.added_tokens().items():
        table[i] = (token.content, Kind.CONTROL if token.special else Kind.USER_DEFINED)
    tokens = in_order(path.name, table)
    prefix = settings.tokenizer.flag("add_prefix_space")
    if prefix is None:
        prefix = bool(_last(normalizer, _DUMMY_PREFIX, 1))
    scores += [min(scores, default=0.0)] * (len(tokens) - len(scores))
    return Source(
        file=path.name,
        tokens=tokens,
        algorithm=partial(_algorithm, tuple(scores), prefix),
        roles=roles,
        adds_bos=True,
        notes=tuple(_notes(normalizer)),
    )


def _algorithm(scores: tuple[float, ...], prefix: bool, bos: Bos) -> Algorithm:
    return Algorithm(model="llama", pre="default", scores=scores, space_prefix=prefix)


def _notes(normalizer: Message) -> Iterator[str]:
    if _last(normalizer, _CHARSMAP, b""):
        yield "text that is not NFKC: SentencePiece normalises it, llama.cpp does not"
    if _last(normalizer, _REMOVE_BLANKS, 1):
        yield "blanks at both ends and runs of blanks: SentencePiece removes them, llama.cpp does not"


def _piece(piece: Message) -> Entry:
    return _bytes(_last(piece, _TEXT, b"")).decode(), Kind(_last(piece, _KIND, 1))


def _score(piece: Message) -> float:
    return float(struct.unpack("<f", _bytes(_last(piece, _SCORE, bytes(4))))[0])


def _last(message: Message, field: int, default: Value) -> Value:
    """The value of a field; of repeated ones the last counts."""
    return message.get(field, [default])[-1]


def _bytes(value: Value) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where a text belongs")
    return value


def _message(raw: bytes) -> Message:
    """The fields of a protocol buffer: numbers, and bytes for anything else."""
    fields: Message = {}
    at = 0
    while at < len(raw):
        key, at = _number(raw, at)
        value: Value
        match key & 7:
            case 0:
                value, at = _number(raw, at)
            case 2:
                size, at = _number(raw, at)
                value, at = raw[at : at + size], at + size
            case 1 | 5 as kind:
                size = 8 if kind == 1 else 4
                value, at = raw[at : at + size], at + size
            case other:
                raise ValueError(f"wire type {other}")
        if at > len(raw):
            raise ValueError("it ends too early")
        fields.setdefault(key >> 3, []).append(value)
    return fields


def _number(raw: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first: (number, offset behind it)."""
    value = shift = 0
    while True:
        byte = raw[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
