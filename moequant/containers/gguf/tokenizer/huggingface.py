"""tokenizer.json: the vocabulary, the added tokens and the merges as Hugging Face's library reads them."""

import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from gguf.constants import TokenType as Kind
from tokenizers import AddedToken, Tokenizer

from moequant.containers.gguf.tokenizer import byte_level, pre, sentencepiece
from moequant.containers.gguf.tokenizer.bpe import Pair
from moequant.containers.gguf.tokenizer.settings import Settings, read_json
from moequant.containers.gguf.tokenizer.vocabulary import Algorithm, Bos, Entry, Source, in_order
from moequant.errors import TokenizerError

_FLAGS = ("lstrip", "rstrip", "single_word")
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def read(path: Path, settings: Settings) -> Source:
    """A tokenizer.json; TokenizerError when it is broken or when llama.cpp has no equivalent."""
    raw = read_json(path)
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # The library raises bare Exception for every malformed file.
        raise TokenizerError(
            f"{path}: not a tokenizer.json that the tokenizers library reads: {error}"
        ) from error
    model = _bpe(raw["model"])
    # As the library understood them: in one spelling, with every default filled in.
    parts = {name: _part(backend, name) for name in ("normalizer", "pre_tokenizer", "post_processor")}
    added = _added_tokens(backend, settings)
    # Byte-level text leaves nothing for byte fallback to do, whatever the flag says.
    spm = bool(model.get("byte_fallback")) and not pre.is_byte_level(parts["pre_tokenizer"])
    tokens = _vocabulary(model["vocab"], added, model.get("unk_token") if spm else None, spm)
    merges = [_pair(merge) for merge in model["merges"]]
    whole = bool(model.get("ignore_merges"))
    return Source(
        file=path.name,
        tokens=tokens,
        algorithm=partial(_spm, parts, tokens, added, merges)
        if spm
        else partial(_byte_level, parts, tokens, merges, whole),
        post_processor=parts["post_processor"],
        notes=tuple(_normalization_notes(backend, added, spm)),
    )


def _byte_level(
    parts: Mapping[str, Any], tokens: list[Entry], merges: list[Pair], whole: bool, bos: Bos
) -> Algorithm:
    row = pre.recognise(parts["pre_tokenizer"])
    return byte_level.algorithm("tokenizer.json", row, tokens, merges, whole, bos.named)


def _spm(
    parts: Mapping[str, Any],
    tokens: list[Entry],
    added: Mapping[int, AddedToken],
    merges: list[Pair],
    bos: Bos,
) -> Algorithm:
    return sentencepiece.algorithm(parts, tokens, added, merges, bos)


def _part(backend: Tokenizer, name: str) -> Any:
    part = getattr(backend, name)
    return None if part is None else json.loads(part.__getstate__())


def _bpe(model: Mapping[str, Any]) -> Mapping[str, Any]:
    """The BPE model of a tokenizer.json, refused when it has features that llama.cpp lacks."""
    if model.get("type") != "BPE":
        raise TokenizerError(
            f"tokenizer.json: model type {model.get('type')!r}; expected BPE, the only one supported"
        )
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise TokenizerError(
                f"tokenizer.json: BPE with {key}={model[key]!r}; expected none, llama.cpp lacks it"
            )
    return model


def _pair(merge: str | list[str]) -> Pair:
    """A merge, which older files spell as one string with a blank in it."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if len(parts) != 2:
        raise TokenizerError(f"tokenizer.json: merge {merge!r}; expected two parts")
    return parts[0], parts[1]


def _added_tokens(backend: Tokenizer, settings: Settings) -> dict[int, AddedToken]:
    """Added tokens by the id that the library really gives them, and those only tokenizer_config.json has."""
    added = dict(backend.get_added_tokens_decoder())
    known = backend.get_vocab(with_added_tokens=True)
    for i, token in settings.tokenizer.added_tokens().items():
        if i not in added and token.content not in known:
            added[i] = token
    return added


def _vocabulary(
    vocab: Mapping[str, int], added: Mapping[int, AddedToken], unknown: str | None, spm: bool
) -> list[Entry]:
    """llama.cpp keeps byte-level text for ordinary tokens and plain text for added ones, as the file does."""
    table: dict[int, Entry] = {}
    for text, i in vocab.items():
        if i in table:
            raise TokenizerError(
                f"tokenizer.json: tokens {table[i][0]!r} and {text!r} share id {i}; expected one"
            )
        byte = spm and _BYTE_TOKEN.fullmatch(text)
        table[i] = (text, Kind.BYTE if byte else Kind.NORMAL)
    table |= {i: _added_entry(token, spm) for i, token in added.items()}
    if unknown is not None and unknown in vocab:
        table[vocab[unknown]] = (unknown, Kind.UNKNOWN)
    return in_order("tokenizer.json", table)


def _added_entry(token: AddedToken, spm: bool) -> Entry:
    text = token.content
    if token.special:
        return text, Kind.CONTROL
    if spm and sentencepiece.METASPACE in text:
        # llama.cpp looks for user-defined tokens before it turns blanks into "▁". Hugging Face looks after
        # that if the token is "normalized"; otherwise only a literal "▁" matches, which merging finds too.
        blank = text.replace(sentencepiece.METASPACE, " ")
        return (blank, Kind.USER_DEFINED) if token.normalized else (text, Kind.NORMAL)
    return text, Kind.USER_DEFINED


def _normalization_notes(backend: Tokenizer, added: Mapping[int, AddedToken], spm: bool) -> list[str]:
    """What is lost because llama.cpp neither normalises text nor knows the flags of added tokens."""
    notes = []
    normalizer = backend.normalizer
    if normalizer is not None:
        for form, sample in (("NFC", "e\u0301"), ("NFD", "é"), ("NFKC/NFKD", "ﬁ")):
            if sample not in normalizer.normalize_str(sample):
                notes.append(f"text that is not {form}: Hugging Face normalises it, llama.cpp does not")
                break
        if not spm and normalizer.normalize_str(" A b  ") != " A b  ":
            raise TokenizerError(
                "tokenizer.json: its normalizer changes ASCII text; expected none or a Unicode normal form"
            )
    for token in added.values():
        flags = [flag for flag in _FLAGS if getattr(token, flag)]
        if flags:
            notes.append(f"added token {token.content!r}: {', '.join(flags)} is ignored by llama.cpp")
        elif (
            token.normalized
            and normalizer is not None
            and normalizer.normalize_str(token.content) != token.content
        ):
            notes.append(
                f"added token {token.content!r} is looked for in normalised text by Hugging Face only"
            )
    return notes
