"""The one GGUF reader: beside gguf-py's on healthy files, and one clear line for every hostile one."""

from __future__ import annotations

import os
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from random import Random

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from gguf import GGUFReader, GGUFWriter
from gguf import GGUFValueType as V

from moequant.check.opened import open_source
from moequant.containers.gguf import checksums, imatrix
from moequant.containers.gguf.read import GgufFile, read_header
from moequant.errors import CheckpointError, CorpusError, MoequantError, VerifyError
from moequant.inspection import inspect
from moequant.inspection.fit import Hardware, fit
from moequant.runtimes.llama_cpp.kv_cache import Load

U64 = 2**64 - 1


def text(value: str | bytes, length: int | None = None) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(name: str, kind: int, count: int, values: bytes) -> bytes:
    return key(name, V.ARRAY, struct.pack("<IQ", kind, count) + values)


def u32(name: str, value: int) -> bytes:
    return key(name, V.UINT32, struct.pack("<I", value))


def tensor(name: str | bytes, dims: tuple[int, ...], kind: int = T.F32, offset: int = 0) -> bytes:
    """Its description; `dims` as stored, the row first."""
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


KEYS = (
    key("general.architecture", V.STRING, text("llama")),
    u32("llama.block_count", 1),
    u32("llama.embedding_length", 32),
    u32("llama.expert_used_count", 1),
    array("llama.attention.head_count", V.INT32, 1, struct.pack("<i", 2)),
    array("tokenizer.ggml.tokens", V.STRING, 3, text("a") + text("") + text("ä")),
    array("tokenizer.ggml.scores", V.FLOAT32, 5000, struct.pack("<5000f", *range(5000))),
    key("tokenizer.ggml.add_bos_token", V.BOOL, b"\1"),
    array("no.numbers", V.INT16, 0, b""),
    array("no.texts", V.STRING, 0, b""),
)
TENSORS = (
    tensor("token_embd.weight", (32, 4)),
    tensor("blk.0.ffn_up_exps.weight", (32, 2, 3), T.Q8_0, 512),
    tensor("blk.0.attn_norm.weight", (32,), T.F32, 736),
)
DATA = bytes(range(256)) * 2 + bytes(204 + 20) + bytes(128)


def file(
    keys: tuple[bytes, ...] = KEYS,
    tensors: tuple[bytes, ...] = TENSORS,
    data: bytes = DATA,
    start: bytes = b"GGUF\3\0\0\0",
    counts: tuple[int | None, int | None] = (None, None),
) -> bytes:
    """A GGUF file of these parts; `counts` of tensors and keys where the header lies about them."""
    numbers = (
        given if given is not None else len(of) for given, of in zip(counts, (tensors, keys), strict=True)
    )
    head = start + struct.pack("<QQ", *numbers) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


def with_key(*more: bytes) -> bytes:
    return file(keys=(*KEYS, *more))


def with_tensors(*some: bytes, data: bytes = DATA) -> bytes:
    return file(tensors=some, data=data)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a GGUF"),
    "another magic": (file(start=b"GGML\3\0\0\0"), "not a GGUF"),
    "version 1": (file(start=b"GGUF\1\0\0\0"), "version 1; expected 2 or 3"),
    "version 4": (file(start=b"GGUF\4\0\0\0"), "version 4; expected 2 or 3"),
    "big endian": (file(start=b"GGUF\0\0\0\3"), "big endian; expected 2 or 3"),
    "tensors without end": (file(counts=(U64, None)), "tensors, expected up to 65,536"),
    "keys without end": (file(counts=(None, U64)), "keys, expected up to 65,536"),
    "a key more": (file(counts=(None, len(KEYS) + 1), tensors=(), data=b""), "inside key 11|name of key 11"),
    "a tensor too many": (file(counts=(9, None), data=b""), "ends inside|is not 1 to"),
    "an array of 2^60": (with_key(array("x", V.UINT8, 2**60, b"")), "ends inside key x"),
    "2^60 strings": (with_key(array("x", V.STRING, 2**60, b"")), "strings, expected up to"),
    "bytes over 2^64": (with_key(array("x", V.UINT64, U64, b"")), "ends inside key x"),
    "strings that are not there": (with_key(array("x", V.STRING, 2**20, b"")), "ends inside key x"),
    "a string without end": (with_key(key("x", V.STRING, text("", U64))), "ends inside key x"),
    "a name without end": (with_key(text("", U64)), "ends inside key 11"),
    "a string in an array without end": (
        with_key(array("x", V.STRING, 2, text("", U64 - 7) + text(""))), "ends inside key x"
    ),
    "an array of arrays": (with_key(array("x", V.ARRAY, 1, b"")), "array of arrays"),
    "an unknown value type": (with_key(key("x", 13, b"")), "value of type 13, expected 0 to 12"),
    "an unknown element type": (with_key(array("x", 99, 1, b"")), "value of type 99"),
    "a key twice": (with_key(u32("llama.block_count", 1)), "key llama.block_count is there twice"),
    "an array twice": (with_key(array("tokenizer.ggml.tokens", V.STRING, 0, b"")), "is there twice"),
    "a key without a name": (with_key(u32("", 1)), "name of key 11"),
    "control codes in a key": (with_key(u32("a\n\x1b[31m", 1)), "printable"),
    "a key that is no UTF-8": (with_key(key(b"\xff", V.UINT8, b"\1")), "printable"),
    "a name of 70,000 bytes": (with_key(u32("x" * 70_000, 1)), "1 to 65,535 bytes"),
    "a bool of 2": (with_key(key("x", V.BOOL, b"\2")), "neither 0 nor 1"),
    "a bool of 2 in an array": (with_key(array("x", V.BOOL, 3, b"\1\2\1")), "neither 0 nor 1"),
    "alignment 0": (with_key(u32("general.alignment", 0)), "general.alignment is 0, expected"),
    "alignment 4": (with_key(u32("general.alignment", 4)), "general.alignment is 4, expected"),
    "alignment 48": (with_key(u32("general.alignment", 48)), "general.alignment is 48, expected"),
    "alignment in words": (with_key(key("general.alignment", V.STRING, text("32"))), "is '32', expected"),
    "alignment 2^31": (with_key(u32("general.alignment", 2**31)), "ends inside|expected a multiple"),
    "a tensor twice": (with_tensors(TENSORS[0], TENSORS[0]), "tensor token_embd.weight is there twice"),
    "a newline in a tensor": (with_tensors(tensor("a\nb", (32,))), "name of tensor 1"),
    "no dimensions": (with_tensors(tensor("x", ())), "0 dimensions, expected 1 to 4"),
    "five dimensions": (with_tensors(tensor("x", (1,) * 5)), "5 dimensions, expected 1 to 4"),
    "2^32 dimensions": (with_tensors(text("x") + b"\xff" * 4), "4,294,967,295 dimensions"),
    "a dimension of 0": (with_tensors(tensor("x", (32, 0))), r"has shape \[0, 32\]"),
    "2^64 numbers": (with_tensors(tensor("x", (2**32, 2**32))), "has shape"),
    "2^62 numbers": (with_tensors(tensor("x", (2**31, 2**31))), "ends inside tensor x"),
    "blocks that do not divide": (with_tensors(tensor("x", (33,), T.Q8_0)), "rows of 33, expected a mult"),
    "an offset between": (with_tensors(tensor("x", (4,), T.F32, 16)), "is at 16, expected a multiple of 32"),
    "an offset of 2^64": (with_tensors(tensor("x", (4,), T.F32, U64 - 31)), "ends inside tensor x"),
    "behind the end": (with_tensors(tensor("x", (4,), T.F32, 1 << 20)), "ends inside tensor x"),
    "over the end": (with_tensors(tensor("x", (1 << 20,))), "ends inside tensor x"),
    "an overlap": (with_tensors(tensor("x", (32,)), tensor("y", (32,), T.F32, 64)), "tensor x overlaps"),
    "the same place": (with_tensors(tensor("x", (32,)), tensor("y", (32,))), "overlaps"),
    "unknown types in one place": (with_tensors(tensor("x", (9,), 999), tensor("y", (9,), 999)), "overlaps"),
    "no data": (file(data=b""), "ends inside tensor"),
    "split in two": (
        with_key(key("split.count", V.UINT16, b"\2\0")), r"split.count is 2, expected 1"
    ),
}  # fmt: skip


def saved(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def use(path: Path) -> None:
    """Everything that a file's user could ask of it."""
    opened = GgufFile(path)
    header = opened.header
    for name in header.arrays:
        assert len(header.array(name)) == header.arrays[name].count
    checksums.recorded(opened)
    for name, info in opened.tensors.items():
        assert opened.data(name).size == info.bytes
        assert tuple(opened.values(name).shape) == info.shape
    inspect(path)
    fit(path, Hardware(2**30, 2**30), Load(256))
    open_source(path, None)


def refusal(action: Callable[[], object]) -> str | None:
    """The one line of the error, None when there was none; anything but a MoequantError falls through."""
    try:
        action()
    except MoequantError as error:
        assert "\n" not in str(error) and str(error).isprintable()
        return str(error)
    return None


def test_the_healthy_file_is_healthy(tmp_path: Path) -> None:
    """Else every refusal below could be for another reason."""
    path = saved(tmp_path / "m.gguf", file())
    use(path)
    header = read_header(path)
    assert header.array("tokenizer.ggml.tokens") == ["a", "", "ä"]
    assert header.array("tokenizer.ggml.scores") == list(range(5000))
    assert header.metadata["llama.attention.head_count"] == (2,)
    assert "tokenizer.ggml.scores" not in header.metadata
    assert header.metadata["tokenizer.ggml.add_bos_token"] is True


@pytest.mark.parametrize("name", HOSTILE)
def test_every_rule_has_its_line(tmp_path: Path, name: str) -> None:
    content, says = HOSTILE[name]
    path = saved(tmp_path / "bad.gguf", content)
    begun = time.monotonic()
    with pytest.raises(CheckpointError, match=rf"^{path}: .*({says})") as caught:
        read_header(path)
    assert str(caught.value).isprintable()
    for action in (inspect, lambda p: fit(p, Hardware(0, 2**30), Load(256)), lambda p: open_source(p, None)):
        assert refusal(lambda action=action: action(path)) == str(caught.value)
    if content.startswith(b"GGUF"):
        with pytest.raises(CorpusError):
            imatrix.parse(path)
    assert time.monotonic() - begun < 2


def test_a_download_that_stopped_anywhere(tmp_path: Path) -> None:
    """At every byte, in the header and behind it."""
    whole, path = file(keys=KEYS[:6]), tmp_path / "cut.gguf"
    for length in range(len(whole)):
        saved(path, whole[:length])
        with pytest.raises(CheckpointError, match=rf"^{path}: (not a GGUF|.*is the download complete\?$)"):
            read_header(path)


def test_damage_anywhere_is_one_line_or_none(tmp_path: Path) -> None:
    """Bytes of the header changed at random, 800 files, each used in every way."""
    whole, path, chance = file(keys=KEYS[:6]), tmp_path / "m.gguf", Random(0)
    header = len(whole) - len(DATA)
    outcomes = {"used": 0, "refused": 0}
    tracemalloc.start()
    for _ in range(800):
        damaged = bytearray(whole)
        for _ in range(chance.choice((1, 1, 2, 5))):
            damaged[chance.randrange(8, header)] = chance.choice(
                (0, 1, 2, 127, 128, 255, chance.randrange(256))
            )
        saved(path, damaged)
        begun = time.monotonic()
        outcomes["used" if refusal(lambda: use(path)) is None else "refused"] += 1
        assert time.monotonic() - begun < 2
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**25 and min(outcomes.values()) > 50, (peak, outcomes)


def test_files_with_holes_cost_no_time(tmp_path: Path) -> None:
    """A terabyte of zeros behind a few bytes: counts that such a file could hold are not believed either."""
    path = tmp_path / "hole.gguf"
    for keys in (
        (array("x", V.STRING, 2**22, b""),) * 2,
        (array("x", V.UINT8, 2**39, b""),),
        (key("x", V.STRING, text("", 2**38)),),
        (key("x", V.STRING, text("", 2**27)),),
    ):
        saved(path, file(keys=(*keys, *KEYS), tensors=(), data=b""))
        os.truncate(path, 2**40)
        begun = time.monotonic()
        tracemalloc.start()
        with pytest.raises(CheckpointError, match=r"hole\.gguf: damaged GGUF file: "):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 2**27 and time.monotonic() - begun < 3
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["fifo", "folder", "absent", "device", "long"])
def test_what_is_no_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "long":
        path = tmp_path / ("x" * 300)
    with pytest.raises(CheckpointError, match=r"no such file|not a regular file|cannot be read \("):
        read_header(path)
    with pytest.raises(CorpusError):
        imatrix.parse(path)


def test_a_file_that_shrinks(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.gguf", file())
    opened = GgufFile(path)
    os.truncate(path, path.stat().st_size - 100)
    assert opened.data("token_embd.weight").tobytes() == DATA[:512]
    with pytest.raises(CheckpointError, match=r"m\.gguf: ends inside tensor blk\.0\.attn_norm"):
        opened.values("blk.0.attn_norm.weight")
    os.truncate(path, 400)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        opened.header.array("tokenizer.ggml.scores")
    path.write_bytes(bytes(1 << 16))
    with pytest.raises(CheckpointError, match="changed while it was read"):
        opened.header.array("tokenizer.ggml.tokens")
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        opened.data("token_embd.weight")


def test_what_the_keys_believe_is_held_against_the_tensors(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for count in (2, 513, 10**9, 2**32 - 1):
        saved(path, file(keys=(KEYS[0], u32("llama.block_count", count), *KEYS[2:])))
        for action in (inspect, lambda p: fit(p, Hardware(0, 2**30), Load(256))):
            with pytest.raises(CheckpointError, match=f"block_count is {count:,}, but its tensors are of 1 "):
                action(path)
    for value, says in (
        (u32("llama.expert_used_count", 4), "a token reaches 4 experts of layer 0, which has 3"),
        (key("llama.expert_used_count", V.FLOAT32, b"\0\0\xc0\x7f"), "is nan, expected a whole number"),
        (key("llama.expert_used_count", V.INT32, b"\xff" * 4), "is -1, expected a whole number"),
        (key("llama.expert_used_count", V.STRING, text("two")), "is 'two', expected a whole number"),
        (array("llama.expert_used_count", V.INT32, 0, b""), "has 0 elements and none for layer 0"),
    ):
        saved(path, file(keys=(*KEYS[:3], value, *KEYS[4:])))
        with pytest.raises(CheckpointError, match=says):
            inspect(path)
        with pytest.raises(CheckpointError, match=says):
            fit(path, Hardware(0, 2**30), Load(256))
    saved(path, with_key(key("llama.context_length", V.UINT64, struct.pack("<Q", U64))))
    with pytest.raises(CheckpointError, match="context_length is 18446744073709551615, expected"):
        inspect(path)


def same_as_gguf_py(path: Path) -> GgufFile:
    """Every key, every byte, every expert, every value."""
    reader, found = GGUFReader(path), GgufFile(path)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF."):
            expected = field.contents()
            ours = found.header.array(name) if isinstance(expected, list) else found.header.metadata[name]
            assert ours == expected, name
    assert len(reader.tensors) > 0
    for theirs in reader.tensors:
        info, data = found.tensors[theirs.name], found.data(theirs.name)
        assert (info.type, info.shape) == (theirs.tensor_type.name, tuple(theirs.shape[::-1].tolist()))
        assert info.bytes == theirs.n_bytes and data.tobytes() == theirs.data.tobytes()
        assert len(data) == np.prod(theirs.shape[1:])
        values = gguf.dequantize(np.array(theirs.data), theirs.tensor_type).reshape(info.shape)
        assert np.array_equal(found.values(theirs.name).numpy(), values, equal_nan=True)
        if len(info.shape) == 3:
            parts = [found.data(theirs.name, expert) for expert in range(info.shape[0])]
            assert np.array_equal(np.concatenate(parts), data)
    return found


def filled(writer: GGUFWriter) -> None:
    """One tensor of every type that gguf-py decodes here: vectors, matrices and stacks."""
    chance = np.random.default_rng(0)
    for kind in (T.Q4_K, T.Q6_K, T.Q2_K, T.Q3_K, T.IQ4_XS, T.Q8_0, T.Q5_1, T.MXFP4, T.BF16):
        block, size = gguf.GGML_QUANT_SIZES[kind]
        for name, shape in (("exps", (3, 4)), ("dense", (5,))):
            raw = chance.integers(0, 60, (*shape, 512 // block * size), dtype=np.uint8)
            writer.add_tensor(f"blk.0.{kind.name}_{name}.weight", raw, raw_dtype=kind)
    for dtype in (np.float32, np.float16):
        writer.add_tensor(f"blk.0.{np.dtype(dtype).name}", chance.normal(size=(2, 3, 7)).astype(dtype))
        writer.add_tensor(f"blk.0.{np.dtype(dtype).name}_bias", chance.normal(size=7).astype(dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_a_model_of_many_types(tmp_path: Path, alignment: int) -> None:
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_custom_alignment(alignment)
    writer.add_token_list([f"token {i}" for i in range(9000)])
    writer.add_token_scores([float(i) for i in range(9000)])
    writer.add_token_types([i % 7 for i in range(9000)])
    writer.add_array("flags", [True, False, True])
    writer.add_int8("small", -5)
    writer.add_float64("double", 1e300)
    writer.add_uint64("large", U64)
    filled(writer)
    same_as_gguf_py(tmp_path / "m.gguf")


def test_an_imatrix_and_a_file_of_version_2(tmp_path: Path) -> None:
    path = tmp_path / "i.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["one", "zwei"])
    writer.add_uint32("imatrix.chunk_count", 4)
    writer.add_uint32("imatrix.chunk_size", 64)
    writer.add_tensor("x.in_sum2", np.ones((2, 32), np.float32))
    writer.add_tensor("x.counts", np.array([[3], [0]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for version in (3, 2):
        with path.open("r+b") as out:
            out.seek(4)
            out.write(struct.pack("<I", version))
        same_as_gguf_py(path)
        found = imatrix.parse(path)
        assert found.datasets == ("one", "zwei") and found.entries["x"].counts.tolist() == [3, 0]


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    filled(GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=9))
    return sorted(tmp_path.glob("*.gguf"))


def test_shards_are_read_as_one(shards: list[Path]) -> None:
    found = GgufFile(shards[0])
    assert len(shards) == 3 and len(found.tensors) == 22
    for path in shards:
        for theirs in GGUFReader(path).tensors:
            assert found.data(theirs.name).tobytes() == theirs.data.tobytes()
    assert found.header.file_bytes == sum(path.stat().st_size for path in shards)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a, b, c: b.unlink(), "m-00002-of-00003.gguf: no such file"),
        (lambda a, b, c: b.write_bytes(c.read_bytes()), "split.no is 2, expected 1 of a shard by that name"),
        (lambda a, b, c: c.write_bytes(file()), "m-00003-of-00003.gguf: split.count is None, expected 3"),
        (lambda a, b, c: c.write_bytes(c.read_bytes()[:-99]), "m-00003-of-00003.gguf: damaged.*ends inside"),
        (lambda a, b, c: a.write_bytes(a.read_bytes().replace(b"blk.0.Q4_K_exps", b"blk.0.BF16_exps")),
         "is in another shard too"),
    ],
)  # fmt: skip
def test_shards_that_do_not_belong_together(shards: list[Path], change, says: str) -> None:
    change(*shards)
    with pytest.raises(CheckpointError, match=says):
        read_header(shards[0])


def test_shards_under_other_names(shards: list[Path], tmp_path: Path) -> None:
    for name in ("m.gguf", "m-00001-of-00001.gguf"):
        alone = saved(tmp_path / name, shards[0].read_bytes())
        with pytest.raises(CheckpointError, match=r"split\.count is 3, expected 1"):
            read_header(alone)
    with pytest.raises(CheckpointError, match=r"m-00002-of-00003\.gguf: shard 2 of 3; give the first"):
        read_header(shards[1])
    assert read_header(saved(tmp_path / "x-00001-of-00001.gguf", file())).tensors


def test_types_that_nobody_decodes(tmp_path: Path) -> None:
    found = GgufFile(
        saved(tmp_path / "m.gguf", with_tensors(tensor("x", (32,), 999), tensor("y", (2,), T.I16, 128)))
    )
    assert found.tensors["x"].type == "type 999" and found.tensors["x"].bytes == 128
    for name, says in (
        ("x", "type 999, which gguf-py does not know"),
        ("y", "I16, which gguf-py cannot"),
        ("z", "miss"),
    ):
        with pytest.raises(VerifyError, match=rf"m\.gguf: .*{says}"):
            found.values(name)


@pytest.mark.parametrize("at_once", [1, 700, 1 << 24])
def test_values_are_those_of_gguf_py_however_many_are_decoded_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr("moequant.containers.gguf.read.AT_ONCE", at_once)
    numbers = np.random.default_rng(0).standard_normal
    packed = {
        "matrix": gguf.quantize(numbers((7, 256), np.float32), T.Q8_0),
        "stack": gguf.quantize(numbers((3, 5, 64), np.float32), T.Q4_0),
        "vector": numbers(96, np.float32),
    }
    writer = GGUFWriter(tmp_path / "a.gguf", "llama")
    kinds = {"matrix": T.Q8_0, "stack": T.Q4_0, "vector": T.F32}
    for name, values in packed.items():
        writer.add_tensor(name, values, raw_dtype=kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = GgufFile(tmp_path / "a.gguf")
    for name, values in packed.items():
        assert np.array_equal(ours.values(name).numpy(), gguf.dequantize(values, kinds[name])), name
