"""Reading a quantized safetensors folder back, weight by weight, as a `forward.model.Provider`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moequant import families
from moequant.checkpoint import folder_of, load
from moequant.checkpoint.codecs.base import plain
from moequant.checkpoint.headers import read_headers
from moequant.containers.folders.plan import modules
from moequant.errors import CheckpointError, VerifyError
from moequant.families.config import make_config
from moequant.values import Stored, TensorRef, Weight
from moequant.values.ops import apply

Decode = Callable[[str, Mapping[str, Tensor]], Tensor]
"""(module, its tensors by suffix) -> weight [out, in]."""

_CODES = ("weight_packed", "qweight", "weight_scale")
"""Suffixes of which a quantized module has one."""

_OTHERS = ("bias", "input_global_scale", "input_scale")
"""Suffixes of a module's tensors that say nothing of its weight."""


class FolderWeights:
    """A quantized folder's weights; a tensor is read when it is asked for, and not kept."""

    def __init__(self, path: Path, layout: str, decoder: Callable[[Mapping[str, Any]], Decode]) -> None:
        self.path = path
        self._opened: tuple[str, Any] = ("", None)
        try:
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
            self.refs = read_headers(folder_of(path))
            self.files = {ref.name: ref.file.name for ref in self.refs.values()}
        except (OSError, ValueError, CheckpointError) as error:
            raise VerifyError(f"{path}: not a readable model folder ({error})") from error
        self.quantization: dict[str, Any] = config.pop("quantization_config", {})
        method = self.quantization.get("quant_method", "not quantized")
        if method != layout:
            raise VerifyError(f"{path}: is {method}, expected {layout}")
        self._decode = decoder(self.quantization)
        self.suffixes: dict[str, list[str]] = {}
        for name in self.files:
            module, _, suffix = name.rpartition(".")
            self.suffixes.setdefault(module, []).append(suffix)
        self.family = families.find(config)
        self.config = make_config(self.family, config)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of all stored tensors."""
        return tuple(self.files)

    def tensor(self, name: str, matrix: int | None = None) -> Tensor:
        """A stored tensor as it is, or one matrix of it: no other is read. VerifyError when it is missing or
        damaged."""
        if name not in self.files:
            raise VerifyError(f"{self.path}: tensor {name} is missing")
        try:
            file = self.files[name]
            if file != self._opened[0]:  # a header may describe 100,000 tensors: parsed once, one kept mapped
                self._opened = (file, safe_open(self.path / file, "pt"))
            opened = self._opened[1]
            stored: Tensor = opened.get_tensor(name) if matrix is None else opened.get_slice(name)[matrix]
        except (OSError, SafetensorError) as error:
            raise VerifyError(f"{self.path / self.files[name]}: {name} cannot be read ({error})") from error
        return stored

    def is_quantized(self, weight: Weight) -> bool:
        """Whether the folder holds codes for it."""
        return any(suffix in _CODES for suffix in self.suffixes.get(modules(weight)[0], ()))

    def codes(self, weight: Weight) -> tuple[str, ...]:
        """The names of the tensors of its codes, of every expert; none where it is not quantized."""
        if len(weight.shape) < 2 or not self.is_quantized(weight):
            return ()
        named = ("weight_packed", "qweight", "weight")
        return tuple(
            f"{module}.{next(suffix for suffix in named if suffix in self.suffixes[module])}"
            for module in modules(weight)
        )

    def parts(self, weight: Weight) -> tuple[tuple[str, ...], ...]:
        """Of every expert of a quantized weight, the names of the stored tensors."""
        return tuple(
            tuple(f"{module}.{suffix}" for suffix in self.suffixes.get(module, ()) if suffix not in _OTHERS)
            for module in modules(weight)
        )

    def label(self, weight: Weight, expert: int) -> str:
        """What messages call one expert of a weight."""
        return modules(weight)[expert]

    def stored(self, weight: Weight, expert: int = 0) -> dict[str, Tensor]:
        """The tensors of one expert of a quantized weight, by suffix."""
        return {name.rpartition(".")[2]: self.tensor(name) for name in self.parts(weight)[expert]}

    def decode(self, weight: Weight, expert: int = 0) -> Tensor:
        """One expert of a quantized weight [out, in], rows as stored."""
        module = self.label(weight, expert)
        try:
            return self._decode(module, self.stored(weight, expert))
        except KeyError as error:
            raise VerifyError(f"{self.path}: tensor {module}.{error.args[0]} is missing") from error

    def load(self, weight: Weight) -> Tensor:
        """Decoded values, shape `weight.shape`, in the file's precision.

        VerifyError when a tensor is missing or another shape comes out.
        """
        if len(weight.shape) < 2 or not self.is_quantized(weight):
            return self._kept(weight)
        out: Tensor | None = None
        for at, expert in enumerate(weight.origin.matrices or range(weight.matrices)):
            values = self.decode(weight, expert)
            if tuple(values.shape) != weight.shape[-2:]:
                raise VerifyError(
                    f"{self.path}: {self.label(weight, expert)} is {list(values.shape)}, "
                    f"expected {list(weight.shape[-2:])}"
                )
            if out is None:
                out = torch.empty((weight.matrices, *values.shape), dtype=values.dtype)
            out[at] = values
        assert out is not None
        return out.reshape(weight.shape)

    def _kept(self, weight: Weight) -> Tensor:
        names, origin, some = weight.names, weight.origin, weight.origin.matrices
        numbers = some or range(weight.matrices)
        if origin.rows is not None:
            here = tuple(plain(self._ref(stored)) for stored in origin.stored)
            return load(replace(weight, origin=replace(origin, stored=here)))
        if weight.is_expert and len(names) >= numbers.stop and names[0] in self.files:
            return torch.stack([self._whole(names[number], weight.shape[1:]) for number in numbers])
        if len(origin.stored) == 1:
            stored = origin.stored[0]
            name = names[0] if names[0] in self.files else stored.name
            values = apply(origin.ops, self._whole(name, stored.shape))
        else:
            parts = [self._whole(part.name, part.shape) for part in origin.stored]
            values = apply(origin.ops, torch.cat(parts))
        return values if some is None else values[some.start : some.stop]

    def _ref(self, stored: Stored) -> TensorRef:
        """Where the folder has what the checkpoint stores; VerifyError where it has no such tensor."""
        found = self.refs.get(stored.name)
        if found is None or found.shape != stored.shape:
            there = "is missing" if found is None else f"is {list(found.shape)}"
            raise VerifyError(f"{self.path}: {stored.name} {there}, expected {list(stored.shape)}")
        return found

    def _whole(self, name: str, shape: tuple[int, ...]) -> Tensor:
        values = self.tensor(name)
        if tuple(values.shape) != shape:
            raise VerifyError(f"{self.path}: {name} is {list(values.shape)}, expected {list(shape)}")
        return values
