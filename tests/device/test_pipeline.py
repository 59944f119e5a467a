"""Every command on a device that does not mix with the CPU: the same statistics, plans and bytes.

On a device torch searches and rounds. On the CPU it does so where nothing is compiled, and must give the same
bytes; what is compiled is held against it in tests/native and tests/formats.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moequant import formats, library, native
from moequant.checkpoint import open_checkpoint
from moequant.forward.memory import chunks, layer_bytes
from moequant.forward.resources import Resources
from moequant.library import (
    CheckSettings,
    CompareSettings,
    PlanSettings,
    Report,
    RouteOutputs,
    RouteSettings,
    Settings,
)
from moequant.rounding import Options, round_to_hessian
from moequant.statistics.fisher import gather
from tests import models
from tests.device.pretend import register, waits

DEVICE = register()
FAMILIES = ["deepseek_v3", "gemma4", "gpt_oss", "nemotron_h", "qwen3_5_moe"]
"""Families with masks, caches, recurrences and buffers of their own."""

SMALL = {
    "num_hidden_layers": 2,
    "num_experts": 4,
    "hidden_size": 32,
    "moe_intermediate_size": 32,
    "head_dim": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.build(tmp_path_factory.mktemp("model"), "qwen3_moe", **SMALL)


@pytest.fixture(scope="module")
def ram(small: Path) -> int:
    """So little memory that experts are taken some at a time, and hidden states lie on the disk."""
    weights = [weight for weight in open_checkpoint(small).weights if weight.layer == 1]
    found = layer_bytes(weights, 1)
    assert len(chunks(weights, 1, found // 2)) > 2
    return found


@pytest.fixture(autouse=True)
def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU has no compiled loops either."""
    monkeypatch.setattr(native, "compiled", lambda: None)


def converted(model: Path, out: Path, device: str, text: Path, **changes: Any) -> Report:
    out.parent.mkdir(exist_ok=True)
    usual = {"calib": text, "calib_tokens": 1024, "eval": text, "eval_tokens": 512, "self_check": False}
    return library.convert(model, out, Settings(**(usual | changes), device=device))


def contents(path: Path) -> dict[str, bytes]:
    """The files of an output by name, without those that tell how it was made."""
    files = [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("*.json")]
    return {file.name: file.read_bytes() for file in files}


def test_route_and_plan(small: Path, text: Path, tmp_path: Path, ram: int) -> None:
    """In little memory as well."""
    stats, plans = [], []
    for number, resources in enumerate((Resources(), Resources(device=DEVICE), Resources(ram, DEVICE))):
        out = RouteOutputs(tmp_path / f"{number}.safetensors")
        found = library.route(small, RouteSettings(text, 1024, resources=resources), out).found
        assert sum(int(route.tokens.sum()) for route in found.stored.calibration.routes) == 2 * 2 * 1024
        stats.append((tmp_path / f"{number}.safetensors").read_bytes())
        wanted = PlanSettings(
            text, 1024, stats=tmp_path / "0.safetensors", effort="fast", resources=resources
        )
        plans.append(library.plan(small, wanted).found.curve)
    assert stats[0] == stats[1] == stats[2] and plans[0] == plans[1] == plans[2]


@pytest.mark.parametrize(
    "how",
    [{"type": "Q4_0"}, {"format": "safetensors", "bits": 4, "group_size": 32, "eval_tokens": 0}],
    ids=["gguf", "safetensors"],
)
def test_rounding_under_hessians(
    small: Path, text: Path, tmp_path: Path, ram: int, how: dict[str, Any]
) -> None:
    """On the device in little memory."""
    name = "out" if "format" in how else "out.gguf"
    one = converted(small, tmp_path / "cpu" / name, "cpu", text, **how)
    two = converted(small, tmp_path / "device" / name, DEVICE, text, **how, ram=ram)
    assert contents(tmp_path / "cpu" / name) == contents(tmp_path / "device" / name)
    assert one.comparison == two.comparison and one.plan == two.plan


def test_what_the_loss_feels(small: Path) -> None:
    """Gradients, for which torch's attention is not the CPU's kernel, and rounding under them."""
    checkpoint = open_checkpoint(small)
    ids = torch.randint(1, models.VOCAB, (2, 64), generator=torch.Generator().manual_seed(0))
    here, there = (gather(checkpoint, ids, device=device) for device in ("cpu", DEVICE))
    assert here.outputs.keys() == there.outputs.keys()
    for name, each in here.outputs.items():
        assert (there.outputs[name].cpu() - each).norm() < 1e-5 * each.norm()
    target, fisher = torch.randn(4, 32, 32), here.outputs["layers.1.experts.gate"]
    rows = torch.randn(4, 200, 32)
    given = target, rows.mT @ rows, fisher
    rounded = round_to_hessian("Q4_0", given[0], given[1], Options(two_sided=1), given[2])
    other = round_to_hessian(
        "Q4_0", *(each.to(DEVICE) for each in given[:2]), Options(two_sided=1), fisher.to(DEVICE)
    )
    assert torch.equal(rounded.data, other.data.cpu()) and torch.equal(rounded.damping, other.damping)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_with_passes_of_their_own(tiny, text: Path, tmp_path: Path, family: str) -> None:
    """The plain search, a comparison, and `check`."""
    model = tiny(family, max_position_embeddings=128)
    one, two = tmp_path / "cpu.gguf", tmp_path / "device.gguf"
    how: dict[str, Any] = {"type": "Q8_0", "effort": "fast", "calib_tokens": 256, "eval_tokens": 256}
    here, there = converted(model, one, "cpu", text, **how), converted(model, two, DEVICE, text, **how)
    assert one.read_bytes() == two.read_bytes()
    assert here.comparison == there.comparison is not None
    checked = [
        library.check(two, CheckSettings(model, device, sample=4, calib=text, tokens=512)).found
        for device in ("cpu", DEVICE)
    ]
    assert all(each.holds for each in checked) and checked[0].blocks == checked[1].blocks
    assert [tensor.experts for tensor in checked[0].tensors] == [
        tensor.experts for tensor in checked[1].tensors
    ]


def test_compare_in_little_memory(small: Path, text: Path, tmp_path: Path, ram: int) -> None:
    converted(small, tmp_path / "out.gguf", "cpu", text, type="Q4_0", effort="fast", eval_tokens=0)
    settings = CompareSettings(text, 1024)
    found = [
        library.compare(
            small, [tmp_path / "out.gguf"], replace(settings, resources=resources)
        ).found.measured[0]
        for resources in (Resources(), Resources(ram, DEVICE))
    ]
    assert found[0].comparison == found[1].comparison and found[0].routing == found[1].routing
    errors = [[each.error.tolist() for each in one.errors] for one in found]
    assert errors[0] == errors[1]


def test_a_gpu_is_not_waited_for_expert_by_expert(tmp_path: Path, text: Path) -> None:
    """Twice the experts, and nowhere twice the waits; rounding is tried on a few experts of each layer."""
    found = []
    for experts in (8, 16):
        changes = SMALL | {"num_hidden_layers": 1, "num_experts": experts}
        model = models.build(tmp_path / f"model-{experts}", "qwen3_moe", **changes)
        with waits() as counted:
            library.route(model, RouteSettings(text, 1024, resources=Resources(device=DEVICE)))
            how = {"format": "safetensors", "bits": 4, "group_size": 32}
            converted(model, tmp_path / f"out-{experts}", DEVICE, text, **how)
        found.append(counted)
    few, many = found
    assert sum(few.values()) > 100, "they are counted"
    grown = {where: (few[where], count) for where, count in many.items() if count > 1.4 * few[where] + 3}
    assert not grown


def test_the_plain_search_runs_there(small: Path, text: Path, tmp_path: Path) -> None:
    """Weights stay in the CPU's memory and cross tile by tile; errors of types are summed on the device."""
    weights, columns = torch.randn(3, 40, 256, dtype=torch.bfloat16), torch.rand(3, 256)
    for name in ("Q4_K", "IQ2_XS", "NVFP4_64"):
        with waits() as counted:
            there = formats.quantize(name, weights, columns, device=DEVICE)
        assert any("engine.py" in where for where, _ in counted), "tiles come back from there"
        assert there.device.type == "cpu" and torch.equal(there, formats.quantize(name, weights, columns))
    with waits() as counted:
        library.plan(small, PlanSettings(text, 1024, resources=Resources(device=DEVICE)))
    files = {Path(where.partition(":")[0]).name for where, _ in counted}
    assert files >= {"measure.py", "engine.py"}
