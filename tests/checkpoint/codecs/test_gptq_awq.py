"""GPTQ and AWQ: packed here code by code as their programs do, compared with the formula in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from moequant.checkpoint.codecs import as_shipped, repack
from moequant.errors import CheckpointError
from tests.checkpoint.codecs.files import one, read, seeded


def words_of(codes: Tensor, bits: int) -> Tensor:
    """Codes [n, m] -> int32 [n · bits / 32, m], the layout of AutoGPTQ's `pack`."""
    rows = []
    for start in range(0, len(codes), 32):
        c = codes[start : start + 32].long()
        if bits == 3:
            low = sum((c[j] << 3 * j for j in range(10)), torch.zeros_like(c[0]))
            middle = sum((c[11 + j] << 3 * j + 1 for j in range(10)), c[10] >> 2)
            high = sum((c[22 + j] << 3 * j + 2 for j in range(10)), c[21] >> 1)
            rows += [low | (c[10] & 3) << 30, middle | (c[21] & 1) << 31, high]
        else:
            each = 32 // bits
            for at in range(0, len(c), each):
                rows.append(sum((c[at + j] << bits * j for j in range(each)), torch.zeros_like(c[0])))
    words = torch.stack(rows)
    return (words - (words >> 31 << 32)).to(torch.int32)


def gptq(bits: int, n_out: int, n_in: int, group: int, **how: Any) -> tuple[dict[str, Tensor], Tensor]:
    """A checkpoint's tensors and the weight [out, in] in float64."""
    size = n_in if group == -1 else group
    count = -(-n_in // size)
    codes = torch.randint(0, 2**bits, (n_in, n_out), generator=seeded())
    zeros = torch.randint(0, 2**bits, (count, n_out), generator=seeded(1))
    if how.get("symmetric"):
        zeros[:] = 2 ** (bits - 1)
    scales = (torch.rand(count, n_out, generator=seeded(2)) * 0.1).half()
    g_idx = torch.arange(n_in) // size
    if how.get("act_order"):
        g_idx = g_idx[torch.randperm(n_in, generator=seeded(3))]
    weight = (codes.double() - zeros.double()[g_idx]) * scales.double()[g_idx]
    stored = zeros if how.get("version") == 2 else (zeros - 1) % 2**bits
    tensors = {
        "m.q_proj.qweight": words_of(codes, bits),
        "m.q_proj.qzeros": words_of(stored.T, bits).T,
        "m.q_proj.scales": scales,
        "m.q_proj.g_idx": g_idx.int(),
    }
    return tensors, weight.T


def config(bits: int, group: int, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False} | more


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("group", [32, -1])
def test_gptq(tmp_path: Path, bits: int, version: int, group: int) -> None:
    tensors, weight = gptq(bits, 96, 128, group, version=version)
    form = {"checkpoint_format": "gptq_v2"} if version == 2 else {}
    stored = one(tmp_path, tensors, config(bits, group, **form))
    assert (stored.name, stored.shape, stored.dtype) == ("m.q_proj.weight", (96, 128), "F32")
    assert torch.equal(read(stored).double(), weight)


@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_with_and_without_the_group_of_each_channel(tmp_path: Path, act_order: bool) -> None:
    tensors, weight = gptq(4, 64, 128, 32, act_order=act_order, symmetric=True)
    stored = one(tmp_path, tensors, config(4, 32, desc_act=act_order, sym=True))
    assert torch.equal(read(stored).double(), weight)
    assert as_shipped(stored) == (None if act_order else "Q4_0")
    assert (repack(stored, "Q4_0", None, range(64)) is None) == act_order
    del tensors["m.q_proj.g_idx"]
    if act_order:
        with pytest.raises(CheckpointError, match="qweight: g_idx is missing, but desc_act is set"):
            one(tmp_path, tensors, config(4, 32, desc_act=True))
    else:
        assert torch.equal(read(one(tmp_path, tensors, config(4, 32))).double(), weight)


def test_one_group_has_no_order(tmp_path: Path) -> None:
    tensors, _ = gptq(4, 64, 128, -1, symmetric=True)
    stored = one(tmp_path, tensors, config(4, -1, desc_act=True, sym=True))
    assert as_shipped(stored) == "Q4_0" and repack(stored, "Q4_0", None, range(64)) is not None


@pytest.mark.parametrize(
    ("code", "zero", "fits"), [(0, 8, True), (0, 9, False), (15, 8, True), (15, 7, False)]
)
def test_numbers_at_the_ends_of_a_type(tmp_path: Path, code: int, zero: int, fits: bool) -> None:
    tensors, _ = gptq(4, 64, 128, 32)
    tensors["m.q_proj.qweight"] = words_of(torch.full((128, 64), code), 4)
    tensors["m.q_proj.qzeros"] = words_of(torch.full((64, 4), zero - 1), 4).T
    stored = one(tmp_path, tensors, config(4, 32))
    blocks = repack(stored, "Q4_0", None, range(64))
    assert (blocks is not None) == fits
    if blocks is not None:
        values = quants.dequantize(blocks.numpy(), GGMLQuantizationType.Q4_0)
        assert torch.equal(torch.from_numpy(values), stored.read())


def test_gptq_with_a_group_that_does_not_divide(tmp_path: Path) -> None:
    tensors, weight = gptq(4, 32, 96, 64)
    assert torch.equal(read(one(tmp_path, tensors, config(4, 64))).double(), weight)
    del tensors["m.q_proj.g_idx"]
    assert torch.equal(read(one(tmp_path, tensors, config(4, 64))).double(), weight)


@pytest.mark.parametrize(
    "dynamic",
    [{r"+:.*\.q_proj": {"bits": 8}}, {r"m\.k_proj": {"bits": 2}, r".*q_proj": {"bits": 8, "group_size": 64}}],
)
def test_gptq_with_bits_of_its_own(tmp_path: Path, dynamic: dict[str, Any]) -> None:
    group = next(iter(dynamic.values())).get("group_size") or list(dynamic.values())[-1].get("group_size", 32)
    tensors, weight = gptq(8, 64, 128, group)
    stored = one(tmp_path, tensors, config(4, 32, dynamic=dynamic))
    assert torch.equal(read(stored).double(), weight)


@pytest.mark.parametrize(
    ("bits", "symmetric", "group", "fmt"),
    [(4, True, 32, "Q4_0"), (4, True, 128, "Q4_0"), (4, False, 128, "Q5_0"), (8, True, 64, "Q8_0")],
)
def test_ggml_types_hold_gptq(tmp_path: Path, bits: int, symmetric: bool, group: int, fmt: str) -> None:
    tensors, _ = gptq(bits, 64, 256, group, symmetric=symmetric)
    stored = one(tmp_path, tensors, config(bits, group, sym=symmetric))
    assert as_shipped(stored) == fmt
    blocks = repack(stored, fmt, None, range(5, 50))
    assert blocks is not None
    values = quants.dequantize(blocks.numpy(), GGMLQuantizationType[fmt])
    assert torch.equal(torch.from_numpy(values), stored.read(rows=range(5, 50)))
    if not symmetric:
        assert repack(stored, "Q4_0", None, range(64)) is None


def awq(n_out: int, n_in: int, group: int) -> tuple[dict[str, Tensor], Tensor]:
    """A checkpoint's tensors and the weight [out, in] in float64, as AutoAWQ's gemm packs them."""
    count = n_in // group
    codes = torch.randint(0, 16, (n_in, n_out), generator=seeded())
    zeros = torch.randint(0, 16, (count, n_out), generator=seeded(1))
    scales = (torch.rand(count, n_out, generator=seeded(2)) * 0.1).half()

    def packed(t: Tensor) -> Tensor:
        words = torch.zeros(len(t), n_out // 8, dtype=torch.int64)
        for nibble, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
            words |= t[:, column::8] << 4 * nibble
        return (words - (words >> 31 << 32)).to(torch.int32)

    each = torch.arange(n_in) // group
    weight = (codes.double() - zeros.double()[each]) * scales.double()[each]
    return {"m.o.qweight": packed(codes), "m.o.qzeros": packed(zeros), "m.o.scales": scales}, weight.T


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}


@pytest.mark.parametrize(
    "config",
    [
        AWQ | {"modules_to_not_convert": ["gate"]},
        {"w_bit": 4, "q_group_size": 64, "version": "GEMM", "zero_point": True},
        {"quant_method": "auto-round", "bits": 4, "group_size": 64, "packing_format": "auto_round:auto_awq"},
    ],
)
def test_awq(tmp_path: Path, config: dict[str, Any]) -> None:
    tensors, weight = awq(104, 128, 64)
    stored = one(tmp_path, tensors, config)
    assert (stored.name, stored.codec.name) == ("m.o.weight", "awq")
    assert torch.equal(read(stored).double(), weight)
    assert as_shipped(stored) == "Q5_0"
    blocks = repack(stored, "Q5_0", None, range(3, 100))
    assert blocks is not None
    values = quants.dequantize(blocks.numpy(), GGMLQuantizationType.Q5_0)
    assert torch.equal(torch.from_numpy(values), stored.read(rows=range(3, 100)))


def test_awq_that_says_it_is_symmetric(tmp_path: Path) -> None:
    """As auto-round and moequant say it: four bits are enough, if the zero points are as was said."""
    tensors = awq(64, 128, 64)[0]
    eights = torch.full_like(tensors["m.o.qzeros"], -2004318072)
    for zeros, holds in ((eights, True), (tensors["m.o.qzeros"], False)):
        stored = one(tmp_path, tensors | {"m.o.qzeros": zeros}, AWQ | {"sym": True})
        assert as_shipped(stored) == "Q4_0"
        blocks = repack(stored, "Q4_0", None, range(64))
        assert (blocks is not None) == holds
        if blocks is not None:
            values = quants.dequantize(blocks.numpy(), GGMLQuantizationType.Q4_0)
            assert torch.equal(torch.from_numpy(values), read(stored))


def test_auto_round_packs_as_gptq(tmp_path: Path) -> None:
    tensors, weight = gptq(4, 64, 128, 32)
    round_config = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False}
    assert torch.equal(read(one(tmp_path, tensors, round_config)).double(), weight)
    with pytest.raises(CheckpointError, match=r"extra_config\['m.q_proj'\] leaves it at 16 bits"):
        one(tmp_path, tensors, round_config | {"extra_config": {"m.q_proj": {"bits": 16}}})
    with pytest.raises(
        CheckpointError, match="packing_format is auto_round:marlin, expected auto_round:auto_g"
    ):
        one(tmp_path, tensors, round_config | {"packing_format": "auto_round:marlin"})


@pytest.mark.parametrize(
    ("change", "said", "message"),
    [
        ({}, {"bits": 8}, "m.q_proj.weight holds int of 4 bits, but quantization_config says int of 8 bits"),
        ({}, {"dynamic": {".*q_proj": {"bits": 8}}}, r"dynamic\['\.\*q_proj'\] says int of 8 bits"),
        (
            {},
            {"dynamic": {"-:.*q_proj": {}}},
            "m.q_proj.weight is quantized, but quantization_config.dynamic has",
        ),
        ({}, {"group_size": 64}, r"scales is \[4, 64\] for a weight of \[64, 128\], expected 2 groups of 64"),
        ({}, {"checkpoint_format": "marlin"}, "checkpoint_format is marlin, expected gptq or gptq_v2"),
        ({"qzeros": None}, {}, "m.q_proj.qweight: qzeros is missing or no matrix"),
        ({"scales": None}, {}, "without scales"),
        ({"qzeros": torch.zeros(4, 7, dtype=torch.int32)}, {}, r"qzeros is \[4, 7\] .* beside scales"),
        ({"g_idx": torch.zeros(7, dtype=torch.int32)}, {}, r"g_idx is \[7\] .* expected \[128\]"),
        (
            {"g_idx": torch.full((128,), 4, dtype=torch.int32)},
            {},
            "g_idx: has groups 4 to 4, expected 0 to 3",
        ),
        (
            {"scales": torch.full((4, 64), torch.inf).half()},
            {},
            "scales: 256 of 256 scales are NaN or infinite",
        ),
    ],
)
def test_what_does_not_fit(
    tmp_path: Path, change: dict[str, Tensor | None], said: dict[str, Any], message: str
) -> None:
    tensors, _ = gptq(4, 64, 128, 32)
    tensors |= {f"m.q_proj.{name}": tensor for name, tensor in change.items()}
    with pytest.raises(CheckpointError, match=message):
        one(tmp_path, {n: t for n, t in tensors.items() if t is not None}, config(4, 32) | said).read()


def test_awq_that_does_not_fit(tmp_path: Path) -> None:
    tensors, _ = awq(64, 128, 64)
    for said, message in (
        ({"version": "gemv"}, "version is gemv, expected gemm"),
        ({"bits": 8}, "m.o.weight holds int of 4 bits"),
        ({"group_size": 32}, r"scales is \[2, 64\] .* expected 4 groups of 32"),
        ({"modules_to_not_convert": ["o"]}, "quantization_config.modules_to_not_convert has 'o'"),
    ):
        with pytest.raises(CheckpointError, match=message):
            one(tmp_path, tensors, AWQ | said)
    with pytest.raises(CheckpointError, match="quant_method is missing, expected gptq or awq"):
        one(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=r"scales is .* beside qzeros"):
        one(tmp_path, tensors | {"m.o.scales": torch.ones(2, 63).half()}, AWQ)
    with pytest.raises(CheckpointError, match="expected no g_idx with AWQ"):
        one(tmp_path, tensors | {"m.o.g_idx": torch.zeros(128, dtype=torch.int32)}, AWQ)
