"""Runs in vLLM's environment: the cache that vLLM itself asks for, from its own classes, without a GPU.

    python vllm_memory.py CASES.json

CASES: objects with `ctx`, `in_flight` (tokens), and `layers`, each with `heads` (of keys, on one GPU),
`width` (of a head), `kind` ("full", "latent" or "sliding") and `window`. Prints the bytes of each, and vLLM's
defaults, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any


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

    defaults = [CacheConfig().gpu_memory_utilization, CacheConfig.DEFAULT_BLOCK_SIZE]
    cases = [needed(case) for case in json.loads(Path(sys.argv[1]).read_text())]
    print(json.dumps({"bytes": cases, "defaults": defaults}))
