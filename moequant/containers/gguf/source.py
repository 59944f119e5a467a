"""A GGUF file as a model to convert: its tensors put into the places that transformers' model has.

What a file says of itself is less than transformers needs, so config.json and tokenizer are a folder's. The
family's way into GGUF (`export`) says which tensors hold which weight, and by which ops; it is gone back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

from moequant.checkpoint import Checkpoint, Folder
from moequant.checkpoint.codecs import as_shipped, ggml
from moequant.checkpoint.open import every_slot, head_last, read_config, shape_of
from moequant.checkpoint.slots import filled
from moequant.containers.gguf.export import Exported, export
from moequant.containers.gguf.read import GgufFile
from moequant.containers.gguf.same import check_same
from moequant.errors import CheckpointError
from moequant.families import Slot
from moequant.families.base import PREDICTION
from moequant.families.config import make_config
from moequant.forward.model import shapes
from moequant.values import ModelShape, Origin, Stored, Weight
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
    weights = (_empty(slot, layer, shape, there) for layer, slot in every_slot(family, config, shape))
    hollow = head_last(weight for weight in weights if weight is not None)
    model = Checkpoint(folder.path, raw, config, family, shape, hollow, gguf=folder.gguf)
    exported = export(model)
    check_same(file.header, exported)
    found = tuple(replace(weight, origin=_origin(weight, exported, file)) for weight in hollow)
    skipped = [each for each in file.header.tensors if (each.layer or 0) >= shape.layers]
    return replace(
        model,
        weights=found,
        skipped={PREDICTION: len(skipped)} if skipped else {},
        notes=_notes(file, found),
    )


def _empty(
    slot: Slot, layer: int | None, model: ModelShape, there: Mapping[str, tuple[int, ...]]
) -> Weight | None:
    """The weight of a slot as transformers' model has it, without values; None where it has none."""
    if slot.param not in there:
        if slot.optional:
            return None
        raise CheckpointError(f"{slot.name}: transformers' model of this config.json has no {slot.param}")
    return filled(slot, layer, model, shape_after(slot.ops, there[slot.param]), Origin(()))


def _origin(weight: Weight, exported: Exported, file: GgufFile) -> Origin:
    """Where the file has a weight: in one tensor as it is, or in parts of it."""
    cut = {each.name: each for each in exported.weights}
    pieces: list[tuple[Ops, Stored]] = []
    for name, ops in exported.parts[weight.name]:
        # The file's shape may be another than the weight's at the same bytes.
        ref = replace(file.ref(exported.names[name]), shape=cut[name].shape)
        pieces.append((ops, ggml.of_type(ref)))
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
