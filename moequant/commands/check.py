"""The check from end to end: tensor by tensor, layer by layer where there is a baseline."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from moequant.check.activations import Collector, merged
from moequant.check.blocks import Fed, check_block
from moequant.check.damage import expected_error
from moequant.check.environment import versions
from moequant.check.figures import BlockFigures, CheckReport, Damage, TensorFigures
from moequant.check.opened import open_source
from moequant.check.plain import misfit
from moequant.check.product import NO_KERNEL, Product, choose
from moequant.check.source import ALTERED, Entry, Source
from moequant.check.speed import measure
from moequant.check.tensors import Against, check_tensor
from moequant.check.text import token_rows
from moequant.checkpoint import Checkpoint
from moequant.commands.text import leading
from moequant.containers.opened import open_model
from moequant.errors import VerifyError
from moequant.escape import shown
from moequant.forward.hidden import Hidden, InMemory
from moequant.forward.memory import WHOLE
from moequant.forward.resources import Resources
from moequant.forward.stream import LayerStream
from moequant.hub import Model, named
from moequant.hub.fetch import complete, headers, whole
from moequant.kernels import KERNEL_FORMATS
from moequant.progress import Bar, Meter, counted
from moequant.values import Role, Weight


@dataclass(frozen=True, slots=True)
class CheckSettings:
    """What to check, and against what.

    `baseline` is the model that the file was made from; without it no expert is compared. `device` is where
    products are computed: "cuda" (by the kernels), "cpu", Triton's "interpreter" or another that torch has;
    None takes a GPU when there is one. `sample` is how many tensors are checked, spread over
    the file; None checks all. `tokens` of the text `calib` are run through both models; None is the bundled
    text. `speed` times the kernels too, which needs a GPU.
    """

    baseline: Model | None = None
    device: str | None = None
    sample: int | None = None
    calib: str | Path | None = None
    tokens: int = 2048
    speed: bool = False


@dataclass(slots=True)
class _Found:
    """What has been seen so far."""

    tensors: list[TensorFigures]
    blocks: list[BlockFigures]
    damages: list[Damage]
    notes: list[str]


def check(out: Model, settings: CheckSettings = CheckSettings()) -> CheckReport:  # frozen
    """Check `out`, a GGUF file or a quantized folder, here or on the Hub.

    What is wrong is in the report's `damages`; VerifyError for a file that cannot be read at all, a
    baseline that does not fit, or a device that is not there.
    """
    with Meter().stage("check"):
        return _check(out, settings)


def _check(out: Model, settings: CheckSettings) -> CheckReport:
    """See `check`."""
    path = whole(out)
    if not path.exists():
        raise VerifyError(f"{path}: no such file or folder")
    product, notes = choose(settings.device)
    baseline = None if settings.baseline is None else open_model(complete(headers(settings.baseline)))
    source = open_source(path, baseline)
    entries = _sample(source.entries, settings.sample)
    found = _Found([], [], [], list(notes))
    if len(entries) < len(source.entries):
        found.notes.append(f"{len(entries)} of {len(source.entries)} quantized tensors were checked")
    if not entries:
        found.notes.append("the file has no quantized tensor")
    found.damages += [Damage(where, what) for where, what in source.said()]
    if settings.sample is None:
        _rest(source, found)
    else:
        found.notes.append("tensors that are not quantized were not checked")
    if not source.recorded:
        found.notes.append(
            "the file records no checksums: a flipped low bit, as large as ordinary rounding, cannot be seen"
        )
    if baseline is None:
        found.notes.append("no --baseline: whether the weights are the model's was not checked")
        for entry in counted("check", entries, "tensor"):
            _tensor(source, entry, product, None, found)
    else:
        _against(source, entries, product, baseline, settings, found)
    if without := sorted({each.format for each in found.tensors if each.product == NO_KERNEL}):
        found.notes.append(
            f"no kernel of moequant takes {', '.join(without)}: torch multiplied decoded weights"
        )
    speed = _speed(source, entries, product, baseline, found) if settings.speed else ()
    base = None if settings.baseline is None else named(settings.baseline)
    return CheckReport(
        shown(path),
        base,
        product.name,
        tuple(found.tensors),
        tuple(found.blocks),
        tuple(found.damages),
        tuple(found.notes),
        versions(product.device),
        speed,
    )


def _speed(
    source: Source, entries: tuple[Entry, ...], product: Product, baseline: Checkpoint | None, found: _Found
) -> tuple[dict[str, float | int | str], ...]:
    """Timings of the first expert tensor of each type that has a kernel."""
    if product.device != "cuda":
        found.notes.append("speed is measured on a GPU only")
        return ()
    rows: list[dict[str, float | int | str]] = []
    for entry in {entry.format: entry for entry in reversed(entries) if entry.stacked}.values():
        matrix = source.matrix(entry)
        if matrix is not None and matrix.format in KERNEL_FORMATS:
            top_k = min(8 if baseline is None else baseline.shape.experts_used, entry.shape[0])
            rows += measure(matrix, top_k)
    return tuple(rows)


def _sample(entries: tuple[Entry, ...], count: int | None) -> tuple[Entry, ...]:
    """`count` entries spread evenly, first and last among them."""
    if count is None or count >= len(entries):
        return entries
    chosen = {round(i) for i in torch.linspace(0, len(entries) - 1, count).tolist()}
    return tuple(entry for i, entry in enumerate(entries) if i in chosen)


def _tensor(source: Source, entry: Entry, product: Product, against: Against | None, found: _Found) -> None:
    figures, damages = check_tensor(source, entry, product, against)
    found.tensors.append(figures)
    found.damages += damages


def _rest(source: Source, found: _Found) -> None:
    """Everything that is not quantized."""
    altered = source.altered_rest()
    found.damages += [Damage(name, what) for name, what in altered]
    changed, before = {name for name, _ in altered}, len(found.damages)
    for plain in source.plain():
        what = misfit(plain, source.recorded and not plain.names & changed)
        if what is not None:
            found.damages.append(Damage(plain.label, what))
    if source.model is not None and not source.recorded and len(found.damages) > before:
        found.notes.append(
            "AWQ, SmoothQuant and rotations change norms and weights together and keep the outputs: such a "
            "file's tensors are not the baseline's, and moequant compare says what it is worth"
        )


def _against(
    source: Source,
    entries: tuple[Entry, ...],
    product: Product,
    baseline: Checkpoint,
    settings: CheckSettings,
    found: _Found,
) -> None:
    """Both models side by side, layer by layer, and every tensor when its layer has been crossed."""
    by_name, model = source.weights, source.model
    assert model is not None
    for entry in entries:
        weight = by_name.get(entry.name)
        if weight is None or weight.numel != entry.shape[0] * entry.shape[1] * entry.shape[2]:
            raise VerifyError(
                f"{source.path}: another model than {baseline.path}, which has no "
                f"{entry.name} {list(entry.shape)}"
            )
    alone = not any(each.is_expert and _is_part(model, each) for each in model.weights)
    if not alone:
        found.notes.append("experts and router are no block of their own in this model: blocks were not run")
    ids = token_rows(baseline, settings.calib, settings.tokens, leading(baseline))
    resources = Resources(device=product.device)
    with (
        LayerStream(model, ids, resources, among=WHOLE) as base,
        LayerStream(model, ids, resources, source.load, among=WHOLE) as other,
        Bar("check", len(entries), "tensor") as bar,
    ):
        for layer, seen in _layers(base, other):
            before = len(found.damages)
            for entry in [entry for entry in entries if _crossed(by_name[entry.name]) == layer]:
                _tensor(source, entry, product, Against(by_name[entry.name], seen[0]), found)
                bar.update()
            up = next((w for w in model.weights if w.layer == layer and w.role is Role.UP), None)
            if alone and layer is not None and up is not None and up.site is not None:
                expected = _expected(source, layer)
                vouched = source.recorded and not any(each.what == ALTERED for each in found.damages[before:])
                models = (base.model, other.model)
                fed = Fed(ids.flatten(), seen)
                figures, damages = check_block(up.site, models, fed, layer, expected, vouched)
                found.blocks.append(figures)
                found.damages += damages


def _is_part(model: Checkpoint, expert: Weight) -> bool:
    """Whether a layer's experts cannot be run with their router as the module that holds them: that is one of
    the layer itself, or its experts are fed something else than it is, as in a space of fewer columns."""
    in_layer = expert.place.param.rpartition(".")[0].count(".") == model.family.layers_at.count(".") + 2
    return in_layer or (expert.role is Role.UP and expert.n_in != model.shape.hidden)


def _crossed(weight: Weight) -> int | None:
    """The layer with which a weight is checked; None for what is outside of those that run."""
    return weight.layer if weight.runs else None


def _layers(
    base: LayerStream, other: LayerStream
) -> Iterator[tuple[int | None, tuple[Collector, Collector]]]:
    """Each layer while both models hold its weights, with what they were fed; then None for the rest."""
    hidden: tuple[Hidden, Hidden] = (InMemory(base.shapes), InMemory(other.shapes))
    base.embed(hidden[0])
    other.embed(hidden[1])
    for layer, _ in zip(base.layers(), other.layers(), strict=True):
        seen = (
            merged(base.cross(layer, hidden[0], lambda batch: Collector(), hidden[0])),
            merged(other.cross(layer, hidden[1], lambda batch: Collector(), hidden[1])),
        )
        yield layer, seen
    last = merged(told for told, _ in base.finish(hidden[0], lambda batch: Collector()))
    yield None, (last, Collector())


def _expected(source: Source, layer: int) -> float:
    """Relative errors of the formats of a block's experts, added as independent ones."""
    of_layer = [entry for entry in source.entries if source.weights[entry.name].layer == layer]
    formats = [entry.alike for entry in of_layer if source.weights[entry.name].is_expert]
    total = sum(expected_error(name) ** 2 for name in formats)
    return float(max(total**0.5, 1e-3))
