"""The same figures from llama.cpp itself: GGUF files in the runtime that will serve them.

Weights in fewer bits than 16 are multiplied with activations that llama.cpp rounds to 8 bits,
so even Q8_0 shows a KL divergence here of which part is not in the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from moequant.errors import VerifyError
from moequant.evaluate.divergence import Scores, join, score_tokens
from moequant.evaluate.results import Measured
from moequant.evaluate.side_by_side import measured
from moequant.progress import counted
from moequant.runtimes.llama_cpp.engine import Llama
from moequant.text.corpus import Rows


class LlamaEncoder:
    """The tokenizer in a GGUF file, as llama.cpp runs it: for files without their folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def encode_ids(self, text: str) -> list[int]:
        """Token ids, none added."""
        with Llama(self.path, vocab_only=True) as vocabulary:
            return vocabulary.tokenize(text)

    @property
    def bos(self) -> int | None:
        """The token that starts every row, None when the file says that there is none."""
        with Llama(self.path, vocab_only=True) as vocabulary:
            return vocabulary.bos if vocabulary.add_bos else None


def compare(
    base: Path,
    candidates: Sequence[tuple[str, Path]],
    rows: Rows,
    threads: int | None = None,
    cache: str = "f32",
) -> tuple[Measured, ...]:
    """Score every candidate (name, file) against `base`, GGUF files all, row by row; no logits are kept.

    The candidates keep keys and values as `cache` says, the baseline as f32. Raises LlamaError for what
    llama.cpp cannot load, VerifyError when vocabularies differ in size.
    """
    length = rows.ids.shape[1]
    found: list[list[Scores]] = [[] for _ in candidates]
    workers, paths = threads or torch.get_num_threads(), [path for _, path in candidates]
    with ExitStack() as stack:
        first, *others = (
            stack.enter_context(Llama(path, n_ctx=length, threads=workers, cache=kept))
            for path, kept in ((base, "f32"), *((path, cache) for path in paths))
        )
        for path, other in zip(paths, others, strict=True):
            if other.n_vocab != first.n_vocab:
                raise VerifyError(
                    f"{path}: another vocabulary than {base}: {other.n_vocab} tokens, not {first.n_vocab}"
                )
        for row in counted("llama.cpp", rows.ids.unbind(), "row"):
            for exact, *rounded in zip(*(_scored(model, row) for model in (first, *others)), strict=True):
                for scores, (logits, target) in zip(found, rounded, strict=True):
                    scores.append(score_tokens(exact[0], logits, target))
    return tuple(
        measured(name, join(scores), rows) for (name, _), scores in zip(candidates, found, strict=True)
    )


def _scored(model: Llama, row: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Piece by piece of a row's second half: the logits in front of every token, and the tokens."""
    for at, logits in model.pieces(row.tolist(), len(row) // 2):
        target = row[at + 1 : at + 1 + len(logits)]
        if len(target):
            yield torch.from_numpy(logits[: len(target)]), target
