"""llama.cpp itself, called through its C interface (`binding`).

Everything runs on the CPU, unless asked otherwise with a float32 KV cache and without flash attention: the
most exact arithmetic llama.cpp has.
"""

from __future__ import annotations

import ctypes as C
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from moequant.runtimes.llama_cpp.session import PIECE, Session


class Llama(Session):
    """One GGUF file loaded in llama.cpp, on the CPU; a context manager that frees it.

    Every call to `logits`, `pieces` or `stream` starts from an empty KV cache. The context (KV cache and
    compute buffers for `n_ctx` positions) is made at the first such call, so `tokenize` alone stays cheap.
    `cache` is the type of keys and values, one of CACHES; None stands for llama.cpp's own defaults of cache
    and attention, those that llama-server runs with.
    """

    @property
    def add_bos(self) -> bool:
        """Whether llama.cpp puts a BOS token in front when asked to add special tokens."""
        return bool(self._lib.llama_vocab_get_add_bos(self._vocab))

    @property
    def bos(self) -> int:
        """Id of the BOS token, -1 when there is none."""
        return int(self._lib.llama_vocab_bos(self._vocab))

    def is_eog(self, token: int) -> bool:
        """Whether generation ends at this token."""
        return bool(self._lib.llama_vocab_is_eog(self._vocab, token))

    def meta(self, key: str) -> str | None:
        """A scalar metadata value as llama.cpp prints it, None when the file lacks the key."""
        size = self._lib.llama_model_meta_val_str(self._model, key.encode(), None, 0)
        if size < 0:
            return None
        buffer = C.create_string_buffer(size + 1)
        self._lib.llama_model_meta_val_str(self._model, key.encode(), buffer, size + 1)
        return buffer.value.decode(errors="replace")

    def tokenize(self, text: str | bytes, add_special: bool = False, parse_special: bool = True) -> list[int]:
        raw = text.encode() if isinstance(text, str) else text
        room = len(raw) + 8
        while True:
            ids = np.empty(room, np.int32)
            n = self._lib.llama_tokenize(
                self._vocab, raw, len(raw), ids.ctypes.data, room, add_special, parse_special
            )
            if n >= 0:
                return [int(i) for i in ids[:n]]
            room = -n

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens spelled out; bytes that are not UTF-8 become U+FFFD."""
        tokens = np.asarray(ids, np.int32)
        room = 16 * len(tokens) + 64
        while True:
            buffer = C.create_string_buffer(room)
            n = self._lib.llama_detokenize(
                self._vocab, tokens.ctypes.data, len(tokens), buffer, room, False, True
            )
            if n >= 0:
                return buffer.raw[:n].decode(errors="replace")
            room = -n

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits after every token, float32 [len(ids), n_vocab]; len(ids) ≤ n_ctx."""
        self.start(len(ids))
        return self._decode(ids, every=True)

    def pieces(self, ids: Sequence[int], begin: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Logits after every token from `begin` on, PIECE of them at most at a time, each with the place of
        its first token: those of a long text do not fit memory together."""
        self.start(len(ids))
        for at in range(0, len(ids), PIECE):
            part = ids[at : at + PIECE]
            found = self._decode(part, every=at + len(part) > begin)
            if at + len(part) > begin:
                skipped = max(0, begin - at)
                yield at + skipped, found[skipped:]

    def generate(self, ids: Sequence[int], n: int) -> list[int]:
        """`n` greedy continuations of `ids`; fewer when a token that ends generation comes, which is kept."""
        return list(self.stream(ids, n))

    def stream(self, ids: Sequence[int], n: int) -> Iterator[int]:
        """What `generate` returns, each token as soon as it is known."""
        self.start(len(ids) + n)
        feed = list(ids)
        for _ in range(n):
            feed = [int(self._decode(feed, every=False)[0].argmax())]
            yield feed[0]
            if self.is_eog(feed[0]):
                break

    def warm_up(self) -> None:
        """Makes the context and runs a token through the model, as llama.cpp's programs do at first."""
        self.start(1)
        self._decode([0], every=False)

    def _decode(self, ids: Sequence[int], every: bool) -> NDArray[np.float32]:
        """Appends `ids` to the cache; logits of all of them, or [1, n_vocab] of the last."""
        return np.frombuffer(self.decode(ids, every), np.float32).reshape(-1, self.n_vocab).copy()
