"""Runs in vLLM's environment: which values vLLM's own models hold once its loader has read our folders.

    python vllm_places.py CASES.json

CASES is a list of families, each with `model`, a folder in floats, `folders` that were made of it, and
whether vLLM drafts with it (`draft`). vLLM builds its model on a CPU and fills it. The choice of kernels is
left out, and so is what would then prepare weights for one: nothing is computed. Every weight is decoded by
the compressed-tensors package and compared with the one that vLLM holds of `model`.

The last line of the output has, by folder, for the model and the draft model, an error of vLLM as text, or

- `weights`: by scheme, how many numbers vLLM holds in it, and of all modules the largest squared error over
  the square of the model's, with its name;
- `others`: names of parameters without a scheme that are not what vLLM holds of the model.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

QUANTIZATION = "vllm.model_executor.layers.quantization"
EXPERTS = f"{QUANTIZATION}.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe"
LINEARS = f"{QUANTIZATION}.compressed_tensors.schemes.compressed_tensors"
ORACLE = "vllm.model_executor.layers.fused_moe.oracle"
SIDES = {"w13": 2, "w2": 1}
"""Tensors of all experts, and how many of an expert's products each holds."""


class Anything(type):
    """A class that has whatever is asked of it."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class Vision(ModuleType):
    """In the place of torchvision, whose builds do not match this torch. Nobody calls what is in it."""

    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})


class VisionFinder:
    """Finds every module of torchvision."""

    @staticmethod
    def find_spec(name: str, *_: Any) -> ModuleSpec | None:
        return ModuleSpec(name, VisionFinder()) if name.partition(".")[0] == "torchvision" else None

    @staticmethod
    def create_module(spec: ModuleSpec) -> ModuleType:
        return Vision(spec.name)

    @staticmethod
    def exec_module(_: ModuleType) -> None:
        pass


class NoKernel:
    """In the place of a kernel."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass


class OtherPlatform:
    """The platform, which says that it is no CPU where vLLM only wants to know that."""

    def __init__(self, own: Any) -> None:
        self._own = own

    def is_xpu(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


def without_kernels() -> None:
    """Nobody looks for a kernel: for a CPU there is none."""

    def chosen(where: str, name: str, kinds: str, kind: str = "MARLIN") -> None:
        backend = getattr(import_module(f"{ORACLE}.{name}"), kinds)[kind]
        module = import_module(where)
        (function,) = (
            each for each in vars(module) if each.startswith("select_") and each.endswith("backend")
        )
        setattr(module, function, lambda *_, **__: (backend, None))

    chosen(f"{EXPERTS}_wna16", "int_wna16", "WNA16MoEBackend")
    chosen(f"{EXPERTS}_w4a4_nvfp4", "nvfp4", "NvFp4MoeBackend")
    chosen(f"{EXPERTS}_w8a8_fp8", "fp8", "Fp8MoeBackend")
    chosen(f"{EXPERTS}_w8a8_int8", "int8", "Int8MoeBackend", "TRITON")
    floats = "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method"
    chosen(floats, "unquantized", "UnquantizedMoeBackend", "CPU")
    released, mxfp4 = (import_module(name) for name in (f"{QUANTIZATION}.mxfp4", f"{ORACLE}.mxfp4"))
    released.select_mxfp4_moe_backend = lambda *_, **__: (mxfp4.Mxfp4MoeBackend.EMULATION, None)
    import_module(f"{EXPERTS}_wna16").check_moe_marlin_supports_config = lambda *_, **__: True
    for scheme, found in {
        "wNa16": ("choose_mp_linear_kernel", lambda *_: NoKernel),
        "w4a4_mxfp4": ("init_mxfp4_linear_kernel", NoKernel),
        "w4a4_nvfp4": ("init_nvfp4_linear_kernel", NoKernel),
        "w8a8_fp8": ("init_fp8_linear_kernel", NoKernel),
        "w8a8_int8": ("init_int8_linear_kernel", NoKernel),
    }.items():
        module = import_module(f"{LINEARS}_{scheme}")
        setattr(module, *found)
        module.expose_input_quant_key = lambda *_: None


def on_any_platform() -> None:
    """What vLLM asks of a platform before it builds a model."""
    from vllm.model_executor.layers.fused_moe import config
    from vllm.model_executor.models import registry
    from vllm.platforms.cpu import CpuPlatform

    config.current_platform = OtherPlatform(config.current_platform)  # of experts without a gate
    registry._run_in_subprocess = lambda function: function()  # it would import vLLM anew for every class
    own = CpuPlatform.get_attn_backend_cls.__func__

    def dense(cls: Any, selected: Any, attn_selector_config: Any, **more: Any) -> str:
        return own(cls, selected, attn_selector_config._replace(use_sparse=False), **more)

    CpuPlatform.get_attn_backend_cls = classmethod(dense)


def remember_schemes() -> None:
    """Every module keeps what its weight is stored as."""
    from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors

    cls = compressed_tensors.CompressedTensorsConfig
    own = cls.get_quant_method

    def told(self: Any, layer: Any, prefix: str) -> Any:
        method = own(self, layer, prefix)
        name = prefix
        if hasattr(layer, "ckpt_down_proj_name"):
            name = f"{prefix}.0.{layer.ckpt_down_proj_name}"
        scheme = self.get_scheme_dict(layer, name) if hasattr(layer, "weight_loader") else None
        if scheme:
            layer.stored_as = scheme["weights"], scheme.get("format") or self.quant_format
        return method

    cls.get_quant_method = told


def loaded(folder: str, draft: bool) -> Any:
    """vLLM's model of a folder, or the one that drafts for it."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    config = EngineArgs(
        model=folder,
        dtype="bfloat16",
        max_model_len=64,
        enforce_eager=True,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        use_tqdm_on_load=False,
        speculative_config={"method": "mtp", "num_speculative_tokens": 1} if draft else None,
        limit_mm_per_prompt={"image": 0, "video": 0, "audio": 0},
    ).create_engine_config()
    with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
        if not parallel_state.model_parallel_is_initialized():
            meeting = tempfile.mkdtemp()
            parallel_state.init_distributed_environment(1, 0, f"file://{meeting}/point", 0, "gloo")
            parallel_state.initialize_model_parallel(backend="gloo")
        told = config.speculative_config.draft_model_config if draft else config.model_config
        model = initialize_model(vllm_config=config, model_config=told)
        for tensor in model.parameters():  # what the loader forgets is nothing that could be meant
            tensor.data.fill_(float("nan") if tensor.dtype in (torch.bfloat16, torch.float32) else 0)
        get_model_loader(config.load_config).load_weights(model, told)
    return model


@dataclass(frozen=True)
class Part:
    """Rows of a module that one of the checkpoint's has, of one expert if it has some.

    `of` is the parameter that holds the same rows in a model of floats.
    """

    of: str
    expert: int | None
    rows: slice
    stored: dict[str, Tensor]
    args: Any
    format: str

    def error(self, reference: dict[str, Tensor], module: str) -> tuple[int, float]:
        """How many numbers it has, and their squared error over the square of those that vLLM holds of the
        model."""
        whole = reference[f"{module}.{self.of}"]
        exact = (whole if self.expert is None else whole[self.expert])[self.rows].float()
        error = (self._values().float() - exact).square().sum() / exact.square().sum()
        return exact.numel(), error.item()

    def _values(self) -> Tensor:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationScheme

        if self.args.block_structure:  # which this version of the package takes for groups
            rows, columns = self.args.block_structure
            scales = self.stored["weight_scale"].float()
            squares = scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
            return self.stored["weight"].float() * squares
        if self.format == "pack-quantized" and 32 % self.args.num_bits:
            # vLLM's words are dense, those of this version of the package are not.
            codes = dense(self.stored["weight_packed"], self.args.num_bits)
            scales = self.stored["weight_scale"].float()
            return codes * scales.repeat_interleave(codes.shape[1] // scales.shape[1], 1)
        scheme = QuantizationScheme(targets=["Linear"], weights=self.args, format=self.format)
        compressor = BaseCompressor.get_value_from_registry(self.format)
        values: Tensor = compressor.decompress(self.stored, scheme)["weight"]
        return values


def dense(words: Tensor, bits: int) -> Tensor:
    """Codes that follow each other in the bits of a row, whatever words they cross."""
    places = torch.arange(32)
    stream = (words.long()[..., None] >> places & 1).flatten(-2)
    count = stream.shape[-1] // bits
    codes = stream[:, : count * bits].unflatten(-1, (count, bits)) << torch.arange(bits)
    return codes.sum(-1).float() - 2 ** (bits - 1)


def parts_of(module: Any) -> Iterator[Part]:
    """All that a module holds in a scheme; none where it has none."""
    kind = type(getattr(module, "quant_method", None)).__name__
    if kind == "GptOssMxfp4MoEMethod":
        from compressed_tensors.quantization import preset_name_to_scheme

        released = preset_name_to_scheme("MXFP4A16", ["Linear"]).weights
        for side in SIDES:  # rows of gate and up in turn
            yield from experts(module, side, 1, (released, "mxfp4-pack-quantized"))
    elif kind == "CompressedTensorsLinearMethod":
        tensors = {name: each.data for name, each in module.named_parameters(recurse=False)}
        widths = getattr(module, "logical_widths", None) or module.output_partition_sizes
        yield from cut(tensors, list(widths), ("weight", None), module.stored_as)
    elif kind.startswith("CompressedTensors") and kind.endswith("MoEMethod"):
        gated = module.quant_method.moe.is_act_and_mul
        for side, products in SIDES.items():
            yield from experts(module, side, products if gated else 1, module.stored_as)


def experts(module: Any, side: str, products: int, stored_as: tuple[Any, str]) -> Iterator[Part]:
    """One product or two of every expert."""
    named = {name.removeprefix(f"{side}_"): each for name, each in module.named_parameters(recurse=False)
             if name.startswith(f"{side}_")}  # fmt: skip
    for expert in range(len(next(iter(named.values())))):
        tensors = {name: each.data[expert] for name, each in named.items()}
        codes = tensors.get("weight_packed", tensors.get("weight"))
        assert codes is not None
        widths = [len(codes) // products] * products
        yield from cut(tensors, widths, (f"{side}_weight", expert), stored_as)


def cut(
    tensors: dict[str, Tensor], widths: list[int], of: tuple[str, int | None], stored_as: tuple[Any, str]
) -> Iterator[Part]:
    """Rows of so many each, as compressed-tensors stores a module."""
    args, stored_in = stored_as
    at = 0
    for number, width in enumerate(widths):
        stored = {}
        for name, tensor in tensors.items():
            if name in ("weight", "weight_packed"):
                key = "weight_packed" if "fp4" in stored_in else name
                stored[key] = tensor[at : at + width]
            elif name == "weight_scale" and tensor.ndim == 2:
                side = sum(widths) // len(tensor)  # rows that share a scale
                stored[name] = tensor[at // side : (at + width) // side]
            elif name in ("weight_scale", "weight_global_scale"):
                stored[name] = tensor.reshape(-1)[number : number + 1]
        if stored_in == "pack-quantized":
            columns = stored["weight_packed"].shape[1] * 32 // args.num_bits
            stored["weight_shape"] = torch.tensor([width, columns])
        yield Part(*of, slice(at, at + width), stored, args, stored_in)
        at += width


def compared(model: Any, reference: dict[str, Tensor]) -> dict[str, Any]:
    """See the module."""
    weights: dict[str, list[Any]] = {}
    rounded = set()
    for name, module in model.named_modules():
        for part in parts_of(module):
            rounded.add(name)
            found = weights.setdefault(f"{part.format} {part.args.num_bits}", [0, 0.0, ""])
            numbers, error = part.error(reference, name)
            found[0] += numbers
            if not error <= found[1]:
                found[1:] = [error, f"{name}.{part.of} {part.expert} {part.rows.start}"]
    others = []
    for name, each in model.named_parameters():
        module, _, own = name.rpartition(".")
        if module in rounded and not own.endswith("bias"):
            continue
        if ".attn." in name or name.endswith(("_scale", "_zero_point")):
            continue  # of a cache that could be quantized
        same = name in reference and torch.equal(each.nan_to_num(), reference[name].nan_to_num())
        others += [] if same else [name]
    return {"weights": weights, "others": others}


def main(path: str) -> None:
    """See the module."""
    import transformers.image_utils  # noqa: F401  asks whether there is a torchvision

    sys.meta_path.append(VisionFinder())
    for prepare in (without_kernels, on_any_platform, remember_schemes):
        prepare()
    found: dict[str, Any] = {}
    for family in json.loads(Path(path).read_text()):
        for draft in (False, True) if family["draft"] else (False,):
            reference = {name: each.data for name, each in loaded(family["model"], draft).named_parameters()}
            for folder in family["folders"]:
                told = found.setdefault(folder, {})
                try:
                    told["draft" if draft else "model"] = compared(loaded(folder, draft), reference)
                except Exception as error:
                    told["draft" if draft else "model"] = f"{type(error).__name__}: {error}"
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1")
    main(sys.argv[1])
