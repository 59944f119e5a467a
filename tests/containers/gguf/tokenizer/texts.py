"""Text that tokenizers disagree about, by class, from a seed: the input of the tokenizer proofs."""

import random
from collections.abc import Callable
from itertools import accumulate
from unicodedata import category, normalize

from tests.models import ROOT

WORDS = (
    "the router sends each token to two experts; gradient flow, weight decay and rounding error are measured "
    "again internationalisation HTTPServer parseJSONResponse snake_case_name camelCase naïve façade "
    "Zürich Ελλάδα "
    "москва Русский український ñandú coöperate İstanbul ǅ straße Œuvre Þórr"
).split()
CONTRACTIONS = (
    "it's I'm they'RE we'll DON'T can't you'd I've o'clock 'tis rock'n'roll l'été d'accord ’s it’s".split()
)
EMOJI = "🙂 👍🏽 👩‍👩‍👧‍👦 🇺🇸🇫🇷 1️⃣ ❤️ ☕ 🏴󠁧󠁢󠁥󠁮󠁧󠁿 🫠 ♟️ ©️ ™ ✔".split()
CJK = (
    "日本語のテスト 中文字符，标点。 漢字かな交じり文 カタカナ ｶﾀｶﾅ 한국어 띄어쓰기 你好！世界 "
    "𠮷野家 々〆 「引用」 ㊙️"
).split()
SCRIPTS = (
    "مرحبا بالعالم العَرَبِيَّة שָׁלוֹם עולם हिन्दी में लिखा है क्षत्रिय বাংলা தமிழ் ภาษาไทย ที่นี่ ລາວ ខ្មែរ မြန်မာ "
    "ქართული հայերեն አማርኛ ᏣᎳᎩ ᠮᠣᠩᠭᠣᠯ བོད་ཡིག tiếng Việt Ǽ ǆ ﬁ"
).split()
NUMBERS = (
    "0 7 42 123 1234 3.14159 1,000,000 1e-5 0xFF ١٢٣٤ १२३ "
    "² ³x x₁ ½ ¼ Ⅻ ⅷ ① ㊿ １２３ 20261122T052308Z 99999999999999"
).split()
PUNCTUATION = (
    "... --- === !!! ?! ;; :: -> => != <= >> << && || ** // /* */ "
    "# $ % ^ ~ ` @ \\ «» “” „‘’ … — – · • § ¶ † № € £ ¥ ± × ÷ ∀ ∃ ∈ √ ∞ ≠ ▁ ▁▁ _"
).split()
WHITESPACE = (
    " ",
    "  ",
    "   ",
    "       ",
    "\t",
    "\t\t",
    "\n",
    "\n\n",
    "\n\n\n",
    "\r\n",
    "\r\n\r\n",
    " \n",
    "\n ",
    "\t\n  ",
)
ODD_SPACES = (
    "\u00a0",
    "\u2003",
    "\u3000",
    "\u2028",
    "\u200b",
    "\ufeff",
    "\x0b",
    "\x0c",
    "\x85",
    "\u1680",
    "\x1c",
    "\x00",
    "\x7f",
)
LINES = (
    "def f(x: int) -> int:\n    return x ** 2  # square\n",
    "for (int i = 0; i < n; ++i) {\r\n\tsum += a[i]->value;\r\n}\r\n",
    '{"key": [1, 2.5, null], "päth": "C:\\\\dir\\n"}',
    "SELECT * FROM t WHERE a='b' AND c<>\"d\";--x",
    r"\frac{\partial L}{\partial w_{ij}} = \sum_k x_k^2 \leq 10^{-6}",
    "<div class='a b'>&nbsp;text</div><!-- c -->",
    "https://example.org/a_b?c=d&e=%20f#g user.name+tag@mail.example",
    "$ ls -la | grep '^d' > /dev/null 2>&1; echo $?",
    "2026-11-22 05:23:08,123 WARN [worker-7] retry=3 took 1.5ms",
    "if x:\n        if y:\n                pass\n\n\n    return\n",
)

BLOCKS = (
    *((0x20, 0x7F), (0xA0, 0x24F), (0x370, 0x52F), (0x5D0, 0x6FF), (0x900, 0xE7F), (0x2000, 0x2BFF)),
    *((0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xFF00, 0xFFEF), (0x1F300, 0x1FAFF)),
    (0x10000, 0x1E943),
)


def _join(r: random.Random, pool: list[str]) -> str:
    return "".join(
        r.choice(pool) + r.choice(("", " ", " ", " ", *WHITESPACE)) for _ in range(r.randint(1, 12))
    )


def _spaces(r: random.Random) -> str:
    return "".join(
        r.choice((*WHITESPACE, " " * r.randint(1, 70), r.choice(WORDS), r.choice(PUNCTUATION)))
        for _ in range(r.randint(1, 8))
    )


def _odd_spaces(r: random.Random) -> str:
    return "".join(r.choice(ODD_SPACES) + r.choice((" ", "", r.choice(WORDS), "1", "!")) for _ in range(6))


def _marks(r: random.Random) -> str:
    """Letters with combining marks that no normal form removes."""
    return "".join(
        r.choice("aeioxz ज क ბ") + r.choice(("", *"\u0301\u0323\u0331\u20d7\u0e31\u093f")) for _ in range(12)
    )


def _any_unicode(r: random.Random) -> str:
    low, high = r.choice(BLOCKS)
    points = (chr(r.randint(low, high)) for _ in range(r.randint(2, 20)))
    return "".join(c for c in points if category(c) not in ("Cn", "Cs", "Co"))


CLASSES: dict[str, Callable[[random.Random], str]] = {
    "words": lambda r: _join(r, WORDS),
    "contractions": lambda r: _join(r, CONTRACTIONS),
    "code": lambda r: _join(r, list(LINES)),
    "emoji": lambda r: _join(r, EMOJI + WORDS),
    "cjk": lambda r: _join(r, CJK + NUMBERS),
    "scripts": lambda r: _join(r, SCRIPTS),
    "numbers": lambda r: _join(r, NUMBERS + PUNCTUATION),
    "punctuation": lambda r: _join(r, PUNCTUATION + WORDS),
    "whitespace": _spaces,
    "odd spaces": _odd_spaces,
    "marks": _marks,
    "mixture": lambda r: _join(r, WORDS + CONTRACTIONS + EMOJI + CJK + SCRIPTS + NUMBERS + PUNCTUATION),
    "any unicode": _any_unicode,
}


def texts(seed: int, each: int, special: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """`each` texts per class, all in NFC; `special` tokens get a class of their own."""
    r = random.Random(seed)
    made = {name: [normalize("NFC", make(r)) for _ in range(each)] for name, make in CLASSES.items()}
    if special:
        pool = [*special, *WORDS, *WHITESPACE, *CJK]
        made["special tokens"] = [
            "".join(r.choice(pool) for _ in range(r.randint(1, 12))) for _ in range(each)
        ]
    return made


def documents() -> list[str]:
    """The written calibration texts of this repository in pieces of about 2000 characters, when present."""
    pieces: list[str] = []
    for path in sorted((ROOT / "calib").rglob("*.txt")):
        text = path.read_text(encoding="utf-8")
        ends = list(accumulate([2000] * (len(text) // 2000 + 1)))
        pieces += [normalize("NFC", text[end - 2000 : end]) for end in ends]
    return [piece for piece in pieces if piece]


def training_text(seed: int) -> list[str]:
    """What the throw-away tokenizers of the tests are trained on."""
    return [line for lines in texts(seed, 300).values() for line in lines]
