"""Values that the fuzz suite found, each as a test of what refuses it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import typer

from moequant.checkpoint import open_checkpoint
from moequant.checkpoint.codecs.declared import read_config
from moequant.checkpoint.folder import Folder, belongs, folder_of
from moequant.cli.output import guarded
from moequant.commands.route import RouteSettings
from moequant.containers.gguf.export import export
from moequant.containers.gguf.families.base import Key
from moequant.containers.gguf.read import shards
from moequant.containers.gguf.sizes import Budget, parse_size
from moequant.errors import (
    LONGEST,
    CheckpointError,
    FamilyError,
    MoequantError,
    PlanError,
    VerifyError,
    few,
    foreign,
)
from moequant.evaluate.divergence import score_tokens
from moequant.forward.resources import Resources
from moequant.inspection.folder import inspect_folder
from moequant.plan import document
from tests import models
from tests.checkpoint.codecs.files import one


def test_messages_are_one_line_of_bounded_length() -> None:
    told = str(MoequantError("a\nb" * 5000))
    assert len(told) <= LONGEST and "\n" not in told


def test_of_a_long_list_of_names_ten_are_shown() -> None:
    assert few(range(10)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    assert few(range(12)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"
    for asked in (lambda: Budget.of_preset("none"), lambda: read_config({"quant_method": "none"})):
        with pytest.raises(MoequantError, match=r"and \d+ more"):
            asked()


@pytest.mark.parametrize("pattern", ["(a+)+$", "(.*)*x", "(a|ab|b)*c", ".*.*.*.*.*.*.*z", "((x{2,}){2,})+"])
def test_a_pattern_that_may_take_for_ever(pattern: str) -> None:
    for key, entry in (("ignore", f"re:{pattern}"), ("modules_to_not_convert", pattern)):
        with pytest.raises(CheckpointError, match="may take for ever"):
            read_config({"quant_method": "fp8", key: [entry]})


@pytest.mark.parametrize(
    "pattern",
    [
        r"re:.*mlp\.gate$",
        "re:model.layers.*.mlp.experts.*.(gate|up)_proj",
        "re:^(?!.*(mlp|experts)).*$",
        "re:(",
        "*",
    ],
)
def test_patterns_as_releases_have_them(pattern: str) -> None:
    assert (
        read_config({"quant_method": "fp8", "ignore": [pattern]}).left_out.find("model.layers.0.mlp.x")
        is None
    )


@pytest.mark.parametrize(
    "change",
    [{"config_groups": [1]}, {"config_groups": {"a": 3}}, {"config_groups": {"a": {"targets": 7}}},
     {"ignore": 5}, {"sparsity_config": [1]}, {"transform_config": "x"},
     {"config_groups": {"a": {"targets": ["Linear"], "weights": {"group_size": "x", "strategy": "group"}}}}],
)  # fmt: skip
def test_a_quantization_config_of_odd_values(tmp_path: Path, change: dict[str, object]) -> None:
    parts = {"a.weight": torch.zeros(4, 4, dtype=torch.int8), "a.weight_scale": torch.ones(4, 1)}
    with pytest.raises(CheckpointError, match="quantization_config"):
        one(tmp_path, parts, {"quant_method": "compressed-tensors", **change})


def test_what_others_raise_is_ours_and_our_own_passes() -> None:
    with (
        pytest.raises(FamilyError, match=r"config.json is odd \(3\)"),
        foreign(FamilyError, "config.json is odd"),
    ):
        raise KeyError(3)
    with pytest.raises(PlanError, match="own"), foreign(FamilyError, "config.json is odd"):
        raise PlanError("own")


@pytest.mark.parametrize("fill", [torch.ones, np.ones])
def test_a_lack_of_memory_is_no_mistake_of_a_model(
    fill: Callable[[int], object], capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> None:
        with foreign(FamilyError, "config.json is odd"):
            fill(1 << 52)

    with pytest.raises(typer.Exit) as ended:
        guarded(run)
    assert ended.value.exit_code == 1
    told = capsys.readouterr().err
    assert told.startswith("moequant: memory ran out (") and told.count("\n") == 1
    with pytest.raises(RuntimeError, match="a mistake"):
        guarded(mistaken)


def mistaken() -> None:
    """What no lack of memory says."""
    raise RuntimeError("a mistake")


@pytest.mark.parametrize("device", ["", "gpu", "meta", "mps", "cpu:7", "cuda:99", "\x1b[31m"])
def test_a_device_that_is_not_there(device: str) -> None:
    with pytest.raises(PlanError, match="--device"):
        Resources(device=device)


@pytest.mark.parametrize("size", ["9" * 400, "9" * 400 + "G", "0.0000001K", "99999999999T"])
def test_a_size_that_no_disk_has(size: str) -> None:
    with pytest.raises(PlanError, match="size"):
        parse_size(size)


def test_more_bits_than_a_type_has() -> None:
    with pytest.raises(PlanError, match="bits per weight"):
        Budget.of_bpw(1e18)


@pytest.mark.parametrize("ratio", [float("nan"), float("inf"), -1.0, 1e300])
def test_a_fair_share_that_is_none(ratio: float) -> None:
    with pytest.raises(PlanError, match="--min-tokens-per-expert"):
        RouteSettings(ratio=ratio)


@pytest.mark.parametrize(
    ("kind", "value"),
    [("u32", -1), ("u32", 1 << 32), ("u32", 1.0), ("u32", True), ("f32", float("nan")), ("f32", 1e39),
     ("bool", 1), ("str", None), ("u32s", [1, -1])],
)  # fmt: skip
def test_a_key_that_its_type_cannot_hold(kind: str, value: object) -> None:
    with pytest.raises(FamilyError, match="GGUF's key some"):
        Key("some.key", kind, value)  # type: ignore[arg-type]


def test_a_model_that_computes_no_numbers_passes_no_comparison() -> None:
    logits, target = torch.randn(4, 8), torch.zeros(4, dtype=torch.int64)
    damaged = logits.clone()
    damaged[2, 3] = float("nan")
    for pair, name in (((damaged, logits), "baseline"), ((logits, damaged), "candidate")):
        with pytest.raises(VerifyError, match=name):
            score_tokens(*pair, target)


def test_an_infinite_epsilon(tmp_path: Path) -> None:
    folder = models.build(tmp_path / "model", "qwen3", num_hidden_layers=1, hidden_size=64)
    models.edit_config(folder, rms_norm_eps=float("inf"))
    with pytest.raises(MoequantError, match="rms_norm_eps"):
        open_checkpoint(folder)


@pytest.mark.parametrize("layers", [10_001, 1 << 31, 1 << 62, 1e18, float("inf"), float("nan")])
def test_layers_without_end_are_refused_before_any_is_looked_at(tmp_path: Path, layers: float) -> None:
    folder = models.build(tmp_path / "model", "qwen3", num_hidden_layers=1, hidden_size=64)
    models.edit_config(folder, num_hidden_layers=layers)
    with pytest.raises(FamilyError, match=r"num_hidden_layers = .*more than any model has"):
        open_checkpoint(folder)
    assert any("more than any model has" in line for line in inspect_folder(folder_of(folder)).missing)


@pytest.mark.parametrize("value", [float("-inf"), float("nan"), -1, 10**40])
def test_numbers_that_no_rotation_has(tmp_path: Path, value: float) -> None:
    folder = models.build(tmp_path / "model", "deepseek_v3", num_hidden_layers=1)
    rope = {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "rope_theta": 1e4}
    models.edit_config(folder, rope_parameters={**rope, "original_max_position_embeddings": value})
    with pytest.raises(MoequantError):
        export(open_checkpoint(folder))


def test_a_name_that_promises_shards_without_end(tmp_path: Path) -> None:
    (tmp_path / "x-00001-of-99999.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="99,999 shards"):
        shards(tmp_path / "x-00001-of-99999.gguf")


def test_groups_of_a_recurrent_layer_that_are_none(tmp_path: Path) -> None:
    folder = models.build(tmp_path / "model", "nemotron_h")
    models.edit_config(folder, n_groups=-4, mamba_n_groups=-4)
    (told,) = inspect_folder(folder_of(folder)).missing
    assert told == "nemotron_h: config.json: GGUF's key ssm.group_count would be -4, which is no u32"


@pytest.mark.parametrize("key", ["mlp_layer_types", "layer_types"])
def test_a_list_of_fewer_layers_than_there_are(tmp_path: Path, key: str) -> None:
    folder = models.build(tmp_path / "model", "glm4_moe_lite")
    raw = json.loads((folder / "config.json").read_text())
    del raw["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps({**raw, key: list(raw["mlp_layer_types"])[:1]}))
    with pytest.raises(MoequantError):
        open_checkpoint(folder)
    assert inspect_folder(folder_of(folder)).missing


def test_a_plan_that_is_a_pipe(tmp_path: Path) -> None:

    os.mkfifo(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="not a regular file"):
        document.read(tmp_path / "plan.json", ())


def test_links_out_of_the_model_folder(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (tmp_path / "secret").write_text("key")
    (model / "own").write_text("text")
    (model / "in").symlink_to("own")
    (model / "out").symlink_to(tmp_path / "secret")
    assert (
        belongs(model / "own", model) and belongs(model / "in", model) and not belongs(model / "out", model)
    )


def test_a_shard_of_a_name_that_no_file_has(tmp_path: Path) -> None:
    from moequant.checkpoint.folder import INDEX
    from moequant.checkpoint.headers import read_headers

    for name in ("x" * 300 + ".safetensors", "\\ud800.safetensors"):
        (tmp_path / INDEX).write_text(f'{{"weight_map": {{"a": "{name}"}}}}')
        with pytest.raises(CheckpointError, match="was expected"):
            read_headers(Folder(tmp_path, {}))
