"""A config that moequant misreads is caught by transformers' own reading of the folder."""

from __future__ import annotations

import copy
import json
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers.quantizers import AutoHfQuantizer

from moequant.checkpoint import Checkpoint, load, open_checkpoint
from moequant.commands.convert import Settings, convert
from moequant.containers.gguf.container import GgufContainer
from moequant.errors import CheckpointError, MoequantError, VerifyError
from moequant.evaluate.reference import without_kernels
from moequant.evaluate.self_check import LIMIT, WEIGHT, Output, SelfChecks, self_check
from moequant.values import Role, Weight
from tests import models
from tests.containers.folders.cases import quantized
from tests.containers.folders.test_schemes import FAMILIES


def misread(checkpoint: Checkpoint, **values: object) -> Checkpoint:
    """The same folder with config values that it does not have."""
    config = copy.deepcopy(checkpoint.config)
    for key, value in values.items():
        setattr(config, key, value)
    return replace(checkpoint, config=config)


def tied(checkpoint: Checkpoint) -> Checkpoint:
    """The embedding taken for the head, over one that is stored."""
    weights = tuple(weight for weight in checkpoint.weights if weight.role is not Role.OUTPUT)
    shape = replace(checkpoint.shape, tied=True)
    return replace(misread(checkpoint, tie_word_embeddings=True), weights=weights, shape=shape)


def rope(base: float) -> Callable[[Checkpoint], Checkpoint]:
    return lambda one: misread(one, rope_parameters={**one.config.rope_parameters, "rope_theta": base})


PLANTED = {
    "rotary base": rope(500.0),
    "gating": lambda one: misread(one, norm_topk_prob=False),
    "epsilon of norms": lambda one: misread(one, rms_norm_eps=1e-4),
    "tied head over a stored one": tied,
}


@pytest.mark.parametrize("error", PLANTED)
def test_a_planted_error_is_caught(tiny, error: str) -> None:
    checkpoint = PLANTED[error](open_checkpoint(tiny("qwen3_moe")))
    with pytest.raises(VerifyError, match="transformers computes something else"):
        self_check(checkpoint, None)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_folder_that_is_read_right_passes(tiny, family: str) -> None:
    checkpoint = open_checkpoint(tiny(family))
    found = self_check(checkpoint, Output(load, exact=True))
    assert found.source is not None and found.source < LIMIT and found.decoded == 0


def test_what_a_config_says_of_running_it_is_ours_to_say(tiny, tmp_path: Path, text: Path) -> None:
    """Kernels of the Hub are code, which nobody fetches; results come in the shape that we read."""
    folder = tmp_path / "model"
    shutil.copytree(tiny("mixtral"), folder)
    models.edit_config(
        folder,
        _attn_implementation="somebody/kernels",
        _experts_implementation="somebody/experts",
        return_dict=False,
    )
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config._attn_implementation is None
    assert checkpoint.config._experts_implementation is None
    assert self_check(checkpoint, Output(load, exact=True)).source is not None
    given = Settings("Q8_0", text, 1024, effort="fast", eval=text, eval_tokens=1024, self_check=False)
    assert convert(folder, tmp_path / "a.gguf", given).summary()


@pytest.mark.parametrize("method", ["mxfp4", "fp8"])
def test_a_quantized_folder_brings_no_kernels_of_the_hub(method: str) -> None:
    """Where the package `kernels` is installed, transformers would fetch and run them."""
    config = AutoConfig.for_model("gpt_oss", quantization_config={"quant_method": method})
    without_kernels(config)
    found = AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True)
    assert found.quantization_config.dequantize


@pytest.mark.parametrize(("family", "same"), [("qwen3_moe", slice(None)), ("deepseek_v3", slice(2, 4))])
def test_routers_that_tie_are_said_and_excuse_nothing_else(
    tmp_path: Path, text: Path, family: str, same: slice
) -> None:
    """All scores of a router of zeros are the same: llama.cpp chooses other experts than transformers."""
    folder = models.build(tmp_path / "model", family)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if name.endswith("mlp.gate.weight") or "e_score_correction_bias" in name:
            tensors[name][same] = 0
    save_file(tensors, file, {"format": "pt"})
    given = Settings("F32", text, 1024, effort="fast", eval_tokens=0)
    found = convert(folder, tmp_path / "a.gguf", given).checked
    assert found is not None and "with transformers on the untouched folder: logits differ by" in found
    assert re.search(
        r"not compared with llama\.cpp: routers of layers .*1.* score experts exactly alike", found
    )
    checkpoint = misread(open_checkpoint(folder), rms_norm_eps=1e-4)
    with pytest.raises(VerifyError, match="transformers computes something else"):
        self_check(checkpoint, None)


@pytest.fixture
def one_expert(tmp_path: Path) -> Path:
    """The router of DeepSeek-V3 adds up the two best experts of a group."""
    lone = {"n_routed_experts": 1, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
    return models.build(tmp_path / "model", "deepseek_v3", **lone)


def test_what_nobody_can_run_is_not_written(one_expert: Path, tmp_path: Path, text: Path) -> None:
    with pytest.raises(VerifyError, match=r"transformers cannot run what config\.json describes"):
        convert(one_expert, tmp_path / "a.gguf", Settings("F32", eval_tokens=0))
    settings = Settings("Q4_0", text, 1024, effort="fast", eval_tokens=0, self_check=False)
    with pytest.raises(CheckpointError, match=r"transformers cannot run the model"):
        convert(one_expert, tmp_path / "b.gguf", settings)
    assert {path.suffix for path in tmp_path.glob("*.gguf*")} <= {".journal"}
    checkpoint = open_checkpoint(one_expert)
    with pytest.raises(VerifyError, match=r"transformers cannot run what config\.json describes"):
        self_check(checkpoint, Output(load, True))


def test_where_transformers_does_not_load_a_folder_llama_cpp_still_counts(
    files, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: object) -> None:
        raise ImportError("no library for it")

    monkeypatch.setattr("moequant.evaluate.self_check.reference", refuse)
    checkpoint, file = files("qwen3_moe", "F32")
    output = Output(GgufContainer(checkpoint).open(file).load, True, file, True)
    found = self_check(checkpoint, output)
    assert found.source is None and found.runtime is not None and found.runtime <= LIMIT
    assert re.search(
        r"not compared with transformers: .*no library.*; llama\.cpp computes the same", found.note
    )
    with pytest.raises(VerifyError, match=r"llama\.cpp computes something else"):
        self_check(misread(checkpoint, norm_topk_prob=False), replace(output, exact=False))


def doubled(weight: Weight) -> torch.Tensor:
    values = load(weight)
    return values * 2 if weight.name == "layers.1.experts.down" else values


def test_weights_that_are_written_wrong_are_caught(tiny) -> None:
    with pytest.raises(VerifyError, match="what was written computes something else"):
        self_check(open_checkpoint(tiny("mixtral")), Output(doubled, exact=True))


def test_what_is_known_of_the_original_excuses_no_output_after_the_first(tiny) -> None:
    """Nor do its first layers, which memory had room for, stand for the whole."""
    checkpoint = open_checkpoint(tiny("mixtral"))
    checks = SelfChecks(checkpoint, exact=True)
    rounded = checks.of(Output(doubled, exact=False))
    assert rounded.source is not None and rounded.decoded is None
    assert checks.of(Output(load, exact=True)).decoded == 0
    with pytest.raises(VerifyError, match="what was written computes something else"):
        checks.of(Output(doubled, exact=True))
    first = WEIGHT * sum(weight.numel for weight in checkpoint.weights if not weight.layer)
    assert checks.of(Output(load, exact=True), first).layers == (1, checkpoint.n_layers)
    assert checks.of(Output(load, exact=True)).layers is None


def test_too_little_memory_is_said_and_no_error(tiny) -> None:
    found = self_check(open_checkpoint(tiny("mixtral")), None, available=1000)
    assert found.source is None and "GB are needed" in found.note


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "qwen3_next", "lfm2_moe"])
def test_of_a_model_larger_than_memory_the_first_layers_are_checked(tiny, family: str) -> None:
    checkpoint = open_checkpoint(tiny(family))
    first = [weight for weight in checkpoint.weights if not weight.layer]
    room = WEIGHT * sum(weight.numel for weight in first)
    found = self_check(checkpoint, Output(load, exact=True), available=room)
    assert found.source is not None and found.source <= LIMIT and found.decoded == 0
    assert f"1 of {checkpoint.n_layers} layers, which fit" in found.note
    with pytest.raises(VerifyError, match="transformers computes something else"):
        eps = next(key for key in ("norm_eps", "rms_norm_eps") if hasattr(checkpoint.config, key))
        self_check(misread(checkpoint, **{eps: 1e-2}), None, available=room)


def test_the_report_says_it_and_the_option_leaves_it_out(tiny, tmp_path: Path, text: Path) -> None:
    given = {"type": "Q4_0", "calib": text, "calib_tokens": 1024, "eval_tokens": 0, "effort": "fast"}
    with_it = convert(tiny("mixtral"), tmp_path / "a.gguf", Settings(**given))
    without = convert(tiny("mixtral"), tmp_path / "b.gguf", Settings(**given, self_check=False))
    assert with_it.checked is not None and "compared with transformers" in with_it.checked
    assert "compared with transformers" in with_it.summary() and without.checked is None
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.parametrize("error", PLANTED)
def test_a_planted_error_keeps_a_quantized_file_from_its_name(
    tiny, tmp_path: Path, monkeypatch, text: Path, error: str
) -> None:
    monkeypatch.setattr("moequant.commands.job.open_model", lambda p: PLANTED[error](open_checkpoint(p)))
    given = {"calib": text, "calib_tokens": 1024, "eval_tokens": 0, "effort": "fast"}
    for out, more in (("q.gguf", {"type": "Q4_0"}), ("f", {"format": "safetensors", "group_size": 64})):
        # llama.cpp's graph has but one gating: there the file is refused before.
        with pytest.raises(MoequantError, match=r"transformers computes something else|norm_topk_prob"):
            convert(tiny("qwen3_moe"), tmp_path / out, Settings(**given, **more))
    # For --no-self-check, which goes on from there.
    assert {path.suffix for path in tmp_path.iterdir()} <= {".journal"}


@pytest.fixture
def dbrx(tmp_path: Path) -> Path:
    """As the release says it: the base of the rotation lies where transformers does not look."""
    folder = models.build(tmp_path / "dbrx", "dbrx")
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    raw = {key: value for key, value in raw.items() if key not in ("rope_theta", "rope_parameters")}
    raw["attn_config"]["rope_theta"] = 500_000
    path.write_text(json.dumps(raw))
    return folder


def test_what_transformers_is_known_to_misread_is_named_with_its_size(dbrx: Path) -> None:
    checkpoint = open_checkpoint(dbrx)
    assert checkpoint.config.rope_parameters["rope_theta"] == 500_000
    found = self_check(checkpoint, Output(load, exact=True))
    assert found.source is not None and found.source <= LIMIT
    assert re.search(r"no account of the release's rope_theta, which alone is [0-9.e-]+", found.note)


def test_a_known_difference_excuses_no_other(dbrx: Path) -> None:
    for base in (10_000.0, 400_000.0):
        checkpoint = rope(base)(open_checkpoint(dbrx))
        if base == 10_000.0:  # then both misread it alike: that the release is read right, its own test says
            assert self_check(checkpoint, None).differs is None
            continue
        with pytest.raises(VerifyError, match="transformers computes something else"):
            self_check(checkpoint, None)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        ("NVFP4A16", "transformers drops the number of NVFP4's experts, which alone is [0-9.e-]+"),
        ("W4A16", "transformers rounds decoded integers to the precision of their scales, which alone is"),
        ("MXFP4A16", "logits differ by [0-9.e-]+ at most$"),
    ],
)
def test_what_transformers_reads_otherwise_is_named_and_excuses_no_other(
    tiny, tmp_path: Path, family: str, scheme: str, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of NVFP4 its loader of experts leaves out the number of each matrix. And experts that it decodes stay
    in bfloat16: computed so, the logits of any folder are off."""
    quantized(tiny(family, **FAMILIES[family]), tmp_path / "model", scheme=scheme)
    checkpoint = open_checkpoint(tmp_path / "model")
    capfd.readouterr()
    found = self_check(checkpoint, None)
    assert found.source is not None and found.source <= 0.01 * LIMIT
    assert re.search(words, found.note)
    assert "Compressing" not in capfd.readouterr().err, "bars of other packages are not shown"
    for wrong in (rope(500.0), lambda one: misread(one, rms_norm_eps=1e-2)):
        with pytest.raises(VerifyError, match="transformers computes something else"):
            self_check(wrong(checkpoint), None)


@pytest.mark.parametrize("told", [None, "modelopt"])
def test_a_method_that_transformers_does_not_know_is_no_difference(
    tiny, tmp_path: Path, told: str | None
) -> None:
    """It takes the codes of ModelOpt's FP8 for numbers, which is no reason to refuse them."""
    folder = Path(shutil.copytree(tiny("mixtral"), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name]:
        tensors[name] = (tensors[name].float() * 100).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"] = torch.tensor(0.01)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    how = {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    if told:
        models.edit_config(folder, quantization_config={"quant_method": told, **how})
    else:
        (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": how}))
    found = self_check(open_checkpoint(folder), None)
    assert found.source is None and found.skipped is not None
    why = "does not decode weights of the quant_method modelopt" if told else "no other quantization_config"
    assert why in found.note


KEYS = {
    ("qwen3_moe", "qwen3moe.rope.freq_base"): 500.0,
    ("qwen3_moe", "qwen3moe.attention.layer_norm_rms_epsilon"): 1e-2,
    ("deepseek_v3", "deepseek2.expert_weights_scale"): 50.0,
}
"""Keys of a file and wrong values for them."""


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory: pytest.TempPathFactory, text: Path):
    """`files("qwen3_moe", "Q4_0")`: the model and a file of it, made once."""
    made: dict[tuple[str, str], Path] = {}

    def get(family: str, type_: str) -> tuple[Checkpoint, Path]:
        if (family, type_) not in made:
            out = tmp_path_factory.mktemp("files") / f"{family}-{type_}.gguf"
            convert(tiny(family), out, Settings(type_, text, 1024, effort="fast", eval_tokens=0))
            made[family, type_] = out
        return open_checkpoint(tiny(family)), made[family, type_]

    return get


@pytest.mark.parametrize("type_", ["F32", "Q4_0"])
@pytest.mark.parametrize(("family", "key"), KEYS)
def test_a_wrong_key_of_a_file_is_caught_by_llama_cpp(
    files, tmp_path: Path, family: str, key: str, type_: str
) -> None:
    """In quantized files what is off by more than llama.cpp's rounding of activations."""
    if type_ != "F32" and key.endswith("freq_base"):
        pytest.skip("random attention hardly looks at where tokens are")
    checkpoint, file = files(family, type_)
    raw = bytearray(file.read_bytes())
    at = raw.index(key.encode()) + len(key) + 4
    raw[at : at + 4] = struct.pack("<f", KEYS[family, key])
    (tmp_path / "wrong.gguf").write_bytes(raw)

    def output(path: Path) -> Output:
        return Output(GgufContainer(checkpoint).open(path).load, type_ == "F32", path, type_ == "F32")

    assert self_check(checkpoint, output(file)).runtime is not None
    with pytest.raises(VerifyError, match=r"llama\.cpp computes something else"):
        self_check(checkpoint, output(tmp_path / "wrong.gguf"))


def test_a_file_that_llama_cpp_refuses_does_not_get_its_name(files, tmp_path: Path) -> None:
    checkpoint, file = files("qwen3_moe", "F32")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes().replace(b"blk.1.attn_q.weight", b"blk.1.attn_z.weight"))
    with pytest.raises(MoequantError, match=r"llama\.cpp cannot run it"):
        self_check(checkpoint, Output(load, False, cut))
