"""The folder around the tensors: shards, side files, refusals, atomicity, verification, memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from moequant.checkpoint import open_checkpoint
from moequant.containers.folders import write as container
from moequant.containers.folders.shards import INDEX, Entry, ShardWriter, cut
from moequant.errors import CheckpointError, OutputError, PlanError, VerifyError
from moequant.evaluate import Comparison, Estimate, Measured, Scores
from moequant.evaluate.divergence import PERCENTILES
from moequant.files import RECORD
from moequant.report.card import Card
from moequant.report.conversion import Conversion
from moequant.report.summary import How, Report
from tests import models
from tests.containers.folders.cases import convert, folder_of, own_decoder, packed, quantized


def leftovers(parent: Path) -> list[str]:
    return [path.name for path in parent.iterdir() if path.name.startswith(".")]


def test_shards_hold_the_same_tensors_as_one_file(tiny, tmp_path: Path) -> None:
    quantized(tiny("mixtral"), tmp_path / "one")
    made, _ = quantized(tiny("mixtral"), tmp_path / "many", shard_bytes=300_000)
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 5 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert not (tmp_path / "one" / INDEX).exists()
    one = own_decoder(tmp_path / "one")
    found = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
        sizes = [tensor.nbytes for tensor in tensors.values()]
        assert sum(sizes) <= 300_000 or len(sizes) == 1
        found |= dict.fromkeys(tensors, file.name)
        assert all(torch.equal(tensor, one.tensor(name)) for name, tensor in tensors.items())
    assert found == index["weight_map"] and set(found) == set(one.tensors)
    assert index["metadata"]["total_size"] == sum(one.tensor(name).nbytes for name in one.tensors)
    assert made.size(made.plan) == sum(file.stat().st_size for file in files)
    kept = sum(choice.bytes for choice in made.plan.choices)
    shapes = 16 * sum(name.endswith("weight_shape") for name in found)
    assert index["metadata"]["total_size"] == kept + shapes, "the plan knows every byte"


def test_side_files_and_card(tiny, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny("olmoe"), tmp_path / "Tiny-OLMoE"))
    (model / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# Praise of itself\n")
    (model / "LICENSE").write_text("be nice\n")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (model / "pytorch_model.bin").write_bytes(b"old weights")
    (model / ".cache").mkdir()
    out = tmp_path / "out"
    quantized(model, out, shard_bytes=400_000)
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "LICENSE",
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
    ):
        assert (out / name).read_bytes() == (model / name).read_bytes()
    assert not (out / "pytorch_model.bin").exists() and not (out / ".cache").exists()
    config, original = (json.loads((folder / "config.json").read_text()) for folder in (out, model))
    assert config.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert config == original
    record = json.loads((out / "moequant.json").read_text())
    files = [file.relative_to(out).as_posix() for file in out.rglob("*") if file.is_file()]
    assert record["files"] == sorted(files), "all of them are moequant's"
    assert record["quantization_config"]["format"] == "pack-quantized" and record["made_by"].startswith(
        "moequant "
    )
    decoder = own_decoder(out)
    for name in decoder.tensors:
        raw = decoder.tensor(name).contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        assert record["crc32"].pop(name) == zlib.crc32(raw)
    assert not record["crc32"]
    card = (out / "README.md").read_text()
    front = card.split("---\n")[1]
    assert "\nlicense: apache-2.0\n" in front
    assert not any(line.startswith("base_model") for line in front.splitlines()), (
        "a folder is no name of the Hub"
    )
    assert "Praise" not in card and "int4, one scale for 128 weights" in card and "vllm serve" in card


def test_the_card_tells_what_was_measured(tiny) -> None:
    made = folder_of(tiny("qwen3_moe"), bits=8, group_size=-1, quantize_attention=True)
    how = How(folder=made.settings)
    plain = Report(made.checkpoint.path, Path("out"), 1000, made.checkpoint, made.plan, how=how)
    about = Estimate(12.3456, 0.1)
    spread = (0.5,) * len(PERCENTILES)
    comparison = Comparison(
        100, about, about, about, about, 1.0, spread, about, spread, 0.5, 0.1, None, "/data/my text"
    )
    scores = Scores(*torch.zeros(4, 100, dtype=torch.float64))
    card = Card(Conversion((plain,))).text()
    found = Measured("q", comparison, (), scores, (), ())
    measured = Card(Conversion((replace(plain, measured=found),))).text()
    assert "Measured" not in card and "a whole row" in card and "and attention" in card
    assert "| 12.346 ± 0.100 | 12.34560 ± 0.10000 |" in measured
    assert "Measured on 100 tokens of: my text." in measured


def test_nothing_but_the_model_is_copied(tiny, tmp_path: Path) -> None:
    """What a stranger's folder holds beside the model is not published, least of all files from elsewhere."""
    model = Path(shutil.copytree(tiny("qwen3_moe"), tmp_path / "model"))
    (tmp_path / "id_rsa").write_text("a key")
    for name in ("LICENSE", "tokenizer_key.json", "additional_chat_templates"):
        (model / name).symlink_to(tmp_path / "id_rsa" if "." in name or name.isupper() else tmp_path)
    (tmp_path / "x.jinja").write_text("elsewhere")
    left = (
        "modeling.py",
        "tokenizer.py",
        "tokenizer.pkl",
        "x.npz",
        "model.ckpt",
        "x.bin",
        "notes.json",
        ".env",
    )
    for name in left:
        (model / name).write_text("x")
    (model / "NOTICE").write_text("kept")
    (model / "merges.txt").unlink(missing_ok=True)
    (model / "sub").mkdir()
    (model / "sub" / "real").write_text("merges")
    (model / "merges.txt").symlink_to("sub/real")
    (model / "vocab.txt").symlink_to("vocab.txt")  # leads nowhere, for ever
    quantized(model, tmp_path / "out")
    found = {file.relative_to(tmp_path / "out").as_posix() for file in (tmp_path / "out").rglob("*")}
    assert found == {
        "NOTICE", "README.md", "config.json", "generation_config.json", "merges.txt", "model.safetensors",
        "moequant.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert (tmp_path / "out" / "merges.txt").read_text() == "merges"


def test_links_into_the_cache_of_hugging_face_are_followed(tiny, tmp_path: Path) -> None:
    """There a model's folder holds links to files under `blobs`, which are named by their hashes."""
    blobs, model = tmp_path / "models--a" / "blobs", tmp_path / "models--a" / "snapshots" / ("0" * 40)
    blobs.mkdir(parents=True)
    model.mkdir(parents=True)
    for number, file in enumerate(tiny("qwen3_moe").iterdir()):
        shutil.copy(file, blobs / f"{number}")
        (model / file.name).symlink_to(f"../../blobs/{number}")
    (blobs / "license").write_text("free")
    (model / "LICENSE").symlink_to("../../blobs/license")
    quantized(model, tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text() == "free"
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    "changes, settings, message",
    [
        ({}, {"bits": 9}, "--bits 9: 2 to 8 were expected"),
        ({}, {"scheme": "W4A15"}, "--scheme W4A15: no such scheme; there are W2A16, W3A16"),
        ({}, {"scheme": "W4A16", "bits": 4}, "say the same thing"),
        ({}, {"scheme": "NVFP4A16", "group_size": 32}, "--group-size 32: NVFP4A16 has its own"),
        ({}, {"scheme": "FP8_BLOCK", "layout": "gptq"}, "gptq holds W4A16 and W8A16, not FP8_BLOCK"),
        (
            {},
            {"scheme": "FP8_BLOCK", "tp": 4},
            r"experts.gate: FP8_BLOCK has a scale for 128 rows, which does not divide 64",
        ),
        (
            {"moe_intermediate_size": 48},
            {"scheme": "MXFP4A16"},
            "experts.down: MXFP4A16 has a scale for 32 weights, which does not divide rows of 48",
        ),
        ({}, {"group_size": 100}, "--group-size 100: loaders take 32, 64, 128 or -1"),
        (
            {"moe_intermediate_size": 96},
            {},
            "layers.0.experts.down: --group-size 128 does not divide rows of 96; "
            "--group-size 32 or -1 would work",
        ),
        (
            {},
            {"tp": 4},
            r"experts.down: --group-size 128 does not divide rows of 64 \(256 / --tp 4\); "
            "--group-size 32 or 64 or -1 would work",
        ),
        ({}, {"tp": 8, "group_size": 32}, "--tp 8 does not divide 4 heads, or their 2 of keys and values"),
        (
            {"num_attention_heads": 6, "num_key_value_heads": 3},
            {"tp": 3},
            "--tp 3 does not divide its 256 channels",
        ),
        ({}, {"tp": 0}, "1 GPU or more"),
        ({"moe_intermediate_size": 36}, {"group_size": -1}, "packed 8 at a time, not rows of 36; write GGUF"),
        ({"moe_intermediate_size": 36}, {"group_size": -1, "bits": 8, "layout": "gptq"}, None),
        ({}, {"tp": 2}, None),
        ({"num_attention_heads": 8}, {"tp": 8, "group_size": 32}, None),
    ],
)
def test_sizes_that_no_loader_takes_are_refused(
    tiny, changes: dict[str, int], settings: dict[str, object], message: str | None
) -> None:
    if message is None:
        assert folder_of(tiny("qwen3_moe", **changes), **settings).plan.bytes > 0
        return
    with pytest.raises(PlanError, match=message):
        assert not folder_of(tiny("qwen3_moe", **changes), **settings).plan


def test_targets_are_checked_before_work_begins(tiny, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny("qwen3_moe"), tmp_path / "models" / "tiny"))
    made = folder_of(model)
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    for out, overwrite, message in (
        (tmp_path / "file", True, "is a file"),
        (tmp_path / "none" / "out", False, "no such folder"),
        (tmp_path / "full", False, "exists already"),
        (tmp_path / "full", True, "is not a folder that moequant made and is not replaced"),
        (model, True, "holds the model that is read"),
        (model.parent, True, "holds the model that is read"),
    ):
        with pytest.raises(OutputError, match=message):
            convert(made, out, overwrite=overwrite)
    assert (tmp_path / "full" / "thesis.tex").exists() and (model / "config.json").exists()
    (tmp_path / "empty").mkdir()
    convert(made, tmp_path / "empty")
    with pytest.raises(OutputError, match="exists already"):
        convert(made, tmp_path / "empty")
    (tmp_path / "empty" / "notes.txt").write_text("mine")
    convert(made, tmp_path / "empty", overwrite=True)
    assert (tmp_path / "empty" / "notes.txt").read_text() == "mine"
    assert not leftovers(tmp_path)


def test_what_is_in_the_way_is_said_before_any_work(tiny, tmp_path: Path) -> None:
    made, out = folder_of(tiny("mixtral")), tmp_path / "out"
    convert(made, out)
    record = json.loads((out / RECORD).read_text())
    for name in ("LICENSE", "tokenizer_config.json", "model.safetensors"):
        files = [each for each in record["files"] if each != name]
        (out / RECORD).write_text(json.dumps(record | {"files": files}))
        if name == "LICENSE":  # not in the new folder either
            (out / name).write_text("mine")
            made.check_target(out, made.plan)
            continue
        with pytest.raises(OutputError, match=rf"{name}: was not written by moequant.*move it away"):
            made.check_target(out, made.plan)
    made.check_target(tmp_path / "new", made.plan)


def test_nothing_is_left_when_it_fails(tiny, tmp_path: Path) -> None:
    model = models.build(tmp_path / "model", "qwen3_moe")
    out = tmp_path / "out"
    convert(folder_of(model), out)
    before = (out / "model.safetensors").read_bytes()
    damaged = Path(shutil.copytree(model, tmp_path / "damaged"))
    checkpoint = open_checkpoint(damaged)
    weight = next(w for w in checkpoint.weights if w.name == "layers.1.experts.up")
    with (damaged / "model.safetensors").open("r+b") as file:
        file.seek(weight.origin.stored[5].parts[""].begin)
        file.write(b"\xc0\x7f")  # NaN
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.experts.5.up_proj.weight .* NaN"):
        convert(folder_of(damaged), out, overwrite=True)
    assert (out / "model.safetensors").read_bytes() == before and not leftovers(tmp_path)


@pytest.mark.parametrize("suffix", ["weight_packed", "weight_scale"])
def test_verify_names_the_tensor_that_changed(tiny, tmp_path: Path, suffix: str) -> None:
    made = folder_of(tiny("olmoe"))
    name = f"model.layers.1.mlp.experts.6.down_proj.{suffix}"
    (tmp_path / "out").mkdir()
    written = made.write(tmp_path / "out", made.plan, packed(made, []))
    assert container.verify(written, made.checkpoint, made.plan, made.settings) == 6 * 256 * 256
    header = (tmp_path / "out" / "model.safetensors").read_bytes()
    length = int.from_bytes(header[:8], "little")
    begin = json.loads(header[8 : 8 + length])[name]["data_offsets"][0]
    with (tmp_path / "out" / "model.safetensors").open("r+b") as file:
        file.seek(8 + length + begin + 1)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 4]))
    with pytest.raises(VerifyError, match=f"bytes of {name} are not those"):
        made.verify(written, made.plan)


def test_the_writer_takes_nothing_but_the_plan(tmp_path: Path) -> None:
    shards = cut([Entry("a", "I32", (2,)), Entry("b", "BF16", (3,)), Entry("c", "F32", (100,))], 16)
    assert [shard.name for shard in shards] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    with pytest.raises(VerifyError, match="b came where a was planned"), ShardWriter(tmp_path, shards) as out:
        out.put("b", [b"123456"])
    with pytest.raises(VerifyError, match="7 bytes came"), ShardWriter(tmp_path, shards) as out:
        out.put("a", [b"1234", b"567"])
    with pytest.raises(VerifyError, match="tensor b was never written"), ShardWriter(tmp_path, shards) as out:
        out.put("a", [b"1234", b"5678"])
    with pytest.raises(OutputError, match="cannot be written"), ShardWriter(tmp_path / "no", shards) as out:
        out.put("a", [b"12345678"])


MEMORY = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from moequant.progress import peak_bytes
from tests.containers.folders.cases import quantized
quantized(Path(sys.argv[1]) / "small", Path(sys.argv[1]) / "warm", shard_bytes=1_000_000)
before = peak_bytes()
quantized(Path(sys.argv[1]) / "model", Path(sys.argv[1]) / "out", shard_bytes=10_000_000)
print((peak_bytes() - before) / 1e6)
"""


def test_memory_is_a_few_tensors(tmp_path: Path) -> None:
    """A checkpoint of 110 MB whose largest weight has 6 MB: neither it nor a shard is ever held."""
    models.build(tmp_path / "small", "qwen3_moe", num_hidden_layers=1)
    models.build(
        tmp_path / "model",
        "qwen3_moe",
        num_hidden_layers=10,
        num_experts=14,
        hidden_size=512,
        save={"max_shard_size": "40MB"},
    )
    size = sum(file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors")) / 1e6
    assert size > 105
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)],
        cwd=models.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout.split()[-1]) < 55, "MB more than a small model: 32 to 41, 68 with the output held"
