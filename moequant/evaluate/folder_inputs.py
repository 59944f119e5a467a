"""What becomes of the inputs of every weight of a folder: as its config says, with the numbers in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from math import isfinite
from pathlib import Path

from moequant.checkpoint import folder_of
from moequant.checkpoint.codecs import read_part
from moequant.checkpoint.codecs.declared import Declared
from moequant.checkpoint.codecs.inputs import AS_THEY_ARE, Inputs, inputs_of
from moequant.checkpoint.headers import read_headers
from moequant.errors import CheckpointError, VerifyError, foreign
from moequant.values import TensorRef, Weight

Names = Callable[[Weight], tuple[str, ...]]
"""The tensors of a weight's codes as a folder has them; none where it is not quantized."""

_CODES = (".weight_packed", ".qweight", ".qscale_weight", ".weight")


def stored_codes(weight: Weight) -> tuple[str, ...]:
    """`Names` of the weights of a checkpoint."""
    quantized = (stored for stored in weight.origin.stored if stored.codec.name != "plain")
    return tuple(stored.parts["weight"].name for stored in quantized)


def folder_inputs(
    path: Path, declared: Declared, weights: Iterable[Weight], names: Names
) -> dict[str, Inputs]:
    """By weight, what its folder makes of its inputs. Weights with one site have one number: the one of all
    that are stored there that cuts off least, as vLLM's fused layers have it.

    CheckpointError for a config that contradicts itself, VerifyError where a number is missing, or is none
    that scales.
    """
    found, numbers = dict[str, Inputs](), dict[tuple[str, Inputs], float]()
    refs: Mapping[str, TensorRef] | None = None
    sites = dict[str, str]()
    for weight in weights:
        codes = names(weight)
        told = AS_THEY_ARE
        if codes and weight.site is not None and not weight.role.keeps_precision:
            with foreign(CheckpointError, "quantization_config does not say what becomes of inputs"):
                told = inputs_of(declared, _plain(codes[0]))
            sites[weight.name] = weight.site.name
        found[weight.name] = told
        if told.endings:
            refs = read_headers(folder_of(path)) if refs is None else refs
            key = (sites[weight.name], told)
            known = [numbers[key]] if key in numbers else []
            stored = [number for name in codes for number in _numbers(path, refs, name, told)]
            numbers[key] = (min if told.numbers == "NVFP4" else max)([*known, *stored])
    return {
        name: replace(told, number=numbers[sites[name], told]) if told.endings else told
        for name, told in found.items()
    }


def _module(codes: str) -> tuple[str, str]:
    """The name in front of a tensor's ending, and what joins it to other endings."""
    ending = next((each for each in _CODES if codes.endswith(each)), None)
    return (codes, "_") if ending is None else (codes.removesuffix(ending), ".")


def _plain(codes: str) -> str:
    """The name that an unquantized checkpoint has for a tensor of codes."""
    module, joint = _module(codes)
    return f"{module}.weight" if joint == "." else module


def _numbers(path: Path, refs: Mapping[str, TensorRef], codes: str, told: Inputs) -> list[float]:
    module, joint = _module(codes)
    names = [f"{module}{joint}{ending}" for ending in told.endings]
    there = [name for name in names if name in refs]
    if not there:
        raise VerifyError(
            f"{path}: {names[0]} is missing, by which its config says that inputs are scaled; compare with "
            "--exact, which rounds no inputs"
        )
    found = read_part(refs[there[0]]).float().flatten()
    for value in found.tolist():
        if not (isfinite(value) and value > 0):
            raise VerifyError(f"{path}: {there[0]} is {value}, expected a number above 0")
    return [float(value) for value in (1 / found if told.inverse else found)]
