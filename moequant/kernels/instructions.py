# mypy: ignore-errors
# (device code: Triton's types are not Python's)
"""Machine instructions that Triton has no name for, and what they compute in plain operations.

ISA says which is meant: "ptx" (NVIDIA), "gcn" (AMD) or "none", the plain form, which the interpreter runs.
"""

import triton
import triton.language as tl


@triton.jit
def dot4(a, b, total, ISA: tl.constexpr):
    """i32: total + the products of four signed bytes of a with those of b (32-bit words)."""
    if ISA == "ptx":
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, total], dtype=tl.int32, is_pure=True, pack=1
        )
    elif ISA == "gcn":
        return tl.inline_asm_elementwise(
            "v_dot4_i32_i8 $0, $1, $2, $3", "=v,v,v,v", [a, b, total], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return _plain_dot4(a, b, total)


@triton.jit
def _plain_dot4(a, b, total):
    up = 24 - 8 * tl.arange(0, 4)[None, None, None, :]
    a = (a.to(tl.int32, bitcast=True)[:, :, :, None] << up) >> 24
    b = (b.to(tl.int32, bitcast=True)[:, :, :, None] << up) >> 24
    return total + tl.sum(a * b, 3)


@triton.jit
def pick(low, high, code, ISA: tl.constexpr):
    """u32: byte i is byte `code >> 4 i & 7` of the eight bytes low, high. Bit 3 of each nibble must be 0."""
    if ISA == "ptx":
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, code], dtype=tl.uint32, is_pure=True, pack=1
        )
    else:
        return _plain_pick(low, high, code)


@triton.jit
def _plain_pick(low, high, code):
    place = tl.arange(0, 4).to(tl.uint32)
    number = _last(code) >> (4 * place) & 7
    both = _last(low).to(tl.uint64) | _last(high).to(tl.uint64) << 32
    byte = (both >> (8 * number).to(tl.uint64)).to(tl.uint32) & 255
    return tl.sum(byte << (8 * place), len(code.shape)).to(tl.uint32)


@triton.jit
def _last(word):
    return tl.expand_dims(word, len(word.shape))


@triton.jit
def fma2(a, b, c, ISA: tl.constexpr):
    """u32: a · b + c of two f16 in each word."""
    if ISA == "ptx":
        return tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.uint32, is_pure=True, pack=1
        )
    elif ISA == "gcn":
        return tl.inline_asm_elementwise(
            "v_pk_fma_f16 $0, $1, $2, $3", "=v,v,v,v", [a, b, c], dtype=tl.uint32, is_pure=True, pack=1
        )
    else:
        low = _plain_fma(a, b, c)
        return low | _plain_fma(a >> 16, b >> 16, c >> 16) << 16


@triton.jit
def _plain_fma(a, b, c):
    # The product of two f16 is exact in f32; only the sum is rounded twice.
    return half_bits(_half(a) * _half(b) + _half(c))


@triton.jit
def _half(word):
    return word.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def half_bits(value):
    """u32: the bits of an f32 rounded to f16."""
    return value.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
