"""From the tensors that files hold to those that a model has: what belongs together, and how it is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moequant.checkpoint.codecs import forms
from moequant.checkpoint.codecs.base import plain
from moequant.checkpoint.codecs.declared import Declared, Scheme, disagrees, read_config
from moequant.errors import CheckpointError, few, foreign
from moequant.values import Stored, TensorRef

Refs = Mapping[str, TensorRef]

_ACTIVATION = re.compile(
    r"(^|[._])(input_scale|input_global_scale|input_zero_point|output_scale|output_zero_point"
    r"|activation_scale|qscale_act|[qkv]_scale|kv_scale|prob_scale|[kv]_zero_point)$"
)
"""Scales of activations and of the KV cache: a weight does not need them."""

_LOW_BIT = ("F8_E4M3", "F8_E5M2", "F4", "I8", "U8")

_BESIDE = {
    "scale": ("_scale_inv", "_scale", "_weight_scale"),
    "global_scale": ("_scale_2", "_global_scale", "_weight_scale_2"),
    "zero_point": ("_zero_point",),
    "shape": ("_shape",),
    "g_idx": ("_g_idx",),
}
"""Endings of what lies beside a weight, after its own name; ModelOpt puts "weight" behind that of a stack."""

_NUMBERS = ("BF16", "F16", "F32", "F64")

_TYPES = {
    "scale": (*_NUMBERS, "F8_E4M3", "F8_E8M0", "U8"),
    "global_scale": _NUMBERS,
    "zero_point": ("I8", "U8", "I16", "I32", "F8_E4M3", *_NUMBERS),
    "shape": ("I32", "I64"),
    "g_idx": ("I32", "I64"),
}
"""Types that what lies beside a weight can have: the same bytes under another are other numbers."""

_WORDS = {"weight": ("I32",), "zero_point": ("I32",), "scale": _NUMBERS}
"""Those of GPTQ and AWQ, where they are others."""

_PART = re.compile(
    r"(_scale|_scale_inv|_scale_2|_scales|_global_scale|_zero_point|_shape|_g_idx"
    r"|\.scale|\.scales|\.qzeros|\.g_idx|\.qscale_weight)$"
)
_SHARD = re.compile(r"(.+)\.shard_\d+\.weight")
"""Parts of a table that is too large for one tensor: one scale serves all of them."""

_NEVER_ALONE = re.compile(
    r"(\.weight_(packed|scale|scale_inv|scale_2|global_scale|zero_point|shape|g_idx)"
    r"|\.(qweight|qzeros|qscale_weight|pre_quant_scale)|\.quant_state\..*|\.absmax)$"
)
"""Names that only parts of quantized weights have: one that nothing claims is an error."""


def activation_scales(refs: Refs, quantization: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Names of the tensors that `recognise` leaves out on purpose: they scale activations, not weights.

    None in a checkpoint without quantized weights and without a quantization config.
    """
    if not quantization and not any(r.dtype in _LOW_BIT or _NEVER_ALONE.search(n) for n, r in refs.items()):
        return ()
    return tuple(name for name in refs if _ACTIVATION.search(name))


def recognise(refs: Refs, quantization: Mapping[str, Any] | None) -> dict[str, Stored]:
    """The tensors of a model by the names that a bf16 checkpoint has, in the order of `refs`.

    `refs` are all tensors of all files, `quantization` the config's entry, if any. What is no part of a
    quantized weight stays plain; gpt-oss's experts keep `_blocks` in their names. Only headers are read
    (and the shapes of packed integers whose scales do not tell them).

    CheckpointError, one line, for a method that is not read, parts that are missing, left over or of
    another shape, and weights that are not as the config says.
    """
    with foreign(CheckpointError, "quantization_config cannot be read"):
        declared = read_config(quantization)
    dropped = set(activation_scales(refs, quantization))
    left = {name: ref for name, ref in refs.items() if name not in dropped}
    found: dict[str, Stored] = {}
    claimed: set[str] = set()
    for name, ref in left.items():
        if (group := _group(name, ref, left)) is None:
            continue
        logical, parts = group
        with foreign(CheckpointError, f"tensor {name} is not as quantization_config says"):
            found[name] = _stored(logical, parts, declared)
        claimed |= {part.name for part in parts.values()}
    out: dict[str, Stored] = {}
    for name, ref in left.items():
        if name not in claimed:
            _check_plain(name, ref)
        elif name not in found:
            continue
        stored = found.get(name) or plain(ref)
        if stored.name in out:
            raise CheckpointError(
                f"tensor {stored.name} is stored twice, once as {name}; expected one, remove the other"
            )
        out[stored.name] = stored
    return out


def _group(name: str, ref: TensorRef, refs: Refs) -> tuple[str, dict[str, TensorRef]] | None:
    """The plain name and the parts of the quantized weight that a tensor holds the codes of, if it does."""
    if name.endswith("_blocks") and (scale := refs.get(name.removesuffix("_blocks") + "_scales")):
        return name, {"weight": ref, "scale": scale}
    if name.endswith(".qweight"):
        module = name.removesuffix("qweight")
        wanted = {"weight": "qweight", "zero_point": "qzeros", "scale": "scales", "g_idx": "g_idx"}
        return module + "weight", {k: refs[module + v] for k, v in wanted.items() if module + v in refs}
    packed = name.endswith("_packed") and ref.dtype in ("I32", "U8")
    words = ref.dtype == "I32" and name.endswith(".weight") and f"{name}_scale" in refs  # Quark's
    if not packed and not words and (ref.dtype not in _LOW_BIT or _PART.search(name)):
        return None
    logical = name.removesuffix("_packed") if packed else name
    beside = {key: [logical + ending for ending in endings] for key, endings in _BESIDE.items()}
    if logical.endswith(".weight"):
        beside["scale"] += [logical.removesuffix("weight") + other for other in ("scale", "qscale_weight")]
    if shard := _SHARD.fullmatch(logical):
        beside["scale"].append(f"{shard[1]}.weight_scale")
    there = {key: [refs[n] for n in names if n in refs] for key, names in beside.items()}
    return logical, {"weight": ref} | {key: named[0] for key, named in there.items() if named}


def _stored(logical: str, parts: dict[str, TensorRef], declared: Declared) -> Stored:
    """One quantized weight, by the form that its parts have."""
    weight = parts["weight"]
    if weight.dtype == "F4":  # two to a byte, but counted one by one
        weight = replace(weight, dtype="U8", shape=(*weight.shape[:-1], weight.shape[-1] // 2))
    elif weight.dtype == "I8" and forms.is_mxfp4(parts):
        weight = replace(weight, dtype="U8")
    parts = parts | {"weight": weight}
    _check_types(parts)
    if "scale" not in parts:
        raise CheckpointError(
            f"tensor {weight.name} is stored as {weight.dtype} without scales; expected "
            f"{logical}_scale or the like beside it; give a checkpoint of a form that moequant reads"
        )
    if len(weight.shape) not in (2, 3) and not logical.endswith("_blocks"):
        raise CheckpointError(
            f"tensor {weight.name} is {list(weight.shape)}, expected a matrix or a stack of matrices with "
            "the scales beside it; give the unquantized checkpoint"
        )
    if logical.endswith("_blocks"):
        return forms.gpt_oss(logical, parts)
    # What a config leaves out it may still have in 8 bits where it says so elsewhere: of such tables.
    scheme = Scheme() if _SHARD.fullmatch(logical) else declared.scheme(logical)
    if weight.name.endswith(".qweight"):
        return forms.transposed(logical, parts, declared, scheme)
    if weight.dtype == "I32":
        if weight.name == logical:
            return forms.quark_int(logical, parts, declared, scheme)
        return forms.packed_int(logical, parts, scheme)
    if weight.dtype == "U8":
        return forms.fp4(logical, parts, scheme)
    return forms.eight_bit(logical, parts, scheme)


def _check_types(parts: Refs) -> None:
    """CheckpointError for a part of a type that makes no such part."""
    kinds = _TYPES | (_WORDS if parts["weight"].name.endswith(".qweight") else {})
    for key, ref in parts.items():
        if key in kinds and ref.dtype not in kinds[key]:
            raise CheckpointError(
                f"tensor {ref.name} is {ref.dtype}, expected one of {few(kinds[key])}; the header is "
                "damaged, download it again, or give a checkpoint of a form that moequant reads"
            )


def _check_plain(name: str, ref: TensorRef) -> None:
    """CheckpointError for a tensor that makes no sense alone."""
    if _NEVER_ALONE.search(name) or ref.dtype in (*_LOW_BIT, "F8_E8M0"):
        raise disagrees(
            name,
            f"is {ref.dtype} {list(ref.shape)} and belongs to no weight that is read",
            "a quantized weight has its codes and scales side by side",
        )
