"""Byte-level BPE, which spells bytes as letters, as llama.cpp's "gpt2" with a named pre-tokenizer."""

from collections.abc import Sequence

from gguf.constants import TokenType as Kind

from moequant.containers.gguf.tokenizer import pre
from moequant.containers.gguf.tokenizer.bpe import Pair, unreachable
from moequant.containers.gguf.tokenizer.splittings import PreTokenizer
from moequant.containers.gguf.tokenizer.vocabulary import Algorithm, Entry
from moequant.errors import TokenizerError


def algorithm(
    file: str,
    row: PreTokenizer,
    tokens: Sequence[Entry],
    merges: Sequence[Pair],
    ignore_merges: bool,
    named_bos: bool,
) -> Algorithm:
    """The keys for byte-level merges behind the splitting `row`."""
    check_merges(file, merges)
    ordinary = [text for text, kind in tokens if kind == Kind.NORMAL]
    name, notes = row.choose(ignore_merges, lambda: unreachable(ordinary, merges))
    if row.joins_digits and any(left[-1:].isdigit() and right[:1].isdigit() for left, right in merges):
        notes.append("numbers: llama.cpp joins digits that Hugging Face keeps apart")
    return Algorithm(
        model="gpt2",
        pre=name if named_bos else pre.name_without_bos(name),
        merges=tuple(f"{left} {right}" for left, right in merges),
        notes=tuple(notes),
    )


def check_merges(file: str, merges: Sequence[Pair]) -> None:
    """TokenizerError when llama.cpp cannot read these merges, which it does not say itself."""
    if len(set(merges)) != len(merges):
        raise TokenizerError(f"{file}: a merge is listed twice; expected every pair once")
    if bad := next((pair for pair in merges if " " in pair[0] or " " in pair[1]), None):
        raise TokenizerError(f"{file}: merge {bad} holds a blank; expected byte-level text without blanks")
    if not merges:
        raise TokenizerError(f"{file}: no merges; expected at least one, llama.cpp loads no file without")
