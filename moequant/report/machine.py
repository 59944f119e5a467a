"""Conversions, dry runs and plans for a machine: numbers exact, sizes in bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moequant.checkpoint import Checkpoint
from moequant.escape import shown
from moequant.plan import Point
from moequant.plan.curve import Curve
from moequant.report.dry_run import DryRun
from moequant.report.summary import Report
from moequant.values import Calibration, ExpertLoss, Plan


def model_json(checkpoint: Checkpoint) -> dict[str, Any]:
    """Which model it is: its name, the commit where it comes from the Hub, and its bytes of weights."""
    return {
        "model": shown(checkpoint.source),
        "revision": checkpoint.revision,
        "family": checkpoint.family.name,
        "weights": sum(weight.numel for weight in checkpoint.weights),
        "source_bytes": checkpoint.source_bytes,
    }


def conversion_json(reports: Sequence[Report]) -> dict[str, Any]:
    """A conversion: what came out, what each weight became, what it cost, and what experts saw."""
    first = reports[0]
    return {
        **model_json(first.checkpoint),
        "calibration": None if first.calibration is None else _calibration(first.calibration),
        "files": [_file(report) for report in reports],
        "forecast": None if first.forecast is None else asdict(first.forecast),
        "stages": [asdict(cost) for cost in first.stages],
        "notes": list(dict.fromkeys(note for report in reports for note in report.notes)),
    }


def _file(report: Report) -> dict[str, Any]:
    return {
        "out": str(report.out),
        "bytes": report.file_bytes,
        "parts": _parts(report.parts),
        "bits_per_weight": report.bits_per_weight,
        **plan_json(report.plan),
        "comparison": None if report.comparison is None else asdict(report.comparison),
        "losses": [_loss(loss) for loss in report.losses],
    }


def _parts(parts: Mapping[Path, int]) -> list[dict[str, Any]]:
    """The files of one output, in order."""
    return [{"name": path.name, "bytes": size} for path, size in parts.items()]


def dry_run_json(files: Sequence[DryRun]) -> dict[str, Any]:
    """What a conversion would make, of each file."""
    made = [
        {
            "bytes": sum(each.parts.values()),
            "parts": _parts(each.parts),
            "limit": each.limit,
            "notes": list(each.notes),
            **plan_json(each.plan),
        }
        for each in files
    ]
    return {**model_json(files[0].checkpoint), "files": made}


def plan_json(plan: Plan) -> dict[str, Any]:
    """The type of every weight, and why."""
    return {
        "type": plan.preset,
        "target": plan.target or plan.preset,
        "expected_kl": plan.kl,
        "types": [asdict(choice) for choice in plan.choices],
    }


def survey_json(curve: Curve) -> dict[str, Any]:
    """What every size is expected to cost: sizes asked for with all types; the curve, and what others would
    make, without."""
    return {
        "model": curve.title,
        "format": curve.format,
        "weights": curve.weights,
        "predicted_from": curve.source,
        "wanted": [_point(point) | plan_json(point.plan) for point in curve.wanted if point.plan is not None],
        "curve": [_point(point) for point in curve.plans],
        "presets": [
            {"preset": theirs.label, "theirs": _point(theirs), "ours": _point(ours)}
            for theirs, ours in curve.presets
        ],
    }


def _point(point: Point) -> dict[str, Any]:
    return {"label": point.label, "bytes": point.file_bytes, "predicted_kl": point.predicted}


def _loss(loss: ExpertLoss) -> dict[str, Any]:
    return {
        "weight": loss.weight,
        "layer": loss.layer,
        "format": loss.format,
        "relative_error": loss.error.tolist(),
        "tokens": None if loss.tokens is None else loss.tokens.tolist(),
        "fallbacks": list(loss.fallbacks),
    }


def _calibration(found: Calibration) -> dict[str, Any]:
    return {
        "tokens": found.tokens,
        "source": found.source,
        "expert_tokens": {route.layer: route.tokens.tolist() for route in found.routes},
    }
