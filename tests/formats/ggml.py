"""The ggml reference: encoders and decoders of libggml-python's `libggml-base`, through ctypes.

`ggml_quantize_chunk` there writes the same bytes as llama.cpp's `llama-quantize`.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib import metadata

import numpy as np
import torch
from torch import Tensor

from moequant.formats.base import Format


class _TypeTraits(ctypes.Structure):
    """`struct ggml_type_traits` of ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    )


@cache
def _library() -> ctypes.CDLL:
    files = metadata.files("libggml-python") or []
    path = next(f.locate() for f in files if f.name == "libggml-base.so")
    lib = ctypes.CDLL(str(path))
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = (
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    )
    lib.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    lib.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    return lib


def traits(fmt: Format) -> tuple[str, int, int]:
    """ggml's own (name, weights per block, bytes per block) of the type number that `fmt` claims."""
    t = _library().ggml_get_type_traits(fmt.ggml_type).contents
    return t.type_name.decode(), t.blck_size, t.type_size


def needs_importance(fmt: Format) -> bool:
    """True where ggml refuses to quantize without an importance matrix."""
    return bool(_library().ggml_quantize_requires_imatrix(fmt.ggml_type))


def quantize(fmt: Format, weights: Tensor, importance: Tensor | None = None) -> Tensor:
    """weights [..., rows, in], importance [..., in] or None -> uint8 [..., rows, row_bytes], one thread."""
    lib = _library()
    n_in = weights.shape[-1]
    rows = weights.shape[-2]
    x = np.ascontiguousarray(weights.float().reshape(-1, rows, n_in).numpy())
    w = None if importance is None else np.ascontiguousarray(importance.float().reshape(-1, n_in).numpy())
    row_bytes = fmt.row_bytes(n_in)
    out = np.zeros((len(x), rows, row_bytes), np.uint8)
    for e in range(len(x)):
        imatrix = None if w is None else w[e].ctypes.data
        wrote = lib.ggml_quantize_chunk(
            fmt.ggml_type, x[e].ctypes.data, out[e].ctypes.data, 0, rows, n_in, imatrix
        )
        assert wrote == rows * row_bytes
    return torch.from_numpy(out).reshape(*weights.shape[:-1], row_bytes)


def dequantize(fmt: Format, packed: Tensor) -> Tensor:
    """uint8 [..., row_bytes] -> f32 [..., in]."""
    raw = np.ascontiguousarray(packed.numpy())
    n_in = raw.shape[-1] // fmt.block_bytes * fmt.block
    out = np.empty((*raw.shape[:-1], n_in), np.float32)
    t = _library().ggml_get_type_traits(fmt.ggml_type).contents
    if fmt.name == "F32":  # ggml has no converter from f32 to f32
        out = raw.view(np.float32).copy()
    else:
        t.to_float(raw.ctypes.data, out.ctypes.data, out.size)
    return torch.from_numpy(out)
