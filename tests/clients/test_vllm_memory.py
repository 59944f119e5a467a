"""The KV cache that `fit` counts, beside what vLLM's own classes ask for; skips without its environment."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from moequant.checkpoint import Checkpoint, open_checkpoint
from moequant.runtimes.vllm.memory import BLOCK, UTILIZATION, Serving, cache_bytes
from moequant.values import Role
from tests import served_shapes
from tests.clients.test_vllm import ENVIRONMENT

SCRIPT = Path(__file__).with_name("vllm_memory.py")
BATCH = 300


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


def test_the_cache_is_what_vllm_asks_for(tiny, tmp_path: Path) -> None:
    if not (ENVIRONMENT / "complete").is_file():
        pytest.skip(f"vLLM's environment {ENVIRONMENT} is absent: tests/clients/vllm_env.sh makes it")
    models = {name: open_checkpoint(tiny(name)) for name in ("mixtral", "deepseek_v3", "gpt_oss")}
    models["qwen3"] = open_checkpoint(served_shapes.qwen3_30b(tmp_path / "qwen", 4))
    asked = [(name, Serving(ctx, tp=tp)) for name in models for ctx in (100, 1000, 32768) for tp in (1, 2, 8)]
    cases = [
        {"ctx": each.ctx, "in_flight": 2 * BATCH, "layers": layers(models[name], each)}
        for name, each in asked
    ]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    told = subprocess.run(
        [ENVIRONMENT / "bin" / "python", SCRIPT, tmp_path / "cases.json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert told.returncode == 0, told.stderr[-3000:]
    theirs = json.loads(told.stdout.strip().splitlines()[-1])
    assert theirs["defaults"] == [UTILIZATION, BLOCK]
    assert [cache_bytes(models[name], each, BATCH) for name, each in asked] == theirs["bytes"]
    assert any(w.role is Role.KV_A for w in models["deepseek_v3"].weights)
    assert len(set(models["gpt_oss"].config.layer_types)) == 2, "windows are among the cases"
