"""SentencePiece-style BPE (a metaspace for blanks, byte fallback) of a tokenizer.json.

llama.cpp has two algorithms for it. One, "gemma4" (or "sarvam-moe" for a text without BOS), merges listed
pairs in order of rank as Hugging Face does, but puts no blank in front of a text. The other, "llama", stores
no merges: two neighbours join whenever their joined text is a token, the highest score first, the leftmost
of equals first. It does the same if each token's score is the negated rank of the one merge that makes it:

A token T that its own text encodes to is made there by one pair (l, r). Merging is local: the inside of a
symbol is merged exactly as its text would be alone, as long as nothing crosses its ends. So wherever T
appears, that pair made it, and no other split of T is ever adjacent. Only a token that its own text does
*not* encode to can be joined by llama.cpp and not by Hugging Face, and only if that text ends as two
symbols; those are counted and reported.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gguf.constants import TokenType as Kind

from moequant.containers.gguf.tokenizer.bpe import Pair, merge_alone, unreachable
from moequant.containers.gguf.tokenizer.byte_level import check_merges
from moequant.containers.gguf.tokenizer.vocabulary import Algorithm, Bos, Entry
from moequant.errors import TokenizerError

METASPACE = "▁"
# llama.cpp wants scores in such files but merges by rank; its own converter writes this number.
_UNREAD_SCORE = -1000.0


def algorithm(
    raw: Mapping[str, Any], tokens: Sequence[Entry], added: Iterable[int], merges: Sequence[Pair], bos: Bos
) -> Algorithm:
    """The keys for a vocabulary with "▁" for blanks; `added` are ids that merging does not make."""
    texts = {text for text, _ in tokens}
    if missing := [b for b in range(256) if f"<0x{b:02X}>" not in texts]:
        raise TokenizerError(
            f"tokenizer.json: byte_fallback without token <0x{missing[0]:02X}>; expected all 256 byte "
            "tokens, llama.cpp aborts without"
        )
    prefix, notes = space_prefix(raw)
    aside = set(added)
    own = [text for i, (text, _) in enumerate(tokens) if i not in aside]
    if is_gemma(raw) and merges:
        return _by_rank(tokens, own, merges, bos)
    if words_are_split(raw) and (inner := [text for text in own if METASPACE in text[1:]]):
        raise TokenizerError(
            f"tokenizer.json: Metaspace cuts before every '▁' but {len(inner)} tokens have one inside, "
            f"such as {inner[0]!r}; expected none, llama.cpp does not cut there"
        )
    scores, stray = merge_scores(own, merges)
    if stray:
        notes.append(
            f"llama.cpp forms {len(stray)} tokens that Hugging Face never does, such as {stray[0]!r}"
        )
    floor = -float(len(merges) + 1)
    return Algorithm(
        model="llama",
        pre="default",
        scores=tuple(scores.get(text, floor) for text, _ in tokens),
        space_prefix=prefix,
        notes=tuple(notes),
    )


def _by_rank(tokens: Sequence[Entry], own: Sequence[str], merges: Sequence[Pair], bos: Bos) -> Algorithm:
    """Gemma's shape. llama.cpp cuts runs of line breaks apart from the rest, and "gemma4" always adds BOS."""
    check_merges("tokenizer.json", merges)
    notes = []
    if mixed := [text for text in own if "\n" in text and text.strip("\n")]:
        notes.append(
            f"llama.cpp never forms {len(mixed)} tokens with a line break inside, such as {mixed[0]!r}"
        )
    breaks = [text for text, kind in tokens if kind == Kind.NORMAL and text and not text.strip("\n")]
    if bos.added and (odd := unreachable(breaks, merges)):
        notes.append(f"{len(odd)} runs of line breaks are tokens that only llama.cpp makes")
    return Algorithm(
        model="gemma4" if bos.added else "gpt2",
        pre="gemma4" if bos.added else "sarvam-moe",
        scores=(_UNREAD_SCORE,) * len(tokens) if bos.added else None,
        merges=tuple(f"{left} {right}" for left, right in merges),
        space_prefix=False,
        notes=tuple(notes),
    )


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
        symbols, last = merge_alone(token, lambda *pair: ranks.get(pair))
        made = last is not None and len(symbols) == 1
        scores[token] = -float(ranks[last]) if made and last is not None else floor
        if len(symbols) == 2:
            stray.append(token)
    return scores, stray


def is_gemma(tokenizer: Mapping[str, Any]) -> bool:
    """Whether blanks become "▁" first and are then looked for in vain, as Gemma's and Sarvam's files do."""
    steps = _flatten(tokenizer.get("pre_tokenizer"), "pretokenizers")
    prepended, escaped = _read_normalizer(tokenizer.get("normalizer"))
    return escaped and not prepended and bool(steps) and all(_is_idle(step) for step in steps)


def space_prefix(tokenizer: Mapping[str, Any]) -> tuple[bool, list[str]]:
    """Whether a space goes in front of the text, and where llama.cpp is known to differ.

    Raises TokenizerError when normalizer and pre-tokenizer do anything but turn blanks into "▁".
    """
    prepended, escaped = _read_normalizer(tokenizer.get("normalizer"))
    notes: list[str] = []
    for step in _flatten(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        if escaped and _is_idle(step):
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


def _is_idle(step: Mapping[str, Any]) -> bool:
    """Whether a step splits at blanks, of which a normalizer has left none."""
    return step.get("type") == "Split" and " " in (
        step["pattern"].get("String"),
        step["pattern"].get("Regex"),
    )


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
