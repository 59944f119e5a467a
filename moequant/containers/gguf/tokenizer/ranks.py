"""Vocabularies that list every token with its rank: tiktoken files (Kimi, Hunyuan) and Mistral's tekken.json.

There are no merges in them: of two neighbours those join whose joined bytes have the lowest rank. llama.cpp
wants merges, so they are found again by merging every token's own bytes with the ranks below its own; the
two symbols left at the end are its merge. The models' own Python files, which say how text is split and what
the special tokens are called, are never run: what they say is in the table here.
"""

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gguf.constants import TokenType as Kind

from moequant.containers.gguf.tokenizer import byte_level, pre
from moequant.containers.gguf.tokenizer.bpe import Pair, byte_letters, merge_alone
from moequant.containers.gguf.tokenizer.settings import Section, Settings, read_json
from moequant.containers.gguf.tokenizer.splittings import PreTokenizer, named
from moequant.containers.gguf.tokenizer.vocabulary import Algorithm, Bos, Entry, Source, in_order
from moequant.errors import TokenizerError

_NFC = "text that is not NFC: the model's own tokenizer normalises it, llama.cpp does not"


@dataclass(frozen=True, slots=True)
class RankFile:
    """What a model's Python file says about its tiktoken vocabulary.

    splitting: llama.cpp's name for the regular expression.
    special:   names of the first special tokens, whose ids follow the ranks.
    reserved:  names of the others, with their id or their number among the others.
    count:     how many special tokens there are.
    """

    splitting: str
    special: tuple[str, ...]
    reserved: str
    count: int
    notes: tuple[str, ...] = ()


FILES = {
    "tiktoken.model": RankFile("kimi-k2", (), "<|reserved_token_{id}|>", 256),
    "hy.tiktoken": RankFile(
        "qwen2",
        ("<|endoftext|>", "<|startoftext|>", "<|bos|>", "<|eos|>", "<|pad|>"),
        "<|extra_{number}|>",
        210,
        (_NFC,),
    ),
}


def read_tiktoken(path: Path, settings: Settings) -> Source:
    """A tiktoken file whose name is in FILES; TokenizerError naming the line that is not one of its kind."""
    about = FILES[path.name]
    ranks = _ranks(path)
    table = _spelled(path.name, ranks, 0)
    listed = {i: token.content for i, token in settings.tokenizer.added_tokens().items()}
    first = max(ranks.values(), default=-1) + 1
    for number in range(about.count):
        i = first + number
        named_here = dict(enumerate(about.special, first))
        other = about.reserved.format(id=i, number=number - len(about.special))
        table[i] = (listed.get(i) or named_here.get(i) or other, Kind.CONTROL)
    return _source(path.name, ranks, table, named(about.splitting), notes=about.notes)


def read_tekken(path: Path) -> Source:
    """Mistral's tekken.json, where the special tokens come first and the file holds its own pattern."""
    file = Section(path.name, read_json(path))
    config = file.section("config")
    size, special = (_count(config, key) for key in ("default_vocab_size", "default_num_special_tokens"))
    ranks = {}
    for entry in _objects(file, "vocab")[: max(size - special, 0)]:
        token = _decode(path.name, entry.text("token_bytes") or "")
        ranks[token] = _count(entry, "rank")
    table = _spelled(path.name, ranks, special)
    table |= {i: (f"<SPECIAL_{i}>", Kind.CONTROL) for i in range(special)}
    for entry in _objects(file, "special_tokens"):
        table[_count(entry, "rank")] = (entry.text("token_str") or "", Kind.CONTROL)
    split = {"type": "Split", "pattern": {"Regex": config.text("pattern")}, "behavior": "Isolated"}
    bytes_ = {"type": "ByteLevel", "use_regex": False}
    row = pre.recognise({"type": "Sequence", "pretokenizers": [split, bytes_]})
    roles = {"bos": "<s>", "eos": "</s>", "unknown": "<unk>", "padding": "<pad>"}
    return _source(path.name, ranks, table, row, roles=roles, adds_bos=True)


def _source(
    file: str, ranks: Mapping[bytes, int], table: Mapping[int, Entry], row: PreTokenizer, **rest: Any
) -> Source:
    tokens = in_order(file, table)
    return Source(file, tokens, partial(_algorithm, file, row, tokens, rebuilt_merges(ranks)), **rest)


def _algorithm(file: str, row: PreTokenizer, tokens: list[Entry], merges: list[Pair], bos: Bos) -> Algorithm:
    # tiktoken takes a whole word that is a token before it merges anything.
    return byte_level.algorithm(file, row, tokens, merges, True, bos.named)


def rebuilt_merges(ranks: Mapping[bytes, int]) -> list[Pair]:
    """The merges of a vocabulary with ranks, in order; tokens that no two others make have none."""
    letters = byte_letters()
    merges = []
    for token, own in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) < 2:
            continue

        def below(left: bytes, right: bytes, own: int = own) -> int | None:
            rank = ranks.get(left + right)
            return rank if rank is not None and rank < own else None

        symbols, _ = merge_alone(token, below)
        if len(symbols) == 2:
            left, right = ("".join(letters[byte] for byte in symbol) for symbol in symbols)
            merges.append((left, right))
    return merges


def _ranks(path: Path) -> dict[bytes, int]:
    """The lines of a tiktoken file: a token in base64, a blank, its rank."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        parts = line.split()
        if len(parts) != 2 or not parts[1].isdigit():
            raise TokenizerError(f"{path.name}: line {number} is not a token in base64 and its rank")
        ranks[_decode(f"{path.name}: line {number}", parts[0])] = int(parts[1])
    return ranks


def _decode(where: str, token: str | bytes) -> bytes:
    try:
        found = base64.b64decode(token, validate=True)
    except (binascii.Error, ValueError):
        found = b""
    if not found:
        raise TokenizerError(f"{where}: {token!r:.60} is not a token in base64")
    return found


def _spelled(file: str, ranks: Mapping[bytes, int], first: int) -> dict[int, Entry]:
    """Ids and texts of ranked tokens; TokenizerError when a byte is missing or a rank is given twice."""
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise TokenizerError(f"{file}: no token for byte 0x{missing[0]:02X}; expected all 256")
    letters = byte_letters()
    table = {
        first + rank: ("".join(letters[byte] for byte in token), Kind.NORMAL) for token, rank in ranks.items()
    }
    if len(table) != len(ranks):
        raise TokenizerError(f"{file}: two tokens share a rank; expected one each")
    return table


def _objects(file: Section, key: str) -> list[Section]:
    entries = file.values.get(key)
    if not isinstance(entries, list):
        raise file.wrong(key, entries, "a list")
    return [Section(file.file, {key: entry}).section(key) for entry in entries]


def _count(section: Section, key: str) -> int:
    found = section.ids(key)
    if len(found) != 1:
        raise section.wrong(key, section.values.get(key), "a number")
    return found[0]
