"""What every kind of vocabulary file is read into: tokens by id, and how llama.cpp should merge them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gguf.constants import TokenType as Kind

from moequant.errors import TokenizerError

Entry = tuple[str, Kind]

# Far more than any model has; a file that claims more would only fill memory with names of holes.
_MOST = 1 << 22


@dataclass(frozen=True, slots=True)
class Algorithm:
    """The part of a TokenizerSpec that depends on the kind of tokenizer."""

    model: str
    pre: str
    scores: tuple[float, ...] | None = None
    merges: tuple[str, ...] | None = None
    space_prefix: bool | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Bos:
    """named: the folder says which token begins a text; added: one is put in front of every text."""

    named: bool
    added: bool


@dataclass(frozen=True, slots=True)
class Source:
    """One vocabulary file.

    file:           its name, for messages.
    tokens:         (text, kind) of every id from 0 on.
    algorithm:      how llama.cpp should use them, once it is known what stands in front of a text.
    post_processor: what Hugging Face puts around a text, as tokenizer.json has it.
    roles:          role to text, where the format itself fixes it.
    adds_bos:       whether a text begins with BOS when tokenizer_config.json says nothing.
    notes:          known differences from Hugging Face that the algorithm does not matter for.
    """

    file: str
    tokens: list[Entry]
    algorithm: Callable[[Bos], Algorithm]
    post_processor: Mapping[str, Any] | None = None
    roles: Mapping[str, str] = field(default_factory=dict)
    adds_bos: bool = False
    notes: tuple[str, ...] = ()


def in_order(file: str, table: Mapping[int, Entry]) -> list[Entry]:
    """(text, kind) of every id from 0 to the highest; holes become unused tokens.

    Raises TokenizerError on texts that llama.cpp cannot keep apart.
    """
    if not table:
        raise TokenizerError(f"{file}: no tokens; expected at least one")
    if max(table) >= _MOST:
        raise TokenizerError(f"{file}: a token has id {max(table)}; expected less than {_MOST}")
    owner: dict[str, int] = {}
    for i, (text, _) in sorted(table.items()):
        if "\0" in text:
            raise TokenizerError(f"{file}: token {i} is {text!r}; expected no NUL, llama.cpp cuts text there")
        if text in owner:
            raise TokenizerError(
                f"{file}: ids {owner[text]} and {i} are both {text!r}; expected distinct texts"
            )
        owner[text] = i
    taken = set(owner)
    return [table.get(i) or (filler(i, taken), Kind.UNUSED) for i in range(max(table) + 1)]


def filler(i: int, taken: set[str]) -> str:
    """A name for an id that has no token, different from every name taken so far; it is then taken."""
    name = f"[PAD{i}]"
    while name in taken:
        name += "_"
    taken.add(name)
    return name
