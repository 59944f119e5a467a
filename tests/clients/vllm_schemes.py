"""Runs in vLLM's environment: what vLLM's own code reads out of the configs of folders, without loading one.

    python vllm_schemes.py CASES.json

CASES: objects with `config` (a `quantization_config`), `fused` (fused modules of vLLM, and their parts)
and `asked`: names of modules as vLLM has them, each with the name of its class. Of every case it prints bits,
type and format of each, null for what stays as it is.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
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


if __name__ == "__main__":
    print(json.dumps([schemes(case) for case in json.loads(Path(sys.argv[1]).read_text())]))
