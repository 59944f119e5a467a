"""llama.cpp's importance matrices: ours as llama-quantize reads them, theirs read by us, both formats."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from safetensors.torch import load_file, save_file

from moequant.checkpoint import open_checkpoint
from moequant.containers.gguf import imatrix
from moequant.containers.gguf.export import Exported, export
from moequant.errors import CorpusError
from moequant.rounding.diagonal import Quantizer
from moequant.statistics.calibrate import calibrate
from moequant.statistics.importance import importance
from moequant.text import corpus
from moequant.text.corpus import Rows
from moequant.text.rows import load_encoder
from moequant.values import Calibration, Role
from tests import models
from tests.statistics import starving

EXPERTS = "layers.{}.experts.{}"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A model whose experts 6 and 7 see no token."""
    return export(open_checkpoint(starving.never_chosen(tmp_path_factory.mktemp("starved"), dead=2)))


@pytest.fixture(scope="module")
def calibration(exported: Exported) -> Calibration:
    ids = torch.randint(0, models.VOCAB, (4, 64), generator=torch.Generator().manual_seed(2))
    return calibrate(exported.checkpoint, Rows(ids, ("a",) * 4, "a text", ids.numel()))


def as_llama_quantize_reads(path: Path) -> dict[str, np.ndarray]:
    """Name -> f32 [matrices, in], by the rules of tools/quantize/quantize.cpp, with gguf-py's reader."""
    reader = GGUFReader(path)
    for key in ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"):
        assert key in reader.fields
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    found = {}
    for name, sums in tensors.items():
        if name.endswith(".in_sum2"):
            counts = np.rint(tensors[name.removesuffix(".in_sum2") + ".counts"].reshape(-1))
            values = sums.reshape(len(counts), -1)
            mean = values / np.maximum(counts, 1)[:, None].astype(np.float32)
            found[name.removesuffix(".in_sum2")] = np.where(counts[:, None] > 0, mean, np.float32(1))
    return found


def test_llama_quantize_computes_our_importance(exported, calibration, tmp_path: Path) -> None:
    imatrix.write(tmp_path / "i.gguf", exported, calibration)
    found = as_llama_quantize_reads(tmp_path / "i.gguf")
    wanted = [weight for weight in exported.weights if weight.site is not None]
    assert found.keys() == {exported.names[weight.name] for weight in wanted}
    for weight in wanted:
        expected, columns = (
            importance(calibration.inputs[weight.site.name]),
            found[exported.names[weight.name]],
        )
        assert columns.shape == (weight.matrices, weight.n_in)
        torch.testing.assert_close(torch.from_numpy(columns), expected, rtol=1e-6, atol=0)


def test_the_header_says_what_llama_cpp_asks_for(exported, calibration, tmp_path: Path) -> None:
    imatrix.write(tmp_path / "i.gguf", exported, calibration)
    fields = {name: field.contents() for name, field in GGUFReader(tmp_path / "i.gguf").fields.items()}
    assert fields["general.type"] == "imatrix" and fields["imatrix.datasets"] == ["a text"]
    assert (fields["imatrix.chunk_count"], fields["imatrix.chunk_size"]) == (4, 64)
    assert fields["moequant.gating"] == "gate2"


def test_counts_are_the_tokens_of_every_expert(exported, calibration, tmp_path: Path) -> None:
    imatrix.write(tmp_path / "i.gguf", exported, calibration, "none")
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "i.gguf").tensors}
    for weight in exported.weights:
        if weight.site is None:
            continue
        stats, name = calibration.inputs[weight.site.name], exported.names[weight.name]
        counts, sums = (tensors[f"{name}.{kind}"] for kind in ("counts", "in_sum2"))
        assert counts.data.reshape(-1).tolist() == stats.tokens.tolist()
        assert counts.shape.tolist() == [1, weight.matrices]
        np.testing.assert_allclose(sums.data, stats.moment.numpy(), rtol=1e-6)
    assert tensors["blk.1.ffn_down_exps.weight.counts"].data.reshape(-1)[6:].tolist() == [0, 0]


def test_the_same_statistics_are_the_same_bytes(exported, calibration, tmp_path: Path) -> None:
    imatrix.write(tmp_path / "one", exported, calibration)
    imatrix.write(tmp_path / "two", exported, calibration)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_what_we_wrote_we_read(exported, calibration, tmp_path: Path) -> None:
    imatrix.write(tmp_path / "i.gguf", exported, calibration, "none")
    found = imatrix.read(tmp_path / "i.gguf", exported)
    assert found.inputs.keys() == calibration.inputs.keys()
    assert (found.rows, found.tokens, found.source) == (4, 256, "i.gguf (a text)")
    for name, stats in found.inputs.items():
        assert torch.equal(stats.tokens, calibration.inputs[name].tokens)
        one, two = importance(stats), importance(calibration.inputs[name], "none")
        torch.testing.assert_close(one, two, rtol=1e-5, atol=0)
    assert [route.tokens.tolist() for route in found.routes] == [
        route.tokens.tolist() for route in calibration.routes
    ]


def test_experts_with_a_count_of_0_take_their_layers_mean(exported, calibration, tmp_path: Path) -> None:
    imatrix.write(tmp_path / "i.gguf", exported, calibration, "none")
    found = imatrix.read(tmp_path / "i.gguf", exported)
    for layer in (0, 1):
        for side in ("input", "inner"):
            stats = found.inputs[EXPERTS.format(layer, side)]
            pooled = stats.moment.sum(0) / stats.tokens.sum()
            assert stats.tokens[6:].tolist() == [0, 0]
            torch.testing.assert_close(importance(stats)[7].double(), pooled, rtol=1e-5, atol=1e-12)


def test_every_weight_is_quantized_with_an_imported_imatrix(exported, calibration, tmp_path: Path) -> None:
    """Ours without the head, as llama-imatrix leaves it: nobody asks where the statistics came from."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        del tensors["output.weight.in_sum2"], tensors["output.weight.counts"]

    path = altered(tmp_path / "i.gguf", exported, calibration, change)
    quantizer = Quantizer(imatrix.read(path, exported), "fast")
    for weight in exported.weights:
        if len(weight.shape) > 1 and weight.layer != 0:
            _, loss = quantizer.pack(weight, "Q4_K" if weight.n_in % 256 == 0 else "Q5_0")
            assert torch.isfinite(loss.error).all() and loss.error.max() < 0.02, weight.name


def test_llama_imatrix_own_file(mix: Path) -> None:
    """What llama-imatrix made of 204,800 tokens: every token chose two experts; the head is left out."""
    found = imatrix.read(models.SHARED / "baselines" / "mix.imatrix.gguf", export(open_checkpoint(mix)))
    assert (found.rows, found.tokens, len(found.routes)) == (400, 204_800, 4)
    assert all(int(route.tokens.sum()) == 2 * 204_800 for route in found.routes)
    for name, stats in found.inputs.items():
        columns = importance(stats)
        assert torch.isfinite(columns).all() and (columns > 0).all(), name
    assert (importance(found.inputs["head.input"]) == 1).all()


def test_ours_and_llama_imatrix_agree_expert_by_expert(mix: Path, tmp_path: Path) -> None:
    """All 204,800 tokens, through the first layer only: the rest of the model cannot change what it sees."""
    checkpoint = open_checkpoint(mix)
    rows = corpus.pack(corpus.read(models.SHARED / "data" / "calib.txt"), load_encoder(mix), 512, 204_800)
    tensors = load_file(mix / "model.safetensors")
    first = {name: values for name, values in tensors.items() if not re.search(r"layers\.[1-9]", name)}
    save_file(first, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((mix / "config.json").read_text())
    models.edit_config(tmp_path, num_hidden_layers=1)
    ours = calibrate(open_checkpoint(tmp_path), rows)
    theirs = imatrix.read(models.SHARED / "baselines" / "mix.imatrix.gguf", export(checkpoint))
    compared = [name for name in ours.inputs if name.startswith("layers.0.")]
    assert len(compared) == 4
    for name in compared:
        one, two = ours.inputs[name], theirs.inputs[name]
        torch.testing.assert_close(one.tokens, two.tokens, rtol=0.01, atol=0)
        means = [stats.moment / stats.tokens[:, None] for stats in (one, two)]
        error = (means[0] - means[1]).abs().sum(1) / means[1].sum(1)
        assert error.max() < 0.01, f"{name}: {error}"


def legacy(entries: dict[str, tuple[int, np.ndarray]], trailer: bytes | None = None) -> bytes:
    """The bytes of a .dat file from name -> (calls, stored values); the first ones had no `trailer`."""
    data = struct.pack("<i", len(entries))
    for name, (calls, values) in entries.items():
        raw = name.encode()
        data += struct.pack("<i", len(raw)) + raw + struct.pack("<ii", calls, values.size)
        data += values.astype("<f4").tobytes()
    return data + (trailer or b"")


TRAILER = struct.pack("<ii", 7, 8) + b"book.txt"


def as_llama_imatrix_stores(exported, calibration, calls: int = 3) -> dict[str, tuple[int, np.ndarray]]:
    """Means times calls, 1 times calls for an expert without tokens (imatrix.cpp, save_imatrix_legacy)."""
    entries = {}
    for weight in exported.weights:
        if weight.site is not None and weight.role is not Role.OUTPUT:
            stats = calibration.inputs[weight.site.name]
            mean = stats.moment / stats.tokens.clamp(min=1)[:, None]
            mean[stats.tokens == 0] = 1.0
            entries[exported.names[weight.name]] = (calls, (mean.float() * calls).numpy())
    return entries


def test_a_legacy_file(exported, calibration, tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(legacy(as_llama_imatrix_stores(exported, calibration), TRAILER))
    found = imatrix.read(path, exported)
    assert (found.rows, found.tokens, found.source) == (7, 7 * 512, "imatrix.dat (book.txt)")
    for name, stats in found.inputs.items():
        other = calibration.inputs[name]
        if name == "head.input":
            assert (importance(stats) == 1).all()
            continue
        assert torch.equal(stats.tokens > 0, other.tokens > 0), "all ones mean that the expert saw nothing"
        seen = stats.tokens > 0
        mean = stats.moment[seen] / stats.tokens[seen, None]
        expected = other.moment[seen] / other.tokens[seen, None]
        torch.testing.assert_close(mean, expected, rtol=1e-6, atol=1e-12)
        assert torch.isfinite(importance(stats)).all() and (importance(stats) > 0).all()


def test_the_first_legacy_files_had_no_trailer_and_no_calls(exported, calibration, tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    entries = as_llama_imatrix_stores(exported, calibration, calls=1)
    path.write_bytes(legacy({name: (0, values) for name, (_, values) in entries.items()}))
    found = imatrix.read(path, exported)
    assert found.source == "imatrix.dat (text not named)"
    stats, other = (c.inputs["layers.0.attn.input"] for c in (found, calibration))
    torch.testing.assert_close(
        stats.moment / stats.tokens[:, None], other.moment / other.tokens[:, None], rtol=1e-6, atol=1e-12
    )


def refused(path: Path, exported: Exported, says: str) -> None:
    with pytest.raises(CorpusError) as caught:
        imatrix.read(path, exported)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and says in message and "\n" not in message, message


def test_files_cut_short_anywhere(exported, calibration, tmp_path: Path) -> None:
    old, new = tmp_path / "i.dat", tmp_path / "i.gguf"
    old.write_bytes(data := legacy(as_llama_imatrix_stores(exported, calibration), TRAILER))
    body = len(data) - len(TRAILER)
    for length in (0, 3, 4, 9, 30, body // 2, body - 1, body + 5, len(data) - 1):
        old.write_bytes(data[:length])
        refused(old, exported, "neither a GGUF nor a complete .dat imatrix")
    imatrix.write(new, exported, calibration)
    data = new.read_bytes()
    for length in [*range(4, 4000, 331), len(data) // 2, len(data) - 32]:
        new.write_bytes(data[:length])
        refused(new, exported, "damaged GGUF file")


def test_junk_and_other_files(exported, tiny, tmp_path: Path) -> None:
    path = tmp_path / "i"
    refused(path, exported, "No such file")
    refused(tmp_path, exported, "cannot be read")
    for junk in (b"", b"\xff" * 64, b"some text that is long enough to be read", bytes(200)):
        path.write_bytes(junk)
        refused(path, exported, "imatrix")
    writer = GGUFWriter(path, "llama")
    writer.add_type("model")
    writer.add_tensor("x.in_sum2", np.ones(4, np.float32))
    close(writer)
    refused(path, exported, "GGUF of type 'model', expected 'imatrix'")


def test_a_file_without_llama_cpps_keys(exported, tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "i", "llama")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["a text"])
    writer.add_string("imatrix.chunk_count", "four")
    writer.add_tensor("x.in_sum2", np.ones(4, np.float32))
    close(writer)
    refused(tmp_path / "i", exported, "key imatrix.chunk_count is missing or no int")


def test_any_damage_is_one_clear_error_or_none(exported, calibration, tmp_path: Path) -> None:
    """Bytes changed at random in the header, 300 times: read, or refused as it should be."""
    path = tmp_path / "i.gguf"
    imatrix.write(path, exported, calibration)
    data, chance = path.read_bytes(), Random(0)
    outcomes = set()
    for _ in range(300):
        damaged = bytearray(data)
        damaged[chance.randrange(400)] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            imatrix.read(path, exported)
            outcomes.add("read")
        except CorpusError as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def close(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def altered(path: Path, exported, calibration, change) -> Path:
    """A GGUF imatrix after `change(tensors)` on its name -> f32 arrays."""
    source = path.with_name(f"{path.name}-source.gguf")
    imatrix.write(source, exported, calibration, "none")
    tensors = {tensor.name: np.array(tensor.data) for tensor in GGUFReader(source).tensors}
    change(tensors)
    writer = GGUFWriter(path, "llama")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["a text"])
    writer.add_uint32("imatrix.chunk_count", 4)
    writer.add_uint32("imatrix.chunk_size", 64)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    close(writer)
    return path


DOWN = "blk.1.ffn_down_exps.weight"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("kind", ["in_sum2", "counts"])
def test_values_that_cannot_be(exported, calibration, tmp_path: Path, kind: str, value: float) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[f"{DOWN}.{kind}"][2, 0] = value

    path = altered(tmp_path / "i.gguf", exported, calibration, change)
    refused(
        path, exported, f"{DOWN} has {'values' if kind == 'in_sum2' else 'counts'} that are negative, NaN"
    )


@pytest.mark.parametrize(("count", "says"), [(1e16, "counts that are"), (9e15, None)])
def test_counts_that_no_text_has(exported, calibration, tmp_path: Path, count: float, says: str) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[f"{DOWN}.counts"][0, 0] = count

    path = altered(tmp_path / "i.gguf", exported, calibration, change)
    if says:
        refused(path, exported, says)
    else:
        assert imatrix.parse(path).entries[DOWN].counts[0] == np.float32(count)


def test_a_dat_file_is_believed_only_as_far_as_it_goes(exported, tmp_path: Path) -> None:
    """Lengths beyond the file, none of which is allocated; text that a terminal would obey."""
    path = tmp_path / "i.dat"
    for content in (
        struct.pack("<ii", 1, 2**31 - 1),
        struct.pack("<ii", 1, -1),
        struct.pack("<ii1sii", 1, 1, b"x", 1, 2**29),
        struct.pack("<ii1sii", 1, 1, b"x", 1, -(2**29)),
    ):
        path.write_bytes(content)
        refused(path, exported, "neither a GGUF nor a complete .dat imatrix")
    entries = {"a\x1b[31m\nb": (1, np.ones(2))}
    path.write_bytes(legacy(entries, struct.pack("<ii", 1, 3) + b"a\nb"))
    found = imatrix.parse(path)
    assert list(found.entries) == ["a\ufffd[31m\ufffdb"] and found.datasets == ("a\ufffdb",)
    path.write_bytes(legacy(entries, struct.pack("<ii", -7, 0)))
    refused(path, exported, "-7 chunks of 512 tokens")


def test_missing_and_misfitting_tensors(exported, calibration, tiny, tmp_path: Path) -> None:
    def without(*names: str):
        return lambda tensors: [tensors.pop(name) for name in names]

    path = altered(tmp_path / "2", exported, calibration, without(f"{DOWN}.counts"))
    refused(path, exported, f"{DOWN} needs in_sum2 and counts, both F32")
    path = altered(
        tmp_path / "3",
        exported,
        calibration,
        lambda tensors: tensors.update({f"{DOWN}.in_sum2": np.ones((8, 128), np.float32)}),
    )
    refused(path, exported, f"{DOWN} has 1024 values and 8 counts, expected 8 x 256 and 8")
    path = altered(tmp_path / "4", exported, calibration, lambda tensors: None)
    refused(path, export(open_checkpoint(tiny("mixtral"))), "the imatrix of another model?")


def test_a_stack_that_is_missing_counts_alike_and_is_named(exported, calibration, tmp_path, caplog) -> None:
    """llama-imatrix leaves out a stack of which an expert saw nothing."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        del tensors[f"{DOWN}.in_sum2"], tensors[f"{DOWN}.counts"]

    path = altered(tmp_path / "i.gguf", exported, calibration, change)
    found = imatrix.read(path, exported)
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: no entry for {DOWN}; all of its columns get the same importance"
    ]
    assert (importance(found.inputs[EXPERTS.format(1, "inner")]) == 1).all()
    assert found.inputs.keys() == calibration.inputs.keys()


def test_a_file_that_lacks_most_is_of_another_model(exported, calibration, tmp_path: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if not name.startswith("blk.0.attn_q.")]:
            del tensors[name]

    path = altered(tmp_path / "i.gguf", exported, calibration, change)
    refused(path, exported, "no entry for blk.0.attn_output.weight; the imatrix of another model?")


def test_values_of_one_input_must_agree(exported, calibration, tmp_path: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["blk.0.attn_v.weight.in_sum2"] *= 2

    path = altered(tmp_path / "i.gguf", exported, calibration, change)
    refused(path, exported, "blk.0.attn_q.weight and blk.0.attn_v.weight multiply the same activations")


def test_any_name_of_an_input_will_do_also_of_fused_gate_and_up(exported, calibration, tmp_path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        for kind in ("in_sum2", "counts"):
            values = tensors.pop(f"blk.0.ffn_gate_exps.weight.{kind}")
            del tensors[f"blk.0.ffn_up_exps.weight.{kind}"], tensors[f"blk.0.attn_q.weight.{kind}"]
            tensors[f"blk.0.ffn_gate_up_exps.weight.{kind}"] = values

    path = altered(tmp_path / "i.gguf", exported, calibration, change)
    found = imatrix.read(path, exported)
    for name in (EXPERTS.format(0, "input"), "layers.0.attn.input"):
        torch.testing.assert_close(
            found.inputs[name].moment, calibration.inputs[name].moment, rtol=1e-6, atol=1e-9
        )
