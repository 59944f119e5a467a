"""Qwen3.8-Flash-Next looks tokens up in a table that is larger than all else: nobody reads it whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moequant import formats
from moequant.checkpoint import load, open_checkpoint
from moequant.checkpoint.codecs import base
from moequant.commands.convert import Settings, convert
from moequant.commands.journal import RunJournal
from moequant.commands.journal_files import dismiss
from moequant.containers.gguf.export import export
from moequant.containers.gguf.families import EXPORTS
from moequant.containers.gguf.read import GgufFile, read_header
from moequant.containers.gguf.weights import GgufWeights
from moequant.errors import CheckpointError, FamilyError, OutputError
from moequant.files import large
from moequant.forward.resources import Resources
from moequant.forward.stream import LayerStream, Reader
from moequant.hub.fetch import headers
from moequant.inspection.folder import inspect_folder
from moequant.rounding import diagonal
from moequant.rounding.diagonal import Quantizer
from moequant.rounding.parts import Parts
from moequant.values import Role, TensorRef, Weight
from tests import models
from tests.clients.llama import Llama

FAMILY = "qwen4_exp"
TABLE = "layers.0.ngrams"
STORED = "model.language_model.layers.0.ple.ple_embedding"
QWEN4_EXP = EXPORTS[FAMILY]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of 48,000 rows: much more than a few tokens look up."""
    made = tmp_path_factory.mktemp(FAMILY) / "model"
    models.build(made, FAMILY, ngram_vocab_size_base=6000)
    return models.as_released(made, FAMILY)


@pytest.fixture(scope="module")
def file(folder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file with every number of it."""
    out = tmp_path_factory.mktemp(FAMILY) / "f32.gguf"
    given = {"effort": "fast", "eval_tokens": 0, "self_check": False}
    convert(folder, out, Settings("F32", text, 1024, text, **given))
    return out


def table(folder: Path) -> Weight:
    (found,) = (weight for weight in open_checkpoint(folder).weights if weight.role is Role.LOOKUP)
    return found


def ids(count: int = 64, rows: int = 2) -> torch.Tensor:
    """Rows of tokens with ends of texts among them, two next to each other."""
    found = torch.randint(1, models.VOCAB, (rows, count), generator=torch.Generator().manual_seed(0))
    found[:, [5, 6, 20, count - 1]] = 0
    return found


def test_n_grams_stop_at_the_end_of_a_text(folder: Path, file: Path) -> None:
    """In llama.cpp as in transformers, which is given a row with ends of texts."""
    row = ids(200, 1)[0]
    with torch.inference_mode():
        expected = models.reference(folder)(row[None]).logits[0].numpy()
    with Llama(file, threads=1) as llama:
        difference = np.abs(llama.logits(row.tolist()) - expected).max(1)
    assert np.quantile(difference, 0.99) < 5e-4
    with torch.inference_mode():
        others = models.reference(folder)(row.clamp(min=1)[None]).logits[0].numpy()
    assert np.abs(others - expected).max(1)[8] > 5e-3, "an end counts"


def test_the_numbers_that_choose_rows_are_those_of_transformers(folder: Path, file: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    told = read_header(file).metadata
    for theirs, key in {
        "layer_multipliers": "layer_multipliers",
        "ngram_heads_offsets": "head_offsets",
        "ngram_heads_vocab_sizes": "head_vocab_sizes",
    }.items():
        assert list(told[f"qwen4exp.ple.{key}"]) == stored[f"{STORED}.{theirs}"].tolist()
    assert max(told["qwen4exp.ple.layer_multipliers"]) > 1 << 40, "more than a float holds"


def test_other_numbers_than_the_config_makes_are_refused(folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "model")
    models.edit_config(other, text_config={**_text(other), "seed": 1235})
    with pytest.raises(CheckpointError, match=r"layer_multipliers holds \d+.*, config.json makes it \d+"):
        open_checkpoint(other)


def _text(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "config.json").read_text())["text_config"]
    return found


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """Every read of a stored tensor: its name, and the bytes."""
    seen: list[tuple[str, int]] = []
    inner = base.read_part

    def counting(ref: TensorRef, *which: Any) -> torch.Tensor:
        found = inner(ref, *which)
        seen.append((ref.name, found.nbytes))
        return found

    monkeypatch.setattr(base, "read_part", counting)
    yield seen


def of_table(reads: list[tuple[str, int]]) -> list[int]:
    return [count for name, count in reads if ".ngram_embedding." in name]


def test_a_pass_reads_the_rows_that_its_tokens_look_up(folder: Path, reads: list[tuple[str, int]]) -> None:
    """Once, and no others: eight heads look at most eight rows of 64 bytes up for a token."""
    checkpoint, rows, reader = open_checkpoint(folder), ids(), Reader()
    reads.clear()
    with LayerStream(checkpoint, rows, Resources(threads=1, batch_tokens=64), reader) as stream:
        (narrow,) = (weight for weight in stream.checkpoint.weights if weight.is_table)
        for _ in stream.layers():
            pass
        embedding = stream.model.get_submodule("model.layers.0.ple.ple_embedding")
        asked = torch.tensor(narrow.origin.rows)
    whole = table(folder)
    assert reader.reads[TABLE] == 1 and narrow.numel < whole.numel // 40
    assert sum(of_table(reads)) == 2 * narrow.numel and len(asked) <= 8 * rows.numel()
    assert max(of_table(reads)) < 64 * 8, "neighbours at most"
    assert torch.equal(load(narrow), load(whole)[asked])
    assert embedding.ngram_embedding.weight.shape == narrow.shape


def test_a_pass_that_looks_up_more_than_fits_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"128 tokens look up takes .* give fewer tokens"):
        LayerStream(open_checkpoint(folder), ids(), Resources(threads=1, ram=4000))


def test_packing_reads_bands_and_makes_the_same_bytes(
    folder: Path, reads: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, quantizer = table(folder), Quantizer(None, "fast")
    whole, lost = quantizer.pack(weight, "Q5_0")
    monkeypatch.setattr(diagonal, "BAND", 1 << 14)
    monkeypatch.setattr(large, "LARGE", 1 << 10)
    reads.clear()
    bands, also = quantizer.pack(weight, "Q5_0")
    assert max(of_table(reads)) <= 2 << 14 and sum(of_table(reads)) == 2 * weight.numel
    assert torch.equal(bands.data, whole.data) and bands.data.shape == (weight.shape[0], 22)
    assert torch.allclose(lost.error, also.error, rtol=1e-9)
    values = load(weight).float()
    error = (formats.dequantize("Q5_0", whole.data) - values).square().sum() / values.square().sum()
    assert float(lost.error) == pytest.approx(float(error), rel=1e-4)


def test_a_killed_run_goes_on_behind_the_table(folder: Path, tmp_path: Path) -> None:
    """What is packed of it lies beside the part; another byte there is noticed."""
    weight = table(folder)
    made = Quantizer(None, "fast").pack(weight, "Q5_0")
    Parts(tmp_path, [weight], {TABLE: "Q5_0"}, "run", "again").add([made])
    ((packed, loss),) = Parts(tmp_path, [weight], {TABLE: "Q5_0"}, "run", "again").results()
    assert torch.equal(packed.data, made[0].data) and torch.equal(loss.error, made[1].error)
    (beside,) = tmp_path.glob("*.bytes")
    assert beside.stat().st_size == made[0].data.numel()
    with beside.open("r+b") as there:
        there.seek(1000)
        there.write(b"???")
    with pytest.raises(OutputError, match="checksum differs"):
        list(Parts(tmp_path, [weight], {TABLE: "Q5_0"}, "run", "again").results())


def test_the_journal_knows_what_is_packed_of_the_table(folder: Path, tmp_path: Path) -> None:
    """The same command continues, and nothing is left when the output has its name."""
    weight, kept = table(folder), tmp_path / "model.gguf.journal"
    RunJournal(kept, {"model": "x"})
    made = Quantizer(None, "fast").pack(weight, "Q5_0")
    Parts(kept / "0", [weight], {TABLE: "Q5_0"}, "run", "again").add([made])
    assert list(kept.glob("0/*.bytes"))
    again = RunJournal(kept, {"model": "x"})
    again.forget_parts(0)
    assert not (kept / "0").exists() and kept.exists()
    dismiss(kept)
    assert not kept.exists()


def test_inspect_knows_every_tensor(folder: Path) -> None:
    """The table is looked up, so that a token reads next to nothing of it."""
    found = inspect_folder(headers(folder))
    assert not found.missing, "a third of it drafts: IQ1_S is too small for it, which is no reason against it"
    assert [runtime.supported for runtime in found.runtimes if runtime.name == "llama.cpp"] == [True]
    (rows,) = (row for row in found.roles if row.role == "embedding")
    assert rows.parameters == table(folder).numel + models.VOCAB * 256
    assert found.active_bytes < found.bytes - rows.bytes


def test_the_file_has_the_table_outside_of_the_layers_and_gives_its_rows(folder: Path, file: Path) -> None:
    checkpoint = open_checkpoint(folder)
    weights, weight = GgufWeights(file, export(checkpoint)), table(folder)
    assert weights.exported.names[TABLE] == "per_layer_token_embd.weight"
    assert sum("ngram" in name or "per_layer" in name for name in GgufFile(file).tensors) == 1
    rows = (0, 1, 2, 700, 4001, weight.shape[0] - 1)
    assert torch.equal(weights.load(weight.at(rows)), load(weight).float()[list(rows)])
    assert torch.equal(weights.load(weight), load(weight).float())


def test_a_table_in_8_bits_has_one_scale(folder: Path, tmp_path: Path) -> None:
    """As releases in FP8 have it, beside a config that leaves the table out of what is quantized."""
    other = Path(shutil.copytree(folder, tmp_path / "model"))
    tensors, scale = load_file(folder / "model.safetensors"), torch.tensor([0.0009765625]).bfloat16()
    for name in [name for name in tensors if ".shard_" in name]:
        tensors[name] = (tensors[name].float() / scale.float()).to(torch.float8_e4m3fn)
    save_file(tensors | {f"{STORED}.ngram_embedding.weight_scale": scale}, other / "model.safetensors")
    models.indexed(other)
    parts = [tensors[f"{STORED}.ngram_embedding.shard_{part}.weight"] for part in range(12)]
    assert torch.equal(load(table(other)).float(), torch.cat(parts).float() * scale.float())


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("output_gate_type", None, "output_gate_type = 'silu'"),
        ("ple_embed_dim", 128, "ple_embed_dim = 128"),
        ("indexer_compress_ratio", 1, "indexer_compress_ratio = 1"),
        ("norm_topk_prob", False, "norm_topk_prob = False"),
        ("ngram_vocab_size_base", 1 << 29, "ngram_vocab_size_base"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(key: str, value: object, said: str) -> None:
    config = _config(**{key: value})
    assert [said in each for each in QWEN4_EXP.complaints(config)] == [True]
    assert not list(QWEN4_EXP.complaints(_config()))


def test_of_several_tokens_that_end_a_text_the_first_counts() -> None:
    config = _config(eos_token_id=[7, 3])
    assert next(key.value for key in QWEN4_EXP.keys(config) if key.name == "ple.eos_token_id") == 7
    assert any("at the last" in each for each in QWEN4_EXP.warnings(config))
    assert not QWEN4_EXP.warnings(_config(eos_token_id=[7]))


def test_a_table_in_too_many_parts_is_refused(folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "model"))
    models.edit_config(other, text_config={**_text(other), "split_ngram_parts": 1 << 20})
    with pytest.raises(FamilyError, match=r"split_ngram_parts = 1048576: 1 to 65,536 were expected"):
        open_checkpoint(other)


def _config(**changes: object) -> object:
    return models.config(FAMILY, model_type="qwen4_exp_text", **changes)
