"""What a quantization config says of inputs: the numbers that a runtime rounds them to before it multiplies.

| said by | inputs |
|---|---|
| compressed-tensors | `input_activations` of the module's config group |
| ModelOpt | its algorithm; calibrated scales are `input_scale`, which multiplies |
| `fp8` (transformers, DeepSeek) | `activation_scheme`; with `weight_block_size` a scale for a block |
| Mistral | `qscheme_act` |
| `fbgemm_fp8` | a scale a token, of at most `activation_scale_ub` |
| MXFP8 | a power of two for 32 channels |
| Quark | `input_tensors` of the module's entry, else of all |
| GPTQ, AWQ, auto-round, MXFP4 of gpt-oss | as they are, unless `act_bits` says otherwise |

What no config says is not guessed: `Inputs.untold` has the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from moequant.checkpoint.codecs.declared import Declared

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Inputs:
    """What becomes of the inputs of a weight.

    `numbers` are what they are rounded to, "" for nothing. `group` channels of a token share a scale that is
    made as the model runs; 0 are all of a token, and -1 is for no such scale. `power`: these scales are
    powers of two. `most`: a larger input does not make a scale larger.

    `number` comes from calibration: FP8 is multiplied by it, NVFP4's scales are divided by it. It is stored
    under one of `endings`, behind the module's name; `inverse`: what is stored is 1 / `number`.

    `untold` is why a config does not tell, empty where it does. `elsewhere` is which runtime does otherwise,
    and how: that is not computed.
    """

    numbers: Literal["", "FP8", "int8", "NVFP4", "MXFP4"] = ""
    group: int = -1
    power: bool = False
    most: float | None = None
    endings: tuple[str, ...] = ()
    inverse: bool = False
    number: float | None = None
    untold: str = ""
    elsewhere: str = ""

    def __str__(self) -> str:
        aside = self.untold or self.elsewhere
        return self._words() + (f" ({aside})" if aside else "")

    def _words(self) -> str:
        if not self.numbers:
            return "as they are"
        if self.group < 0:
            return f"{self.numbers}, one scale from calibration"
        scales = f"a scale for {self.group} channels of a token" if self.group else "a scale a token"
        also = " and one number from calibration" if self.endings else ""
        return f"{self.numbers}, {scales}{', a power of two' if self.power else ''}{also}"


AS_THEY_ARE = Inputs()

_PER_TOKEN = Inputs("FP8", 0)
_PER_TENSOR = replace(_PER_TOKEN, elsewhere="vLLM's experts: a scale for all tokens of a batch")
"""transformers has a scale a token here, and so have vLLM's linears where CUTLASS has FP8 (both read)."""

_MXFP4_FORM = ("float", 4, 32)
"""Type, bits and group of such weights."""

_MXFP4 = Inputs("MXFP4", 32, power=True)
_MXFP4_WEIGHTS = Inputs(elsewhere="vLLM on compute capability 10.x and 11.x: MXFP4")
"""vLLM 0.32 takes no notice there of whether inputs are named beside such weights (read)."""

_FIXED = Inputs("FP8", endings=("input_scale", "activation_scale", "qscale_act"))
_MXFP8 = Inputs("FP8", 32, power=True)

_ALGORITHMS = {
    "FP8": _FIXED,
    "FP8_PER_CHANNEL_PER_TOKEN": _PER_TOKEN,
    # "Weights only", but vLLM rounds inputs all the same (read).
    "FP8_PB_WO": Inputs("FP8", 128),
    "NVFP4": Inputs("NVFP4", 16, endings=("input_scale",), inverse=True),
    "W4A16_NVFP4": AS_THEY_ARE,
    "W4A8_NVFP4_FP8": _FIXED,
    "MXFP8": _MXFP8,
}
"""ModelOpt's `quant_algo`. MXFP4 and W4A8_MXFP4_FP8 do not say how their inputs are scaled."""


def inputs_of(declared: Declared, tensor: str) -> Inputs:
    """What becomes of the inputs of a quantized weight, by its plain name; numbers are not read yet."""
    raw, method, module = declared.raw, declared.method, tensor.removesuffix(".weight")
    if method != "compressed-tensors" and (name := declared.algorithm(module)):
        return _ALGORITHMS.get(name, Inputs(untold=f"quant_algo {name} does not say how they are scaled"))
    match method:
        case "compressed-tensors":
            found = declared.group(tensor)
            return _of_scheme(found[1]) if found else AS_THEY_ARE
        case "fp8":
            return _of_fp8(raw)
        case "fbgemm_fp8":
            most = raw.get("activation_scale_ub")
            return Inputs("FP8", 0, most=None if most is None else float(most))
        case "mxfp8":
            return _MXFP8
        case "quark" if declared.left_out.find(module):
            return Inputs(untold="Quark left it as its source had it")
        case "quark":
            return _of_quark(declared.layer(module)[1].get("input_tensors"))
        case _ if method.startswith("modelopt"):
            return Inputs(untold=f"{method} without a quant_algo")
    bits = declared.setting(module, "act_bits") or 16
    return AS_THEY_ARE if bits >= 16 else Inputs(untold=f"act_bits {bits}, which no runtime is known for")


def cache_of(declared: Declared) -> str:
    """What a config says that keys and values are kept as: vLLM does so unless `--kv-cache-dtype` says
    otherwise (read). Empty where it says nothing."""
    told = declared.raw.get("kv_cache_scheme") or declared.raw.get("kv_cache_quant_algo")
    if isinstance(told, Mapping):
        told = f"{told.get('type')} of {told.get('num_bits')} bits"
    return str(told or "")


def _of_fp8(raw: Config) -> Inputs:
    """Releases of DeepSeek and those like it; Mistral's own config says the same in words of its own."""
    scheme = raw.get("activation_scheme")
    if "qformat_weight" in raw:
        scheme = {"TENSOR": "static", "NO_SCALES": "dynamic"}.get(str(raw.get("qscheme_act")))
    if scheme == "static":
        return _FIXED
    if scheme != "dynamic":
        return Inputs(untold=f"activation_scheme is {scheme or 'missing'}")
    block = raw.get("weight_block_size")
    if not block:
        return _PER_TENSOR
    if int(block[1]) < 0:
        return Inputs(untold=f"weight_block_size is {list(block)}")
    return Inputs("FP8", int(block[1]), power=raw.get("scale_fmt") == "ue8m0")


def _of_quark(told: Config | None) -> Inputs:
    """The `input_tensors` of Quark; for rows of inputs, a channel is a token."""
    if not told:
        return AS_THEY_ARE
    match told.get("dtype"), told.get("qscheme"), bool(told.get("is_dynamic")):
        case "fp8_e4m3", "per_tensor", False:
            return _FIXED
        case "fp8_e4m3", "per_channel", True:
            return _PER_TOKEN
        case "int8", "per_channel", True:
            return Inputs("int8", 0)
        case "fp4", "per_group", True if _is_mxfp4(told):
            return _MXFP4
    said = f"{told.get('dtype')} {told.get('qscheme')}, dynamic: {bool(told.get('is_dynamic'))}"
    return Inputs(untold=f"{said}, which is not computed here")


def _is_mxfp4(told: Config) -> bool:
    """Whether Quark's inputs of four bits are scaled as compressed-tensors' are."""
    way = told.get("scale_calculation_mode") or "even"
    return (told.get("group_size"), told.get("scale_format"), way) == (32, "e8m0", "even")


def _of_scheme(group: Config) -> Inputs:
    """What an entry of compressed-tensors' `config_groups` says."""
    weights, told = group.get("weights") or {}, group.get("input_activations")
    if not told and (weights.get("type"), weights.get("num_bits"), weights.get("group_size")) == _MXFP4_FORM:
        return _MXFP4_WEIGHTS
    found = of_group(told)
    if group.get("output_activations") and not found.untold:
        return replace(found, elsewhere="compressed-tensors: outputs are rounded too")
    return found


def of_group(told: Config | None) -> Inputs:
    """The `input_activations` of compressed-tensors."""
    if not told:
        return AS_THEY_ARE
    kind, bits, dynamic = told.get("type"), told.get("num_bits"), told.get("dynamic")
    strategy, size = told.get("strategy"), told.get("group_size")
    if told.get("symmetric") is False:
        return Inputs(untold=f"{kind} of {bits} bits with zero points, which are not computed here")
    match dynamic, kind, bits:
        case True, "float", 4 if strategy == "group" and size == 32:
            return _MXFP4
        case "local", "float", 4:
            return Inputs("NVFP4", 16, endings=("input_global_scale",))
        case False, "float", 8 if strategy in (None, "tensor"):
            return Inputs("FP8", endings=("input_scale",))
        case True, "float" | "int", 8 if strategy == "token" or (strategy == "group" and int(size or 0) > 0):
            group = int(size or 0) if strategy == "group" else 0
            power = told.get("scale_dtype") in ("torch.uint8", "uint8")
            return Inputs("FP8" if kind == "float" else "int8", group, power=power)
    said = f"{kind} of {bits} bits, {strategy}, dynamic: {dynamic}"
    return Inputs(untold=f"{said}, which no runtime is known for")
