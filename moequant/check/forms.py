"""What the numbers of a folder are called, how coarse they are, and the packed bytes that a kernel takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moequant.checkpoint.codecs import multiplier
from moequant.checkpoint.codecs.awq import BITS, Awq
from moequant.checkpoint.codecs.eight_bit import EightBit
from moequant.checkpoint.codecs.gptq import Gptq
from moequant.checkpoint.codecs.integers import Integers
from moequant.checkpoint.codecs.mxfp4 import BLOCK, Mxfp4
from moequant.checkpoint.codecs.mxfp6 import Mxfp6
from moequant.checkpoint.codecs.nvfp4 import BLOCK as NV_BLOCK
from moequant.checkpoint.codecs.nvfp4 import Nvfp4, Nvfp4Across
from moequant.checkpoint.codecs.packed_int import PackedInt
from moequant.checkpoint.read import load_packed, matrices
from moequant.formats import groups
from moequant.formats.float8 import SIDE
from moequant.kernels import Matrix
from moequant.kernels.matrix import INTEGERS
from moequant.values import Stored, Weight
from moequant.values.ops import apply, on_rows

_FACTORS = 4
"""Steps of f32's last place between decoders of NVFP4: its three factors, of which one may be stored as its
inverse, are multiplied in any order, and each product is rounded."""


@dataclass(frozen=True, slots=True)
class Form:
    """How a weight is stored: `name`, `alike` and `steps` as in `source.Entry`; `columns` weights of a row
    share a scale."""

    name: str
    alike: str
    columns: int
    steps: int = 0


def form_of(stored: Stored) -> Form:
    """The form of a quantized weight, by its headers."""
    codec, (n_out, n_in) = stored.codec, stored.shape[-2:]
    if isinstance(codec, Nvfp4 | Nvfp4Across):
        return Form("NVFP4", "NVFP4", NV_BLOCK, _FACTORS)
    if isinstance(codec, Mxfp4):
        return Form("MXFP4", "MXFP4", BLOCK)
    if isinstance(codec, Mxfp6):  # with two bits of fraction it is as coarse as integers of five bits
        return Form("MXFP6", _fp8(BLOCK) if codec.exponent == 2 else f"INT5_G{BLOCK}_BF16", BLOCK)
    scales = stored.parts["scale"].dtype
    if isinstance(codec, EightBit) and stored.parts["weight"].dtype != "I8":
        return _eight_bit(codec, scales, n_out, n_in)
    bits, columns = _integers(codec)
    columns = min(columns, n_in)
    return Form(f"INT{bits}_G{columns}_{scales}", f"INT{bits}_G{columns}_BF16", columns)


def _eight_bit(codec: EightBit, scales: str, n_out: int, n_in: int) -> Form:
    if codec.grid.columns == 1 < n_in and codec.grid.rows == n_out:  # a row's, of a stack that was turned
        return Form(f"FP8_G{n_out}_{scales}", _fp8(n_out), n_out)
    rows, columns = codec.grid.rows, min(codec.grid.columns, n_in)
    if codec.name == "mxfp8":
        return Form("MXFP8", _fp8(columns), columns)
    if (rows, codec.grid.columns) == (SIDE, SIDE):
        span = f"B{SIDE}"
    elif columns == n_in and rows in (1, n_out):
        span = f"{'G' if rows == 1 else 'W'}{n_in}"
    else:
        span = f"{rows}x{columns}"
    return Form(f"FP8_{span}_{scales}", _fp8(columns), columns)


def _fp8(columns: int) -> str:
    return f"FP8_G{columns}_BF16"


def _integers(codec: object) -> tuple[int, int]:
    """(bits, weights that share a scale) of whole numbers."""
    if isinstance(codec, EightBit):
        return 8, codec.grid.columns
    if isinstance(codec, PackedInt):
        return codec.bits, codec.grid.columns
    if isinstance(codec, Awq):
        return BITS, codec.group
    assert isinstance(codec, Gptq), codec
    return codec.bits, codec.group


def matrix_of(weight: Weight, shape: tuple[int, int, int]) -> Matrix | None:
    """A weight as a kernel takes it; None where none takes its numbers.

    FP4 is laid out as in ggml's blocks. Whole numbers are put into words of 4 or 8 bits, their zero points
    taken off.
    """
    codec, origin = weight.origin.stored[0].codec, weight.origin
    if isinstance(codec, Mxfp4 | Nvfp4):
        data = load_packed(weight) if origin.shipped else None
        if data is None:
            return None
        factors = [multiplier(*each) for each in matrices(weight)]
        known = [factor for factor in factors if factor is not None]
        return Matrix(
            "NVFP4" if known else "MXFP4",
            shape,
            data.view(*shape[:2], -1),
            factors=torch.stack(known) if known else None,
        )
    if not isinstance(codec, EightBit | PackedInt | Gptq | Awq) or not all(map(on_rows, origin.ops)):
        return None
    if len(origin.stored) > 1 and not weight.is_expert:  # one below the other
        return None
    return _words(weight, shape)


def _words(weight: Weight, shape: tuple[int, int, int]) -> Matrix | None:
    """Whole numbers, where neighbours share a scale."""
    codes, scales = [], []
    for stored, index in matrices(weight):
        whole = stored.codec.integers(stored, index, range(stored.shape[-2]))  # type: ignore[attr-defined]
        shared = None if whole is None else _shared(whole)
        if whole is None or shared is None:
            return None
        codes.append(apply(weight.origin.ops, whole.codes))
        scales.append(apply(weight.origin.ops, shared))
    all_codes = torch.stack(codes)
    reach = max(-int(all_codes.min()), int(all_codes.max()) + 1)
    fitting = [name for name, bits in INTEGERS.items() if reach <= 1 << bits - 1]
    if not fitting:
        return None
    packed = groups.pack(all_codes.to(torch.int8), INTEGERS[fitting[0]])
    return Matrix(fitting[0], shape, packed.contiguous().view(torch.uint8), torch.stack(scales))


def _shared(whole: Integers) -> torch.Tensor | None:
    """Scales [n, groups] of groups of a multiple of 32, which kernels take; None when there are none."""
    n_in = whole.codes.shape[1]
    columns = n_in if whole.scales.shape[1] == 1 else whole.columns
    if whole.group_of is None and columns % 32 == 0 and n_in % columns == 0:
        return whole.scales
    return whole.block_scales(32)
