"""A Hugging Face tokenizer as the `tokenizer.*` keys of a GGUF file.

Two kinds exist on both sides: byte-level BPE (llama.cpp's "gpt2" with a named pre-tokenizer) and BPE with
blanks as "▁" and byte fallback (llama.cpp's "llama"). Everything else is refused. tokenizer.json is the only
source of the vocabulary.

llama.cpp gives the same ids as tokenizer.json except where `TokenizerSpec.notes` says otherwise:

* It does not normalise. Behind an NFC normalizer (Qwen, OLMo), text that is not NFC gets other ids.
* It matches added tokens literally, the longest first; flags like lstrip, rstrip and single_word are lost.
* A metaspace pre-tokenizer (unlike the Prepend normalizer of Mixtral and Llama 2) adds no blank to text that
  starts with one; llama.cpp does.
* Some of its regular expressions approximate Unicode classes (see `tokenizer_pre`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from gguf.constants import TokenType as Kind
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE

from moequant.containers.gguf.tokenizer import pre as tokenizer_pre
from moequant.containers.gguf.tokenizer import sentencepiece as tokenizer_spm
from moequant.containers.gguf.tokenizer import special as tokenizer_special
from moequant.errors import TokenizerError

_FLAGS = ("lstrip", "rstrip", "single_word")
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True, slots=True)
class TokenizerSpec:
    """What a GGUF file says about its tokenizer, before padding to the embedding's size.

    model:          "gpt2" or "llama", llama.cpp's names for the two algorithms.
    pre:            llama.cpp's pre-tokenizer name.
    tokens, types:  text and kind of every id from 0 on; ids that name no token are filled and UNUSED.
    scores:         per token, for "llama" only.
    merges:         "left right", for "gpt2" only.
    ids:            role (bos, eos, eot, eom, unknown, padding) to id.
    space_prefix:   whether a blank is put in front of a text, for "llama" only.
    chat_templates: (name, Jinja source), "default" first.
    notes:          one sentence per known difference from Hugging Face; empty means the same ids always.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[Kind, ...]
    scores: tuple[float, ...] | None
    merges: tuple[str, ...] | None
    ids: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    space_prefix: bool | None
    chat_templates: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]

    @property
    def leading(self) -> int | None:
        """The id that llama.cpp puts in front of every text, None when it puts none."""
        return self.ids.get("bos") if self.add_bos else None


def read_tokenizer(folder: Path) -> TokenizerSpec:
    """The tokenizer of a Hugging Face model folder.

    Raises TokenizerError, naming the file, when tokenizer.json is missing or broken, or when llama.cpp has no
    equivalent.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        other = " (tokenizer.model alone is not read)" if (folder / "tokenizer.model").is_file() else ""
        raise TokenizerError(
            f"{folder}: expected a tokenizer.json, found none{other}; download it, or write it with "
            "transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    raw = tokenizer_special.read_json(path)
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # The library raises bare Exception for every malformed file.
        raise TokenizerError(
            f"{path}: not a tokenizer.json that the tokenizers library reads: {error}"
        ) from error
    settings = tokenizer_special.read_settings(folder)
    model = _bpe(raw)
    added = _added_tokens(backend, settings)
    # Byte-level text leaves nothing for byte fallback to do, whatever the flag says.
    spm = bool(model.get("byte_fallback")) and not tokenizer_pre.is_byte_level(raw.get("pre_tokenizer"))
    vocab = _vocabulary(model["vocab"], added, model.get("unk_token") if spm else None, spm)

    ids, notes = _special(raw, settings, vocab)
    notes += tokenizer_special.stolen_words(text for text, kind in vocab if kind == Kind.NORMAL)
    notes += _normalization_notes(backend, added, spm)
    merges = [_pair(merge) for merge in model["merges"]]
    rest = (
        _sentencepiece(raw, vocab, merges, added)
        if spm
        else _byte_level(raw, vocab, merges, "bos" in ids.ids)
    )
    return TokenizerSpec(
        model="llama" if spm else "gpt2",
        pre=rest.pre,
        tokens=tuple(text for text, _ in vocab),
        types=tuple(kind for _, kind in vocab),
        scores=rest.scores,
        merges=rest.merges,
        ids=ids.ids,
        add_bos=ids.bos,
        add_eos=ids.eos,
        space_prefix=rest.space_prefix,
        chat_templates=tokenizer_special.chat_templates(folder, settings),
        notes=(*notes, *ids.notes, *rest.notes),
    )


def add_tokenizer(writer: gguf.GGUFWriter, spec: TokenizerSpec, vocab_size: int) -> None:
    """Adds every tokenizer key to `writer`, padded with unused tokens to `vocab_size` rows of the embedding.

    Raises TokenizerError when the tokenizer has ids that the embedding lacks.
    """
    tokens, kinds = list(spec.tokens), list(spec.types)
    if len(tokens) > vocab_size:
        raise TokenizerError(
            f"tokenizer.json: {len(tokens)} ids but the embedding has {vocab_size} rows; expected no more "
            "ids than rows; remove the added tokens that the model was never given"
        )
    taken = set(tokens)
    for i in range(len(tokens), vocab_size):
        tokens.append(_filler(i, taken))
        kinds.append(Kind.UNUSED)
    writer.add_tokenizer_model(spec.model)
    writer.add_tokenizer_pre(spec.pre)
    writer.add_token_list(tokens)
    writer.add_token_types([int(kind) for kind in kinds])
    if spec.scores is not None:
        floor = min(spec.scores)
        writer.add_token_scores([*spec.scores, *[floor] * (vocab_size - len(spec.scores))])
    if spec.merges is not None:
        writer.add_token_merges(list(spec.merges))
    _add_special(writer, spec, vocab_size)


def _add_special(writer: gguf.GGUFWriter, spec: TokenizerSpec, vocab_size: int) -> None:
    for role, token in spec.ids.items():
        if token >= vocab_size:
            raise TokenizerError(f"{role} token id {token}: the embedding has only {vocab_size} rows")
        writer.add_uint32(f"tokenizer.ggml.{role}_token_id", token)
    writer.add_add_bos_token(spec.add_bos)
    writer.add_add_eos_token(spec.add_eos)
    if spec.space_prefix is not None:
        writer.add_add_space_prefix(spec.space_prefix)
    names = [re.sub(r"[^A-Za-z0-9]", "_", name) for name, _ in spec.chat_templates]
    for name, (_, template) in zip(names, spec.chat_templates, strict=True):
        suffix = "" if name == "default" else f".{name}"
        writer.add_string(f"tokenizer.chat_template{suffix}", template)
    if named := [name for name in names if name != "default"]:
        # Written here and not by gguf-py, whose order comes from a set and changes from run to run.
        writer.add_array("tokenizer.chat_templates", named)


@dataclass(frozen=True, slots=True)
class _Algorithm:
    """The part of a TokenizerSpec that depends on the algorithm."""

    pre: str
    scores: tuple[float, ...] | None
    merges: tuple[str, ...] | None
    space_prefix: bool | None
    notes: list[str]


def _byte_level(
    raw: Mapping[str, Any], vocab: list[tuple[str, Kind]], merges: list[tokenizer_spm.Pair], has_bos: bool
) -> _Algorithm:
    row = tokenizer_pre.recognise(raw.get("pre_tokenizer"))
    whole = bool(raw["model"].get("ignore_merges"))
    name = row.name(whole, lambda: _merging_reaches_all(vocab, merges))
    if len(set(merges)) != len(merges):
        raise TokenizerError("tokenizer.json: a merge is listed twice; expected every pair once")
    if bad := next((pair for pair in merges if " " in pair[0] or " " in pair[1]), None):
        raise TokenizerError(
            f"tokenizer.json: merge {bad} holds a blank; expected byte-level text without blanks"
        )
    if not merges:
        raise TokenizerError(
            "tokenizer.json: no merges; expected at least one, llama.cpp loads no file without"
        )
    notes = [row.difference] if row.difference else []
    if row.joins_digits and any(left[-1:].isdigit() and right[:1].isdigit() for left, right in merges):
        notes.append("numbers: llama.cpp joins digits that Hugging Face keeps apart")
    return _Algorithm(
        pre=name if has_bos else tokenizer_pre.name_without_bos(name),
        scores=None,
        merges=tuple(f"{left} {right}" for left, right in merges),
        space_prefix=None,
        notes=notes,
    )


def _merging_reaches_all(vocab: list[tuple[str, Kind]], merges: list[tokenizer_spm.Pair]) -> bool:
    """Whether every ordinary token is what its own text merges to."""
    ids = {text: i for i, (text, _) in enumerate(vocab)}
    model = BPE(vocab=ids, merges=merges)
    return all(len(model.tokenize(text)) == 1 for text, kind in vocab if kind == Kind.NORMAL)


def _sentencepiece(
    raw: Mapping[str, Any],
    vocab: list[tuple[str, Kind]],
    merges: list[tokenizer_spm.Pair],
    added: Mapping[int, AddedToken],
) -> _Algorithm:
    texts = {text for text, _ in vocab}
    if missing := [b for b in range(256) if f"<0x{b:02X}>" not in texts]:
        raise TokenizerError(
            f"tokenizer.json: byte_fallback without token <0x{missing[0]:02X}>; expected all 256 byte "
            "tokens, llama.cpp aborts without"
        )
    prefix, notes = tokenizer_spm.space_prefix(raw)
    own = [text for i, (text, _) in enumerate(vocab) if i not in added]
    scores, stray = tokenizer_spm.merge_scores(own, merges)
    if tokenizer_spm.words_are_split(raw) and (inner := [t for t in own if tokenizer_spm.METASPACE in t[1:]]):
        raise TokenizerError(
            f"tokenizer.json: Metaspace cuts before every '▁' but {len(inner)} tokens have one inside, "
            f"such as {inner[0]!r}; expected none, llama.cpp does not cut there"
        )
    if stray:
        notes.append(
            f"llama.cpp forms {len(stray)} tokens that Hugging Face never does, such as {stray[0]!r}"
        )
    floor = -float(len(merges) + 1)
    return _Algorithm(
        pre="default",
        scores=tuple(scores.get(text, floor) for text, _ in vocab),
        merges=None,
        space_prefix=prefix,
        notes=notes,
    )


def _bpe(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The BPE model of a tokenizer.json, refused when it has features that llama.cpp lacks."""
    model: Mapping[str, Any] = raw["model"]
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


def _pair(merge: str | list[str]) -> tokenizer_spm.Pair:
    """A merge, which older files spell as one string with a blank in it."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if len(parts) != 2:
        raise TokenizerError(f"tokenizer.json: merge {merge!r}; expected two parts")
    return parts[0], parts[1]


def _added_tokens(backend: Tokenizer, settings: tokenizer_special.Settings) -> dict[int, AddedToken]:
    """Added tokens by the id that the library really gives them, and those only tokenizer_config.json has."""
    added = dict(backend.get_added_tokens_decoder())
    known = backend.get_vocab(with_added_tokens=True)
    for key, entry in settings.tokenizer.get("added_tokens_decoder", {}).items():
        if int(key) not in added and entry["content"] not in known:
            added[int(key)] = AddedToken(
                entry["content"],
                **{
                    flag: bool(entry.get(flag))
                    for flag in ("lstrip", "rstrip", "normalized", "single_word", "special")
                },
            )
    return added


def _vocabulary(
    vocab: Mapping[str, int], added: Mapping[int, AddedToken], unknown: str | None, spm: bool
) -> list[tuple[str, Kind]]:
    """(text, kind) of every id from 0 to the highest; holes become unused tokens.

    llama.cpp keeps byte-level text for ordinary tokens and plain text for added ones, as tokenizer.json does.
    """
    table: dict[int, tuple[str, Kind]] = {}
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
    owner: dict[str, int] = {}
    for i, (text, _) in sorted(table.items()):
        if "\0" in text:
            raise TokenizerError(
                f"tokenizer.json: token {i} is {text!r}; expected no NUL, llama.cpp cuts text there"
            )
        if text in owner:
            raise TokenizerError(
                f"tokenizer.json: ids {owner[text]} and {i} are both {text!r}; expected distinct texts"
            )
        owner[text] = i
    taken = set(owner)
    return [table.get(i) or (_filler(i, taken), Kind.UNUSED) for i in range(max(table) + 1)]


def _added_entry(token: AddedToken, spm: bool) -> tuple[str, Kind]:
    text = token.content
    if token.special:
        return text, Kind.CONTROL
    if spm and tokenizer_spm.METASPACE in text:
        # llama.cpp looks for user-defined tokens before it turns blanks into "▁". Hugging Face looks after
        # that if the token is "normalized"; otherwise only a literal "▁" matches, which merging finds too.
        blank = text.replace(tokenizer_spm.METASPACE, " ")
        return (blank, Kind.USER_DEFINED) if token.normalized else (text, Kind.NORMAL)
    return text, Kind.USER_DEFINED


def _filler(i: int, taken: set[str]) -> str:
    """A name for an id that has no token, different from every name taken so far; it is then taken."""
    name = f"[PAD{i}]"
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _special(
    raw: Mapping[str, Any], settings: tokenizer_special.Settings, vocab: list[tuple[str, Kind]]
) -> tuple[tokenizer_special.Added, list[str]]:
    owner = {text: i for i, (text, _) in enumerate(vocab)}

    def text_of(token: int) -> str:
        return vocab[token][0] if token < len(vocab) else f"[PAD{token}]"

    ids, notes = tokenizer_special.special_ids(settings, owner.get, text_of)
    around = tokenizer_special.added_around(raw.get("post_processor"), settings, owner.get, ids)
    ids |= around.ids
    return tokenizer_special.Added(bos=around.bos, eos=around.eos, ids=ids, notes=around.notes), notes


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
