"""Runs in vLLM's environment: what vLLM's own loader has made of folders whose experts no CPU can compute.

    python vllm_loaded.py FOLDER…

Every folder is loaded in a child, forked of a process that has imported vLLM, which takes long.
Loading ends where vLLM would hand the weights to a kernel. The last line of the output has, of every folder,
by layer with experts: of static FP8 the numbers that scale inputs of every expert and what vLLM makes of
them, the scales of weights, and a checksum of the codes of every expert; of AWQ a checksum of each tensor of
every expert, and under the name of every other module in AWQ those of its tensors.
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


def crc32(tensor: Any) -> int:
    """Of the bytes that a tensor holds."""
    import torch

    return zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def static_fp8(module: Any) -> dict[str, Any]:
    """The experts of a layer in static FP8."""
    from vllm.model_executor.layers.quantization.utils.fp8_utils import process_fp8_input_tensor_strategy_moe

    both = process_fp8_input_tensor_strategy_moe(module.w13_input_scale, module.w2_input_scale, False)
    return {
        "inputs": [module.w13_input_scale.tolist(), module.w2_input_scale.tolist()],
        "used": [float(each.max()) for each in both],
        "scales": [module.w13_weight_scale.tolist(), module.w2_weight_scale.tolist()],
        "codes": [list(map(crc32, weight)) for weight in (module.w13_weight.data, module.w2_weight.data)],
    }


def awq(module: Any) -> dict[str, Any]:
    """The experts of a layer in AWQ."""
    return {
        suffix: [list(map(crc32, getattr(module, f"{side}_{suffix}").data)) for side in ("w13", "w2")]
        for suffix in ("qweight", "qzeros", "scales")
    }


EXPERTS = {"CompressedTensorsW8A8Fp8MoEMethod": static_fp8, "AutoAWQMoEMethod": awq}
"""By what computes the experts of a layer, what is told of them."""


def loaded(folder: str) -> dict[str, Any]:
    """Layers with experts in their order, and other modules in AWQ by their names."""
    import torch
    import vllm
    from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
    from vllm.model_executor.layers.quantization import auto_awq
    from vllm.model_executor.model_loader import base_loader, utils

    found: dict[str, Any] = {"layers": [], "linears": {}}

    def look(model: torch.nn.Module, *_: Any) -> None:
        for name, module in model.named_modules():
            kind = type(getattr(module, "quant_method", None)).__name__
            if kind in EXPERTS:
                found["layers"].append(EXPERTS[kind](module))
            elif kind == "AutoAWQMarlinLinearMethod":
                tensors = (module.qweight, module.qzeros, module.scales)
                found["linears"][name] = [crc32(each.data) for each in tensors]
        raise LoadedError

    for place in (utils, base_loader):
        place.process_weights_after_loading = look
    # It looks for a kernel first, and finds one for AWQ on CPUs with AMX alone.
    auto_awq.select_wna16_moe_backend = lambda *_, **__: (WNA16MoEBackend.CPU, None)
    try:
        vllm.LLM(folder, dtype="bfloat16", max_model_len=64, enforce_eager=True, skip_tokenizer_init=True)
    except LoadedError:
        pass
    return found


def forked(folder: str) -> dict[str, Any]:
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
    found: dict[str, Any] = json.loads(said)
    return found


if __name__ == "__main__":
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_LOGGING_LEVEL="ERROR",
        HF_HUB_OFFLINE="1",
    )
    import vllm

    _ = vllm.LLM  # imported when it is first named: here, before the forks

    print("\n" + json.dumps([forked(folder) for folder in sys.argv[1:]]))
