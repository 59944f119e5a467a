"""Checkpoints, GGUF files and quantized folders side by side, in any mix."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moequant.checkpoint import open_checkpoint
from moequant.commands.compare import CompareSettings, run
from moequant.commands.convert import Settings, convert
from moequant.errors import MoequantError
from moequant.evaluate.open_source import open_source
from moequant.forward.resources import Resources
from moequant.report.compare import compare_value
from tests.containers.folders.cases import own_decoder, quantized


@pytest.fixture(scope="module")
def made(tiny, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Versions of one model by how they are stored."""
    model, folder = tiny("mixtral"), tmp_path_factory.mktemp("made")
    quantized(model, folder / "compressed-tensors", bits=4, group_size=128)
    quantized(model, folder / "gptq", layout="gptq", bits=8, group_size=64)
    quantized(model, folder / "awq", layout="awq", bits=4, group_size=128)
    convert(model, folder / "GGUF.gguf", Settings("Q4_K_M", text, 1024, eval_tokens=0, effort="fast"))
    return {path.stem: path for path in folder.iterdir()}


def settings(text: Path, **changes: object) -> CompareSettings:
    return CompareSettings(text, 1024, resources=Resources(threads=1, batch_tokens=512), **changes)


def test_every_kind_in_one_comparison(tiny, made: dict[str, Path], text: Path) -> None:
    kinds = ["GGUF", "compressed-tensors", "gptq", "awq"]
    found = run(tiny("mixtral"), [made[kind] for kind in kinds], settings(text))
    assert [source.kind for source in found.candidates] == kinds
    for source, one in zip(found.candidates[1:], found.measured[1:], strict=True):
        assert one.comparison.kl_mean.value > 0 and len(one.routing) == 2
        for weight in one.errors:  # attention, router, norms and embeddings of a folder stay as they are
            assert bool(weight.error.any()) == weight.role.is_expert, weight.weight
            assert (source.types[weight.weight] == source.kind) == weight.role.is_expert
    four, eight, same = (one.comparison.kl_mean.value for one in found.measured[1:])
    assert eight < four, "8 bits lose less than 4"
    assert same == pytest.approx(four, rel=0.02), "the same codes"
    assert len(found.differences) == 6, "every pair"
    sizes = [sum(file.stat().st_size for file in made[kind].glob("*.safetensors")) for kind in kinds[1:]]
    assert [source.bytes for source in found.candidates[1:]] == sizes
    told = compare_value(found)
    assert told["activations"] == "llama.cpp; as they are"
    assert [one["activations"] for one in told["candidates"]] == ["llama.cpp", *["as they are"] * 3]


def test_experts_are_read_alone_and_compared_alike(tiny, made: dict[str, Path], text: Path) -> None:
    """Some experts of every kind are those of the whole; in one byte of memory they come one by one."""
    checkpoint = open_checkpoint(tiny("mixtral"))
    for path in (*made.values(), tiny("mixtral")):
        provider = open_source(path, checkpoint).provider
        assert provider is not None
        for weight in checkpoint.weights:
            if weight.is_expert:
                assert torch.equal(provider(weight)[1:3], provider(weight.of(range(1, 3)))), (path, weight)
    some = Resources(ram=1, threads=1, batch_tokens=512)
    one, two = (
        run(tiny("mixtral"), [*made.values()], replace(settings(text), resources=each)).measured
        for each in (settings(text).resources, some)
    )
    assert [each.comparison for each in one] == [each.comparison for each in two]
    assert [each.routing for each in one] == [each.routing for each in two]


def test_a_folder_is_decoded_by_compressed_tensors_as_by_us(tiny, made: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(tiny("mixtral"))
    source = open_source(made["compressed-tensors"], checkpoint)
    ours = own_decoder(made["compressed-tensors"])
    assert source.provider is not None
    for weight in checkpoint.weights:
        assert torch.equal(source.provider(weight), ours.load(weight)), weight.name


def test_a_folder_as_the_baseline_and_beside_itself(tiny, made: dict[str, Path], text: Path) -> None:
    packed, file = made["compressed-tensors"], made["GGUF"]
    found = run(packed, [packed, file], settings(text, model=tiny("mixtral"), sample_tokens=2))
    assert found.measured[0].comparison.kl_max == 0.0 and found.measured[0].comparison.same_top == 1.0
    assert found.measured[1].comparison.kl_mean.value > 0
    assert found.ran[0].samples == found.ran[1].samples and found.ran[2].serving is not None
    assert set(found.record.origins[0].files) >= {"config.json", "model.safetensors"}


def test_wrong_pairs_with_folders_are_one_line(
    tiny, made: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    packed = made["compressed-tensors"]
    quantized(tiny("mixtral", num_hidden_layers=3), tmp_path / "deeper", bits=4, group_size=128)
    for base, candidate, match in (
        (packed, made["GGUF"], "name it with --model"),
        (tiny("mixtral"), tmp_path / "deeper", r"num_hidden_layers is 3, not 2"),
        (tiny("qwen3_moe"), packed, r"family is mixtral, not qwen3_moe"),
        (tiny("mixtral", vocab_size=400), packed, r"vocab_size is 384, not 400"),
    ):
        with pytest.raises(MoequantError, match=match) as error:
            run(base, [candidate], settings(text))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("layout", ["compressed-tensors", "gptq", "awq"])
def test_of_several_files_of_a_folder_the_whole_one_is_read(
    tiny, made: dict[str, Path], tmp_path: Path, layout: str
) -> None:
    """As transformers does, and as of sources: an old index does not count beside `model.safetensors`."""
    checkpoint, out = open_checkpoint(tiny("mixtral")), tmp_path / "out"
    shutil.copytree(made[layout], out)
    stored = load_file(out / "model.safetensors")
    old = {name: torch.zeros_like(values) for name, values in stored.items()}
    save_file(old, out / "old.safetensors", {"format": "pt"})
    index = {"weight_map": dict.fromkeys(old, "old.safetensors")}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    sources = [open_source(path, checkpoint) for path in (made[layout], out)]
    assert sources[0].bytes == sources[1].bytes
    for weight in checkpoint.weights:
        one, two = (source.provider(weight) for source in sources if source.provider is not None)
        assert torch.equal(one, two) and one.any(), weight.name
