"""Text for one model: rows of its own tokens, and which of them probe instead of calibrating."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from moequant.checkpoint import Checkpoint
from moequant.errors import CheckpointError, TokenizerError
from moequant.files.read import read_text
from moequant.text import corpus
from moequant.text.corpus import Document, Rows

ROW = 512
"""Tokens in a row: llama.cpp's context for perplexity and imatrix. A shorter context has shorter rows."""

PROBED = 7
"""Rows that calibrate for each one that probes."""


def row_length(checkpoint: Checkpoint) -> int:
    """Tokens in a row for this model."""
    return min(ROW, checkpoint.shape.context)


def token_rows(
    checkpoint: Checkpoint, documents: list[Document], tokens: int, seed: int, bos: int | None
) -> Rows:
    """At most `tokens` tokens of the documents, from their beginning as llama-perplexity scores them, in rows
    that the model can take; CorpusError if it can take none."""
    rows = corpus.pack(documents, load_encoder(checkpoint.path), row_length(checkpoint), tokens, seed, bos)
    return _checked(checkpoint, rows)


def calibration_rows(
    checkpoint: Checkpoint, documents: list[Document], tokens: int, seed: int, bos: int | None
) -> Rows:
    """The same from all over the documents: what few tokens see should be as varied as the text is."""
    every = corpus.pack(documents, load_encoder(checkpoint.path), row_length(checkpoint), None, seed, bos)
    return _checked(checkpoint, corpus.spread(every, tokens))


def probed_rows(
    checkpoint: Checkpoint, documents: list[Document], tokens: int, seed: int, bos: int | None, most: int
) -> tuple[Rows, Rows]:
    """At most `tokens` tokens to calibrate on, as `calibration_rows` gives them, and besides them one row to
    probe with for every seven, at least one and at most `most`."""
    length = row_length(checkpoint)
    corpus.check_budget(tokens, length, corpus.CALIBRATING)
    wanted = tokens // length
    total = wanted + min(most, max(1, wanted // PROBED))
    return split_probes(calibration_rows(checkpoint, documents, total * length, seed, bos), most)


def split_probes(rows: Rows, most: int) -> tuple[Rows, Rows]:
    """Rows to calibrate on, and one in eight, at least one and at most `most`, to probe with instead, drawn
    evenly from the same text. A single row serves both."""
    count = len(rows.ids)
    probes = min(most, max(1, count // (PROBED + 1)))
    chosen = {round((at + 0.5) * count / probes - 0.5) for at in range(probes)}
    others = [row for row in range(count) if row not in chosen] or [0]
    return _part(rows, others), _part(rows, sorted(chosen))


def load_encoder(folder: Path) -> Tokenizer:
    """The folder's tokenizer.json, a regular file of a bounded size, told to neither truncate nor pad."""
    file = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_str(read_text(file))  # the library would read a device without end
    except CheckpointError as error:
        raise TokenizerError(str(error)) from None
    except Exception as error:  # tokenizers raises bare Exception
        raise TokenizerError(f"{file}: cannot be read ({error})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def vocabulary(folder: Path) -> list[str]:
    """The text of every token of the folder's tokenizer, by its id; "" where an id has none."""
    by_id = {number: text for text, number in load_encoder(folder).get_vocab().items()}
    return [by_id.get(number, "") for number in range(max(by_id, default=-1) + 1)]


def _checked(checkpoint: Checkpoint, rows: Rows) -> Rows:
    return corpus.check(rows, max_length=checkpoint.shape.context, vocab_size=checkpoint.shape.vocab)


def _part(rows: Rows, chosen: list[int]) -> Rows:
    ids = rows.ids[chosen]
    return Rows(ids, tuple(rows.domains[row] for row in chosen), rows.source, ids.numel())
