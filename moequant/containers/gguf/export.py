"""A model as the tensors and keys of a GGUF file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from moequant.checkpoint import Checkpoint
from moequant.containers.gguf import nextn
from moequant.containers.gguf.families import COMMON, EXPORTS, OTHERS, Computed, Export, FileTensor, Key
from moequant.containers.gguf.families.base import Unsayable
from moequant.errors import CheckpointError, FamilyError, foreign
from moequant.families import Config, Family
from moequant.families.config import no_shared, one_by_one
from moequant.values import Origin, Place, Role, Stack, Stored, Weight
from moequant.values.ops import Ops


@dataclass(frozen=True, slots=True)
class Exported:
    """What a GGUF file of a model holds, but for types and tokenizer.

    `checkpoint` is the model cut into the file's tensors, in the file's order. `names` and `shapes` are
    those of the file, by our names. `keys` are without the architecture's name. `parts` says of every
    weight of the model, by its name, which of the file's tensors hold it, and by which ops they are made of
    it.
    """

    checkpoint: Checkpoint
    arch: str
    names: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    keys: tuple[Key, ...]
    parts: Mapping[str, tuple[tuple[str, Ops], ...]]
    warnings: tuple[str, ...]

    @property
    def weights(self) -> tuple[Weight, ...]:
        """The file's tensors."""
        return self.checkpoint.weights

    @property
    def own_names(self) -> dict[str, str]:
        """Our names, by the file's."""
        return {theirs: ours for ours, theirs in self.names.items()}

    @property
    def metadata(self) -> dict[str, Any]:
        """The keys by their full names; arrays as tuples, as a header of a file has them."""
        return {
            f"{self.arch}.{key.name}": tuple(key.value) if isinstance(key.value, list) else key.value
            for key in self.keys
        }


def export(checkpoint: Checkpoint) -> Exported:
    """The model as a GGUF file has it.

    FamilyError, with every reason, when llama.cpp has no such architecture or computes something else.
    """
    with foreign(FamilyError, f"{checkpoint.family.name}: config.json has numbers that make no model"):
        return _export(checkpoint)


def _export(checkpoint: Checkpoint) -> Exported:
    """See `export`; raises anything for numbers of a config that nobody would write."""
    way = check(checkpoint.family, checkpoint.config)
    warnings = way.told(checkpoint.config)
    checkpoint = checkpoint.untied() if way.own_head else checkpoint
    kept, told = nextn.kept(checkpoint, way)
    weights: list[Weight] = []
    names: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    ends = [each for each in checkpoint.weights if each.role is Role.OUTPUT]
    layers = [each for each in checkpoint.weights if each.role is not Role.OUTPUT]
    cut = {each.name: _pieces(checkpoint, way, each) for each in (*layers, *kept, *ends)}
    parts = {
        name: tuple((weight.name, tensor.ops) for weight, tensor in pairs) for name, pairs in cut.items()
    }
    tensors = [pair for pairs in cut.values() for pair in pairs]
    # In the order in which weights are rounded: outside of all layers first, the head last.
    first = next(at for at, (weight, _) in enumerate(tensors) if weight.layer is not None)
    tensors[first:first] = [
        (_computed(each), FileTensor(each.name)) for each in way.computed(checkpoint.config)
    ]
    for weight, tensor in tensors:
        prefix = "" if weight.layer is None or tensor.outside else f"blk.{weight.layer}."
        weights.append(weight)
        names[weight.name] = prefix + tensor.name
        shapes[weight.name] = tensor.shape or weight.shape
        if min(shapes[weight.name], default=1) < 1 or prod(shapes[weight.name]) != weight.numel:
            raise CheckpointError(
                f"{weight.name}: shape {list(weight.shape)} does not fit config.json, which makes it "
                f"{list(shapes[weight.name])}"
            )
    return Exported(
        checkpoint.with_weights(tuple(weights)),
        way.arch,
        names,
        shapes,
        nextn.counted(way, checkpoint.config, way.keys(checkpoint.config), kept),
        parts,
        (*warnings, *told),
    )


def check(family: Family, config: Config) -> Export:
    """The family's way into GGUF; FamilyError as `export` raises it."""
    way = EXPORTS.get(family.name)
    if way is None:
        why = OTHERS.get(family.name, "llama.cpp has no such architecture")
        raise FamilyError(f"{family.name}: {why}; --format safetensors writes a folder")
    with foreign(FamilyError, f"{family.name}: config.json has values that make no model"):
        lacking = [*way.complaints(config), *_without_shared(family, config, way.arch)]
        reasons, computes = (lacking, True) if lacking else _unwritable(way, config)
    if reasons:
        more = f" (also: {'; '.join(reasons[1:])})" if reasons[1:] else ""
        folder = "; --format safetensors writes a folder" if computes and one_by_one(family, config) else ""
        raise FamilyError(f"{family.name}: {reasons[0]}{more}{folder}")
    return way


def _unwritable(way: Export, config: Config) -> tuple[list[str], bool]:
    """A complaint about what no key of the file can say, and whether the model computes all the same."""
    try:
        way.keys(config)
    except FamilyError as error:
        return [str(error)], isinstance(error, Unsayable)
    return [], True


def _without_shared(family: Family, config: Config, arch: str) -> Iterator[str]:
    """A complaint about shared experts that are none, where the family has their block all the same: so has
    llama.cpp's graph, which computes something else when it is not there."""
    none = no_shared(config)
    if none is None:
        return
    slots = (slot for number in range(family.shape(config).layers) for slot in family.layer(config, number))
    if any(slot.role is Role.SHARED_DOWN for slot in slots):
        yield (f"config key {none} = 0: llama.cpp's {arch!r} always computes shared experts")


def local(weight: Weight) -> str:
    """A weight's name within its layer."""
    return weight.name if weight.layer is None else weight.name.removeprefix(f"layers.{weight.layer}.")


def _pieces(checkpoint: Checkpoint, way: Export, weight: Weight) -> list[tuple[Weight, FileTensor]]:
    """The file's tensors that are made of one weight; CheckpointError where the config would cut it elsewhere
    than it ends."""
    try:
        return list(_cut(checkpoint, way, weight))
    except ValueError as error:
        raise CheckpointError(
            f"{weight.name}: shape {list(weight.shape)} does not fit config.json ({error})"
        ) from None


def _cut(checkpoint: Checkpoint, way: Export, weight: Weight) -> Iterator[tuple[Weight, FileTensor]]:
    """The file's tensors that are made of one weight."""
    parts = way.cut(checkpoint.config, weight)
    if parts is None:
        yield weight, FileTensor(_name(checkpoint, way, weight))
        return
    for part in parts:
        part = part if part.name else replace(part, name=_name(checkpoint, way, weight))
        own = weight.name if part.own is None else f"layers.{weight.layer}.{part.own}"
        made = weight.refined(
            part.ops, part.stack, name=own, role=part.role or weight.role, site=part.site or weight.site
        )
        yield made, part


def _name(checkpoint: Checkpoint, way: Export, weight: Weight) -> str:
    """What the tables call a weight that is one tensor of the file."""
    name = name_of(way, local(weight))
    if name is None:
        raise FamilyError(f"{checkpoint.family.name}: llama.cpp's {way.arch!r} has no name for {weight.name}")
    return name


def name_of(way: Export, local: str) -> str | None:
    """The file's name, within its block, of a weight that is one tensor, by ours within its layer."""
    return way.names.get(local) or COMMON.get(local)


@dataclass(frozen=True, slots=True)
class _Values:
    """A codec of values that the config gives."""

    values: tuple[float, ...]
    name: str = "computed"

    def decode(self, stored: Stored, index: int | None, rows: range | None) -> Tensor:
        """See `Codec`."""
        return torch.tensor(self.values, dtype=torch.float32)


def _computed(tensor: Computed) -> Weight:
    """A tensor that the file has and the model computes: a weight that lives nowhere."""
    shape = (len(tensor.values),)
    stored = Stored(tensor.name, shape, "F32", {}, _Values(tensor.values))
    name = tensor.name.removesuffix(".weight")
    return Weight(name, Role.SCALE, None, shape, Stack.NONE, Origin((stored,)), Place(""), None)
