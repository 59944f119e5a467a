"""A GGUF file loaded in llama.cpp, with tokens in and logits out.

Nothing here needs NumPy, see `binding`: the process that computes logits for a self-check is one of these.
"""

from __future__ import annotations

import ctypes as C
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from moequant.runtimes.llama_cpp.binding import Batch, LlamaError, library

PIECE = 512
"""Tokens that llama.cpp computes at a time: its default for a micro-batch."""

CACHES = {"f32": 0, "f16": 1, "q8_0": 8}
"""Types of keys and values, with their numbers in ggml."""


class Session:
    """One GGUF file on the CPU; a context manager that frees it.

    The context (KV cache and compute buffers for `n_ctx` positions) is made at the first `start`. `cache` is
    the type of keys and values, one of CACHES; None stands for llama.cpp's own defaults of cache and
    attention, those that llama-server runs with.
    """

    def __init__(
        self,
        path: str | Path,
        n_ctx: int = 512,
        threads: int = 2,
        vocab_only: bool = False,
        cache: str | None = "f32",
    ) -> None:
        self._lib = library()
        self._context: int | None = None
        self.n_ctx, self.threads, self.vocab_only, self.cache = n_ctx, threads, vocab_only, cache
        params = self._lib.llama_model_default_params()
        params.n_gpu_layers, params.vocab_only = 0, vocab_only
        self._lib.lines.clear()
        self._model: int | None = self._lib.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise LlamaError(f"{path}: llama.cpp cannot load it ({self._lib.log()})")
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self.n_vocab: int = self._lib.llama_vocab_n_tokens(self._vocab)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Frees context and model; harmless when repeated."""
        if self._context:
            self._lib.llama_free(self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._context = self._model = None

    def start(self, positions: int) -> None:
        """An empty context with room for `positions`."""
        if not self._model or self.vocab_only:
            raise LlamaError("no weights: the model is closed or was loaded with vocab_only")
        if positions > self.n_ctx:
            raise LlamaError(f"{positions} positions do not fit n_ctx={self.n_ctx}")
        if not self._context:
            self._context = self._new_context()
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def _new_context(self) -> int:
        params = self._lib.llama_context_default_params()
        params.n_ctx = params.n_batch = self.n_ctx
        params.n_ubatch, params.n_seq_max = min(self.n_ctx, PIECE), 1
        if self.cache is not None:
            params.type_k = params.type_v = CACHES[self.cache]
            # Only flash attention reads values that are quantized.
            params.flash_attn = int(self.cache == "q8_0")
        self._lib.lines.clear()
        context: int | None = self._lib.llama_init_from_model(self._model, params)
        if not context:
            raise LlamaError(f"llama.cpp cannot make a context of {self.n_ctx} tokens ({self._lib.log()})")
        self._lib.llama_set_n_threads(context, self.threads, self.threads)
        return context

    def decode(self, ids: Sequence[int], every: bool) -> memoryview:
        """Appends `ids` to the cache; logits f32 of all of them, one after the other, or of the last.

        They lie in llama.cpp's memory, and are good until it is called again.
        """
        if len(ids) == 0 or min(ids) < 0 or max(ids) >= self.n_vocab:
            raise LlamaError(f"token ids must lie in 0…{self.n_vocab - 1} and be at least one")
        count = len(ids)
        tokens, wanted = (C.c_int32 * count)(*ids), (C.c_int8 * count)(*[every] * count)
        wanted[-1] = 1
        batch = Batch(n_tokens=count, token=C.addressof(tokens), logits=C.addressof(wanted))
        status = self._lib.llama_decode(self._context, batch)
        if status != 0:
            raise LlamaError(f"llama_decode returned {status} ({self._lib.log()})")
        floats = C.POINTER(C.c_float * (self.n_vocab * sum(wanted)))
        return memoryview(C.cast(self._lib.llama_get_logits(self._context), floats).contents)
