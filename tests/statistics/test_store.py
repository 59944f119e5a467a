"""Statistics files: nothing lost, always the same bytes, and one clear error for what they are not."""

from __future__ import annotations

import json
import resource
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moequant.checkpoint import open_checkpoint
from moequant.commands.statistics import load_statistics
from moequant.errors import CorpusError, OutputError, UnreadableError
from moequant.files import claim
from moequant.statistics import sealed, store
from moequant.statistics.calibrate import calibrate
from moequant.statistics.coverage import take
from moequant.statistics.store import Model
from moequant.text.corpus import Rows
from moequant.values import Calibration, InputStats, RouteStats
from tests import models


def rows() -> Rows:
    ids = torch.randint(0, models.VOCAB, (6, 32), generator=torch.Generator().manual_seed(3))
    return Rows(ids, ("a", "b", "a", "b", "c", "c"), "random ids", ids.numel())


@pytest.fixture(scope="module")
def checkpoint(tiny):
    return open_checkpoint(tiny("mixtral"))


@pytest.fixture(scope="module")
def whole(checkpoint) -> store.Stored:
    return store.stored(checkpoint, calibrate(checkpoint, rows()))


def assert_same(one: Calibration, two: Calibration, rtol: float = 0) -> None:
    for field in ("rows", "tokens", "source", "domains"):
        assert getattr(one, field) == getattr(two, field), field
    assert one.inputs.keys() == two.inputs.keys() and len(one.routes) == len(two.routes)
    pairs = [(one.inputs[name], two.inputs[name]) for name in one.inputs]
    for left, right in [*pairs, *zip(one.routes, two.routes, strict=True)]:
        for field in left.__slots__:
            if getattr(left, field) is None:
                assert getattr(right, field) is None, field
                continue
            a, b = (torch.as_tensor(getattr(stats, field)) for stats in (left, right))
            assert a.dtype == b.dtype, field
            torch.testing.assert_close(a, b, rtol=rtol, atol=0, msg=field)


def test_nothing_is_lost(whole, tmp_path: Path) -> None:
    store.save(tmp_path / "s.safetensors", whole)
    found = store.load(tmp_path / "s.safetensors")
    assert_same(found.calibration, whole.calibration)
    assert dict(found.model) == dict(whole.model) and found.origin.endswith("s.safetensors")


def test_the_same_statistics_are_the_same_bytes(whole, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    store.save(one, whole)
    backwards = dict(reversed(whole.calibration.inputs.items()))
    store.save(two, replace(whole, calibration=replace(whole.calibration, inputs=backwards)))
    assert one.read_bytes() == two.read_bytes()
    store.save(tmp_path / "three", store.load(one))
    assert one.read_bytes() == (tmp_path / "three").read_bytes()
    with pytest.raises(OutputError, match="two: exists already"):
        store.save(two, whole)


def test_layers_that_differ_are_part_of_what_the_model_is(tiny) -> None:
    """transformers gives no one value of what differs from layer to layer."""
    one, two = (store.identity(open_checkpoint(tiny("step3p7"))) for _ in range(2))
    assert one == two and {heads["num_attention_heads"] for heads in one["per_layer_config"].values()} == {6}
    assert "num_attention_heads" in one


def test_others_may_read_it_as_any_file(whole, tmp_path: Path) -> None:
    store.save(tmp_path / "s", whole)
    (tmp_path / "plain").touch()
    assert (tmp_path / "s").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_parts_merged_are_the_whole(checkpoint, whole, tmp_path: Path) -> None:
    parts = []
    for index, chosen in enumerate([[0, 1], [2, 3, 4], [5]]):
        path = tmp_path / str(index)
        store.save(path, store.stored(checkpoint, calibrate(checkpoint, take(rows(), chosen))))
        parts.append(store.load(path))
    merged = store.merge(parts)
    assert_same(merged.calibration, whole.calibration, rtol=1e-5)
    store.check(checkpoint, merged)


def test_domains_are_united_by_name(checkpoint) -> None:
    both = rows()
    one = calibrate(checkpoint, take(both, [0, 1]))
    two = calibrate(checkpoint, take(both, [5, 2]))
    merged = store.combine([one, two])
    assert (one.domains, two.domains, merged.domains) == (("a", "b"), ("c", "a"), ("a", "b", "c"))
    first, second, together = (part.routes[1].domain_tokens for part in (one, two, merged))
    assert torch.equal(together, torch.stack([first[0] + second[1], first[1], second[0]]))
    other = replace(two, source="a book")
    assert store.combine([one, other, one]).source == "random ids + a book"


def test_statistics_of_another_model_are_refused_by_what_differs(checkpoint, whole, tiny, tmp_path) -> None:
    other = open_checkpoint(tiny("mixtral", num_experts_per_tok=1))
    theirs = store.stored(other, calibrate(other, take(rows(), [0, 1])))
    with pytest.raises(CorpusError, match=r"num_experts_per_tok is 1, not 2"):
        store.merge([whole, theirs])
    store.save(tmp_path / "s", whole)
    with pytest.raises(CorpusError, match=r"s: statistics of another model than .*num_experts_per_tok is 2"):
        load_statistics(other, other, tmp_path / "s")
    with pytest.raises(CorpusError, match=r"family is mixtral, not olmoe"):
        store.check(open_checkpoint(tiny("olmoe")), whole)
    assert_same(load_statistics(checkpoint, checkpoint, tmp_path / "s").calibration, whole.calibration)


def test_statistics_that_lack_a_tensor_are_refused(checkpoint, whole) -> None:
    inputs = dict(whole.calibration.inputs)
    del inputs["layers.1.experts.inner"]
    partial = replace(whole, calibration=replace(whole.calibration, inputs=inputs))
    with pytest.raises(CorpusError, match=r"no fitting statistics for layers\.1\.experts\.down"):
        store.check(checkpoint, partial)
    with pytest.raises(CorpusError, match="not of the same tensors"):
        store.merge([whole, partial])


def test_a_file_cut_short_anywhere(whole, tmp_path: Path) -> None:
    path = tmp_path / "s"
    store.save(path, whole)
    data = path.read_bytes()
    for length in (0, 5, 8, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        refused(path, "cannot be read as statistics")


def test_a_file_that_nobody_may_read_is_not_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.symlink_to(path)
    with pytest.raises(UnreadableError, match=r"s: cannot be read \(Too many levels"):
        store.load(path)


def test_a_flipped_bit_anywhere_is_noticed(whole, tmp_path: Path) -> None:
    path = tmp_path / "s"
    store.save(path, whole)
    data = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    for at in (header, (header + len(data)) // 2, len(data) - 1):
        damaged = bytearray(data)
        damaged[at] ^= 4
        path.write_bytes(damaged)
        refused(path, "checksum differs")
    for at in range(8, header, 41):
        damaged = bytearray(data)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        try:
            found = store.load(path)
        except CorpusError:
            continue
        # The last digit of a number may say the same number with another digit in its place.
        assert chr(data[at]).isdigit() and dict(found.model) == dict(whole.model)
        assert_same(found.calibration, whole.calibration)


def refused(path: Path, says: str) -> None:
    with pytest.raises(CorpusError) as caught:
        store.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and says in message and "\n" not in message


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    refused(path, "no such file; give one")
    path.write_text("{}")
    refused(path, "cannot be read")
    save_file({"weight": torch.ones(3)}, path)
    refused(path, "not statistics from moequant route")
    save_file({"weight": torch.ones(3)}, path, {sealed.METADATA: '{"version": 99}'})
    refused(path, "version 99, expected 3")
    save_file({"weight": torch.ones(3)}, path, {sealed.METADATA: '{"version": 1}'})
    refused(path, "damaged")


OLD_NAMES = {
    "layers.{}.attn.input": "model.layers.{}.self_attn.q_proj",
    "layers.{}.attn.output": "model.layers.{}.self_attn.o_proj",
    "layers.{}.experts.input": "model.layers.{}.mlp.experts:up",
    "layers.{}.experts.inner": "model.layers.{}.mlp.experts:down",
}
OLD_MODEL = {
    "general.architecture": "llama", "vocab_size": 384, "llama.context_length": 1024,
    "llama.embedding_length": 256, "llama.block_count": 2, "llama.feed_forward_length": 512,
    "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-6, "llama.vocab_size": 384, "llama.expert_count": 4,
    "llama.expert_used_count": 2, "llama.rope.dimension_count": 64, "llama.attention.key_length": 64,
    "llama.attention.value_length": 64, "llama.rope.freq_base": 1e6,
}  # fmt: skip
"""Keys and names of files of version 1: those of llama.cpp, and modules of transformers."""


def without_peaks(calibration: Calibration) -> Calibration:
    inputs = {name: replace(stats, peak=None) for name, stats in calibration.inputs.items()}
    return replace(calibration, inputs=inputs)


def write_version_1(path: Path, calibration: Calibration, **changes: object) -> None:
    """What `moequant route` of 2025 wrote."""
    names = {"head.input": "model.norm:out"}
    names |= {new.format(i): old.format(i) for new, old in OLD_NAMES.items() for i in range(2)}
    write_old(path, 1, OLD_MODEL | changes, calibration, names)


def write_old(
    path: Path, version: int, model: Model, calibration: Calibration, names: Mapping[str, str]
) -> None:
    """Layout, names and checksum of the first versions, written anew here."""
    tensors = {
        f"input/{names.get(name, name)}/{field}": getattr(stats, field).clone()
        for name, stats in calibration.inputs.items()
        for field in ("tokens", "gate_mass", "gate_square", "moment", "gated_moment")
    }
    for route in calibration.routes:
        for field in ("tokens", "gate_mass", "domain_tokens", "pairs"):
            tensors[f"route/{route.layer}/{field}"] = getattr(route, field).clone()
    meta: dict[str, object] = {
        "version": version,
        "model": dict(model),
        "rows": calibration.rows,
        "tokens": calibration.tokens,
        "source": calibration.source,
        "domains": list(calibration.domains),
        "gate_entropy": [route.gate_entropy for route in calibration.routes],
    }
    crc = zlib.crc32(json.dumps(meta, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.numpy().tobytes(), crc)
    save_file(tensors, path, {"moequant": json.dumps(meta | {"crc32": crc}, sort_keys=True)})


def test_statistics_of_version_1_are_read(checkpoint, whole, tmp_path: Path) -> None:
    path = tmp_path / "old.safetensors"
    write_version_1(path, whole.calibration)
    assert store.load(path).version == 1
    found, expected = load_statistics(checkpoint, checkpoint, path), without_peaks(whole.calibration)
    assert_same(found.calibration, expected)
    assert found.version == store.VERSION == 3 and dict(found.model) == dict(whole.model)
    # Once read they are like others, and are saved as such.
    store.save(tmp_path / "new", found)
    assert_same(store.load(tmp_path / "new").calibration, expected)
    store.check(checkpoint, store.merge([whole, found]))


def test_statistics_of_version_2_know_no_largest_inputs(checkpoint, whole, tmp_path: Path) -> None:
    path = tmp_path / "old.safetensors"
    write_old(path, 2, whole.model, whole.calibration, {})
    found = load_statistics(checkpoint, checkpoint, path)
    assert found.version == 2
    assert_same(found.calibration, without_peaks(whole.calibration))
    merged = store.merge([whole, found]).calibration
    assert all(stats.peak is None for stats in merged.inputs.values())


def test_statistics_of_version_1_of_another_model_are_refused(checkpoint, whole, tmp_path: Path) -> None:
    path = tmp_path / "old.safetensors"
    for key, value in (("llama.expert_used_count", 3), ("llama.rope.freq_base", 1e4), ("vocab_size", 99)):
        write_version_1(path, whole.calibration, **{key: value})
        with pytest.raises(CorpusError, match=rf"old.*another model than .*: {key} is {value}"):
            load_statistics(checkpoint, checkpoint, path)


def test_nothing_to_merge() -> None:
    with pytest.raises(CorpusError, match="nothing to merge"):
        store.merge([])


def test_shapes_that_differ_are_refused() -> None:
    def tiny_stats(experts: int) -> Calibration:
        zeros = torch.zeros(experts, dtype=torch.float64)
        tokens = torch.zeros(experts, dtype=torch.int64)
        stats = InputStats(tokens, zeros, zeros, torch.zeros(experts, 2), torch.zeros(experts, 2))
        route = RouteStats(0, tokens, zeros, tokens[None], torch.diag(tokens), 0.0)
        return Calibration((route,), {"x": stats}, 1, 1, "text", ("d",))

    with pytest.raises(CorpusError, match=r"shapes \[2\] and \[3\]"):
        store.combine([tiny_stats(2), tiny_stats(3)])


def test_a_disk_that_fills_up_leaves_the_old_file(whole, tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("precious")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        with pytest.raises(OutputError, match="cannot be written"), claim(path, overwrite=True):
            store.save(path, whole)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_text() == "precious" and list(tmp_path.iterdir()) == [path]
