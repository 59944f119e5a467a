"""Which llama.cpp pre-tokenizer does what a tokenizer.json's `pre_tokenizer` does.

llama.cpp knows pre-tokenizers by name (`tokenizer.ggml.pre`), each a list of regular expressions compiled into it
plus the switch `ignore_merges`. A name is chosen here by comparing structure: the splits of tokenizer.json, step
by step, with those that the name stands for. Nothing depends on the vocabulary, so a retrained or extended
tokenizer is recognised as well as the published one.

Names that mean the same splitting are interchangeable; where the presence of a BOS token decides a default of
llama.cpp (glm4, chatglm-bpe), the right one is picked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unicodedata import normalize

from moequant.errors import TokenizerError

Steps = tuple[str, ...]

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_PUNCTUATION_THEN_NEWLINES = r" ?[^\s\p{L}\p{N}]+[\r\n]*"


def _cl100k(number: str) -> str:
    """The GPT-4 splitting and its descendants, which differ in how many digits make a word."""
    return rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{number}|{_PUNCTUATION_THEN_NEWLINES}|{_TAIL}"


_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(contraction: str, number: str) -> str:
    """The o200k splitting, where a change of letter case starts a word, and Mistral's variant of it."""
    words = "|".join(
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}{upper}{_LOWER}{lower}{contraction}" for upper, lower in ("*+", "+*")
    )
    return rf"{words}|{number}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"


_O200K = _cased(f"{_CONTRACTION}?", r"\p{N}{1,3}")
_QWEN35 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_TAIL}"
_DEEPSEEK_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_TAIL}"
)
# Every Latin, Greek, Cyrillic, Armenian … letter with case, as the first DeepSeek tokenizers list them.
_DEEPSEEK_LETTERS = (
    r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗ"
    r"ὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗ"
    r"Ａ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
)
_DEEPSEEK_CJK = r"[一-龥ࠀ-一가-퟿]+"

_BYTES = "bytes"
_GPT2 = "gpt-2 words, bytes"
_EACH_DIGIT = "each digit"


def _split(regex: str) -> str:
    return f"split {normalize('NFC', regex)}"


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One splitting and the names llama.cpp has for it.

    steps:      as `describe` returns them.
    merging:    name that always merges, None when there is none.
    whole:      name that takes a word found in the vocabulary whole (`ignore_merges`), None when there is none.
    difference: what llama.cpp is known to split otherwise, empty when nothing is.
    """

    steps: Steps
    merging: str | None
    whole: str | None = None
    difference: str = ""


_MARKS = "words with combining marks or letters without case may be split otherwise by llama.cpp"

TABLE: tuple[PreTokenizer, ...] = (
    PreTokenizer((_GPT2,), "gpt-2"),
    PreTokenizer((_EACH_DIGIT, _GPT2), "starcoder"),
    PreTokenizer((_split(_cl100k(r"\p{N}{1,3}")), _BYTES), "dbrx", "llama-bpe"),
    PreTokenizer((_split(_cl100k(r"\p{N}")), _BYTES), "qwen2"),
    PreTokenizer((_split(_QWEN35), _BYTES), "qwen35"),
    PreTokenizer((_split(_O200K), _BYTES), "gpt-4o", difference=_MARKS),
    PreTokenizer((_split(_cased("", r"\p{N}")), _BYTES), None, "tekken", difference=_MARKS),
    PreTokenizer(
        (
            _split(r"\p{N}{1,3}"),
            _split(r"[一-龥぀-ゟ゠-ヿ]+"),
            _split(_DEEPSEEK_WORDS),
            _BYTES,
        ),
        "deepseek-v3",
    ),
    PreTokenizer(
        (
            _split(r"[\r\n]"),
            _split(_DEEPSEEK_LETTERS),
            _split(r"\s?[!-/:-~！-／：-～‘-‟　-。]+"),
            _split(r"\s+$"),
            _split(_DEEPSEEK_CJK),
            _EACH_DIGIT,
            _BYTES,
        ),
        "deepseek-llm",
    ),
    PreTokenizer(
        (
            _split(r"[\r\n]"),
            _split(r"\s?\p{L}+"),
            _split(r"\s?\p{P}+"),
            _split(_DEEPSEEK_CJK),
            _EACH_DIGIT,
            _BYTES,
        ),
        "deepseek-coder",
    ),
    PreTokenizer(
        (
            _split(
                r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
                r"|\s*[\r\n]|\s+(?!\S)|\s+"
            ),
            _BYTES,
        ),
        "bailingmoe",
    ),
    PreTokenizer(
        (
            _split(
                rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_TAIL}"
            ),
            _BYTES,
        ),
        "seed-coder",
    ),
    PreTokenizer(
        (
            _split(
                rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
            ),
            _BYTES,
        ),
        "exaone-moe",
    ),
    PreTokenizer(
        (_split(r"\d{1,3}(?=(?:\d{3})*\b)"), _split(_O200K), _BYTES),
        "tiny_aya",
        difference="llama.cpp splits some numbers, and words with combining marks, otherwise",
    ),
)

# With no BOS token, llama.cpp would invent id 11 for it under these names; their twins leave it unset.
_WITHOUT_BOS = {"dbrx": "chatglm-bpe", "llama-bpe": "glm4"}


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
                "tokenizer.json: ByteLevel with add_prefix_space=true has no llama.cpp equivalent; expected false"
            )
        return (_GPT2 if pre_tokenizer.get("use_regex", True) else _BYTES,)
    if kind == "Digits":
        return (_EACH_DIGIT if pre_tokenizer.get("individual_digits") else "runs of digits",)
    if kind == "Split":
        return (_describe_split(pre_tokenizer),)
    return (f"{kind} {dict(pre_tokenizer)}",)


def _describe_split(step: Mapping[str, Any]) -> str:
    pattern = step["pattern"]
    regex = pattern.get("Regex")
    if regex is None:
        return f"split string {pattern.get('String')!r} {step.get('behavior')} {step.get('invert')}"
    # Some files hold line breaks where others hold their escapes, or compatibility letters where others
    # hold the plain ones (the Kelvin sign and K); both mean the same here.
    regex = normalize("NFC", regex)
    regex = regex.replace("\r", r"\r").replace("\n", r"\n")
    how = (step.get("behavior"), bool(step.get("invert")))
    covers_everything = regex.endswith((r"|\s+", r"|\s"))
    if how == ("Isolated", False) or (how == ("Removed", True) and covers_everything):
        return _split(regex)
    return f"split {how[0]} {how[1]} {regex}"


def recognise(pre_tokenizer: Mapping[str, Any] | None) -> PreTokenizer:
    """The table row of a byte-level pre-tokenizer; TokenizerError with its steps when there is none."""
    steps = describe(pre_tokenizer)
    for row in TABLE:
        if row.steps == steps:
            return row
    raise TokenizerError(
        f"tokenizer.json: no llama.cpp pre-tokenizer is known to do these steps: {_one_line(steps)}; "
        "report the model, or add a row to moequant/containers/tokenizer_pre.py"
    )


def name_without_bos(name: str) -> str:
    """The name to write when the tokenizer has no BOS token."""
    return _WITHOUT_BOS.get(name, name)


def _one_line(steps: Sequence[str]) -> str:
    return " → ".join(repr(step) for step in steps) or "none (not byte-level)"
