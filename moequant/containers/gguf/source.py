"""A GGUF file as a model to convert: its tensors put into the places that transformers' model has.

What a file says of itself is less than transformers needs, so config.json and tokenizer are a folder's. The
family's way into GGUF (`export`) says which tensors hold which weight, and by which ops; it is gone back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from moequant.checkpoint import Checkpoint, Folder
from moequant.checkpoint.codecs import as_shipped, ggml, whole_numbers
from moequant.checkpoint.open import every_slot, head_last, read_config, shape_of
from moequant.checkpoint.predictions import Predictions, fed, sites_of
from moequant.checkpoint.slots import filled
from moequant.containers.gguf.export import Exported, export, local, name_of
from moequant.containers.gguf.families import EXPORTS
from moequant.containers.gguf.read import GgufFile
from moequant.containers.gguf.same import check_same, differences
from moequant.errors import CheckpointError
from moequant.families import Slot
from moequant.families.config import make_config
from moequant.forward.model import shapes
from moequant.values import ModelShape, Origin, Role, Stored, Weight
from moequant.values.ops import Ops, shape_after

HEAD = "output.weight"


def open_gguf(folder: Folder) -> Checkpoint:
    """The model whose weights are those of `folder.gguf`; only headers are read.

    FamilyError for a family or config that GGUF has no way for, VerifyError for a file of another model,
    CheckpointError for what cannot be read.
    """
    assert folder.gguf is not None
    raw, family = read_config(folder.path)
    file = GgufFile(folder.gguf)
    wanted = bool(make_config(family, raw).tie_word_embeddings)
    config = make_config(family, raw, wanted and HEAD not in file.tensors)
    shape = shape_of(family, config)
    there = shapes(folder.path, config)
    if shape.tied:
        there.pop("lm_head.weight", None)  # it is the embedding
    weights = (_empty(slot, layer, shape, there) for layer, slot in every_slot(family, config, shape))
    hollow = head_last(weight for weight in weights if weight is not None)
    model = Checkpoint(folder.path, raw, config, family, shape, hollow, gguf=folder.gguf)
    model = replace(model, predictions=_predictions(model, file))
    exported = export(model)
    check_same(file.header, exported)
    found = tuple(replace(weight, origin=_origin(weight, exported, file)) for weight in hollow)
    notes = (*_notes(file, found), *differences(file.header, exported))
    return replace(model, weights=found, predictions=_filled(model, exported, file), notes=notes)


def _empty(
    slot: Slot, layer: int | None, model: ModelShape, there: Mapping[str, tuple[int, ...]]
) -> Weight | None:
    """The weight of a slot as transformers' model has it, without values; None where it has none."""
    if slot.param not in there:
        if slot.optional:
            return None
        raise CheckpointError(f"{slot.name}: transformers' model of this config.json has no {slot.param}")
    return filled(slot, layer, model, shape_after(slot.ops, there[slot.param]), Origin(()))


def _predictions(model: Checkpoint, file: GgufFile) -> Predictions:
    """The layers behind the last that the family describes, without values."""
    behind = [each.name for each in file.header.tensors if (each.layer or 0) >= model.n_layers]
    stored = tuple(ggml.of_type(file.ref(name)) for name in behind)
    if not stored:
        return Predictions()
    shapes_of, sites = _Shapes(model, export(model), file), sites_of(model.weights)
    found: list[Weight] = []
    for number, slots in enumerate(model.family.predictions(model.config), model.n_layers):
        for slot in slots:
            shape = shapes_of.find(slot, number)
            if shape is not None:
                found.append(fed(filled(slot, number, model.shape, shape, Origin(())), sites))
            elif not slot.optional:
                return Predictions(stored, unfit=f"{slot.name} is missing, or like none of the model's")
    return Predictions(stored, tuple(found))


@dataclass(frozen=True, slots=True)
class _Shapes:
    """The shapes of weights that transformers' model does not have, by those that they are like."""

    model: Checkpoint
    exported: Exported
    file: GgufFile

    def find(self, slot: Slot, number: int) -> tuple[int, ...] | None:
        """That of a weight of block `number`: that of the last layer's whose tensors are like its own; where
        no layer has such a weight, what the file says. None when the file has none."""
        own = slot.name.removeprefix(f"layers.{number}.")
        twins = [weight for weight in reversed(self.model.weights) if local(weight) == own]
        if twins:
            return next((twin.shape for twin in twins if self._is_like(twin, number)), None)
        name = name_of(EXPORTS[self.model.family.name], own)
        found = self.file.tensors.get(f"blk.{number}.{name}")
        return None if found is None else found.shape

    def _is_like(self, twin: Weight, number: int) -> bool:
        there = self.file.tensors
        names = [self.exported.names[name] for name, _ in self.exported.parts[twin.name]]
        others = [name.replace(f"blk.{twin.layer}.", f"blk.{number}.", 1) for name in names]
        return all(
            one in there and two in there and there[one].shape == there[two].shape
            for one, two in zip(names, others, strict=True)
        )


def _filled(model: Checkpoint, exported: Exported, file: GgufFile) -> Predictions:
    """The same with their values, where files hold such layers."""
    known = model.predictions
    if not known.weights or known.weights[0].name not in exported.parts:
        return known
    there = tuple(replace(weight, origin=_origin(weight, exported, file)) for weight in known.weights)
    read = {ref.name for weight in there for each in weight.origin.stored for ref in each.parts.values()}
    if rest := [each.name for each in known.stored if each.name not in read]:
        return Predictions(known.stored, unfit=f"{rest[0]} is unknown")
    return replace(known, weights=there)


def _origin(weight: Weight, exported: Exported, file: GgufFile) -> Origin:
    """Where the file has a weight: in one tensor as it is, or in parts of it."""
    cut = {each.name: each for each in exported.weights}
    pieces: list[tuple[Ops, Stored]] = []
    for name, ops in exported.parts[weight.name]:
        # The file's shape may be another than the weight's at the same bytes.
        ref = replace(file.ref(exported.names[name]), shape=cut[name].shape)
        stored = ggml.of_type(ref)
        if weight.role is Role.TABLE:
            stored = whole_numbers(stored, exported.checkpoint.n_experts)
        pieces.append((ops, stored))
    if len(pieces) == 1 and not pieces[0][0]:
        return _whole(pieces[0][1])
    stored = ggml.joined(weight.name, weight.shape, tuple(pieces))
    return Origin((stored,), pieces=tuple((ops, _whole(piece)) for ops, piece in pieces))


def _whole(stored: Stored) -> Origin:
    return Origin((stored,), holds=as_shipped(stored))


def _notes(file: GgufFile, weights: Iterable[Weight]) -> tuple[str, ...]:
    """What a person should know who makes another file of this one."""
    stored = (each for weight in weights for each in weight.origin.stored)
    read = {ref.name for each in stored for ref in each.parts.values()}
    types = Counter(each.type for each in file.header.tensors if each.name in read)
    lossy = [f"{count:,} {kind}" for kind, count in types.most_common() if kind not in ggml.PLAIN]
    if not lossy:
        return (f"made from a GGUF file, {file.path.name}",)
    return (
        f"made from a GGUF file that is quantized already, {file.path.name} ({', '.join(lossy)} tensors): "
        "what that lost stays lost, and the comparison does not see it; convert the original where you have "
        "it",
    )
