"""What a checkpoint's quantization config says of each module, to be held against the tensors that are there.

Tensors decide how they are read. A config that contradicts them makes one of both wrong, which is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import translate
from typing import Any

from moequant.checkpoint.codecs import quark
from moequant.checkpoint.codecs.changes import Changes, changes_of
from moequant.checkpoint.codecs.patterns import compiled
from moequant.checkpoint.codecs.targets import NONE, Targets, targets_of
from moequant.errors import CheckpointError, few

Config = Mapping[str, Any]

METHODS = (
    "fp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "modelopt_fp4", "modelopt_mxfp8", "modelopt_mixed",
    "mxfp4", "mxfp8", "gptq", "gptq_v2", "awq", "auto-round", "quark",
)  # fmt: skip
"""Every `quant_method` that is read."""

_ALGORITHMS = {
    "FP8": (8, None),
    "FP8_PER_CHANNEL_PER_TOKEN": (8, None),
    "FP8_PB_WO": (8, None),
    "NVFP4": (4, 16),
    "W4A16_NVFP4": (4, 16),
    "W4A8_NVFP4_FP8": (4, 16),
    "MXFP8": (8, 32),
    "MXFP4": (4, 32),
    "W4A8_MXFP4_FP8": (4, 32),
    "MIXED_PRECISION": (None, None),
}
"""ModelOpt's `quant_algo`: bits and group, None where tensors may differ."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """What is declared of one module's weight; None is not declared, 0 in `block` a whole side. `numbers` is
    the config's word for them where bits and kind do not tell all."""

    source: str = ""
    bits: int | None = None
    kind: str | None = None
    block: tuple[int, int] | None = None
    symmetric: bool | None = None
    numbers: str = ""

    def check(self, tensor: str, bits: int, kind: str, columns: int | None = None) -> None:
        """CheckpointError when the tensor holds other numbers, or in other groups, than declared."""
        if self.bits not in (None, bits) or self.kind not in (None, kind):
            raise disagrees(tensor, f"holds {kind} of {bits} bits", f"{self.source} says {self._says()}")
        if columns and self.bits and self.block and self.block != (1, columns):
            raise disagrees(
                tensor,
                f"has a scale for each {columns} weights of a row",
                f"{self.source} says blocks of {list(self.block)} (0: all)",
            )

    def _says(self) -> str:
        return f"{self.kind or 'numbers'} of {self.bits if self.bits is not None else 'any number of'} bits"


def disagrees(tensor: str, found: str, said: str) -> CheckpointError:
    """The error for a tensor that is not as the config says."""
    return CheckpointError(
        f"tensor {tensor} {found}, but {said}; correct the config, or download all files of one revision"
    )


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Modules that a config names as not quantized: plain names by the key they are under, and patterns.

    Lists of hundreds of names meet 100,000 weights: plain names are looked up. `parts`: a name also stands
    for what is inside it ("model.layers.3"), and may be the end of one ("gate").
    """

    names: Mapping[str, str]
    patterns: tuple[tuple[str, str, re.Pattern[str]], ...]
    parts: bool = True

    def find(self, module: str) -> tuple[str, str] | None:
        """The key and the entry that leave a module out."""
        dots = [match.start() for match in re.finditer(r"\.", module)] if self.parts else []
        for name in (module, *(module[:dot] for dot in dots), *(module[dot + 1 :] for dot in dots)):
            if name in self.names:
                return self.names[name], name
        for key, entry, pattern in self.patterns:
            if pattern.match(module):
                return key, entry
        return None


@dataclass(frozen=True, slots=True)
class Declared:
    """A quantization config as moequant reads it; `method` is empty when there is none."""

    method: str = ""
    raw: Config = field(default_factory=dict)
    left_out: LeftOut = field(default_factory=lambda: LeftOut({}, ()))
    changes: tuple[Changes, ...] = ()
    targets: Targets = NONE

    @property
    def again(self) -> bool:
        """Whether a tool quantized some modules of what may have been quantized before it: what it leaves out
        stays as it was. Quark keeps it so, and ModelOpt where another method has its name in the config."""
        modelopt = self.method.startswith("modelopt")
        return self.method == "quark" or (bool(self.raw.get("quantized_layers")) and not modelopt)

    def scheme(self, tensor: str) -> Scheme:
        """What holds for a quantized tensor, by its plain name. CheckpointError when it should not be one."""
        module = tensor.removesuffix(".weight")
        found = self.left_out.find(module) or self._removed(module)
        if found and not self.again:
            key, pattern = found
            raise disagrees(tensor, "is quantized", f"quantization_config.{key} has {pattern!r}")
        if self.method == "compressed-tensors":
            group = self.group(tensor)
            return _of_group(*group) if group else Scheme()
        if self.method == "quark":
            return Scheme() if found else Scheme(*quark.scheme(*self.layer(module)))
        if algorithm := self.algorithm(module):
            return _from_algorithm(algorithm)
        if self.method in ("gptq", "awq", "auto-round"):
            return self._of_numbers(tensor, module)
        block, kind = self.raw.get("weight_block_size"), "float" if self.method else None
        if not block:
            whole = (0, 0) if self.method == "fp8" and "qformat_weight" not in self.raw else None
            return Scheme(f"quant_method {self.method}" if kind else "", kind=kind, block=whole)
        return Scheme("weight_block_size", kind=kind, block=(int(block[0]), int(block[1])))

    def group(self, tensor: str) -> tuple[str, Config] | None:
        """compressed-tensors: name and entry of the config group for the tensor's module; None without
        groups. CheckpointError when none is for it."""
        found = self.targets.find(tensor.removesuffix(".weight"))
        if self.targets and found is None:
            raise disagrees(tensor, "is quantized", "no targets of quantization_config.config_groups name it")
        return found

    def algorithm(self, module: str) -> str | None:
        """ModelOpt: the algorithm of the layer, else of all; in capitals. CheckpointError: it is unknown.

        None also where ModelOpt quantized but some layers of what others had quantized.
        """
        _, layer = self._change(module) if self.raw.get("quantized_layers") else ("", {})
        name = layer.get("quant_algo")
        if self.method.startswith("modelopt"):
            name = name or self.raw.get("quant_algo")
        if name is not None and str(name).upper() not in _ALGORITHMS:
            raise CheckpointError(
                f"quantization_config.quant_algo is {name}, expected one of {few(_ALGORITHMS)}; give the "
                "unquantized checkpoint"
            )
        return None if name is None else str(name).upper()

    def layer(self, module: str) -> tuple[str, Config]:
        """Quark: where it says what becomes of a module, and what it says."""
        source, change = self._change(module)
        everywhere = self.raw.get("global_quant_config") or {}
        return (source, change) if change else ("quantization_config.global_quant_config", everywhere)

    def setting(self, module: str, key: str) -> Any:
        """What a config says under a key of a module, else of all."""
        return self._change(module)[1].get(key, self.raw.get(key))

    def _removed(self, module: str) -> tuple[str, str] | None:
        """The key and the entry that leave a module out where others say what becomes of it: the first that
        fits counts."""
        for changes in self.changes:
            if (found := changes.find(module)) and changes.removes(found[0]):
                return changes.key, found[0]
        return None

    def _change(self, module: str) -> tuple[str, Config]:
        """Where a config says something of a module alone, and what; an empty name and nothing else."""
        for changes in self.changes:
            if found := changes.find(module):
                return f"quantization_config.{changes.key}[{found[0]!r}]", found[1] or {}
        return "", {}

    def _of_numbers(self, tensor: str, module: str) -> Scheme:
        """GPTQ, AWQ and auto-round: bits and group of all, and what `dynamic` or `extra_config` change."""
        settings = {key: self.raw.get(key) for key in ("bits", "group_size", "sym", "data_type")}
        settings["bits"] = settings["bits"] or self.raw.get("w_bit")
        settings["group_size"] = settings["group_size"] or self.raw.get("q_group_size")
        source, change = self._change(module)
        settings |= {key: change[key] for key in settings if key in change}
        source = source or "quantization_config"
        bits, group, sym = settings["bits"], settings["group_size"], settings["sym"]
        if bits is not None and int(bits) > 8:
            raise disagrees(tensor, "is quantized", f"{source} leaves it at {bits} bits")
        kind = "float" if "fp" in str(settings["data_type"] or "") else "int"
        block = None
        if isinstance(group, list):
            block = (int(group[0]), int(group[1]))
        elif group is not None:
            block = (0, 0) if group == 0 and kind == "float" else (1, max(int(group), 0))
        return Scheme(source, int(bits) if bits else None, kind, block, sym)


def read_config(quantization: Config | None) -> Declared:
    """The config of `config.json`, `hf_quant_config.json`, `quantize_config.json` or Mistral's `params.json`.

    CheckpointError for a method, or a part of one, that is not read.
    """
    if not quantization:
        return Declared()
    raw: Config = quantization
    if "quant_method" not in raw and isinstance(raw.get("quantization"), Mapping):
        raw = {"quant_method": "modelopt", **raw["quantization"]}
    method = str(raw.get("quant_method", "")).lower().replace("_round", "-round")
    if not method and "qformat_weight" in raw:
        method = "fp8"
    elif not method and "bits" in raw:
        method = "gptq"  # quantize_config.json before there was a quant_method
    elif not method and "w_bit" in raw:
        method = "awq"  # quant_config.json, likewise
    elif not method and "quant_algo" in raw:
        method = "modelopt"  # config.json of its first versions
    if method not in METHODS:
        raise CheckpointError(
            f"quantization_config.quant_method is {method or 'missing'}, expected one of "
            f"{few(METHODS)}; give the unquantized checkpoint"
        )
    _refuse_parts(raw)
    if method == "auto-round":
        raw, method = _auto_round(raw)
    if method == "gptq_v2":
        raw, method = {**raw, "checkpoint_format": "gptq_v2"}, "gptq"
    if method == "quark":
        quark.check(raw)
    targets = targets_of(raw) if method == "compressed-tensors" else NONE
    return Declared(method, raw, _left_out(raw, method), changes_of(raw), targets)


def _left_out(raw: Config, method: str) -> LeftOut:
    """Every module that a config leaves out, by the rules of the library that reads the key."""
    names, patterns = {}, []
    globs = method.startswith("modelopt") or method == "quark"
    for key in ("ignore", "modules_to_not_convert", "ignored_layers", "exclude_modules", "exclude"):
        for entry in map(str, raw.get(key) or ()):
            if entry.startswith("re:"):
                patterns.append((key, entry, entry.removeprefix("re:")))
            elif re.fullmatch(r"[\w.-]*", entry):
                names[entry] = key
            elif globs:
                patterns.append((key, entry, translate(entry)))
            else:
                patterns.append((key, entry, rf"(?:{entry})(?:\.|$)"))
    found = tuple((key, entry, compiled(pattern)) for key, entry, pattern in patterns)
    # compressed-tensors, ModelOpt and Quark want whole names, transformers' own methods parts of them.
    return LeftOut(names, found, method != "compressed-tensors" and not globs)


_TURNED = ("rotation_config", "spinquant_config", "hadamard_config", "rotation")
"""Where auto-round and GPTQModel say that weights are turned, and inputs as the model runs.
compressed-tensors says so in `transform_config`."""


def _refuse_parts(raw: Config) -> None:
    """Weights that are not what they seem: turned by a transform, sparse, or in words of another width."""
    turned = [key for key in _TURNED if raw.get(key)]
    if (raw.get("transform_config") or {}).get("config_groups"):
        turned.append("transform_config")
    if turned:
        raise CheckpointError(
            f"quantization_config.{turned[0]}: weights are stored turned, expected none; give the "
            "unquantized checkpoint"
        )
    if str(raw.get("pack_dtype") or "int32").removeprefix("torch.") != "int32":
        raise CheckpointError(
            f"quantization_config.pack_dtype is {raw['pack_dtype']}, expected int32; give the unquantized "
            "checkpoint"
        )
    sparsity = (raw.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise CheckpointError(
            f"quantization_config.sparsity_config.format is {sparsity}, expected dense; give the unquantized "
            "checkpoint"
        )


_PACKED_AS = {
    "auto_gptq": ("gptq", {}),
    "auto_awq": ("awq", {}),
    "auto_round": ("gptq", {"checkpoint_format": "gptq_v2"}),
    "gptqmodel": ("gptq", {"checkpoint_format": "gptq_v2"}),
    "llm_compressor": ("auto-round", {}),
    "fp8_static": ("auto-round", {}),
    "fp8": ("auto-round", {}),
}
"""auto-round's `packing_format`, without "auto_round:", by what reads it. Its own form of integers is that
of GPTQ, with zero points as they are; floats are stored as compressed-tensors stores them."""


def _auto_round(raw: Config) -> tuple[Config, str]:
    """auto-round packs as others do; which of them is in `packing_format`."""
    packing = str(raw.get("packing_format", "auto_round:auto_gptq"))
    method, more = _PACKED_AS.get(packing.removeprefix("auto_round:"), (None, {}))
    if method is None or "mx_int" in str(raw.get("data_type")):
        told = "packing_format" if method is None else "data_type"
        raise CheckpointError(
            f"quantization_config.{told} is {raw.get(told)}, expected auto_round:auto_gptq, "
            "auto_round:auto_awq or another that moequant reads; give the unquantized checkpoint"
        )
    return {**raw, **more}, method


def _of_group(name: str, group: Config) -> Scheme:
    weights: Config = group.get("weights") or {}
    size, strategy = weights.get("group_size"), weights.get("strategy")
    if strategy is None and size is not None:
        strategy = "group" if size > 0 else "channel"
    block: tuple[int, int] | None = None
    if strategy in ("group", "tensor_group") and size:
        block = (1, int(size))
    elif strategy == "block" and weights.get("block_structure"):
        rows, columns = weights["block_structure"]
        block = (int(rows), int(columns))
    elif strategy in ("channel", "tensor"):
        block = (1, 0) if strategy == "channel" else (0, 0)
    return Scheme(
        f"quantization_config.config_groups.{name}",
        weights.get("num_bits"),
        weights.get("type"),
        block,
        weights.get("symmetric"),
    )


def _from_algorithm(name: str | None) -> Scheme:
    """ModelOpt's algorithm; its config groups say the same."""
    if name is None:
        return Scheme()
    bits, group = _ALGORITHMS[name]
    return Scheme(f"quant_algo {name}", bits, "float" if bits else None, (1, group) if group else None)
