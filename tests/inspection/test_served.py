"""`fit` of folders: every byte counted, GPUs that share weights, and the largest mixture that fits."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from moequant.checkpoint import open_checkpoint
from moequant.commands.convert import Settings, convert, open_job
from moequant.errors import PlanError
from moequant.inspection.served import AS_IT_IS, MIXED, FolderFit, Gpus, fit_folder
from moequant.runtimes.vllm.memory import RESERVE, Serving
from moequant.values import Role
from tests import served_shapes
from tests.cli.test_cli import run

GIB = 2**30
LAYERS = 6
QUICK = Settings(format="safetensors", effort="fast", calib_tokens=2048, eval_tokens=0, self_check=False)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served_shapes.qwen3_30b(tmp_path_factory.mktemp("served") / "qwen", LAYERS)


@pytest.fixture(scope="module")
def found(qwen: Path) -> FolderFit:
    return fit_folder(qwen, Gpus(6 * GIB), Serving(32768))


def test_one_gpu_holds_all_of_it_by_hand(found: FolderFit) -> None:
    """The first layers of Qwen3-30B-A3B: 4 heads of 128 for keys and values, 8 of 128 experts of 768."""
    by = {each.name: each for each in found.candidates}
    whole = by[AS_IT_IS].gpu
    experts = LAYERS * 128 * 3 * 768 * 2048
    assert whole.experts == 2 * experts and whole.experts + whole.weights == by[AS_IT_IS].file_bytes
    assert whole.kv == 32768 * LAYERS * 2 * 4 * 128 * 2
    assert by["W4A16"].gpu.experts == experts // 2 + experts // 128 * 2
    assert by["W4A16"].gpu.weights == whole.weights
    embedding = 2 * 151936 * 2048
    assert whole.read == whole.weights - embedding + whole.experts / 16
    assert 0 < whole.compute < GIB and whole.reserve == RESERVE
    for each in found.candidates:
        assert each.lacking == max(0, each.gpu.total - found.gpus.room)
        spare = found.gpus.room - each.gpu.total
        assert (each.gpu.tokens >= 32768) is (spare >= 0)
        assert each.convert is None or "--format safetensors" in each.convert


def test_the_best_is_the_largest_mixture_that_fits(found: FolderFit, qwen: Path) -> None:
    assert found.best is not None and found.best.name == MIXED
    mixed = found.best
    uniform = [each for each in found.candidates if each.fits and each is not mixed]
    assert uniform and all(mixed.kl < each.kl for each in uniform)
    assert 0 <= found.gpus.room - mixed.gpu.total < 0.02 * found.gpus.room, "little is left"
    words = shlex.split(mixed.convert)
    size = words[words.index("--size") + 1]
    assert open_job(qwen, Settings(format="safetensors", size=size)).size == mixed.file_bytes == int(size)


def test_two_gpus_share(found: FolderFit, qwen: Path) -> None:
    two = {e.name: e for e in fit_folder(qwen, Gpus(6 * GIB), Serving(32768, tp=2)).candidates}
    eight = {e.name: e for e in fit_folder(qwen, Gpus(6 * GIB), Serving(32768, tp=8)).candidates}
    one = {each.name: each for each in found.candidates}
    for name in ("W4A16_G32", "NVFP4A16", AS_IT_IS):
        assert two[name].gpu.experts == one[name].gpu.experts / 2
        assert one[name].gpu.weights / 2 < two[name].gpu.weights < one[name].gpu.weights * 0.51
        assert two[name].gpu.kv == one[name].gpu.kv / 2
    assert eight[AS_IT_IS].gpu.kv == one[AS_IT_IS].gpu.kv / 4, "four heads of keys: each is on two of eight"
    assert "W4A16" in two and "W4A16" not in eight, "groups of 128 do not divide 96"
    made = eight["FP8_DYNAMIC"]
    assert made.convert.endswith("--tp 8") and "--tensor-parallel-size 8" in made.command


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_a_finished_folder_takes_what_its_scheme_was_said_to(
    tiny, tmp_path: Path, text: Path, family: str
) -> None:
    """Ours, read again by its headers: the same bytes on a GPU as were counted before it was made."""
    model, out = tiny(family), tmp_path / "out"
    gpus, serving = Gpus(24 * GIB), Serving(256)
    before = {each.name: each for each in fit_folder(model, gpus, serving).candidates}
    convert(model, out, replace(QUICK, scheme="W4A16_G32", calib=text))
    (after,) = fit_folder(out, gpus, serving).candidates
    assert after.name == AS_IT_IS and after.kl is None and after.convert is None
    said = before["W4A16_G32"]
    shapes = 16 * sum(w.matrices for w in open_checkpoint(model).weights if w.is_expert)
    assert abs(after.gpu.experts - said.gpu.experts) <= shapes
    assert (after.gpu.kv, after.gpu.weights) == (said.gpu.kv, said.gpu.weights)


@pytest.mark.parametrize("layout", ["gptq", "awq", "mxfp4"])
def test_other_layouts_are_counted(tiny, tmp_path: Path, text: Path, layout: str) -> None:
    model, out = tiny("gpt_oss" if layout == "mxfp4" else "mixtral"), tmp_path / "out"
    asked = {"scheme": "MXFP4A16"} if layout == "mxfp4" else {"bits": 4, "format": layout}
    convert(model, out, replace(QUICK, calib=text, **asked))
    (found,) = fit_folder(out, Gpus(24 * GIB), Serving(256)).candidates
    bits = (
        8
        * found.gpu.experts
        / sum(w.numel for w in open_checkpoint(model).weights if w.role in (Role.GATE, Role.UP, Role.DOWN))
    )
    assert 4.1 < bits < 4.8


def test_latent_attention_is_whole_on_every_gpu(tiny) -> None:
    checkpoint = open_checkpoint(tiny("deepseek_v3"))
    one, two = (fit_folder(tiny("deepseek_v3"), Gpus(GIB), Serving(256, tp=tp)).candidates for tp in (1, 2))
    config = checkpoint.config
    per_token = 2 * (config.kv_lora_rank + config.qk_rope_head_dim) * config.num_hidden_layers
    assert one[0].gpu.kv == two[0].gpu.kv == 256 * per_token


def test_text_and_json(tiny) -> None:
    asked = ("fit", tiny("mixtral"), "--format", "safetensors", "--vram", "2GiB", "--ctx", 256, "--tp", 2)
    done = run(*asked)
    assert done.returncode == 0, done.stderr
    assert "best that fits: as it is" in done.stdout and "--tensor-parallel-size 2" in done.stdout
    told = json.loads(run(*asked, "--json").stdout)
    assert told["format"] == "safetensors" and told["gpus"]["count"] == 2 and told["best"] == AS_IT_IS
    assert {"W4A16", "NVFP4A16"} <= {each["name"] for each in told["candidates"]}
    for each in told["candidates"]:
        parts = ("experts", "weights", "kv", "compute", "reserve")
        assert each["gpu"]["total"] == sum(each["gpu"][part] for part in parts)
    small = run(*asked[:4], "--vram", "1GiB", "--ctx", 256)
    assert small.returncode == 1 and small.stderr == ""
    assert re.search(r"^nothing fits: .* needs .* more on each GPU; ", small.stdout, re.M)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--vram", "0"], "--vram 0: vLLM serves from GPU memory"),
        (["--ram", "4G"], "--ram does not go with --format safetensors"),
        (["--min-speed", "3"], "--min-speed does not go with --format safetensors"),
        (["--cache-type", "q8_0"], "--cache-type q8_0: --format safetensors has auto or fp8"),
        (["--tp", "3"], "--tp 3"),
        (["--ctx", "1000000"], "is more than the model's context"),
        (["--schemes", "W4"], "--schemes W4: no such scheme"),
        (["--utilization", "1.5"], "--utilization 1.5: a share above 0"),
        (["--gpu", "7.0"], "--gpu 7: none of W4A16_G32"),
        (["--format", "gguf"], "--ram is missing"),
        (["--format", "gguf", "--tp", "2", "--ram", "4G"], "--tp does not go with --format gguf"),
        (["--format", "gguf", "--cache-type", "fp8", "--ram", "4G"], "--cache-type fp8: --format gguf has"),
    ],
)
def test_refused_in_one_line(tiny, options: list[str], says: str) -> None:
    done = run("fit", tiny("mixtral"), "--vram", "4GiB", "--ctx", 256, "--format", "safetensors", *options)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and says in done.stderr, done.stderr


@pytest.mark.parametrize("wrong", [{"ctx": -1}, {"ctx": 8, "tp": 0}, {"ctx": 8, "cache_type": "f16"}])
def test_a_load_that_is_none(wrong: dict[str, object]) -> None:
    with pytest.raises(PlanError, match="was expected"):
        Serving(**wrong)


@pytest.mark.parametrize("path", ["model.gguf", "someone/model:model.gguf"])
def test_a_file_is_no_folder(tmp_path: Path, path: str) -> None:
    (tmp_path / "model.gguf").touch()
    done = run("fit", path if ":" in path else tmp_path / path, "--vram", "4GiB", "--format", "safetensors")
    assert done.returncode == 1 and "vLLM serves folders" in done.stderr, done.stderr


def test_what_nobody_described_is_refused(tiny) -> None:
    with pytest.raises(PlanError, match="attention whose cache in vLLM is not known"):
        fit_folder(tiny("qwen3_next"), Gpus(GIB), Serving(256))


def test_a_short_context_is_taken_whole(tiny) -> None:
    found = fit_folder(tiny("mixtral", max_position_embeddings=2048), Gpus(6 * GIB), Serving())
    assert found.serving.ctx == 2048 and "--max-model-len 2048" in found.candidates[0].command
