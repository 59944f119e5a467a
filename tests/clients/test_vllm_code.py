"""vLLM's own code, asked without a model: the scheme of every module of a mixed folder, and the KV cache that
`fit` counts. Skips without vLLM's environment."""

from __future__ import annotations

import json
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
from moequant.runtimes.vllm.memory import BLOCK, UTILIZATION, Serving, cache_bytes
from moequant.values import Plan, Role
from tests import served_shapes
from tests.clients.environments import VLLM

SCRIPT = Path(__file__).with_name("vllm_code.py")
EXPERTS = {"mixtral": "block_sparse_moe.experts", "qwen3_moe": "mlp.experts", "deepseek_v3": "mlp.experts"}
BATCH = 300
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


def layers(checkpoint: Checkpoint, serving: Serving) -> list[dict[str, Any]]:
    """Every layer's cache as vLLM describes it, from the config alone."""
    config = checkpoint.config
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    found = []
    for kind in kinds:
        if getattr(config, "kv_lora_rank", None):
            width = config.kv_lora_rank + config.qk_rope_head_dim
            found.append({"heads": 1, "width": width, "kind": "latent"})
            continue
        heads = max(1, config.num_key_value_heads // serving.tp)
        name = "sliding" if "sliding" in kind else "full"
        found.append(
            {"heads": heads, "width": config.head_dim, "kind": name, "window": config.sliding_window}
        )
    return found


@pytest.fixture(scope="module")
def planned(tiny) -> list[tuple[Checkpoint, Plan, dict[str, tuple[str, Any]]]]:
    """Folders' plans, and the modules that are expected of each."""
    found = []
    for family in EXPERTS:
        checkpoint = open_checkpoint(tiny(family))
        found += [(checkpoint, plan, expected(checkpoint, plan, family)) for plan in plans(checkpoint)]
    return found


@pytest.fixture(scope="module")
def served(tiny, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Checkpoint, Serving]]:
    """Models, and how each is served."""
    models = [open_checkpoint(tiny(name)) for name in ("mixtral", "deepseek_v3", "gpt_oss")]
    models.append(open_checkpoint(served_shapes.qwen3_30b(tmp_path_factory.mktemp("served") / "qwen", 4)))
    assert any(w.role is Role.KV_A for w in models[1].weights)
    assert len(set(models[2].config.layer_types)) == 2, "windows are among the cases"
    return [(each, Serving(ctx, tp=tp)) for each in models for ctx in (100, 1000, 32768) for tp in (1, 2, 8)]


@pytest.fixture(scope="module")
def told(planned, served, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What vLLM says of all of them, in one process."""
    VLLM.required()
    configs = [
        {
            "config": quantization(checkpoint, plan, FolderSettings()),
            "fused": QKV,
            "asked": {name: kind for name, (kind, _) in modules.items()},
        }
        for checkpoint, plan, modules in planned
    ]
    caches = [
        {"ctx": each.ctx, "in_flight": 2 * BATCH, "layers": layers(model, each)} for model, each in served
    ]
    cases = tmp_path_factory.mktemp("vllm") / "cases.json"
    cases.write_text(json.dumps({"schemes": configs, "caches": caches}))
    said: dict[str, Any] = VLLM.told(SCRIPT, cases)
    return said


def test_vllm_reads_what_was_planned(planned, told: dict[str, Any]) -> None:
    wanted = [{name: scheme for name, (_, scheme) in modules.items()} for *_, modules in planned]
    assert all({None, "pack-quantized"} <= {each and each[2] for each in one.values()} for one in wanted)
    assert told["schemes"] == wanted


def test_the_cache_is_what_vllm_asks_for(served, told: dict[str, Any]) -> None:
    assert told["defaults"] == [UTILIZATION, BLOCK]
    assert [cache_bytes(model, each, BATCH) for model, each in served] == told["caches"]
