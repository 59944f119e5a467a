"""vLLM's own code finds every module's scheme in the config of a mixed folder, and none where none is."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from moequant.checkpoint import Checkpoint, open_checkpoint
from moequant.containers.folders import schemes
from moequant.containers.folders.container import FolderContainer
from moequant.containers.folders.plan import KEPT, FolderSettings, kept_dtype
from moequant.containers.folders.write import quantization
from moequant.plan import from_json
from moequant.plan.folders import FolderMenu
from moequant.values import Plan, Role
from tests.clients.test_vllm import ENVIRONMENT

SCRIPT = Path(__file__).with_name("vllm_schemes.py")
EXPERTS = {"mixtral": "block_sparse_moe.experts", "qwen3_moe": "mlp.experts", "deepseek_v3": "mlp.experts"}
QKV = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}


def plans(checkpoint: Checkpoint) -> list[Plan]:
    """Experts of the first layer that has some stay, the others have a scheme; attention stays, or has one of
    its own."""
    settings = FolderSettings()
    weights = FolderContainer(checkpoint, settings).checkpoint.weights
    menu = FolderMenu.of(checkpoint, settings)
    first = min(w.layer for w in weights if w.is_expert and w.layer is not None)
    found = []
    for attention in (None, "FP8_DYNAMIC", "FP8"):
        kinds = {weight.name: kept_dtype(weight) for weight in weights}
        for weight in menu.choosable.values():
            if weight.is_expert and weight.layer != first:
                kinds[weight.name] = "W4A16_G32"
            elif attention and weight.role in (Role.ATTN_Q, Role.ATTN_K, Role.ATTN_V, Role.ATTN_OUT):
                kinds[weight.name] = attention
        found.append(from_json(json.dumps(kinds), weights, made=menu.given))
    return found


def expected(checkpoint: Checkpoint, plan: Plan, family: str) -> dict[str, tuple[str, Any]]:
    """By module as vLLM names it: its class, and what should be found."""
    kinds = {choice.weight: choice.format for choice in plan.choices}
    modules: dict[str, tuple[str, Any]] = {"lm_head": ("ParallelLMHead", None)}
    for weight in checkpoint.weights:
        told = None
        if kinds[weight.name] not in KEPT:
            scheme = schemes.find(kinds[weight.name])
            kind = "int" if scheme.kind == "integers" else "float"
            told = [scheme.bits, kind, scheme.format]
        own = f"model.layers.{weight.layer}"
        if weight.is_expert and len(weight.shape) == 3:
            for name in ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"):
                modules[f"{own}.{EXPERTS[family]}.0.{name}"] = ("RoutedExperts", told)
        elif weight.role is Role.ATTN_Q and family != "deepseek_v3":
            modules[f"{own}.self_attn.qkv_proj"] = ("QKVParallelLinear", told)
        elif weight.role is Role.ATTN_OUT:
            modules[f"{own}.self_attn.o_proj"] = ("RowParallelLinear", told)
        elif weight.role is Role.KV_B:
            modules[f"{own}.self_attn.kv_b_proj"] = ("ColumnParallelLinear", told)
        elif weight.role is Role.ROUTER:
            gate = EXPERTS[family].replace("experts", "gate")
            modules[f"{own}.{gate}"] = ("ReplicatedLinear", None)
    return modules


def test_vllm_reads_what_was_planned(tiny, tmp_path: Path) -> None:
    if not (ENVIRONMENT / "complete").is_file():
        pytest.skip(f"vLLM's environment {ENVIRONMENT} is absent: tests/clients/vllm_env.sh makes it")
    cases, wanted = [], []
    for family in EXPERTS:
        checkpoint = open_checkpoint(tiny(family))
        for plan in plans(checkpoint):
            modules = expected(checkpoint, plan, family)
            config = quantization(checkpoint, plan, FolderSettings())
            asked = {name: kind for name, (kind, _) in modules.items()}
            cases.append({"config": config, "fused": QKV, "asked": asked})
            wanted.append({name: told for name, (_, told) in modules.items()})
            assert {None, "pack-quantized"} <= {told and told[2] for _, told in modules.values()}
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    run = subprocess.run(
        [ENVIRONMENT / "bin" / "python", SCRIPT, tmp_path / "cases.json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert json.loads(run.stdout.strip().splitlines()[-1]) == wanted
