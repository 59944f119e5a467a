"""Which weights of a checkpoint a quantized safetensors folder holds as integers, and under which names."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

import torch

from moequant.checkpoint import Checkpoint
from moequant.errors import FamilyError, PlanError
from moequant.formats.groups import BITS, GROUPS, GroupFormat
from moequant.values import Choice, Origin, Place, Plan, Role, Stack, Weight

LayoutName = Literal["compressed-tensors", "gptq"]

ATTENTION = (Role.ATTN_Q, Role.ATTN_K, Role.ATTN_V, Role.ATTN_OUT)
DENSE = (Role.DENSE_GATE, Role.DENSE_UP, Role.DENSE_DOWN)


@dataclass(frozen=True, slots=True)
class FolderSettings:
    """What a quantized folder may be told; `tp` is how many GPUs will share each weight."""

    layout: LayoutName = "compressed-tensors"
    bits: int = 4
    group_size: int = 128
    quantize_attention: bool = False
    tp: int = 1
    shard_bytes: int = 5_000_000_000


def group_format(checkpoint: Checkpoint, settings: FolderSettings) -> GroupFormat:
    """The integer format of the folder. PlanError for bits or a group size that no loader has."""
    if settings.bits not in BITS:
        raise PlanError(f"--bits {settings.bits}: loaders take {' or '.join(map(str, BITS))}")
    if settings.group_size not in GROUPS:
        raise PlanError(
            f"--group-size {settings.group_size}: loaders take {', '.join(map(str, GROUPS[:-1]))} "
            "or -1 (one scale a row)"
        )
    stored = {weight.origin.dtype for weight in checkpoint.weights if weight.is_expert}
    own = torch.float16 if stored == {"F16"} else torch.bfloat16
    # GPTQ files hold f16 scales; rounded like the other layout's first, they give the same codes.
    also = (torch.float16,) if settings.layout == "gptq" and own != torch.float16 else ()
    return GroupFormat(settings.bits, settings.group_size, (own, *also))


def with_copies(checkpoint: Checkpoint) -> Checkpoint:
    """The model with every tensor of its layers that predict, each a weight that nothing runs."""
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
        for each in checkpoint.predictions.stored
    )
    return checkpoint.with_weights((*checkpoint.weights, *copies))


def group_plan(checkpoint: Checkpoint, settings: FolderSettings) -> Plan:
    """Experts (without experts: the feed-forward blocks) as integers, all else as the checkpoint has it.

    `quantize_attention` adds every other linear but router and head. PlanError when groups do
    not divide a weight as it will be cut, with the group sizes that would.
    """
    fmt = group_format(checkpoint, settings)
    shared = _shared_tensors(checkpoint)
    chosen = [weight for weight in checkpoint.weights if _is_quantized(checkpoint, weight, settings, shared)]
    if not chosen:
        raise PlanError(f"{checkpoint.path}: nothing to quantize; --quantize-attention adds dense linears")
    _check_sizes(chosen, fmt, settings)
    quantized = {weight.name for weight in chosen}
    choices = []
    for weight in checkpoint.weights:
        if weight.name in quantized:
            row = weight.n_in * fmt.bits // 8 + fmt.groups(weight.n_in) * fmt.scale_dtype.itemsize
            reason = "" if weight.is_expert else "asked for"
            choices.append(Choice(weight.name, fmt.name, prod(weight.shape[:-1]) * row, reason))
        else:
            dtype = kept_dtype(weight)
            size = weight.numel * (4 if dtype == "F32" else 2)
            choices.append(Choice(weight.name, dtype, size, "as in the checkpoint"))
    return Plan(fmt.name, tuple(choices), sum(choice.bytes for choice in choices))


def kept_dtype(weight: Weight) -> str:
    """What a weight that is not rounded is written in: its own floats, or bf16 where it has none."""
    origin = weight.origin
    return origin.dtype if origin.stored[0].codec.name == "plain" else "BF16"


def block_formats(checkpoint: Checkpoint, plan: Plan, fmt: GroupFormat) -> dict[str, str]:
    """What `formats.get` calls the format of every weight: what rounding packs it in."""
    rows = {weight.name: weight.n_in for weight in checkpoint.weights}
    return {
        choice.weight: fmt.of_rows(rows[choice.weight]).name
        if choice.format == plan.preset
        else choice.format
        for choice in plan.choices
    }


def stored_names(weight: Weight) -> tuple[str, ...]:
    """What checkpoints with a tensor for every expert call a weight's matrices: E names, or one."""
    if weight.is_expert and len(weight.names) != weight.matrices:
        raise FamilyError(
            f"{weight.name}: {weight.names[0]} has no name for a single expert, which safetensors loaders "
            "want; write GGUF instead"
        )
    return weight.names


def modules(weight: Weight) -> tuple[str, ...]:
    """The linear modules behind `stored_names`."""
    return tuple(name.removesuffix(".weight") for name in stored_names(weight))


def kept_linears(checkpoint: Checkpoint, plan: Plan) -> tuple[str, ...]:
    """Every linear module that stays as it is, by all names that loaders know it under; the head is one."""
    formats = {choice.weight: choice.format for choice in plan.choices}
    names = {"lm_head"}
    for weight in checkpoint.weights:
        if not weight.runs:
            names |= {*modules(weight)} if len(weight.shape) > 1 else set()
            continue
        is_linear = len(weight.shape) == 2 and weight.role is not Role.EMBEDDING
        if is_linear and formats[weight.name] != plan.preset:
            names |= {*modules(weight), weight.place.param.removesuffix(".weight")}
    return tuple(sorted(names))


def _is_quantized(
    checkpoint: Checkpoint, weight: Weight, settings: FolderSettings, shared: frozenset[str]
) -> bool:
    if not weight.runs:
        return False
    if weight.is_expert:
        return len(weight.shape) == 3
    if len(weight.shape) != 2 or weight.role.keeps_precision or weight.role in (Role.EMBEDDING, Role.OUTPUT):
        return False
    if weight.origin.stored[0].name in shared:
        return False
    if weight.role in DENSE and checkpoint.n_experts == 0:
        return True
    return settings.quantize_attention


def _shared_tensors(checkpoint: Checkpoint) -> frozenset[str]:
    """Stored tensors that several dense weights are rows of: loaders know them as one module."""
    seen: set[str] = set()
    twice: set[str] = set()
    for weight in checkpoint.weights:
        if not weight.is_expert:
            name = weight.origin.stored[0].name
            (twice if name in seen else seen).add(name)
    return frozenset(twice)


def _check_sizes(chosen: list[Weight], fmt: GroupFormat, settings: FolderSettings) -> None:
    """PlanError for the first weight that groups, words or GPUs do not divide."""
    if settings.tp < 1:
        raise PlanError(f"--tp {settings.tp}: at least one GPU is needed")
    for weight in chosen:
        n_out, n_in = weight.shape[-2:]
        by_rows = weight.role in (Role.DOWN, Role.DENSE_DOWN, Role.ATTN_OUT)
        cut = n_in if by_rows else n_out
        if cut % settings.tp:
            raise PlanError(f"{weight.name}: --tp {settings.tp} does not divide its {cut} channels")
        part = n_in // settings.tp if by_rows else n_in
        if not _fits(part, fmt.group, fmt):
            works = [str(group) for group in GROUPS if _fits(part, group, fmt)]
            shared = f" ({n_in} / --tp {settings.tp})" if part != n_in else ""
            advice = f"--group-size {' or '.join(works)} would work" if works else "write GGUF instead"
            raise PlanError(
                f"{weight.name}: --group-size {fmt.group} does not divide rows of {part}{shared}; {advice}"
            )
        if settings.layout == "gptq" and n_out % fmt.per_word:
            raise PlanError(f"{weight.name}: GPTQ packs {fmt.per_word} rows at a time, not {n_out}")


def _fits(part: int, group: int, fmt: GroupFormat) -> bool:
    return part % (fmt.per_word if group == -1 else group) == 0
