"""The same straight line for a folder of safetensors: open, route, plan, quantize, pack, verify, report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from moequant import corpus
from moequant.bundled import Split
from moequant.checkpoint import Checkpoint, load, open_checkpoint
from moequant.compare import Comparison
from moequant.compare.streaming import Version, compare
from moequant.containers import folder
from moequant.containers.card import Card
from moequant.containers.folder_plan import FolderSettings, group_format, group_plan
from moequant.containers.grouped import pack_all
from moequant.containers.tokenizer import read_tokenizer
from moequant.conversion import Settings, check_memory, given_statistics
from moequant.corpus import Rows
from moequant.meter import Meter
from moequant.quantize import Quantizer
from moequant.report import Report
from moequant.routing.calibrate import calibrate
from moequant.texts import token_rows
from moequant.values import ExpertLoss


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
    model, out, meter = Path(model), Path(out), Meter()
    with meter.stage("open"):
        checkpoint = open_checkpoint(model)
        chosen = group_plan(checkpoint, layout)
        folder.check_target(out, folder.folder_bytes(checkpoint, chosen, layout), settings.overwrite, model)
        calibration = given_statistics(checkpoint, settings)
        calib_rows = None if calibration else _rows(checkpoint, settings, "calibration")
        eval_rows = _rows(checkpoint, settings, "evaluation") if settings.eval_tokens else None
        check_memory(checkpoint, models=2 if eval_rows else 1)
    if calib_rows is not None:
        with meter.stage("route"):
            calibration = calibrate(checkpoint, calib_rows, settings.resources)
    losses: list[ExpertLoss] = []
    card = Card(checkpoint, chosen, layout, calibration)
    quantizer = Quantizer(calibration, settings.effort, settings.gating)
    with folder.atomic(out) as partial:
        with meter.stage("quantize"):
            packed = pack_all(checkpoint, chosen, group_format(checkpoint, layout), quantizer, losses)
            written = folder.write(partial, card, packed)
        with meter.stage("verify"):
            folder.verify(written, checkpoint, chosen, layout)
    comparison: Comparison | None = None
    if eval_rows is not None:
        with meter.stage("compare"):
            decoder = folder.LAYOUTS[layout.layout].open(out).load
            (found,) = compare(
                checkpoint, Version("checkpoint", load), [Version(out.name, decoder)], eval_rows
            )
            comparison = found.comparison
        card = replace(card, measured=_measured(comparison))
        (out / "README.md").write_text(card.text(), encoding="utf-8")
    return Report(
        model=model,
        out=out,
        file_bytes=written.bytes,
        checkpoint=checkpoint,
        plan=chosen,
        calibration=calibration,
        losses=tuple(losses),
        comparison=comparison,
        stages=tuple(meter.costs),
        notes=(),
    )


def _rows(checkpoint: Checkpoint, settings: Settings, split: Split) -> Rows:
    source, tokens = (
        (settings.calib, settings.calib_tokens)
        if split == "calibration"
        else (settings.eval, settings.eval_tokens)
    )
    bos = read_tokenizer(checkpoint.path).leading
    return token_rows(checkpoint, corpus.read(source, split), tokens, settings.seed, bos)


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
