"""A model folder's tokenizer as the `tokenizer.*` keys of a GGUF file.

Three kinds exist on both sides: byte-level BPE (llama.cpp's "gpt2" with a named pre-tokenizer), BPE with
blanks as "▁" and byte fallback (llama.cpp's "llama") and the same without a blank in front ("gemma4"). They
are read from tokenizer.json; where there is none, from tiktoken files, tekken.json or tokenizer.model.
Everything else is refused.

llama.cpp gives the same ids as tokenizer.json except where `TokenizerSpec.notes` says otherwise:

* It does not normalise. Behind an NFC normalizer (Qwen, OLMo), text that is not NFC gets other ids.
* It matches added tokens literally, the longest first; flags like lstrip, rstrip and single_word are lost.
* A metaspace pre-tokenizer (unlike the Prepend normalizer of Mixtral and Llama 2) adds no blank to text that
  starts with one; llama.cpp does.
* Some of its regular expressions approximate Unicode classes (see `splittings`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
from gguf.constants import TokenType as Kind

from moequant.containers.gguf.tokenizer import huggingface, ranks, spm_model
from moequant.containers.gguf.tokenizer.settings import Settings, chat_templates, read_settings
from moequant.containers.gguf.tokenizer.special import special as special_of
from moequant.containers.gguf.tokenizer.vocabulary import Bos, Source, filler
from moequant.errors import TokenizerError

_ADDED = frozenset((Kind.CONTROL, Kind.USER_DEFINED, Kind.UNUSED))
_DISPENSABLE = ("padding", "unknown")


@dataclass(frozen=True, slots=True)
class TokenizerSpec:
    """What a GGUF file says about its tokenizer, before padding to the embedding's size.

    model:          "gpt2", "llama" or "gemma4", llama.cpp's names for the algorithms.
    pre:            llama.cpp's pre-tokenizer name.
    tokens, types:  text and kind of every id from 0 on; ids that name no token are filled and UNUSED.
    scores:         per token, for "llama" and "gemma4".
    merges:         "left right", for "gpt2" and "gemma4".
    ids:            role (bos, eos, eot, eom, unknown, padding) to id.
    space_prefix:   whether a blank is put in front of a text, for all but byte-level ones.
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

    Raises TokenizerError, naming the file, when there is none or it is broken, or when llama.cpp has no
    equivalent.
    """
    settings = read_settings(folder)
    source = _source(folder, settings)
    special = special_of(source, settings)
    rest = source.algorithm(Bos(named=special.named_bos, added=special.add_bos))
    return TokenizerSpec(
        model=rest.model,
        pre=rest.pre,
        tokens=tuple(text for text, _ in special.tokens),
        types=tuple(kind for _, kind in special.tokens),
        scores=rest.scores,
        merges=rest.merges,
        ids=special.ids,
        add_bos=special.add_bos,
        add_eos=special.add_eos,
        space_prefix=rest.space_prefix,
        chat_templates=chat_templates(folder, settings),
        notes=(*special.notes, *source.notes, *rest.notes),
    )


def _source(folder: Path, settings: Settings) -> Source:
    """The vocabulary of a folder from the best file it has."""
    if (folder / "tokenizer.json").is_file():
        return huggingface.read(folder / "tokenizer.json", settings)
    for name in ranks.FILES:
        if (folder / name).is_file():
            return ranks.read_tiktoken(folder / name, settings)
    if (folder / "tekken.json").is_file():
        return ranks.read_tekken(folder / "tekken.json")
    if (folder / "tokenizer.model").is_file():
        return spm_model.read(folder / "tokenizer.model", settings)
    raise TokenizerError(
        f"{folder}: expected a tokenizer.json, found none, nor tokenizer.model, tekken.json or a tiktoken "
        "file; download it, or write it with "
        "transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
    )


def add_tokenizer(writer: gguf.GGUFWriter, spec: TokenizerSpec, vocab_size: int) -> None:
    """Adds every tokenizer key to `writer`, padded with unused tokens to `vocab_size` rows of the embedding.

    Added tokens behind the last row, which the model was never given, are left out. Raises TokenizerError
    when other tokens lie there.
    """
    tokens, kinds = list(spec.tokens[:vocab_size]), list(spec.types[:vocab_size])
    left_out = spec.types[vocab_size:]
    if not _ADDED.issuperset(left_out):
        raise TokenizerError(
            f"tokenizer: {len(spec.tokens)} ids but the embedding has {vocab_size} rows; expected no more "
            "ids than rows"
        )
    taken = set(tokens)
    for i in range(len(tokens), vocab_size):
        tokens.append(filler(i, taken))
        kinds.append(Kind.UNUSED)
    writer.add_tokenizer_model(spec.model)
    writer.add_tokenizer_pre(spec.pre)
    writer.add_token_list(tokens)
    writer.add_token_types([int(kind) for kind in kinds])
    if spec.scores is not None:
        floor = min(spec.scores)
        writer.add_token_scores([*spec.scores[:vocab_size], *[floor] * (vocab_size - len(spec.scores))])
    if spec.merges is not None:
        writer.add_token_merges(list(spec.merges))
    _add_special(writer, spec, vocab_size)


def _add_special(writer: gguf.GGUFWriter, spec: TokenizerSpec, vocab_size: int) -> None:
    for role, token in spec.ids.items():
        if token >= vocab_size and role in _DISPENSABLE:
            continue
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
