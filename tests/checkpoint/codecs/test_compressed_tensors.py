"""compressed-tensors' own compressors make the checkpoints here, and decompress them again to compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from moequant.checkpoint.codecs import Stored, as_shipped, repack
from moequant.errors import CheckpointError
from tests.checkpoint.codecs.files import one, read, seeded


def scheme(bits: int, kind: str, strategy: str, **more: Any) -> QuantizationScheme:
    args = QuantizationArgs(num_bits=bits, type=kind, strategy=strategy, **more)
    return QuantizationScheme(targets=["Linear"], weights=args)


def config(s: QuantizationScheme, **more: Any) -> dict[str, Any]:
    """As config.json would have it."""
    group = {"targets": ["Linear"], "weights": s.weights.model_dump(mode="json")}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, **more}


def grid(s: QuantizationScheme, out: int, n_in: int) -> tuple[int, ...]:
    """The shape of the scales."""
    w = s.weights
    if w.strategy == "block":
        return (-(-out // w.block_structure[0]), -(-n_in // w.block_structure[1]))
    return {"tensor": (1,), "channel": (out, 1), "group": (out, n_in // (w.group_size or n_in))}[w.strategy]


def compressed(
    name: str, s: QuantizationScheme, out: int, n_in: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """A random weight [out, in] as the compressor stores it."""
    shape = grid(s, out, n_in)
    top = 6.0 if s.weights.type == "float" else 2.0 ** (s.weights.num_bits - 1)
    plain = {
        "weight": torch.randn(out, n_in, generator=seeded()),
        "weight_scale": ((torch.rand(shape, generator=seeded(1)) + 1) * (2 / top)).to(dtype),
    }
    if not s.weights.symmetric:
        low = -(2 ** (s.weights.num_bits - 1))
        plain["weight_zero_point"] = torch.randint(low, -low, shape, dtype=torch.int8, generator=seeded(2))
    return BaseCompressor.get_value_from_registry(name).compress(plain, s)


def theirs(name: str, s: QuantizationScheme, stored: dict[str, Tensor]) -> Tensor:
    """What the library decompresses, its scales widened first so that it computes in f32."""
    wide = stored | {"weight_scale": stored["weight_scale"].float()}
    return BaseCompressor.get_value_from_registry(name).decompress(wide, s)["weight"]


def named(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"model.a.{name}": tensor for name, tensor in tensors.items()}


def unblocked(blocks: Tensor, name: str) -> Tensor:
    return torch.from_numpy(quants.dequantize(blocks.numpy(), GGMLQuantizationType[name]))


EIGHT_BIT = [
    ("float-quantized", scheme(8, "float", "tensor")),
    ("float-quantized", scheme(8, "float", "channel")),
    ("float-quantized", scheme(8, "float", "group", group_size=16)),
    ("float-quantized", scheme(8, "float", "block", block_structure=[32, 64])),
    ("int-quantized", scheme(8, "int", "tensor")),
    ("int-quantized", scheme(8, "int", "channel")),
    ("int-quantized", scheme(8, "int", "channel", symmetric=False)),
    ("int-quantized", scheme(8, "int", "group", group_size=32)),
    ("int-quantized", scheme(8, "int", "group", group_size=16, symmetric=False)),
    ("int-quantized", scheme(4, "int", "channel")),
]


@pytest.mark.parametrize(("name", "s"), EIGHT_BIT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_byte_each(tmp_path: Path, name: str, s: QuantizationScheme, dtype: torch.dtype) -> None:
    tensors = compressed(name, s, 96, 128, dtype)
    stored = one(tmp_path, named(tensors), config(s))
    assert stored.name == "model.a.weight" and stored.codec.name == (
        "int8" if s.weights.type == "int" else "fp8"
    )
    assert torch.equal(read(stored), theirs(name, s, tensors))


def test_blocks_that_do_not_divide_a_matrix(tmp_path: Path) -> None:
    s = scheme(8, "float", "block", block_structure=[128, 128])
    tensors = compressed("float-quantized", s, 200, 300, torch.float32)
    rows, columns = torch.arange(200) // 128, torch.arange(300) // 128
    expected = tensors["weight"].double() * tensors["weight_scale"].double()[rows][:, columns]
    assert torch.equal(read(one(tmp_path, named(tensors), config(s))), expected.float())


def test_mxfp8(tmp_path: Path) -> None:
    s = scheme(8, "float", "group", group_size=32, scale_dtype=torch.uint8)
    plain = {
        "weight": torch.randn(24, 96, generator=seeded()),
        "weight_scale": 2.0 ** torch.randint(-9, -5, (24, 3), generator=seeded(1)).float(),
    }
    compressor = BaseCompressor.get_value_from_registry("mxfp8-quantized")
    tensors = compressor.compress(plain, s)
    stored = one(tmp_path, named(tensors), config(s))
    assert (stored.codec.name, stored.dtype) == ("mxfp8", "BF16")
    assert torch.equal(read(stored), compressor.decompress(tensors, s)["weight"])


PACKED = [
    scheme(bits, "int", strategy, symmetric=symmetric, **more)
    for bits in range(2, 9)
    for strategy, more in (("group", {"group_size": 32}), ("channel", {}))
    for symmetric in (True, False)
]


@pytest.mark.parametrize("s", PACKED, ids=lambda s: f"{s.weights.num_bits}-{s.weights.strategy}")
def test_packed_integers(tmp_path: Path, s: QuantizationScheme) -> None:
    tensors = compressed("pack-quantized", s, 75, 160, torch.bfloat16)
    stored = one(tmp_path, named(tensors), config(s))
    assert (stored.shape, stored.codec.name) == ((75, 160), f"int{s.weights.num_bits}")
    assert torch.equal(read(stored), theirs("pack-quantized", s, tensors))


@pytest.mark.parametrize("n_in", [33, 77, 100])
def test_rows_that_end_within_a_word(tmp_path: Path, n_in: int) -> None:
    for bits in (3, 4, 5):
        s = scheme(bits, "int", "channel")
        tensors = compressed("pack-quantized", s, 10, n_in, torch.float16)
        stored = one(tmp_path, named(tensors), config(s))
        assert torch.equal(read(stored), theirs("pack-quantized", s, tensors))


def test_a_tensor_with_one_scale(tmp_path: Path) -> None:
    s = scheme(4, "int", "tensor")
    tensors = compressed("pack-quantized", s, 10, 64, torch.bfloat16)
    assert torch.equal(read(one(tmp_path, named(tensors), config(s))), theirs("pack-quantized", s, tensors))


def test_a_tensor_with_one_scale_and_zero_point(tmp_path: Path) -> None:
    s = scheme(4, "int", "tensor", symmetric=False)
    tensors = compressed("pack-quantized", s, 10, 64, torch.bfloat16)
    tensors["weight_zero_point"] = torch.tensor([-3], dtype=torch.int8)
    stored = one(tmp_path, named(tensors), config(s))
    assert torch.equal(read(stored), theirs("pack-quantized", s, tensors))


def old_words(codes: Tensor, bits: int) -> Tensor:
    """Codes [out, in] as before 0.20: as many whole ones to a word as fit, the lowest bits first."""
    each = 32 // bits
    words = torch.zeros(len(codes), -(-codes.shape[1] // each), dtype=torch.int64)
    for column in range(codes.shape[1]):
        words[:, column // each] += (codes[:, column].long() + 2 ** (bits - 1)) << bits * (column % each)
    return (words - (words >> 31 << 32)).to(torch.int32)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_packing_before_they_straddled_words(tmp_path: Path, bits: int, symmetric: bool) -> None:
    s = scheme(bits, "int", "group", group_size=64, symmetric=symmetric)
    low = -(2 ** (bits - 1))
    codes = torch.randint(low, -low, (45, 256), generator=seeded())
    zeros = torch.randint(low, -low, (45, 4), generator=seeded(1)) if not symmetric else torch.zeros(45, 4)
    scale = torch.rand(45, 4, generator=seeded(2)).half()
    tensors = {
        "weight_packed": old_words(codes, bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor([45, 256]),
    }
    if not symmetric:
        tensors["weight_zero_point"] = old_words(zeros.T, bits).T
    expected = (codes.double() - zeros.double().repeat_interleave(64, 1)) * scale.double().repeat_interleave(
        64, 1
    )
    assert torch.equal(read(one(tmp_path, named(tensors), config(s))), expected.float())


def test_columns_in_groups_out_of_order(tmp_path: Path) -> None:
    s = scheme(4, "int", "group", group_size=32, symmetric=False)
    tensors = compressed("pack-quantized", s, 40, 128, torch.float16)
    plain = theirs("pack-quantized", s, tensors)
    order = torch.randperm(128, generator=seeded(3))
    g_idx = (torch.arange(128) // 32)[order].int()
    q = old_codes(tensors, 128)[:, order]
    shuffled = tensors | {"weight_packed": pack_to_int32((q - 8).to(torch.int8), 4), "weight_g_idx": g_idx}
    stored = one(tmp_path, named(shuffled), config(s))
    assert torch.equal(read(stored), plain[:, order])
    assert as_shipped(stored) is None and repack(stored, "Q8_0", None, range(40)) is None
    shuffled["weight_g_idx"] = g_idx + 1
    with pytest.raises(CheckpointError, match="weight_g_idx: has groups 1 to 4, expected 0 to 3"):
        one(tmp_path, named(shuffled), config(s)).read()


def old_codes(tensors: dict[str, Tensor], n_in: int) -> Tensor:
    """4-bit codes [out, in], read nibble by nibble."""
    words = tensors["weight_packed"].long() & 0xFFFFFFFF
    return torch.stack([words[:, c // 8] >> 4 * (c % 8) & 15 for c in range(n_in)], 1)


@pytest.mark.parametrize("symmetric", [True, False])
def test_experts_in_a_stack(tmp_path: Path, symmetric: bool) -> None:
    s = scheme(4, "int", "group", group_size=32, symmetric=symmetric)
    experts = [compressed("pack-quantized", s, 20, 64, torch.bfloat16) for _ in range(3)]
    for e, expert in enumerate(experts):
        expert["weight_scale"] = expert["weight_scale"] * (e + 1)
    stack = {name: torch.stack([e[name] for e in experts]) for name in experts[0] if name != "weight_shape"}
    tensors = {f"experts.up_proj{name.removeprefix('weight')}": tensor for name, tensor in stack.items()}
    tensors["experts.up_proj_shape"] = torch.tensor([3, 20, 64])
    stored = one(tmp_path, tensors, config(s))
    assert stored.name == "experts.up_proj" and stored.shape == (3, 20, 64)
    assert torch.equal(read(stored), torch.stack([theirs("pack-quantized", s, expert) for expert in experts]))


def test_without_a_config_the_file_tells(tmp_path: Path) -> None:
    s = scheme(4, "int", "group", group_size=32)
    tensors = compressed("pack-quantized", s, 20, 256, torch.bfloat16)
    assert torch.equal(read(one(tmp_path, named(tensors))), theirs("pack-quantized", s, tensors))


HOLDS = [
    (4, "pack-quantized", {"strategy": "group", "group_size": 32}, "Q4_0"),
    (4, "pack-quantized", {"strategy": "group", "group_size": 128}, "Q4_0"),
    (4, "pack-quantized", {"strategy": "channel"}, "Q4_0"),
    (3, "pack-quantized", {"strategy": "group", "group_size": 64}, "Q4_0"),
    (4, "pack-quantized", {"strategy": "group", "group_size": 32, "symmetric": False}, "Q5_0"),
    (8, "pack-quantized", {"strategy": "group", "group_size": 32}, "Q8_0"),
    (8, "int-quantized", {"strategy": "channel"}, "Q8_0"),
    (7, "pack-quantized", {"strategy": "group", "group_size": 32, "symmetric": False}, "Q8_0"),
]


@pytest.mark.parametrize(("bits", "name", "more", "fmt"), HOLDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ggml_types_hold_them(
    tmp_path: Path, bits: int, name: str, more: dict[str, Any], fmt: str, dtype: torch.dtype
) -> None:
    s = scheme(bits, "int", **more)
    stored = one(tmp_path, named(compressed(name, s, 30, 256, dtype)), config(s))
    assert as_shipped(stored) == fmt
    blocks = repack(stored, fmt, None, range(4, 27))
    assert blocks is not None and blocks.dtype == torch.uint8
    assert torch.equal(unblocked(blocks, fmt), stored.read(rows=range(4, 27)))


def test_ggml_types_do_not_hold_them(tmp_path: Path) -> None:
    def made(scale: float | None = None, dtype: torch.dtype = torch.bfloat16, **more: Any) -> Stored:
        s = scheme(4, "int", "group", **more)
        tensors = compressed("pack-quantized", s, 6, 96, dtype)
        if scale is not None:
            tensors["weight_scale"][2, 1] = scale
        return one(tmp_path, named(tensors), config(s))

    assert repack(made(group_size=32, scale=1e-9), "Q4_0", None, range(6)) is None  # below f16
    assert repack(made(group_size=32, scale=1e9), "Q4_0", None, range(6)) is None  # above
    assert repack(made(group_size=32, scale=1e9), "Q4_0", None, range(3, 6)) is not None
    assert repack(made(group_size=32, dtype=torch.float32), "Q4_0", None, range(6)) is None
    assert repack(made(group_size=16), "Q4_0", None, range(6)) is None
    assert repack(made(group_size=48), "Q4_0", None, range(6)) is None
    assert repack(made(group_size=32, symmetric=False), "Q4_0", None, range(6)) is None
    assert repack(made(group_size=32), "Q4_K", None, range(6)) is None
    assert as_shipped(made(group_size=48)) is None
    assert as_shipped(made(group_size=32, dtype=torch.float32)) is None


DAMAGE = [
    ({"weight_scale": torch.ones(20, 3).half()}, r"packed has 8 words for each 96 weights of model.a.weight"),
    ({"weight_scale": torch.ones(19, 2).half()}, r"weight_scale is \[19, 2\] for a weight of \[20, 64\]"),
    ({"weight_scale": torch.full((20, 2), torch.nan).half()}, "weight_scale: 40 of 40 scales are NaN"),
    ({"weight_shape": torch.tensor([20, 63])}, r"weight_shape: says \[20, 63\], expected \[20, 64\]"),
    ({"weight_zero_point": torch.ones(2, 2, dtype=torch.int32)}, r"zero_point is \[2, 2\] .* packed along"),
    (
        {"weight_zero_point": None},
        "model.a.weight has no zero point, but quantization_config.config_groups.gr",
    ),
    ({"weight_scale": None}, "weight_packed is stored as I32 without scales"),
    ({"weight_g_idx": torch.zeros(3, dtype=torch.int32)}, r"weight_g_idx is \[3\] .* expected \[64\]"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGE)
def test_parts_that_do_not_fit(tmp_path: Path, change: dict[str, Tensor | None], message: str) -> None:
    s = scheme(4, "int", "group", group_size=32, symmetric=False)
    tensors = compressed("pack-quantized", s, 20, 64, torch.float16) | change
    with pytest.raises(CheckpointError, match=message):
        one(tmp_path, named({n: t for n, t in tensors.items() if t is not None}), config(s)).read()
