"""Runs in vLLM's environment: what vLLM's own code says of configs and caches, without a model or a GPU.

    python vllm_code.py CASES.json

CASES has two lists. Of `schemes` each has `config` (a `quantization_config`), `fused` (fused modules of
vLLM, and their parts) and `asked`: names of modules as vLLM has them, each with the name of its class. Of
every case it prints bits, type and format of each, null for what stays as it is.

Of `caches` each has `ctx`, `in_flight` (tokens), and `layers`, each with `heads` (of keys, on one GPU),
`width` (of a head), `kind` ("full", "latent" or "sliding") and `window`. It prints the bytes of each, from
vLLM's own classes, and vLLM's defaults.

One process: importing vLLM takes longer than all that it says.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def schemes(case: dict[str, Any]) -> dict[str, Any]:
    """By module, its scheme."""
    import torch
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )

    config = CompressedTensorsConfig.from_config(case["config"])
    config.packed_modules_mapping = case["fused"]
    config._add_fused_moe_to_target_scheme_map()
    found = {}
    for name, kind in case["asked"].items():
        module = type(kind, (torch.nn.Module,), {})()
        told = config.get_scheme_dict(module, name)
        weights = told and told["weights"]
        found[name] = weights and [weights.num_bits, weights.type, told["format"]]
    return found


def spec(layer: dict[str, Any]) -> Any:
    """The cache of one layer, in bf16."""
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec

    told = {"block_size": 16, "num_kv_heads": layer["heads"], "head_size": layer["width"]}
    if layer["kind"] == "sliding":
        return SlidingWindowSpec(**told, dtype=torch.bfloat16, sliding_window=layer["window"])
    kind = MLAAttentionSpec if layer["kind"] == "latent" else FullAttentionSpec
    return kind(**told, dtype=torch.bfloat16)


def needed(case: dict[str, Any]) -> int:
    """Bytes of one request with its context full."""
    from vllm.v1.core import kv_cache_utils

    config = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=case["ctx"]),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        max_in_flight_tokens=case["in_flight"],
    )
    specs = {f"layers.{number}": spec(layer) for number, layer in enumerate(case["layers"])}
    return int(kv_cache_utils.max_memory_usage_bytes(config, specs.values()))


if __name__ == "__main__":
    from vllm.config import CacheConfig

    asked = json.loads(Path(sys.argv[1]).read_text())
    told = {
        "schemes": [schemes(case) for case in asked["schemes"]],
        "caches": [needed(case) for case in asked["caches"]],
        "defaults": [CacheConfig().gpu_memory_utilization, CacheConfig.DEFAULT_BLOCK_SIZE],
    }
    print(json.dumps(told))
