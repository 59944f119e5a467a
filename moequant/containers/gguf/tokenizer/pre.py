"""Which llama.cpp pre-tokenizer does what a tokenizer.json's `pre_tokenizer` does.

llama.cpp knows pre-tokenizers by name (`tokenizer.ggml.pre`): each is a list of regular expressions compiled
into it, plus the switch `ignore_merges`. A name is chosen here by comparing structure: the splits of
tokenizer.json, step by step, with those that the name stands for. Nothing depends on the vocabulary, so a
retrained or extended tokenizer is recognised as well as the published one.
"""

from collections.abc import Mapping, Sequence
from typing import Any
from unicodedata import normalize

from moequant.containers.gguf.tokenizer.splittings import (
    BYTES,
    EACH_DIGIT,
    GPT2,
    TABLE,
    PreTokenizer,
    Steps,
    split,
)
from moequant.errors import TokenizerError

# Without a BOS token llama.cpp would take id 11 for it under these names; their twins leave it unset.
_WITHOUT_BOS = {"dbrx": "chatglm-bpe", "llama-bpe": "glm4"}

# Pieces of regular expressions that match the same text where these expressions use them.
_SAME = (
    ("'(?i:[sdmt]|ll|ve|re)", "(?i:'s|'t|'re|'ve|'m|'ll|'d)"),
    ("(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", "(?i:'s|'t|'re|'ve|'m|'ll|'d)"),
    ("]?+", "]?"),
    ("]++", "]+"),
    (r"|\s*[\r\n]|", r"|\s*[\r\n]+|"),
    (r"|\p{N}{1}|", r"|\p{N}|"),
    (r"[\p{Han}]+|", r"\p{Han}+|"),
)
_GPT2_REGEX = split(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def describe(pre_tokenizer: Mapping[str, Any] | None) -> Steps:
    """The steps of a tokenizer.json pre-tokenizer in one spelling, sequences flattened.

    Raises TokenizerError on a byte-level step that adds a space in front of the text: llama.cpp cannot.
    """
    if pre_tokenizer is None:
        return ()
    kind = pre_tokenizer.get("type")
    if kind == "Sequence":
        return tuple(step for part in pre_tokenizer["pretokenizers"] for step in describe(part))
    if kind == "ByteLevel":
        if pre_tokenizer.get("add_prefix_space"):
            raise TokenizerError(
                "tokenizer.json: ByteLevel has add_prefix_space=true; expected false, llama.cpp adds none"
            )
        return (GPT2 if pre_tokenizer.get("use_regex", True) else BYTES,)
    if kind == "Digits":
        return (EACH_DIGIT if pre_tokenizer.get("individual_digits") else "runs of digits",)
    if kind == "Split":
        return (_describe_split(pre_tokenizer),)
    return (f"{kind} {dict(pre_tokenizer)}",)


def _describe_split(step: Mapping[str, Any]) -> str:
    pattern = step["pattern"]
    regex = pattern.get("Regex")
    if regex is None:
        return f"split string {pattern.get('String')!r} {step.get('behavior')} {step.get('invert')}"
    # Some files hold line breaks where others hold their escapes.
    regex = regex.replace("\r", r"\r").replace("\n", r"\n")
    how = (step.get("behavior"), bool(step.get("invert")))
    covers_everything = regex.endswith((r"|\s+", r"|\s"))
    if how == ("Isolated", False) or (how == ("Removed", True) and covers_everything):
        return split(regex)
    return split(regex, f"{how[0]} {how[1]}")


def is_byte_level(pre_tokenizer: Mapping[str, Any] | None) -> bool:
    """Whether it spells text as letters for bytes."""
    return bool({BYTES, GPT2}.intersection(describe(pre_tokenizer)))


def recognise(pre_tokenizer: Mapping[str, Any] | None) -> PreTokenizer:
    """The table row of a byte-level pre-tokenizer; TokenizerError with its steps when there is none."""
    steps = describe(pre_tokenizer)
    for same in (_composed, _loosened):
        wanted = same(steps)
        for row in TABLE:
            if same(row.steps) == wanted:
                return row
    raise TokenizerError(
        f"tokenizer.json: no llama.cpp pre-tokenizer is known to do these steps: {_one_line(steps)}; "
        "report the model, or add a row to moequant/containers/gguf/tokenizer/splittings.py"
    )


def name_without_bos(name: str) -> str:
    """The name to write when the tokenizer has no BOS token."""
    return _WITHOUT_BOS.get(name, name)


def _composed(steps: Steps) -> Steps:
    """A file may have been through a normal form, which turns the Kelvin sign into K and the like."""
    return tuple(normalize("NFC", step) for step in steps)


def _loosened(steps: Steps) -> Steps:
    """The steps with every piece of regular expression in one of its spellings."""
    loose = []
    for step in _composed(steps):
        for one, other in _SAME:
            step = step.replace(one, other)
        loose.append(EACH_DIGIT if step == split(r"\p{N}") else step)
    if loose[-2:] == [_GPT2_REGEX, BYTES]:
        loose[-2:] = [GPT2]
    return tuple(loose)


def _one_line(steps: Sequence[str]) -> str:
    return " → ".join(repr(step) for step in steps) or "none (not byte-level)"
