"""Which llama.cpp pre-tokenizer does what a tokenizer.json's `pre_tokenizer` does.

llama.cpp knows pre-tokenizers by name (`tokenizer.ggml.pre`): each is a list of regular expressions compiled
into it, plus the switch `ignore_merges`. A name is chosen here by comparing structure: the splits of
tokenizer.json, step by step, with those that the name stands for. Nothing depends on the vocabulary, so a
retrained or extended tokenizer is recognised as well as the published one.

Several names may mean the same splitting; the table keeps one for each setting of `ignore_merges`.
"""

from collections.abc import Callable, Mapping, Sequence
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
_QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_TAIL}"
)
_DEEPSEEK_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_TAIL}"
)
# Every Latin, Greek, Cyrillic, Armenian … letter with case, as the first DeepSeek tokenizers list them. The
# escapes are letters that a normal form would replace, and their ranges with them.
_DEEPSEEK_LETTERS = (
    r"\s?"
    "[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ"
    "-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126"
    "ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-"
    "𑣟𞤀-𞥃]+"
)
_DEEPSEEK_CJK = r"[一-龥ࠀ-一가-퟿]+"

_BYTES = "bytes"
_GPT2 = "gpt-2 words, bytes"
_EACH_DIGIT = "each digit"


def _split(regex: str) -> str:
    return f"split {regex}"


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One splitting and the names llama.cpp has for it.

    steps:        as `describe` returns them.
    merging:      name that always merges, None when there is none.
    whole:        name that takes a word of the vocabulary whole (`ignore_merges`), None when there is none.
    prefer_whole: `whole` splits more exactly than `merging`.
    joins_digits: llama.cpp keeps runs of digits together, which shows if the vocabulary has merges for them.
    difference:   what llama.cpp is known to split otherwise, empty when nothing is.
    """

    steps: Steps
    merging: str | None
    whole: str | None = None
    prefer_whole: bool = False
    joins_digits: bool = False
    difference: str = ""

    def name(self, ignore_merges: bool, merging_reaches_all: Callable[[], bool]) -> str:
        """The name to write for a tokenizer with this splitting.

        `merging_reaches_all` is asked only if the wanted name has the other `ignore_merges`, which changes
        nothing when every token is what its own text merges to. Raises TokenizerError when it does.
        """
        for whole in (True, False) if self.prefer_whole else (ignore_merges, not ignore_merges):
            name = self.whole if whole else self.merging
            if name is not None and (whole == ignore_merges or merging_reaches_all()):
                return name
        raise TokenizerError(
            f"tokenizer.json: ignore_merges={ignore_merges}, llama.cpp's {self.whole or self.merging!r} has "
            "the opposite and gives this vocabulary other ids; expected tokens that their own text merges to"
        )


_BLANKS = "a blank before a blank of another kind (U+2003, U+3000 …) may be split otherwise by llama.cpp"
_CASE = "letters outside A-Z may be split otherwise by llama.cpp where their case changes"

TABLE: tuple[PreTokenizer, ...] = (
    PreTokenizer((_GPT2,), "gpt-2"),
    PreTokenizer((_EACH_DIGIT, _GPT2), "starcoder"),
    PreTokenizer((_split(_cl100k(r"\p{N}{1,3}")), _BYTES), "dbrx", "llama-bpe"),
    PreTokenizer((_split(_cl100k(r"\p{N}")), _BYTES), "qwen2"),
    PreTokenizer((_split(_QWEN35), _BYTES), "qwen35"),
    # "gpt-4o" itself takes combining marks for punctuation, which breaks up Hindi, Thai and many emoji.
    PreTokenizer(
        (_split(_O200K), _BYTES), "gpt-4o", "granite-embed-multi-97m", prefer_whole=True, difference=_CASE
    ),
    PreTokenizer(
        (_split(_cased("", r"\p{N}")), _BYTES),
        None,
        "tekken",
        difference=f"{_CASE}, or words with combining marks",
    ),
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
        joins_digits=True,
        difference=_BLANKS,
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
        difference=_BLANKS,
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
                rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}"
                rf"| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_TAIL}"
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
        difference="llama.cpp splits blanks before numbers otherwise, and no words where their case changes",
    ),
)

# Without a BOS token llama.cpp would take id 11 for it under these names; their twins leave it unset.
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
                "tokenizer.json: ByteLevel has add_prefix_space=true; expected false, llama.cpp adds none"
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
    # Some files hold line breaks where others hold their escapes.
    regex = regex.replace("\r", r"\r").replace("\n", r"\n")
    how = (step.get("behavior"), bool(step.get("invert")))
    covers_everything = regex.endswith((r"|\s+", r"|\s"))
    if how == ("Isolated", False) or (how == ("Removed", True) and covers_everything):
        return _split(regex)
    return f"split {how[0]} {how[1]} {regex}"


def is_byte_level(pre_tokenizer: Mapping[str, Any] | None) -> bool:
    """Whether it spells text as letters for bytes."""
    return bool({_BYTES, _GPT2}.intersection(describe(pre_tokenizer)))


def recognise(pre_tokenizer: Mapping[str, Any] | None) -> PreTokenizer:
    """The table row of a byte-level pre-tokenizer; TokenizerError with its steps when there is none."""
    steps = describe(pre_tokenizer)
    for row in TABLE:
        # A file may have been through a normal form, which turns the Kelvin sign into K and the like.
        if [normalize("NFC", step) for step in row.steps] == [normalize("NFC", step) for step in steps]:
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
