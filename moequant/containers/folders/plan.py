"""Which weights of a checkpoint a folder holds in which scheme, and under which names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import gcd, prod
from typing import Literal

import torch

from moequant.checkpoint import Checkpoint, around
from moequant.containers.folders import schemes
from moequant.containers.folders.schemes import Scheme
from moequant.containers.folders.shards import DTYPE_BYTES
from moequant.containers.folders.storage import AwqIntegers, GptqIntegers, Storage
from moequant.errors import FamilyError, PlanError
from moequant.formats.groups import GROUPS, GroupFormat
from moequant.values import Choice, Origin, Place, Plan, Role, Stack, Stored, Weight
from moequant.values.ops import Transposed

LayoutName = Literal["compressed-tensors", "gptq", "awq", "mxfp4"]

ATTENTION = (Role.ATTN_Q, Role.ATTN_K, Role.ATTN_V, Role.ATTN_OUT)
DENSE = (Role.DENSE_GATE, Role.DENSE_UP, Role.DENSE_DOWN)
KEPT = ("F32", "F16", "BF16", "I32", "I64")
"""Formats of choices that are no schemes: numbers as the checkpoint has them."""

BITS_OF: Mapping[str, tuple[int, ...]] = {"gptq": (4, 8), "awq": (4,)}
"""Layouts that hold integers alone, with f16 scales: of which widths."""


@dataclass(frozen=True, slots=True)
class FolderSettings:
    """What a quantized folder may be told; `tp` is how many GPUs will share each weight.

    `scheme` is a name of `schemes.find`; `bits` is a short word for W4A16 or W8A16. None: W4A16, and the
    scheme's own group size. Under a budget `schemes`, separated by commas, are those to choose from, and
    `gpu` is the compute capability of the GPU that will serve it.
    """

    layout: LayoutName = "compressed-tensors"
    scheme: str | None = None
    bits: int | None = None
    group_size: int | None = None
    quantize_attention: bool = False
    tp: int = 1
    schemes: str | None = None
    gpu: float | None = None
    shard_bytes: int = 5_000_000_000

    @property
    def wanted(self) -> Scheme:
        """The scheme that was asked for. PlanError for what no loader has."""
        if self.scheme is not None and self.bits is not None:
            raise PlanError(f"--scheme {self.scheme} and --bits {self.bits} say the same thing; give one")
        if self.bits is not None and f"W{self.bits}A16" not in schemes.PRESETS:
            raise PlanError(f"--bits {self.bits}: 2 to 8 were expected")
        found = schemes.find(self.scheme or f"W{self.bits or 4}A16")
        held = BITS_OF.get(self.layout)
        if held is not None and (found.kind != "integers" or found.bits not in held):
            names = " and ".join(f"W{bits}A16" for bits in held)
            raise PlanError(
                f"--format {self.layout} holds {names}, not {found.name}; write --format safetensors"
            )
        return found if self.group_size is None else schemes.with_group(found, self.group_size)


def storage(checkpoint: Checkpoint, scheme: Scheme, layout: LayoutName) -> Storage:
    """How modules of a scheme are stored; scales are of the checkpoint's own type."""
    stored = {weight.origin.dtype for weight in checkpoint.weights if weight.is_expert}
    own = torch.float16 if stored == {"F16"} else torch.bfloat16
    if layout not in BITS_OF:
        return scheme.storage((own,))
    # These files hold f16 scales; rounded like the other layout's first, they give the same codes.
    also = (torch.float16,) if own != torch.float16 else ()
    fmt = GroupFormat(scheme.bits, scheme.group, (own, *also))
    return GptqIntegers(fmt) if layout == "gptq" else AwqIntegers(fmt)


def with_copies(checkpoint: Checkpoint) -> Checkpoint:
    """The model with every tensor of its layers that predict, of its eyes and ears, and with whole numbers
    that its config tells as well, each a weight that nothing runs."""
    copies = (
        Weight(
            each.name,
            Role.NEXTN,
            None,
            each.shape,
            Stack.NONE,
            Origin((each,)),
            Place(""),
            None,
            (each.name,),
        )
        for each in (*checkpoint.predictions.stored, *beside_text(checkpoint), *checkpoint.constants)
    )
    copied = {why: len(_kept(found)) for why, found in checkpoint.unread.items()}
    left = {why: count - copied.get(why, 0) for why, count in checkpoint.skipped.items()}
    left = {why: count for why, count in left.items() if count}
    return replace(checkpoint, weights=(*checkpoint.weights, *copies), skipped=left)


def beside_text(checkpoint: Checkpoint) -> tuple[Stored, ...]:
    """What a folder has for those who also see or hear: its config.json is the whole model's."""
    return tuple(each for found in checkpoint.unread.values() for each in _kept(found))


def _kept(found: tuple[Stored, ...]) -> tuple[Stored, ...]:
    return tuple(each for each in found if each.dtype in KEPT)


def scheme_plan(checkpoint: Checkpoint, settings: FolderSettings) -> Plan:
    """Experts (without experts: the feed-forward blocks) in one scheme, all else as the checkpoint has it.

    `quantize_attention` adds every other linear but router and head. PlanError when groups do
    not divide a weight as it will be cut, with the group sizes that would.
    """
    scheme = settings.wanted
    chosen = quantizable(checkpoint, settings.quantize_attention, settings.layout == "mxfp4")
    if not chosen:
        raise PlanError(
            f"{checkpoint.path}: no experts and no feed-forward blocks to quantize; --quantize-attention "
            "adds the other linears"
        )
    check_tp(checkpoint, chosen, settings.tp)
    for weight in chosen:
        if reason := refusal(weight, scheme, settings):
            raise PlanError(reason)
    made = {
        weight.name: choice_of(weight, scheme, "" if weight.is_expert else "asked for") for weight in chosen
    }
    choices = tuple(made.get(weight.name) or kept_choice(weight) for weight in checkpoint.weights)
    return Plan(scheme.name, choices, sum(choice.bytes for choice in choices))


def choice_of(weight: Weight, scheme: Scheme, reason: str, kl: float | None = None) -> Choice:
    """A weight in a scheme, with the bytes of its codes and scales."""
    entries = scheme.storage((torch.bfloat16,)).entries("", *weight.shape[-2:])
    size = sum(entry.bytes for entry in entries if not entry.name.endswith("weight_shape"))
    return Choice(weight.name, scheme.name, prod(weight.shape[:-2]) * size, reason, kl)


def kept_choice(weight: Weight) -> Choice:
    """A weight as the checkpoint has it."""
    dtype = kept_dtype(weight)
    return Choice(weight.name, dtype, weight.numel * DTYPE_BYTES[dtype], "as in the checkpoint")


def kept_dtype(weight: Weight) -> str:
    """What a weight that is not rounded is written in: its own floats, or bf16 where it has none."""
    origin = weight.origin
    return origin.dtype if origin.stored[0].codec.name == "plain" else "BF16"


def stores(checkpoint: Checkpoint, plan: Plan, layout: LayoutName) -> dict[str, Storage]:
    """How every weight that is rounded is stored, by its name, in the plan's order."""
    by_scheme = {
        name: storage(checkpoint, schemes.find(name), layout)
        for name in dict.fromkeys(choice.format for choice in plan.choices)
        if name not in KEPT
    }
    return {choice.weight: by_scheme[choice.format] for choice in plan.choices if choice.format in by_scheme}


def stored_names(weight: Weight) -> tuple[str, ...]:
    """What checkpoints with a tensor for every expert call a weight's matrices: E names, or one."""
    some = weight.origin.matrices or range(weight.matrices)
    if weight.is_expert and len(weight.names) < some.stop:
        raise FamilyError(
            f"{weight.name}: {weight.names[0]} has no name for a single expert, which loaders of "
            "safetensors need; write GGUF instead"
        )
    return weight.names


def modules(weight: Weight) -> tuple[str, ...]:
    """The linear modules behind `stored_names`."""
    return tuple(name.removesuffix(".weight") for name in stored_names(weight))


def kept_linears(checkpoint: Checkpoint, plan: Plan) -> tuple[str, ...]:
    """Every linear module that stays as it is, by all names that loaders know it under; the head is one.

    Experts of a layer have one pattern, as in `targets`. What ends in a dot stands for all that lies in it.
    """
    formats = {choice.weight: choice.format for choice in plan.choices}
    names = {"lm_head"}
    for weight in checkpoint.weights:
        if not weight.runs:
            names |= {_around(weight, checkpoint.n_layers)} if len(weight.shape) > 1 else set()
            continue
        is_linear = len(weight.shape) == (2 if weight.stack is Stack.NONE else 3)
        is_linear &= weight.role not in (Role.EMBEDDING, Role.LOOKUP, Role.TABLE)
        if is_linear and formats[weight.name] in KEPT:
            names |= {*targets([weight])}
    return tuple(sorted(names))


def _around(weight: Weight, layers: int) -> str:
    """What a tensor that is only copied lies in, with a dot: a tower, or a layer that predicts.

    vLLM's classes for those have modules of their own, and do not say which of them are several of the
    checkpoint's: it would look for the names of parts in vain (`DeepSeekMTP` in vLLM 0.32).
    """
    (module,) = modules(weight)
    if (tower := around(module)) != "layers":
        return f"{tower}."
    number = module.partition("layers.")[2].partition(".")[0]
    return f"layers.{number}." if number.isdecimal() and int(number) >= layers else module


def of_stack(module: str) -> str:
    """What loaders that hold all experts of a layer in one module call it; other modules as they are."""
    return re.sub(r"\.experts\.\d+\..*", ".experts", module)


def quantizable(checkpoint: Checkpoint, attention: bool, stacked: bool = False) -> list[Weight]:
    """The weights that may have a scheme; `attention` adds the dense linears but router and head. Experts
    may be `stacked` in the release's own tensors.

    FamilyError for experts that no loader knows one by one: it comes before all that could be changed.
    """
    shared = _shared_tensors(checkpoint)
    found = [weight for weight in checkpoint.weights if _is_quantized(checkpoint, weight, attention, shared)]
    for weight in () if stacked else found:
        modules(weight)
    turned = (each for each in checkpoint.weights if not each.is_expert and Transposed() in each.origin.ops)
    if (first := next(turned, None)) is not None:
        raise FamilyError(
            f"{first.name}: {first.origin.stored[0].name} is stored with inputs as rows, which loaders of "
            "safetensors do not know; write GGUF instead"
        )
    return found


def _is_quantized(checkpoint: Checkpoint, weight: Weight, attention: bool, shared: frozenset[str]) -> bool:
    if not weight.runs:
        return False
    if weight.is_expert:
        return len(weight.shape) == 3
    if (
        len(weight.shape) != 2
        or weight.role.keeps_precision
        or weight.role in (Role.EMBEDDING, Role.LOOKUP, Role.OUTPUT)
    ):
        return False
    if weight.origin.stored[0].name in shared or _beside_kept(checkpoint, weight):
        return False
    if weight.role in DENSE and checkpoint.n_experts == 0:
        return True
    return attention


def _beside_kept(checkpoint: Checkpoint, weight: Weight) -> bool:
    """Whether vLLM has it in one module with the indexer's weights of heads, which nobody rounds: the
    indexer's keys (`wk_weights_proj` in vLLM 0.32's deepseek_v2.py)."""
    if weight.role is not Role.INDEXER or weight.site is None:
        return False
    alike = (other for other in checkpoint.weights if other.role is Role.KV_A and other.site is not None)
    return any(other.site == weight.site for other in alike)


def _shared_tensors(checkpoint: Checkpoint) -> frozenset[str]:
    """Stored tensors that several dense weights are rows of: loaders know them as one module."""
    seen: set[str] = set()
    twice: set[str] = set()
    for weight in checkpoint.weights:
        if not weight.is_expert:
            name = weight.origin.stored[0].name
            (twice if name in seen else seen).add(name)
    return frozenset(twice)


def check_tp(checkpoint: Checkpoint, chosen: Iterable[Weight], tp: int) -> None:
    """PlanError for heads, or the first weight, that so many GPUs cannot share."""
    if tp < 1:
        raise PlanError(f"--tp {tp}: 1 GPU or more was expected")
    shape = checkpoint.shape
    if not shape.heads_on(tp):
        raise PlanError(
            f"{checkpoint.path}: --tp {tp} does not divide {shape.heads} heads, or their {shape.kv_heads} of "
            "keys and values"
        )
    for weight in chosen:
        cut = weight.shape[-1] if _by_rows(weight) else weight.shape[-2]
        if cut % tp:
            raise PlanError(f"{weight.name}: --tp {tp} does not divide its {cut} channels")


def refusal(weight: Weight, scheme: Scheme, settings: FolderSettings) -> str | None:
    """Why a weight cannot be in a scheme as the GPUs will share it, None when it can."""
    n_out, n_in = weight.shape[-2:]
    by_rows, tp = _by_rows(weight), settings.tp
    part = n_in // tp if by_rows else n_in
    cut = f" ({n_in} / --tp {tp})" if part != n_in else ""
    if scheme.kind == "integers":
        if not _fits(part, scheme.group, scheme.bits):
            groups = [group for group in GROUPS if group > 0 or settings.layout != "awq"]
            works = [str(group) for group in groups if _fits(part, group, scheme.bits)]
            advice = f"--group-size {' or '.join(works)} would work" if works else "write GGUF instead"
            asked = f"--group-size {scheme.group} does not divide"
            if scheme.group == -1:
                at_once = 32 // gcd(32, scheme.bits)
                asked = f"integers of {scheme.bits} bits are packed {at_once} at a time, not"
            return f"{weight.name}: {asked} rows of {part}{cut}; {advice}"
        if settings.layout == "awq" and scheme.group == -1 and weight.is_expert:
            return (
                f"{weight.name}: vLLM loads no experts in AWQ with one scale a row; take --group-size 32, 64 "
                "or 128, or --format gptq"
            )
        rows = n_out if by_rows else n_out // tp
        if settings.layout in BITS_OF and rows * scheme.bits % 32:
            shared = f" ({n_out} / --tp {tp})" if rows != n_out else ""
            return (
                f"{weight.name}: {settings.layout.upper()} packs {32 // scheme.bits} rows at a time, not "
                f"{rows}{shared}; write --format safetensors"
            )
        return None
    if scheme.group > 0 and part % scheme.group:
        return (
            f"{weight.name}: {scheme.name} has a scale for {scheme.group} weights, which does not divide "
            f"rows of {part}{cut}; take another scheme, such as FP8_DYNAMIC"
        )
    rows = n_out if by_rows else n_out // tp
    if rows % scheme.rows:
        return (
            f"{weight.name}: {scheme.name} has a scale for {scheme.rows} rows, which does not divide {rows}; "
            "take another scheme, such as FP8_DYNAMIC"
        )
    return None


def _by_rows(weight: Weight) -> bool:
    """Whether GPUs share the inputs of a weight, and not its outputs."""
    return weight.role in (Role.DOWN, Role.DENSE_DOWN, Role.SHARED_DOWN, Role.ATTN_OUT, Role.OUT_B)


def _fits(part: int, group: int, bits: int) -> bool:
    return part % group == 0 if group != -1 else part * bits % 32 == 0


def scheme_groups(plan: Plan) -> Mapping[str, list[str]]:
    """By scheme, the weights that have it, in the plan's order."""
    found: dict[str, list[str]] = {}
    for choice in plan.choices:
        if choice.format not in KEPT:
            found.setdefault(choice.format, []).append(choice.weight)
    return found


def targets(weights: Iterable[Weight]) -> list[str]:
    """What stands for these weights in a config: a pattern for the experts of a layer, else modules' names.

    vLLM asks for experts under names of its own ("model.layers.0.block_sparse_moe.experts.0.gate_proj").
    """
    found: list[str] = []
    for weight in weights:
        if weight.is_expert:
            found.append(rf"re:.*layers\.{weight.layer}\..*\bexperts\.\d+\..*")
        else:
            found += [*modules(weight), weight.place.param.removesuffix(".weight")]
    return list(dict.fromkeys(found))
