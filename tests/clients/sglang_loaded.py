"""Runs in SGLang's environment: what SGLang's own loader has made of the experts of folders.

    python sglang_loaded.py FOLDER...

SGLang's kernels need a GPU, and so nothing is computed: its model is built on a CPU, its loader fills the
parameters, and what would then prepare these for a kernel is left out. The last line of the output has, by
folder, the parameters of experts: shape, type, and a checksum for each expert; or the error, where SGLang
refuses a folder.

Two packages that SGLang imports cannot be had for a CPU. Of torchvision two operators are declared, which
nobody calls; of vLLM the rotation of attention's inputs, which nobody calls either.
"""

from __future__ import annotations

import json
import sys
import tempfile
import types
import zlib
from typing import Any

import torch


def stand_in() -> Any:
    """See the module. What it returns must live as long as the process."""
    vision = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        vision.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for name in ("vllm", "vllm._custom_ops"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["vllm._custom_ops"].rotary_embedding = None  # type: ignore[attr-defined]
    return vision


def arguments(folder: str) -> Any:
    """How a server of one CPU would be started."""
    from sglang.srt.server_args import ServerArgs

    return ServerArgs(
        model_path=folder,
        device="cpu",
        skip_tokenizer_init=True,
        attention_backend="torch_native",
        dtype="bfloat16",
    )


def prepare(folder: str) -> None:
    """One process that is all of the ranks."""
    from sglang.srt.distributed import parallel_state
    from sglang.srt.layers.dp_attention import initialize_dp_attention
    from sglang.srt.runtime_context import get_parallel, publish

    publish(arguments(folder), role="scheduler")
    meeting = tempfile.mkdtemp()
    parallel_state.init_distributed_environment(1, 0, f"file://{meeting}/point", 0, "gloo")
    parallel_state.initialize_model_parallel(backend="gloo")
    ranks = ("tp", "pp", "moe_ep", "moe_tp", "moe_dp", "attn_tp", "attn_cp")
    get_parallel().override_permanently(**{f"{name}_rank": 0 for name in ranks})
    initialize_dp_attention(arguments(folder))


def loaded(folder: str) -> dict[str, Any]:
    """The parameters of the experts of every layer."""
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_loader.loader import DefaultModelLoader

    DefaultModelLoader.postprocess_weights = staticmethod(lambda model, device: None)
    config = ModelConfig.from_server_args(arguments(folder))
    model = DefaultModelLoader(LoadConfig()).load_model(
        model_config=config, device_config=DeviceConfig("cpu")
    )
    return {
        name: {
            "shape": list(each.shape),
            "dtype": str(each.dtype),
            "crc32": [
                zlib.crc32(one.detach().contiguous().view(-1).view(torch.uint8).numpy()) for one in each
            ],
        }
        for name, each in model.named_parameters()
        if ".experts." in name
    }


def main(folders: list[str]) -> None:
    """See the module."""
    kept = stand_in()
    prepare(folders[0])
    found: dict[str, Any] = {}
    for folder in folders:
        try:
            found[folder] = loaded(folder)
        except Exception as error:
            found[folder] = f"{type(error).__name__}: {error}"
    print("\n" + json.dumps(found))
    del kept


if __name__ == "__main__":
    main(sys.argv[1:])
