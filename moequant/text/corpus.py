"""Calibration and evaluation text: from wherever it lies to rows of token ids.

`read` finds documents (the bundled set, a file, a folder, JSON Lines, a Hugging Face dataset),
`pack` cuts them into rows of one length, `check` holds the rows against the model. A text file is
one document, and one document is cut exactly as llama-imatrix and llama-perplexity cut a file: the
tokens in one stream, consecutive rows, the tail dropped. So figures on the same text compare.
"""

import importlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer
from torch import Tensor

from moequant.errors import CorpusError, few
from moequant.escape import shown
from moequant.text import bundled
from moequant.text.bundled import Split

log = logging.getLogger(__name__)

MIXED = "mixed"
"""The domain of a row made of what several domains had left over."""

MIN_ROWS = 2
"""Fewer rows measure nothing; llama.cpp's tools draw the line at the same place."""

CALIBRATING, EVALUATING = "--calib-tokens", "--eval-tokens"
"""The options that say how many tokens of a text are read."""

DATASET_BYTES = 16 * 2**20
"""How much text of a Hugging Face dataset is read: about 4 million tokens, far past the need."""

BATCH = 256
"""Documents encoded at once: enough for every core, few enough to bound the library's own records."""

Messages = list[dict[str, Any]]
Render = Callable[[Messages], str]
"""Turns a conversation into text, e.g. `lambda m: tokenizer.apply_chat_template(m, tokenize=False)`."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text. `domain` says what kind it is, `source` what `read` was given to find it."""

    domain: str
    text: str
    source: str = "text"


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Token rows: `ids` i64 [rows, length], the domain of every row, the source, `ids.numel()`."""

    ids: Tensor
    domains: tuple[str, ...]
    source: str
    tokens: int


class Encoder(Protocol):
    """Anything that turns text into token ids without adding any of its own."""

    def encode_ids(self, text: str) -> list[int]: ...


def read(
    source: str | Path | None = None, split: Split = "calibration", render: Render | None = None
) -> list[Document]:
    """The documents of `source`.

    None            the bundled set, calibration or evaluation split
    a .jsonl file   one document a line: "text", or "messages" when `render` is given; "domain" if any
    any other file  one document, UTF-8, line ends kept as they are; its domain is the file's stem
    a folder        every file in it, sorted; the subfolder is the domain (`code/a.py` → code)
    anything else   a Hugging Face dataset `name[:config[:split]]`, when `datasets` is installed; by
                    default its train split for calibration, test or validation for evaluation

    Empty documents hold nothing and are left out. Raises CorpusError for what is missing, empty,
    not text or not in that form.
    """
    if source is None:
        label = bundled.LABELS[split]
        return [
            Document(domain, text, label) for domain, texts in bundled.texts(split).items() for text in texts
        ]
    label = str(source)
    path = Path(label)
    if not label.strip():
        raise CorpusError("the text source is an empty name; give a file, a folder or a dataset")
    try:
        if path.is_dir():
            found = _folder(path, shown(path), render)
        elif path.exists():
            found = _file(path, path.stem, shown(path), render)
        else:
            found = list(_dataset(label, split, render))
    except OSError as error:
        raise CorpusError(f"{error.filename or label}: cannot be read ({error.strerror or error})") from None
    found = [document for document in found if document.text.strip()]
    if not found:
        raise CorpusError(f"{label}: empty; expected text")
    return found


def _folder(folder: Path, source: str, render: Render | None) -> list[Document]:
    """Every file below `folder` that is not hidden, in the order of their paths."""
    found: list[Document] = []
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        if file.is_file() and not any(part.startswith(".") for part in parts):
            found += _file(file, parts[0] if len(parts) > 1 else folder.resolve().name, source, render)
    return found


def _file(file: Path, domain: str, source: str, render: Render | None) -> list[Document]:
    if not file.is_file():
        raise CorpusError(f"{file}: neither a file nor a folder; expected text")
    text = _decode(file)
    if file.suffix.lower() != ".jsonl":
        return [Document(domain, text, source)]
    found: list[Document] = []
    # Not splitlines(): JSON strings may hold U+2028 and its kin unescaped.
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        if line.strip():
            where = f"{file}:{number}"
            found.append(_record(_json(line, where), where, Document(domain, "", source), render))
    return found


def _decode(file: Path) -> str:
    """The text of `file` with its line ends as they are: newline translation would change the tokens."""
    data = file.read_bytes()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        what = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        raise CorpusError(f"{file}: not UTF-8 text ({what}); convert or unpack it") from None
    if (nul := data.find(0)) >= 0:
        raise CorpusError(f"{file}: binary, not text (NUL at offset {nul}); expected UTF-8 text")
    return text


def _json(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CorpusError(
            f'{where}: not JSON ({error}); expected an object such as {{"text": "…"}}'
        ) from None
    if not isinstance(record, dict):
        raise CorpusError(
            f'{where}: a JSON {type(record).__name__}; expected an object such as {{"text": "…"}}'
        )
    return record


def _record(record: dict[str, Any], where: str, blank: Document, render: Render | None) -> Document:
    """`blank` with the text of one JSON line or dataset row, and its domain if the row names one."""
    text, domain = record.get("text"), record.get("domain")
    if text is None and isinstance(messages := record.get("messages"), list):
        if render is None:
            raise CorpusError(
                f'{where}: "messages" needs a chat template; apply one and store the result as "text"'
            )
        try:
            text = render(messages)
        except Exception as error:  # a template is code of the model's author: anything may come out of it
            raise CorpusError(f'{where}: the chat template refuses these "messages" ({error})') from None
    if not isinstance(text, str):
        fields = few(sorted(record)) or "none"
        raise CorpusError(f'{where}: no string "text" (fields: {fields}); each line or row needs one')
    if not isinstance(domain, str | None):
        raise CorpusError(f'{where}: "domain" is {domain!r}; expected a string')
    if (lone := re.search("[\ud800-\udfff]", text)) is not None:
        raise CorpusError(
            f'{where}: lone surrogate at character {lone.start()} of "text"; expected valid Unicode'
        )
    return Document(domain or blank.domain, text, blank.source)


def _dataset(name: str, split: Split, render: Render | None) -> Iterator[Document]:
    """Rows of a Hugging Face dataset in their order, streamed, until DATASET_BYTES of text."""
    # "notes.txt" fits the pattern of a dataset's name, but whoever writes that means a file.
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[^:/]*){0,2}", name) or re.search(r"\.[A-Za-z]+$", name):
        raise CorpusError(f"{name}: no such file or folder")
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        hint = "if it is a Hugging Face dataset: pip install datasets"
        raise CorpusError(f"{name}: no such file or folder; {hint}") from None
    path, config, wanted = (*name.split(":"), "", "")[:3]
    try:
        splits = datasets.get_dataset_split_names(path, config or None)
        preferred = ("train",) if split == "calibration" else ("test", "validation")
        chosen = wanted or next((candidate for candidate in preferred if candidate in splits), "")
        if chosen not in splits:
            raise CorpusError(f"{name}: no split {chosen or ' or '.join(preferred)}; it has {few(splits)}")
        rows = datasets.load_dataset(path, config or None, split=chosen, streaming=True)
        yield from _dataset_rows(rows, name, render)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise CorpusError(f"{name}: no such file or folder, and not a usable dataset ({reason})") from None


def _dataset_rows(rows: Iterable[dict[str, Any]], name: str, render: Render | None) -> Iterator[Document]:
    blank, size = Document(name.split(":")[0].split("/")[-1], "", name), 0
    for number, row in enumerate(rows, 1):
        document = _record(row, f"{name} row {number}", blank, render)
        yield document
        size += len(document.text.encode())
        if size >= DATASET_BYTES:
            log.info("%s: stopped reading after %d rows, %.0f MiB of text", name, number, size / 2**20)
            return


def pack(
    documents: Sequence[Document],
    tokenizer: Tokenizer | Encoder,
    length: int = 512,
    tokens: int | None = None,
    seed: int = 0,
    bos_id: int | None = None,
) -> Rows:
    """Rows of `length` tokens, at most `tokens` tokens of them (all of the text when None).

    The documents of a domain, shuffled by `seed`, form one stream that is cut into consecutive rows;
    what the domains have left over is cut together (domain `MIXED`), so fewer than `length` tokens
    are dropped in all. Rows come domain by domain in turn: in any prefix, two domains that both have
    rows to come are at most one row apart, and a larger `tokens` only appends rows.

    With `bos_id` every document starts with that token, and so does every row, in place of its first
    token: llama.cpp's rule. Special tokens written out in the text count as such (llama-imatrix does
    so with --parse-special).

    Raises CorpusError when `length` is below 2 or text or budget give fewer than MIN_ROWS rows.
    """
    source = ", ".join(dict.fromkeys(document.source for document in documents))
    if length < 2:
        raise CorpusError(
            f"row length {length}: a row needs at least 2 tokens, one to read and one to predict"
        )
    if tokens is not None:
        check_budget(tokens, length, EVALUATING)
    streams = _streams(documents, tokenizer, seed, bos_id)
    total = sum(len(stream) for stream in streams.values())
    if total < MIN_ROWS * length:
        raise CorpusError(
            f"{source or 'no documents'}: {total} tokens found, {MIN_ROWS * length} needed "
            f"({MIN_ROWS} rows of {length}); give more text"
        )
    queues = {domain: _cut(stream, length) for domain, stream in streams.items()}
    rest = torch.cat([stream[len(queues[domain]) * length :] for domain, stream in streams.items()])
    queues[MIXED] = torch.cat([queues.get(MIXED, rest.new_empty(0, length)), _cut(rest, length)])
    turns = _in_turn({domain: len(rows) for domain, rows in queues.items()})
    turns = turns if tokens is None else turns[: tokens // length]
    ids = torch.stack([queues[domain][row] for domain, row in turns])
    if bos_id is not None:
        ids[:, 0] = bos_id
    return Rows(ids, tuple(domain for domain, _ in turns), source, ids.numel())


def spread(rows: Rows, tokens: int) -> Rows:
    """At most `tokens` tokens of `rows`, from all over the text instead of from its beginning.

    Domains take turns as in `pack`; of each domain rows are taken in the order of their reversed binary
    number, so that any prefix lies evenly and a larger `tokens` only appends rows.
    Raises CorpusError when the budget gives fewer than MIN_ROWS rows.
    """
    length = rows.ids.shape[1]
    check_budget(tokens, length, CALIBRATING)
    places: dict[str, list[int]] = {}
    for row, domain in enumerate(rows.domains):
        places.setdefault(domain, []).append(row)
    for domain, found in places.items():
        bits = len(found).bit_length()
        places[domain] = [found[i] for i in sorted(range(len(found)), key=lambda i: f"{i:0{bits}b}"[::-1])]
    turns = _in_turn({domain: len(found) for domain, found in places.items()})
    chosen = [places[domain][row] for domain, row in turns[: tokens // length]]
    ids = rows.ids[chosen]
    return Rows(ids, tuple(rows.domains[row] for row in chosen), rows.source, ids.numel())


def check_budget(tokens: int, length: int, option: str, shorter: str = "") -> None:
    """CorpusError when `tokens`, which `option` says, are fewer than MIN_ROWS rows of `length`; `shorter`
    names the option that makes rows shorter, where there is one."""
    if tokens < MIN_ROWS * length:
        instead = f", or give a smaller {shorter}" if shorter else ""
        raise CorpusError(
            f"a budget of {tokens} tokens: {MIN_ROWS * length} are the least ({MIN_ROWS} rows of {length}); "
            f"raise {option}{instead}"
        )


def _streams(
    documents: Sequence[Document], tokenizer: Tokenizer | Encoder, seed: int, bos_id: int | None
) -> dict[str, Tensor]:
    """Domain → the tokens of its documents, i64 [tokens], domains and documents in seeded order."""
    by_domain: dict[str, list[str]] = {}
    for document in documents:
        by_domain.setdefault(document.domain, []).append(document.text)
    # A generator of its own for each domain: text added to one does not reorder the others.
    order = sorted(by_domain)
    Random(f"domains/{seed}").shuffle(order)
    start = [] if bos_id is None else [bos_id]
    streams: dict[str, Tensor] = {}
    for domain in order:
        texts = by_domain[domain]
        Random(f"{domain}/{seed}").shuffle(texts)
        parts = [torch.tensor(start + ids, dtype=torch.int64) for ids in _encode(tokenizer, texts)]
        streams[domain] = torch.cat(parts)
    return streams


def _encode(tokenizer: Tokenizer | Encoder, texts: list[str]) -> Iterator[list[int]]:
    """Token ids of each text, nothing added, nothing cut off."""
    if not isinstance(tokenizer, Tokenizer):
        yield from (tokenizer.encode_ids(text) for text in texts)
        return
    if tokenizer.truncation is not None or tokenizer.padding is not None:
        # A tokenizer.json may carry either; both would silently change the text.
        tokenizer = Tokenizer.from_str(tokenizer.to_str())
        tokenizer.no_truncation()
        tokenizer.no_padding()
    for start in range(0, len(texts), BATCH):
        for encoding in tokenizer.encode_batch_fast(texts[start : start + BATCH], add_special_tokens=False):
            yield encoding.ids


def _cut(stream: Tensor, length: int) -> Tensor:
    """[tokens] -> [tokens // length, length], the tail dropped."""
    rows = len(stream) // length
    return stream[: rows * length].view(rows, length)


def _in_turn(counts: dict[str, int]) -> list[tuple[str, int]]:
    """Every (domain, row), the first row of each domain, then the second of each, and so on."""
    rounds = range(max(counts.values()))
    return [(domain, row) for row in rounds for domain, count in counts.items() if row < count]


def check(rows: Rows, *, max_length: int | None = None, vocab_size: int | None = None) -> Rows:
    """`rows`, if the model can take them: `max_length` is its context, `vocab_size` its embedding rows.

    None leaves that side unchecked. Raises CorpusError otherwise.
    """
    length = rows.ids.shape[1]
    if max_length is not None and length > max_length:
        raise CorpusError(
            f"rows of {length} tokens: the model's context is {max_length}; give a smaller --ctx"
        )
    low, high = int(rows.ids.min()), int(rows.ids.max())
    if vocab_size is not None and not 0 <= low <= high < vocab_size:
        raise CorpusError(
            f"{rows.source}: token id {high if high >= vocab_size else low}, but the model embeds ids 0 to "
            f"{vocab_size - 1}: tokenizer disagrees with the embedding size; use this checkpoint's tokenizer"
        )
    return rows
