"""The same figures from llama.cpp itself: GGUF files in the runtime that will serve them.

Weights in fewer bits than 16 are multiplied with activations that llama.cpp rounds to 8 bits,
so even Q8_0 shows a KL divergence here of which part is not in the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from moequant.errors import VerifyError
from moequant.evaluate.divergence import Scores, join, score_row
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
    base: Path, candidates: Sequence[tuple[str, Path]], rows: Rows, threads: int | None = None
) -> tuple[Measured, ...]:
    """Score every candidate (name, file) against `base`, GGUF files all, row by row; no logits are kept.

    Raises LlamaError for what llama.cpp cannot load, VerifyError when vocabularies differ in size.
    """
    length = rows.ids.shape[1]
    found: list[list[Scores]] = [[] for _ in candidates]
    workers, paths = threads or torch.get_num_threads(), [path for _, path in candidates]
    with ExitStack() as stack:
        first, *others = (
            stack.enter_context(Llama(path, n_ctx=length, threads=workers)) for path in (base, *paths)
        )
        for path, other in zip(paths, others, strict=True):
            if other.n_vocab != first.n_vocab:
                raise VerifyError(
                    f"{path}: another vocabulary than {base}: {other.n_vocab} tokens, not {first.n_vocab}"
                )
        for row in counted("llama.cpp", rows.ids.unbind(), "row"):
            exact = _logits(first, row)
            for scores, other in zip(found, others, strict=True):
                scores.append(score_row(exact, _logits(other, row), row))
    return tuple(
        measured(name, join(scores), rows) for (name, _), scores in zip(candidates, found, strict=True)
    )


def _logits(model: Llama, row: Tensor) -> Tensor:
    return torch.from_numpy(model.logits(row.tolist()))
