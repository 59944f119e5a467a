"""What llama.cpp reserves in memory, as it logs it; the runtime is `runtimes.llama_cpp.engine`."""

import ctypes as C
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moequant.runtimes.llama_cpp.binding import Batch, Library, LlamaError, ModelParams, library
from moequant.runtimes.llama_cpp.engine import Llama

__all__ = ["Llama", "LlamaError", "MemoryReport", "drafting", "drafts", "memory_report", "model_bytes"]


class _FitModelParams(C.Structure):
    """The same structure with the fields that decide whether weights are read at all."""

    _fields_ = (
        ("unused", C.c_uint8 * 24),
        ("load_mode", C.c_int32),
        ("unused_too", C.c_uint8 * 48),
        ("no_alloc", C.c_bool),
        ("rest", C.c_uint8 * 195),
    )


class _FitContextParams(C.Structure):
    """The same structure with the field that decides how long windowed layers remember."""

    _fields_ = (
        ("unused", C.c_uint8 * 136),
        ("flags", C.c_bool * 6),
        ("rest", C.c_uint8 * 226),
    )


class _DraftingModelParams(C.Structure):
    """The same structure with the field that decides whether layers that predict are loaded."""

    _fields_ = (
        ("unused", C.c_uint8 * 72),
        ("flags", C.c_bool * 6),
        ("rest", C.c_uint8 * 194),
    )


class _DraftingContextParams(C.Structure):
    """The same structure with the field that decides what a context runs: 1 is the layers that predict."""

    _fields_ = (
        ("unused", C.c_uint8 * 36),
        ("kind", C.c_int32),
        ("rest", C.c_uint8 * 328),
    )


_WANTED = "_Z26llama_set_embeddings_nextnP13llama_contextbb"
_HIDDEN = "_Z26llama_get_embeddings_nextnP13llama_context"
"""Functions of C++ that llama.cpp's own drafting calls: a context keeps, and gives, the hidden states that
layers which predict are fed."""


def _with_predictions(lib: Library, path: str | Path) -> int:
    """A model loaded with its layers that predict. LlamaError where one misses a tensor."""
    params = lib.llama_model_default_params()
    params.n_gpu_layers = 0
    flags = C.cast(C.pointer(params), C.POINTER(_DraftingModelParams)).contents.flags
    if list(flags) != [False, False, True, False, False, False]:
        raise LlamaError(f"xllamacpp: structure layout changed (flags read as {list(flags)})")
    flags[5] = True
    lib.lines.clear()
    model: int = lib.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise LlamaError(f"llama.cpp cannot load {path}:\n{lib.log(2000)}")
    return model


def _decode(
    lib: Library, context: int, ids: Sequence[int], first: int, states: np.ndarray[Any, Any] | None = None
) -> None:
    """Runs tokens at positions from `first` on, with hidden states beside them where they are given."""
    tokens, places = np.asarray(ids, np.int32), np.arange(first, first + len(ids), dtype=np.int32)
    every = np.ones(len(ids), np.int8)
    rows = None if states is None else np.ascontiguousarray(states, np.float32)
    batch = Batch(len(ids), tokens.ctypes.data, None, places.ctypes.data, None, None, every.ctypes.data)
    batch.embd = None if rows is None else rows.ctypes.data
    if found := lib.llama_decode(context, batch):
        raise LlamaError(f"llama.cpp does not run the batch: {found}\n{lib.log(2000)}")


def drafts(path: str | Path, ids: Sequence[int]) -> np.ndarray[Any, Any]:
    """Logits of the first layer that predicts, f32 [len(ids) - 1, vocab]: row p is for token p + 2, of the
    hidden state of token p and of token p + 1."""
    lib = library()
    dll = C.CDLL(str(lib.path))  # the same that is loaded
    wanted, hidden, size = getattr(dll, _WANTED), getattr(dll, _HIDDEN), dll.llama_model_n_embd
    wanted.restype, wanted.argtypes = None, (C.c_void_p, C.c_bool, C.c_bool)
    hidden.restype, hidden.argtypes = C.POINTER(C.c_float), (C.c_void_p,)
    size.restype, size.argtypes = C.c_int32, (C.c_void_p,)
    with ExitStack() as stack:
        model = _with_predictions(lib, path)
        stack.callback(lib.llama_model_free, model)

        def context(kind: int) -> int:
            params = lib.llama_context_default_params()
            params.n_ctx = params.n_batch = params.n_ubatch = 256
            params.flash_attn = params.type_k = params.type_v = 0  # exact: a cache in f32
            C.cast(C.pointer(params), C.POINTER(_DraftingContextParams)).contents.kind = kind
            made: int = lib.llama_init_from_model(model, params)
            if not made:
                raise LlamaError(f"llama.cpp cannot run {path}:\n{lib.log(2000)}")
            stack.callback(lib.llama_free, made)
            return made

        main, draft = context(0), context(1)
        wanted(main, True, False)
        _decode(lib, main, ids, 0)
        states = np.ctypeslib.as_array(hidden(main), (len(ids), size(model))).copy()
        _decode(lib, draft, ids[1:], 1, states[:-1])
        vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        return np.ctypeslib.as_array(lib.llama_get_logits(draft), (len(ids) - 1, vocab)).copy()


def drafting(path: str | Path) -> list[str]:
    """Loads a file with its layers that predict: the tensors in it that nobody uses. LlamaError when one is
    missing, or of another shape."""
    lib = library()
    model = _with_predictions(lib, path)
    lib.llama_model_free(model)
    return [line for line in lib.lines if "unused tensor" in line]


@dataclass(frozen=True)
class MemoryReport:
    """What llama.cpp logs that it reserves, in bytes; it prints MiB with two decimals, so ± 5,243."""

    model: int
    kv: int
    state: int
    compute: int


def memory_report(path: str | Path, n_ctx: int, parallel: int = 1, cache_type: int = 1) -> MemoryReport:
    """What llama.cpp reserves for a file on the CPU with flash attention and batches of 512.

    `n_ctx` is the context of all `parallel` sequences together, `cache_type` a ggml type (1 is f16, 8 q8_0).
    Weights are neither read nor allocated, so the file may be a header with a hole behind it. The size of the
    model is then not logged, and `model` is 0; `model_bytes` loads for real.
    """
    lib = library()
    params = lib.llama_model_default_params()
    fit = C.cast(C.pointer(params), C.POINTER(_FitModelParams)).contents
    fit.no_alloc, fit.load_mode = True, 0
    return _reserve(lib, path, params, n_ctx, parallel, cache_type)


def model_bytes(path: str | Path) -> int:
    """Bytes of weights that llama.cpp logs after it mapped a file."""
    lib = library()
    params = lib.llama_model_default_params()
    params.n_gpu_layers = 0
    return _reserve(lib, path, params, 256, 1, 1).model


def _reserve(
    lib: Library, path: str | Path, params: ModelParams, n_ctx: int, parallel: int, cache_type: int
) -> MemoryReport:
    lib.lines.clear()
    lib.sizes.clear()
    model = lib.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise LlamaError(f"llama.cpp cannot load {path}:\n{lib.log(2000)}")
    try:
        wanted = lib.llama_context_default_params()
        wanted.n_ctx, wanted.n_seq_max, wanted.flash_attn = n_ctx, parallel, 1
        wanted.type_k = wanted.type_v = cache_type
        # llama-server's default, unlike libllama's: layers with a window keep only the window.
        flags = C.cast(C.pointer(wanted), C.POINTER(_FitContextParams)).contents.flags
        if list(flags) != [False, True, True, True, True, False]:
            raise LlamaError(f"xllamacpp: structure layout changed (flags read as {list(flags)})")
        flags[4] = False
        context = lib.llama_init_from_model(model, wanted)
        if not context:
            raise LlamaError(f"llama.cpp cannot make a context of {n_ctx} tokens:\n{lib.log(2000)}")
        lib.llama_free(context)
    finally:
        lib.llama_model_free(model)
    log = "".join(lib.sizes)
    return MemoryReport(
        model=_mebibytes(r"CPU\w* model buffer size = +([\d.]+) MiB", log),
        kv=_mebibytes(r"llama_kv_cache: size = +([\d.]+) MiB", log),
        state=_mebibytes(r"(?:llama_memory_recurrent: size|DSV4 \w+ state buffer size) = +([\d.]+) MiB", log),
        compute=_mebibytes(r"compute buffer size = +([\d.]+) MiB", log),
    )


def _mebibytes(pattern: str, log: str) -> int:
    """The sum of all figures that a pattern finds, in bytes."""
    return int(sum(float(value) for value in re.findall(pattern, log)) * 2**20)
