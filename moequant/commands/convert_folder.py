"""The same straight line for a folder of safetensors: open, route, plan, quantize, pack, verify, report."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from moequant.checkpoint import Checkpoint, load, open_checkpoint
from moequant.commands.convert import Settings, check_memory, given_statistics, gradients
from moequant.containers.folders import write as folder
from moequant.containers.folders.card import Card
from moequant.containers.folders.plan import FolderSettings, block_formats, group_format, group_plan
from moequant.containers.gguf import imatrix
from moequant.containers.gguf.tokenizer.spec import read_tokenizer
from moequant.evaluate import Comparison
from moequant.evaluate.side_by_side import Version, compare
from moequant.files import atomic_folder, claim
from moequant.progress import Meter
from moequant.report import Report
from moequant.rounding.coupled import Result, Rounding
from moequant.rounding.diagonal import Quantizer, progress
from moequant.rounding.layerwise import round_checkpoint
from moequant.statistics.calibrate import calibrate
from moequant.text import corpus
from moequant.text.bundled import Split
from moequant.text.corpus import Rows
from moequant.text.rows import calibration_rows, token_rows
from moequant.values import ExpertLoss, Packed


def convert_folder(
    model: str | Path,
    out: str | Path,
    settings: Settings = Settings(),  # noqa: B008  frozen
    layout: FolderSettings = FolderSettings(),  # noqa: B008  frozen
) -> Report:
    """Quantize the Hugging Face folder `model` into the folder `out`, for vLLM and transformers.

    Of `settings`, what says how large a GGUF file is has no meaning here. Raises a MoequantError
    with one clear line when something is wrong; `out` is then absent, or as it was before.
    """
    out = Path(out)
    outputs = claim(
        settings.imatrix_out, folder=out, overwrite=settings.overwrite, inputs=(model, *settings.inputs)
    )
    with outputs:
        return _convert(Path(model), out, settings, layout)


def _convert(model: Path, out: Path, settings: Settings, layout: FolderSettings) -> Report:
    meter = Meter()
    with meter.stage("open"):
        checkpoint = open_checkpoint(model)
        card = Card(checkpoint, group_plan(checkpoint, layout), layout)
        folder.check_target(
            out, folder.folder_bytes(checkpoint, card.plan, layout), settings.overwrite, model
        )
        calibration = given_statistics(checkpoint, settings)
        texts = _texts(checkpoint, settings, calibrated=calibration is not None)
        check_memory(checkpoint, models=2 if texts.evaluation or texts.rounding else 1)
        if texts.rounding is not None:
            gradients(checkpoint, settings)
    if calibration is None:
        assert texts.calibration is not None
        with meter.stage("route"):
            calibration = calibrate(checkpoint, texts.calibration, settings.resources)
    if settings.imatrix_out is not None:
        imatrix.write(settings.imatrix_out, checkpoint, calibration, "none")
    card = replace(card, calibration=calibration, rounded_on=texts.rounding, coupled=settings.coupled)
    losses: list[ExpertLoss] = []
    comparison: Comparison | None = None
    with atomic_folder(out) as partial:
        with meter.stage("quantize"):
            written = folder.write(partial, card, pack_all(card, settings, losses))
        with meter.stage("verify"):
            folder.verify(written, checkpoint, card.plan, layout)
        if texts.evaluation is not None:
            with meter.stage("compare"):
                comparison = _compared(checkpoint, partial, layout, texts.evaluation, settings)
            card = replace(card, measured=_measured(comparison))
            (partial / "README.md").write_text(card.text(), encoding="utf-8")
    return Report(
        model=model,
        out=out,
        file_bytes=written.bytes,
        checkpoint=checkpoint,
        plan=card.plan,
        calibration=calibration,
        losses=tuple(losses),
        comparison=comparison,
        stages=tuple(meter.costs),
        notes=(),
    )


def pack_all(card: Card, settings: Settings, losses: list[ExpertLoss]) -> Iterator[Packed]:
    """The plan's integer weights in its order, made when asked for; losses are appended as they are known.

    Under Hessians of the text that `card.rounded_on` has, without one by the plain search.
    """
    checkpoint, plan = card.checkpoint, card.plan
    quantizer = Quantizer(card.calibration, settings.effort, settings.gating)
    types = block_formats(checkpoint, plan, group_format(checkpoint, card.settings))
    integers = {choice.weight for choice in plan.choices if choice.format == plan.preset}
    found: Iterator[Result]
    if card.rounded_on is None:
        wanted = (weight for weight in checkpoint.weights if weight.name in integers)
        found = (quantizer.pack(weight, types[weight.name]) for weight in wanted)
    else:
        ids, rounding = card.rounded_on.ids, Rounding.of(settings.effort, settings.coupled)
        found = round_checkpoint(checkpoint, ids, types, quantizer.pack, rounding, settings.resources)
    for packed, loss in progress(found, checkpoint):
        if packed.weight.name in integers:
            losses.append(replace(loss, format=plan.preset))
            yield packed


@dataclass(frozen=True, slots=True)
class _Texts:
    """Rows for statistics, for Hessians and for the comparison; None where not needed."""

    calibration: Rows | None
    rounding: Rows | None
    evaluation: Rows | None


def _texts(checkpoint: Checkpoint, settings: Settings, calibrated: bool) -> _Texts:
    """The rows that this conversion needs; `calibrated` says that statistics are there already."""
    fast = settings.effort == "fast"
    calib = None if fast and calibrated else _rows(checkpoint, settings, "calibration")
    evaluation = _rows(checkpoint, settings, "evaluation") if settings.eval_tokens else None
    return _Texts(calib, None if fast else calib, evaluation)


def _rows(checkpoint: Checkpoint, settings: Settings, split: Split) -> Rows:
    bos = read_tokenizer(checkpoint.path).leading
    if split == "calibration":
        documents = corpus.read(settings.calib, split)
        return calibration_rows(checkpoint, documents, settings.calib_tokens, settings.seed, bos)
    documents = corpus.read(settings.eval, split)
    return token_rows(checkpoint, documents, settings.eval_tokens, settings.seed, bos)


def _compared(
    checkpoint: Checkpoint, out: Path, layout: FolderSettings, rows: Rows, settings: Settings
) -> Comparison:
    """The checkpoint and the folder, decoded by the loader's decoder, scored on `rows`."""
    decoder = folder.LAYOUTS[layout.layout].open(out).load
    base, candidate = Version("checkpoint", load), Version(out.name, decoder)
    (found,) = compare(checkpoint, base, [candidate], rows, settings.resources)
    return found.comparison


def _measured(found: Comparison) -> tuple[tuple[str, str], ...]:
    """What the model card says of the comparison."""
    before, after = found.base_perplexity, found.perplexity
    return (
        ("scored", f"{found.tokens:,} tokens of {found.source}"),
        ("perplexity before", f"{before.value:.3f} ± {before.error:.3f}"),
        ("perplexity after", f"{after.value:.3f} ± {after.error:.3f}"),
        ("KL divergence, mean", f"{found.kl_mean.value:.5f} ± {found.kl_mean.error:.5f}"),
        ("same top token", f"{found.same_top:.2%}"),
    )
