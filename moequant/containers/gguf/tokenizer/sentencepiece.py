"""SentencePiece-style BPE (a metaspace for blanks, byte fallback) as llama.cpp's "llama" tokenizer.

llama.cpp stores no merges for it: two neighbours join whenever their joined text is a token, the highest
score first, the leftmost of equals first. Hugging Face's BPE joins listed pairs in order of rank. Both do
the same if each token's score is the negated rank of the one merge that ever makes it:

A token T that its own text encodes to is made there by one pair (l, r). Merging is local: the inside of a
symbol is merged exactly as its text would be alone, as long as nothing crosses its ends. So wherever T
appears, that pair made it, and no other split of T is ever adjacent. Only a token that its own text does
*not* encode to can be joined by llama.cpp and not by Hugging Face, and only if that text ends as two
symbols; those are counted and reported.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from moequant.errors import TokenizerError

METASPACE = "▁"
Pair = tuple[str, str]


def merge_alone(text: str, ranks: Mapping[Pair, int]) -> tuple[list[str], Pair | None]:
    """BPE of `text` on its own, from characters: (symbols, the last pair merged)."""
    parts, last = list(text), None
    while len(parts) > 1:
        found = [(ranks[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in ranks]
        if not found:
            break
        _, i = min(found)
        last = (parts[i], parts[i + 1])
        parts[i : i + 2] = ["".join(last)]
    return parts, last


def merge_scores(tokens: Iterable[str], merges: Sequence[Pair]) -> tuple[dict[str, float], list[str]]:
    """Scores that make llama.cpp merge as `merges` do, and the tokens for which none can.

    Tokens that no merge makes get a score below every other. The second result lists tokens that llama.cpp
    forms from two neighbours although no merge does.
    """
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    if len(ranks) != len(merges):
        raise TokenizerError("tokenizer.json: a merge is listed twice; expected every pair once")
    floor = -float(len(merges) + 1)
    scores: dict[str, float] = {}
    stray: list[str] = []
    for token in tokens:
        symbols, last = merge_alone(token, ranks)
        made = last is not None and len(symbols) == 1
        scores[token] = -float(ranks[last]) if made and last is not None else floor
        if len(symbols) == 2:
            stray.append(token)
    return scores, stray


def space_prefix(tokenizer: Mapping[str, Any]) -> tuple[bool, list[str]]:
    """Whether a space goes in front of the text, and where llama.cpp is known to differ.

    Raises TokenizerError when normalizer and pre-tokenizer do anything but turn blanks into "▁".
    """
    prepended, escaped = _read_normalizer(tokenizer.get("normalizer"))
    notes: list[str] = []
    for step in _flatten(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        if step.get("type") == "Split" and step["pattern"].get("String") == " " and escaped:
            continue  # Nothing left to split: the normalizer replaced every blank.
        if step.get("type") != "Metaspace" or step.get("replacement", METASPACE) != METASPACE:
            raise TokenizerError(_unknown("pre-tokenizer", step))
        escaped = True
        scheme = step.get("prepend_scheme") or ("always" if step.get("add_prefix_space", True) else "never")
        if scheme == "never":
            continue
        prepended = True
        notes.append("text that starts with a blank: Hugging Face adds no second one, llama.cpp does")
        if scheme == "first":
            notes.append("text after a special token: llama.cpp puts a blank in front, Hugging Face does not")
    if not escaped:
        raise TokenizerError(
            "tokenizer.json: byte-fallback BPE without blanks turned into '▁'; llama.cpp always does that"
        )
    return prepended, notes


def words_are_split(tokenizer: Mapping[str, Any]) -> bool:
    """Whether the pre-tokenizer cuts before every "▁", so that no merge may cross one."""
    steps = _flatten(tokenizer.get("pre_tokenizer"), "pretokenizers")
    return any(step.get("type") == "Metaspace" and step.get("split", True) for step in steps)


def _read_normalizer(normalizer: Mapping[str, Any] | None) -> tuple[bool, bool]:
    """(a "▁" is put in front, blanks become "▁")"""
    prepended = escaped = False
    for step in _flatten(normalizer, "normalizers"):
        match step:
            case {"type": "Prepend", "prepend": "▁"}:
                prepended = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                escaped = True
            case {"type": "NFC" | "NFD" | "NFKC" | "NFKD"}:
                pass  # Reported by the caller: llama.cpp normalises nothing.
            case _:
                raise TokenizerError(_unknown("normalizer", step))
    if prepended and not escaped:
        raise TokenizerError(
            "tokenizer.json: normalizer prepends '▁' but keeps blanks; llama.cpp always replaces them"
        )
    return prepended, escaped


def _flatten(step: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    if step.get("type") == "Sequence":
        return [leaf for part in step[inner] for leaf in _flatten(part, inner)]
    return [step]


def _unknown(what: str, step: Mapping[str, Any]) -> str:
    return (
        f"tokenizer.json: {what} {dict(step)} has no equivalent in llama.cpp's SentencePiece tokenizer; "
        "expected Prepend/Replace/Metaspace with '▁'"
    )
