"""What a number format is: a name, a block, and two functions between floats and bytes.

A format file (`q4_k.py`, `iq4.py`, …) knows blocks only. Rows, experts, threads,
compilation and checking live once, in `engine.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from moequant.errors import FormatError
from moequant.formats.parts import Scalar, Vector

Effort = Literal["fast", "default", "best"]

NO_GGML_TYPE = -1
"""The `ggml_type` of formats that GGUF files do not have."""

Encode = Callable[[Tensor, Tensor, Effort], Tensor]
"""(x f32 [n, block], w f32 [n, block] > 0, effort) -> uint8 [n, block_bytes], minimising sum(w * (x - q)**2).

x is finite and at most `Format.limit` in size; it may hold zeros and subnormals. Blocks are independent.
"""

Decode = Callable[[Tensor], Tensor]
"""uint8 [n, block_bytes] -> f32 [n, block], bit for bit what ggml decodes."""


@dataclass(frozen=True, slots=True)
class Shared:
    """The scale d of blocks that rows have in common: found in whole matrices, before a block is packed.

    `find` (x f32 [E, out, in], w f32 [E, in] > 0, effort) -> f32 [E, out, in / block] that files can hold.
    With `across`, weights that multiply the same inputs share it as well, as one matrix with all their
    rows. `encode` is the format's `encode` with d f32 [n, 1] given.
    """

    find: Callable[[Tensor, Tensor, Effort], Tensor]
    encode: Callable[[Tensor, Tensor, Tensor, Effort], Tensor]
    across: bool = False


@dataclass(frozen=True, slots=True)
class Format:
    """One weight type: ggml's, or one of safetensors folders, whose `ggml_type` is NO_GGML_TYPE.

    `block` weights in a row share `block_bytes` bytes. `magnitude` is the exponent p of
    the factor (c·mean(x²) + x²)^(p/2) that multiplies the importance when scales and
    codes are searched: 0 is importance alone, 1 is ggml's own objective. The mean is
    over the block, and c is `spread`.

    `gain` multiplies the weights before they are packed. The scale of least squared error
    shrinks what a coarse code stores (least squares pulls towards 0), and all products of
    a layer shrink together: at 1 to 3 bits that costs more KL divergence than the error
    that the gain adds (`benchmarks/cases/objective.py`).
    """

    name: str
    ggml_type: int
    block: int
    block_bytes: int
    encode: Encode
    decode: Decode
    magnitude: float = 0.0
    spread: float = 2.0
    gain: float = 1.0
    limit: float = 65504.0  # the largest weight in size: scales are f16
    tiles: int = 1  # how many of `kernel.TILE` weights the encoder takes at once, where it is faster so
    view: Scalar | Vector | None = None  # what the bytes say, where codes and scales can be told apart
    loops: bool = False  # whether `encode` has compiled loops on a CPU, see `native`
    shared: Shared | None = None  # where rows have scales in common; `encode` alone gives each block its own

    @property
    def bits(self) -> float:
        """Bits per weight, scales included."""
        return 8 * self.block_bytes / self.block

    def row_bytes(self, n_in: int) -> int:
        """Bytes of one packed row of `n_in` weights; FormatError when the block does not divide it."""
        if n_in % self.block:
            raise FormatError(
                f"{self.name} packs {self.block} weights at a time and cannot hold rows of {n_in}"
            )
        return n_in // self.block * self.block_bytes
