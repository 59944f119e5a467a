"""Checksums in the header: recorded after the data, read back, and what one flipped bit does to them."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

from moequant import formats
from moequant.commands.check import CheckSettings, check
from moequant.containers.gguf import checksums
from moequant.containers.gguf.read import GgufFile
from moequant.errors import VerifyError

EXPERTS, DENSE = "blk.0.ffn_up_exps.weight", "blk.0.attn_q.weight"


def write(path: Path, reserve: int | None) -> dict[str, np.ndarray]:
    """A GGUF file of two Q2_K tensors; their bytes."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    writer = GGUFWriter(path, "test")
    if reserve is not None:
        checksums.reserve(writer, reserve)
    for name, shape in ((EXPERTS, (4, 6, 256)), (DENSE, (8, 512))):
        packed = formats.quantize("Q2_K", torch.randn(shape, generator=generator), None, "fast").numpy()
        writer.add_tensor(name, packed, raw_dtype=GGMLQuantizationType.Q2_K)
        tensors[name] = packed
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "sums.gguf"
    tensors = write(path, 5)
    slices = {EXPERTS: 4, DENSE: 1}
    checksums.record(path, {name: checksums.of_slices(data, slices[name]) for name, data in tensors.items()})
    return path


def test_recorded_is_what_was_written(file: Path) -> None:
    found = checksums.recorded(GgufFile(file))
    assert found is not None
    assert {name: len(values) for name, values in found.items()} == {EXPERTS: 4, DENSE: 1}
    reader = GGUFReader(file)
    assert all(
        found[t.name] == checksums.of_slices(np.array(t.data), len(found[t.name])) for t in reader.tensors
    )
    assert len(set(found[EXPERTS])) == 4


def test_every_flipped_bit_is_named(file: Path) -> None:
    """Whatever bit of an expert: a crc32 misses no single one."""
    assert check(file, CheckSettings(device="cpu")).holds
    generator = np.random.default_rng(0)
    for _ in range(8):
        reader = GGUFReader(file, "r+")
        data = next(t.data for t in reader.tensors if t.name == EXPERTS)
        expert, row, byte, bit = (int(generator.integers(n)) for n in (*data.shape, 8))
        data[expert, row, byte] ^= 1 << bit
        reader.data.flush()
        damages = check(file, CheckSettings(device="cpu")).damages
        assert f"{EXPERTS} expert {expert}" in {damage.where for damage in damages}
        assert {damage.where for damage in damages} == {f"{EXPERTS} expert {expert}"}
        data[expert, row, byte] ^= 1 << bit
        reader.data.flush()


def test_a_file_without_any(tmp_path: Path) -> None:
    path = tmp_path / "none.gguf"
    write(path, None)
    assert checksums.recorded(GgufFile(path)) is None
    with pytest.raises(VerifyError, match="no room"):
        checksums.record(path, {EXPERTS: (1, 2, 3, 4), DENSE: (5,)})


def test_room_for_another_number(tmp_path: Path) -> None:
    path = tmp_path / "room.gguf"
    tensors = write(path, 3)
    with pytest.raises(VerifyError, match="no room for 5"):
        checksums.record(path, {EXPERTS: (1, 2, 3, 4), DENSE: (5,)})
    with pytest.raises(VerifyError, match="3 checksums for 5"):
        checksums.recorded(GgufFile(path))
    assert tensors[EXPERTS].shape == (4, 6, gguf.GGML_QUANT_SIZES[GGMLQuantizationType.Q2_K][1])
