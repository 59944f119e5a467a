"""The C interface of the libllama inside xllamacpp.

xllamacpp's Python classes expose no logits, but its shared object exports llama.h. The structures below
were read off the build of xllamacpp 2026.10.11549 and are checked against that build's own defaults when it
is loaded, so another version fails loudly instead of computing nonsense. Nothing here needs NumPy: importing
it takes longer than all else that a process does which only asks whether a file loads.
"""

from __future__ import annotations

import ctypes as C
import functools
import importlib.util
import re
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moequant.errors import MoequantError

_LOG_TYPE = C.CFUNCTYPE(None, C.c_int, C.c_char_p, C.c_void_p)

_CAUSES = re.compile(
    r"error loading model: (?!llama_model_loader: failed)(.+)|(GGML_ASSERT\(.+\) failed|GGML_ABORT.+)"
)
"""How llama.cpp says why it gives up: in what it logs, and on stderr where it aborts. That its loader failed
is no cause: the lines in front of it say that."""


class LlamaError(MoequantError):
    """llama.cpp refused, or is not there; the message ends with what it logged."""


class ModelParams(C.Structure):
    _fields_ = (
        ("devices", C.c_void_p),
        ("buffer_overrides", C.c_void_p),
        ("n_gpu_layers", C.c_int32),
        ("unused", C.c_uint8 * 4),
        ("load_mode", C.c_int32),
        ("unused_too", C.c_uint8 * 44),
        ("vocab_only", C.c_bool),
        ("flags", C.c_bool * 3),
        ("no_alloc", C.c_bool),
        # Larger than the real structure: what follows is carried along unread.
        ("rest", C.c_uint8 * 195),
    )


class _ContextParams(C.Structure):
    _fields_ = (
        ("n_ctx", C.c_uint32),
        ("n_batch", C.c_uint32),
        ("n_ubatch", C.c_uint32),
        ("n_seq_max", C.c_uint32),
        ("unused", C.c_uint8 * 36),
        ("flash_attn", C.c_int32),
        ("unused_too", C.c_uint8 * 48),
        ("type_k", C.c_int32),
        ("type_v", C.c_int32),
        ("rest", C.c_uint8 * 256),
    )


class Batch(C.Structure):
    """Null `pos` and `seq_id` mean: append to sequence 0."""

    _fields_ = (
        ("n_tokens", C.c_int32),
        ("token", C.c_void_p),
        ("embd", C.c_void_p),
        ("pos", C.c_void_p),
        ("n_seq_id", C.c_void_p),
        ("seq_id", C.c_void_p),
        ("logits", C.c_void_p),
    )


_SIGNATURES: dict[str, tuple[Any, ...]] = {
    # name: (result, *arguments); P = pointer, I = int32
    "llama_backend_init": (None,),
    "llama_log_set": (None, _LOG_TYPE, C.c_void_p),
    "llama_model_default_params": (ModelParams,),
    "llama_model_load_from_file": (C.c_void_p, C.c_char_p, ModelParams),
    "llama_model_free": (None, C.c_void_p),
    "llama_model_get_vocab": (C.c_void_p, C.c_void_p),
    "llama_model_meta_val_str": (C.c_int32, C.c_void_p, C.c_char_p, C.c_char_p, C.c_size_t),
    "llama_vocab_n_tokens": (C.c_int32, C.c_void_p),
    "llama_vocab_get_add_bos": (C.c_bool, C.c_void_p),
    "llama_vocab_bos": (C.c_int32, C.c_void_p),
    "llama_vocab_is_eog": (C.c_bool, C.c_void_p, C.c_int32),
    "llama_tokenize": (
        C.c_int32, C.c_void_p, C.c_char_p, C.c_int32, C.c_void_p, C.c_int32, C.c_bool, C.c_bool,
    ),
    "llama_detokenize": (
        C.c_int32, C.c_void_p, C.c_void_p, C.c_int32, C.c_char_p, C.c_int32, C.c_bool, C.c_bool,
    ),
    "llama_context_default_params": (_ContextParams,),
    "llama_init_from_model": (C.c_void_p, C.c_void_p, _ContextParams),
    "llama_free": (None, C.c_void_p),
    "llama_set_n_threads": (None, C.c_void_p, C.c_int32, C.c_int32),
    "llama_get_memory": (C.c_void_p, C.c_void_p),
    "llama_memory_clear": (None, C.c_void_p, C.c_bool),
    "llama_decode": (C.c_int32, C.c_void_p, Batch),
    "llama_get_logits": (C.POINTER(C.c_float), C.c_void_p),
}  # fmt: skip


class Library:
    """The loaded shared object with typed functions and the last lines it logged."""

    def __init__(self, path: Path) -> None:
        self.path, self._dll = path, C.CDLL(str(path))
        for name, (result, *arguments) in _SIGNATURES.items():
            function = getattr(self._dll, name)
            function.restype, function.argtypes = result, arguments
        self.lines: deque[str] = deque(maxlen=2000)
        # Sizes of buffers, kept apart: llama.cpp logs more lines than fit when a model has many layers.
        self.sizes: list[str] = []
        # Kept as an attribute: libllama holds only a bare pointer to it.
        self._callback = _LOG_TYPE(self._log)
        self.llama_log_set(self._callback, None)
        self.llama_backend_init()
        self._check_layout()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in _SIGNATURES:
            raise AttributeError(name)
        function: Callable[..., Any] = getattr(self._dll, name)
        return function

    def _log(self, level: int, text: bytes, data: object) -> None:
        self.lines.append(text.decode(errors="replace"))
        if b"size =" in text:
            self.sizes.append(self.lines[-1])

    def _check_layout(self) -> None:
        """LlamaError when the defaults are not where this build of llama.cpp has them."""
        model, context = self.llama_model_default_params(), self.llama_context_default_params()
        found = (
            model.n_gpu_layers, *model.flags, context.n_ctx, context.n_batch, context.n_seq_max,
            context.flash_attn, context.type_k, context.type_v,
        )  # fmt: skip
        if found != (-1, False, True, False, 512, 2048, 1, -1, 1, 1):
            raise LlamaError(
                f"xllamacpp: another version than moequant knows (defaults read as {found}); "
                "pip install xllamacpp==2026.10.11549"
            )

    def log(self, length: int = 300) -> str:
        """Why llama.cpp gave up, by what it logged, as one line."""
        return cause("".join(self.lines), length)


def cause(said: str, length: int = 300) -> str:
    """Why llama.cpp gave up, as one line: its last word on it in what it said, else the end of that."""
    found = _CAUSES.findall(said)
    if not found:
        return " ".join(said.split())[-length:]
    return " ".join("".join(found[-1]).split())[:length]


@functools.cache
def library() -> Library:
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or not spec.submodule_search_locations:
        raise LlamaError("xllamacpp is not installed; pip install xllamacpp==2026.10.11549")
    return Library(Path(spec.submodule_search_locations[0]) / "xllamacpp.abi3.so")
