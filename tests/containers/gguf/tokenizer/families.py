"""Pre-tokenizers of published models as their tokenizer.json has them, and what llama.cpp calls them.

The regular expressions come from the models' files and from the comments in llama.cpp's source, not from the
product's table.
"""

from dataclasses import dataclass
from typing import Any

Step = dict[str, Any]

BYTES: Step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
WORDS: Step = {**BYTES, "use_regex": True}
DIGITS: Step = {"type": "Digits", "individual_digits": True}


def split(regex: str, behavior: str = "Isolated", invert: bool = False) -> Step:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}


def steps(*parts: Step) -> Step:
    return {"type": "Sequence", "pretokenizers": list(parts)}


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4 = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KIMI = (
    r"[\p{Han}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
AFMOE_SCRIPTS = (
    r"(?:[\u4E00-\u9FFF\u3040-\u309F\u30A0-\u30FF\u3400-\u4DBF\uf900-\uFAFF\uFF65-\uFF9F\u2F00-\u2FDF]+"
    r"|[\u0E00-\u0E7F]+|[\u0E80-\u0EFF]+|[\u1780-\u17FF]+|[\u1000-\u109F\uAA60-\uAA7F\uA9E0-\uA9FF]+"
    r"|[\uAC00-\uD7AF\u1100-\u11FF]+)"
)
# The letters as llama.cpp's source lists them.
DEEPSEEK_LETTERS = (
    "\\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-"
    "ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮ"
    "ⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
)


@dataclass(frozen=True)
class Family:
    """pre: the name to be written. Where llama.cpp is known to split otherwise, `odd` is a text for which it
    does and `wrong` lists the classes of text (see `texts`) in which it may, "*" for nearly all."""

    pre_tokenizer: Step
    pre: str
    ignore_merges: bool = False
    odd: str = ""
    wrong: str = ""


FAMILIES = {
    "gpt-2": Family(WORDS, "gpt-2"),
    "granite 3": Family(steps(DIGITS, WORDS), "starcoder"),
    "llama 3": Family(steps(split(LLAMA3), BYTES), "llama-bpe", ignore_merges=True),
    "dbrx": Family(steps(split(GPT4), BYTES), "dbrx"),
    "qwen 3": Family(steps(split(QWEN2), BYTES), "qwen2"),
    "qwen 3.5": Family(steps(split(QWEN35), BYTES), "qwen35"),
    "gpt-oss": Family(
        steps(split(GPT4O), BYTES), "granite-embed-multi-97m", odd="ѽѢѱѩѨҧ", wrong="any unicode"
    ),
    "mistral": Family(
        steps(split(TEKKEN), BYTES),
        "tekken",
        ignore_merges=True,
        odd="हिन्दी में",
        wrong="documents,emoji,scripts,marks,mixture,any unicode",
    ),
    "kimi": Family(steps(split(KIMI), BYTES), "kimi-k2", odd="camelCase", wrong="*"),
    "deepseek 3": Family(
        steps(split(r"\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"), split(DEEPSEEK3), BYTES), "deepseek-v3"
    ),
    "deepseek 2": Family(
        steps(
            split("[\r\n]"),
            split(DEEPSEEK_LETTERS),
            split("\\s?[!-/:-~！-／：-～‘-‟　-。]+"),
            split(r"\s+$"),
            split("[一-龥ࠀ-一가-퟿]+"),
            DIGITS,
            BYTES,
        ),
        "deepseek-llm",
        odd="日本\u3000 語",
        wrong="code,cjk,numbers,odd spaces,mixture,any unicode,documents",
    ),
    "deepseek coder": Family(
        steps(
            split("[\r\n]"),
            split(r"\s?\p{L}+"),
            split(r"\s?\p{P}+"),
            split("[一-龥ࠀ-一가-퟿]+"),
            DIGITS,
            BYTES,
        ),
        "deepseek-coder",
        odd="\u2003 \u2003",
        wrong="odd spaces,any unicode,documents",
    ),
    "trinity": Family(
        steps(
            split(r"\p{Nd}{1,510}(?=(?>\p{Nd}{510})*(?:\P{Nd}|$))|\G\p{Nd}{510}"),
            split(r"\A\p{Nd}{1,2}(?=\p{Nd}{3}+\z)"),
            split(r"\A\p{Nd}{3}|\G\p{Nd}{3}"),
            split(AFMOE_SCRIPTS),
            split(DEEPSEEK3),
            BYTES,
        ),
        "afmoe",
        odd="m  1.5",
        wrong="code,emoji,cjk,scripts,numbers,odd spaces,marks,mixture,documents",
    ),
    "laguna": Family(
        steps(split(r"(?:\r?\n)+(?!\r?\n)", "MergedWithNext"), split(QWEN2), BYTES),
        "laguna",
        odd="a\r\nb",
        wrong="*",
    ),
    "cohere 2": Family(
        steps(split(r"\d{1,3}(?=(?:\d{3})*\b)"), split(GPT4O), BYTES), "tiny_aya", odd="m  1.5", wrong="*"
    ),
    "ling": Family(
        steps(
            split(
                r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"
                r"|\s+(?!\S)|\s+"
            ),
            BYTES,
        ),
        "bailingmoe",
    ),
    "k-exaone": Family(
        steps(
            split(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
            ),
            BYTES,
        ),
        "exaone-moe",
    ),
    "seed": Family(
        steps(
            split(
                "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1}| ?[^\\s\\p{L}\\p{N}\r\n]+"
                "|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
            ),
            BYTES,
        ),
        "seed-coder",
    ),
    "minicpm 5": Family(
        steps(
            split(r"\p{N}{1,3}"),
            split(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            BYTES,
        ),
        "minicpm5",
        ignore_merges=True,
    ),
}

# Families that share a splitting with one of the above: (the other, ignore_merges, has BOS, the name).
SHARED = {
    "lfm2": ("llama 3", True, True, "llama-bpe"),
    "glm 4.5": ("llama 3", True, False, "glm4"),
    "olmo 2": ("llama 3", False, True, "dbrx"),
    "hunyuan a13b": ("qwen 3", False, True, "qwen2"),
    "solar open": ("qwen 3", False, True, "qwen2"),
    "grok 2": ("qwen 3", False, True, "qwen2"),
    "llama 4": ("gpt-oss", True, True, "granite-embed-multi-97m"),
    "minimax m2": ("gpt-oss", False, True, "granite-embed-multi-97m"),
    "kanana 2": ("gpt-oss", True, True, "granite-embed-multi-97m"),
    "hy 4": ("deepseek 3", False, True, "deepseek-v3"),
    "nemotron 3": ("mistral", True, True, "tekken"),
    "ling 2": ("ling", False, True, "bailingmoe"),
    "mellum 2": ("granite 3", False, True, "starcoder"),
    "smollm": ("granite 3", False, True, "starcoder"),
    "granite 4": ("gpt-2", False, True, "gpt-2"),
    "olmoe": ("gpt-2", False, True, "gpt-2"),
    "gigachat": ("gpt-2", False, True, "gpt-2"),
}
