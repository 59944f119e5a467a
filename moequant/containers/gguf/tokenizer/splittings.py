"""The splittings that llama.cpp has names for, as the steps of a Hugging Face pre-tokenizer.

Several names mean the same splitting; the table keeps one for each setting of `ignore_merges`. So the
tokenizers of Hunyuan-A13B, Solar-Open and Grok-2 get "qwen2", those of Llama 4, MiniMax-M2 and Kanana 2 the
name that gpt-oss gets, those of Hunyuan's later models "deepseek-v3", Granite's and SmolLM's "starcoder".
"""

from collections.abc import Callable
from dataclasses import dataclass

Steps = tuple[str, ...]

BYTES = "bytes"
GPT2 = "gpt-2 words, bytes"
EACH_DIGIT = "each digit"


def split(regex: str, behaviour: str = "") -> str:
    """The spelling of a step that cuts out every match; `behaviour` is empty for "Isolated"."""
    return f"split {behaviour} {regex}" if behaviour else f"split {regex}"


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One splitting and the names llama.cpp has for it.

    steps:              as `pre.describe` returns them.
    merging:            name that always merges, None when there is none.
    whole:              name that takes a word of the vocabulary whole (`ignore_merges`), None for none.
    prefer_whole:       `whole` splits more exactly than `merging`.
    joins_digits:       llama.cpp keeps runs of digits together, which shows if there are merges for them.
    difference:         what llama.cpp is known to split otherwise, empty when nothing is.
    merging_difference: what it splits otherwise besides under the name `merging`.
    """

    steps: Steps
    merging: str | None
    whole: str | None = None
    prefer_whole: bool = False
    joins_digits: bool = False
    difference: str = ""
    merging_difference: str = ""

    def choose(self, ignore_merges: bool, unreachable: Callable[[], list[str]]) -> tuple[str, list[str]]:
        """The name to write for a tokenizer with this splitting, and notes.

        `unreachable` lists the tokens that their own text does not merge to. It is asked only if the wanted
        name has the other `ignore_merges`, which changes nothing when there are none.
        """
        order = (True, False) if self.prefer_whole else (ignore_merges, not ignore_merges)
        names = {whole: name for whole in order if (name := self.whole if whole else self.merging)}
        chosen = next((w for w in names if w == ignore_merges or not unreachable()), None)
        notes = [self.difference] if self.difference else []
        if chosen is None:
            chosen = next(iter(names))
            odd = unreachable()
            others = "only Hugging Face makes" if ignore_merges else "only llama.cpp makes"
            notes.append(f"{others} {len(odd)} tokens out of whole words, such as {odd[0]!r}")
        if not chosen and self.merging_difference:
            notes.append(self.merging_difference)
        return names[chosen], notes


# The regular expressions -----------------------------------------------------------------------------------

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_PUNCTUATION_THEN_NEWLINES = r" ?[^\s\p{L}\p{N}]+[\r\n]*"


def _cl100k(number: str) -> str:
    """The GPT-4 splitting and its descendants, which differ in how many digits make a word."""
    return rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{number}|{_PUNCTUATION_THEN_NEWLINES}|{_TAIL}"


def _cased(contraction: str, number: str, but: str = "", after: str = "/") -> str:
    """The o200k splitting, where a change of letter case starts a word, and its variants.

    `but` takes letters out of words, `after` is what may follow punctuation besides line breaks.
    """
    upper = rf"[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{but}]"
    lower = rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{but}]"
    words = "|".join(
        rf"[^\r\n\p{{L}}\p{{N}}]?{upper}{some}{lower}{any_}{contraction}" for some, any_ in ("*+", "+*")
    )
    return rf"{words}|{number}| ?[^\s\p{{L}}\p{{N}}]+[\r\n{after}]*|{_TAIL}"


_O200K = _cased(f"{_CONTRACTION}?", r"\p{N}{1,3}")
_KIMI = r"[\p{Han}]+|" + _cased(f"{_CONTRACTION}?", r"\p{N}{1,3}", but=r"&&[^\p{Han}]", after="")
_QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_TAIL}"
)
_BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
_SEED = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_TAIL}"
_EXAONE = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
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
# Runs of digits are cut into threes from the right, 510 of them at a time.
_AFMOE_DIGITS = (
    r"\p{Nd}{1,510}(?=(?>\p{Nd}{510})*(?:\P{Nd}|$))|\G\p{Nd}{510}",
    r"\A\p{Nd}{1,2}(?=\p{Nd}{3}+\z)",
    r"\A\p{Nd}{3}|\G\p{Nd}{3}",
)
_AFMOE_SCRIPTS = (
    r"(?:[\u4E00-\u9FFF\u3040-\u309F\u30A0-\u30FF\u3400-\u4DBF\uf900-\uFAFF\uFF65-\uFF9F\u2F00-\u2FDF]+"
    r"|[\u0E00-\u0E7F]+|[\u0E80-\u0EFF]+|[\u1780-\u17FF]+|[\u1000-\u109F\uAA60-\uAA7F\uA9E0-\uA9FF]+"
    r"|[\uAC00-\uD7AF\u1100-\u11FF]+)"
)

# The rows --------------------------------------------------------------------------------------------------

_BLANKS = "a blank before a blank of another kind (U+2003, U+3000 …) may be split otherwise by llama.cpp"
_CASE = "letters outside A-Z may be split otherwise by llama.cpp where their case changes"
_MARKS = "words with combining marks are split otherwise by llama.cpp"

TABLE: tuple[PreTokenizer, ...] = (
    PreTokenizer((GPT2,), "gpt-2"),
    PreTokenizer((EACH_DIGIT, GPT2), "starcoder"),
    PreTokenizer((split(_cl100k(r"\p{N}{1,3}")), BYTES), "dbrx", "llama-bpe"),
    PreTokenizer((split(_cl100k(r"\p{N}")), BYTES), "qwen2"),
    PreTokenizer((split(_QWEN35), BYTES), "qwen35"),
    # "gpt-4o" itself takes combining marks for punctuation, which breaks up Hindi, Thai and many emoji.
    PreTokenizer(
        (split(_O200K), BYTES),
        "gpt-4o",
        "granite-embed-multi-97m",
        prefer_whole=True,
        difference=_CASE,
        merging_difference=_MARKS,
    ),
    PreTokenizer(
        (split(_cased("", r"\p{N}")), BYTES),
        None,
        "tekken",
        difference=f"{_CASE}; {_MARKS}",
    ),
    PreTokenizer(
        (split(r"\p{N}{1,3}"), split(r"[一-龥぀-ゟ゠-ヿ]+"), split(_DEEPSEEK_WORDS), BYTES), "deepseek-v3"
    ),
    PreTokenizer(
        (
            split(r"[\r\n]"),
            split(_DEEPSEEK_LETTERS),
            split(r"\s?[!-/:-~！-／：-～‘-‟　-。]+"),
            split(r"\s+$"),
            split(_DEEPSEEK_CJK),
            EACH_DIGIT,
            BYTES,
        ),
        "deepseek-llm",
        joins_digits=True,
        difference=_BLANKS,
    ),
    PreTokenizer(
        (
            split(r"[\r\n]"),
            split(r"\s?\p{L}+"),
            split(r"\s?\p{P}+"),
            split(_DEEPSEEK_CJK),
            EACH_DIGIT,
            BYTES,
        ),
        "deepseek-coder",
        difference=_BLANKS,
    ),
    PreTokenizer((split(_BAILING), BYTES), "bailingmoe"),
    PreTokenizer((split(_SEED), BYTES), "seed-coder"),
    PreTokenizer((split(_EXAONE), BYTES), "exaone-moe"),
    PreTokenizer(
        (split(r"\d{1,3}(?=(?:\d{3})*\b)"), split(_O200K), BYTES),
        "tiny_aya",
        difference="llama.cpp splits blanks before numbers otherwise, and no words where their case changes",
    ),
    PreTokenizer(
        (split(_KIMI), BYTES),
        "kimi-k2",
        difference=f"words whose letters change case, and 々 and 〆, are not split by llama.cpp; {_MARKS}",
    ),
    PreTokenizer(
        (*map(split, _AFMOE_DIGITS), split(_AFMOE_SCRIPTS), split(_DEEPSEEK_WORDS), BYTES),
        "afmoe",
        difference="Thai, blanks before numbers and numbers like ³ or Ⅷ are split otherwise by llama.cpp",
    ),
    PreTokenizer(
        (split(r"(?:\r?\n)+(?!\r?\n)", "MergedWithNext False"), split(_cl100k(r"\p{N}")), BYTES),
        "laguna",
        difference="a carriage return before a line break is split off by llama.cpp only",
    ),
    PreTokenizer((split(r"\p{N}{1,3}"), split(_cl100k(r"\p{N}+")), BYTES), None, "minicpm5"),
)


def named(name: str) -> PreTokenizer:
    """The row of one of llama.cpp's names."""
    return next(row for row in TABLE if name in (row.merging, row.whole))
