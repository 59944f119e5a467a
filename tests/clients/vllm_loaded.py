"""Runs in vLLM's environment: what vLLM's own loader has made of the experts of a folder in static FP8.

    python vllm_loaded.py FOLDER…

Every folder is loaded in a child, forked of a process that has imported vLLM, which takes long.
No kernel for this scheme runs on a CPU, so that loading ends where vLLM would hand the weights to one. The
last line of the output has, by folder and layer, the numbers that scale inputs of every expert and what vLLM
makes of them, the scales of weights, and a checksum of the codes of every expert.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import zlib
from typing import Any


class LoadedError(Exception):
    """Everything is loaded."""


def loaded(folder: str) -> list[dict[str, Any]]:
    """Of every layer with experts, in their order."""
    import torch
    import vllm
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w8a8_fp8 as theirs,
    )
    from vllm.model_executor.layers.quantization.utils.fp8_utils import process_fp8_input_tensor_strategy_moe
    from vllm.model_executor.model_loader import utils

    found: list[dict[str, Any]] = []

    def look(model: torch.nn.Module, *_: Any) -> None:
        for module in model.modules():
            if isinstance(getattr(module, "quant_method", None), theirs.CompressedTensorsW8A8Fp8MoEMethod):
                both = process_fp8_input_tensor_strategy_moe(
                    module.w13_input_scale, module.w2_input_scale, False
                )
                found.append(
                    {
                        "inputs": [module.w13_input_scale.tolist(), module.w2_input_scale.tolist()],
                        "used": [float(each.max()) for each in both],
                        "scales": [module.w13_weight_scale.tolist(), module.w2_weight_scale.tolist()],
                        "codes": [
                            [zlib.crc32(expert.view(torch.uint8).numpy().tobytes()) for expert in weight]
                            for weight in (module.w13_weight.data, module.w2_weight.data)
                        ],
                    }
                )
        raise LoadedError

    from vllm.model_executor.model_loader import base_loader

    for place in (utils, base_loader):
        place.process_weights_after_loading = look
    try:
        vllm.LLM(folder, dtype="bfloat16", max_model_len=64, enforce_eager=True, skip_tokenizer_init=True)
    except LoadedError:
        pass
    return found


def forked(folder: str) -> list[dict[str, Any]]:
    """The same, of a child."""
    reading, writing = os.pipe()
    if not (child := os.fork()):
        try:
            with os.fdopen(writing, "w") as answer:
                answer.write(json.dumps(loaded(folder)))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        said = answer.read()
    if os.waitpid(child, 0)[1]:
        sys.exit(1)
    found: list[dict[str, Any]] = json.loads(said)
    return found


if __name__ == "__main__":
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_LOGGING_LEVEL="ERROR",
        HF_HUB_OFFLINE="1",
    )
    import vllm  # noqa: F401  before the forks

    print("\n" + json.dumps([forked(folder) for folder in sys.argv[1:]]))
