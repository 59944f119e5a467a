"""What calibration learned, as one safetensors file: saved, loaded, merged.

The same statistics are the same bytes (`sealed`). Tensors keep their float64, so that merging loses
nothing.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moequant.checkpoint import Checkpoint
from moequant.errors import CorpusError
from moequant.families import Config, Family
from moequant.statistics import sealed
from moequant.values import Calibration, InputStats, RouteStats, Weight

PEAK = "peak"

VERSION = 3
"""Layout of the file: sites and keys of the config have the model's names, and the largest inputs are there.
Version 2 had none of those, version 1 had llama.cpp's names as well."""

_INPUT_SUMS = tuple(field.name for field in fields(InputStats) if field.name != PEAK)
_ROUTE_FIELDS = ("tokens", "gate_mass", "domain_tokens", "pairs")

Model = Mapping[str, Any]
"""What decides how a model computes, by config key; statistics of two models never mix."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Statistics and the model that they are of. `origin` names them in errors."""

    model: Model
    calibration: Calibration
    origin: str
    version: int = VERSION


def identity(checkpoint: Checkpoint) -> Model:
    """What decides how a checkpoint computes."""
    return identity_of(checkpoint.family, checkpoint.config)


def identity_of(family: Family, config: Config) -> Model:
    """The family, and every config value that its tables know, as the class in transformers fills them."""
    # What differs from layer to layer such a config gives in this way alone.
    told = config.to_dict() if config.is_heterogeneous else {}
    values = {key: told[key] if key in told else getattr(config, key, None) for key in sorted(family.known)}
    found = {"family": family.name, **values}
    # Through JSON, because that is what a file keeps: tuples are lists there.
    known: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return {key: value for key, value in known.items() if value is not None}


def stored(checkpoint: Checkpoint, calibration: Calibration) -> Stored:
    """Statistics just collected from `checkpoint`."""
    return Stored(identity(checkpoint), calibration, str(checkpoint.path))


def save(path: Path, what: Stored, overwrite: bool = False) -> None:
    """Write `what` to `path`: the same statistics give the same bytes. OutputError when the disk refuses."""
    calibration = what.calibration
    tensors = _tensors(calibration)
    meta: dict[str, Any] = {
        "version": VERSION,
        "model": dict(what.model),
        "rows": calibration.rows,
        "tokens": calibration.tokens,
        "source": calibration.source,
        "domains": list(calibration.domains),
        "gate_entropy": [route.gate_entropy for route in calibration.routes],
    }
    sealed.write(path, meta, tensors, overwrite)


def load(path: Path) -> Stored:
    """Read what `save` wrote; CorpusError for a file that is damaged, or something else, UnreadableError for
    one that is not to be read."""
    if not os.path.lexists(path):
        raise CorpusError(f"{path}: no such file; give one that `moequant route -o` wrote")
    try:
        meta, tensors = sealed.read(path)
    except ValueError as error:
        raise CorpusError(
            f"{path}: cannot be read as statistics ({error}); give what `moequant route -o` wrote"
        ) from None
    if not isinstance(meta, dict):
        raise CorpusError(f"{path}: a safetensors file, but not statistics from moequant route")
    if meta.get("version") not in (1, 2, VERSION):
        raise CorpusError(
            f"{path}: statistics of version {meta.get('version')}, expected {VERSION}; route again"
        )
    if meta.pop("crc32", None) != sealed.checksum(meta, tensors):
        raise CorpusError(f"{path}: statistics are damaged (checksum differs); copy or route again")
    try:
        calibration = _calibration(meta, tensors)
        _check_sound(calibration)
        return Stored(dict(meta["model"]), calibration, str(path), int(meta["version"]))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CorpusError(f"{path}: statistics are damaged ({error}); route again") from None


def _check_sound(calibration: Calibration) -> None:
    """ValueError, naming it, for sums that no text can have: of other shapes or types than `InputStats` and
    `RouteStats` say, not finite, or below 0."""
    domains = len(calibration.domains)
    if calibration.rows < 0 or calibration.tokens < 0 or not all(map(_is_text, calibration.domains)):
        raise ValueError("rows, tokens or domains are none")
    for name, stats in calibration.inputs.items():
        experts, width = len(stats.tokens), stats.moment.shape[-1] if stats.moment.dim() else 0
        counts, sums, table = (
            (torch.int64, (experts,)),
            (torch.float64, (experts,)),
            (torch.float64, (experts, width)),
        )
        wanted = dict(zip(_INPUT_SUMS, (counts, sums, sums, table, table), strict=True))
        _check_sums(f"input/{name}", stats, wanted if stats.peak is None else wanted | {PEAK: sums})
    for route in calibration.routes:
        n = len(route.tokens)
        shapes = (
            (torch.int64, (n,)),
            (torch.float64, (n,)),
            (torch.int64, (domains, n)),
            (torch.int64, (n, n)),
        )
        _check_sums(f"route/{route.layer}", route, dict(zip(_ROUTE_FIELDS, shapes, strict=True)))
        if not math.isfinite(route.gate_entropy):
            raise ValueError(f"route/{route.layer}: gate_entropy is {route.gate_entropy}")


def _check_sums(
    name: str, of: InputStats | RouteStats, wanted: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> None:
    for field, (dtype, shape) in wanted.items():
        tensor: Tensor = getattr(of, field)
        if tensor.dtype != dtype or tensor.shape != shape:
            raise ValueError(
                f"{name}/{field} is {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(shape)}"
            )
        if not (torch.isfinite(tensor).all() and (tensor >= 0).all()):
            raise ValueError(f"{name}/{field} has numbers that are no sums")


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def check(checkpoint: Checkpoint, found: Stored) -> None:
    """CorpusError, naming what differs, unless `found` has statistics for every weight of `checkpoint`."""
    _same_model(stored(checkpoint, found.calibration), found)
    for weight in checkpoint.weights:
        if weight.site is None:
            continue
        stats = found.calibration.inputs.get(weight.site.name)
        if stats is None or stats.moment.shape != (stacked(weight), weight.n_in):
            raise CorpusError(
                f"{found.origin}: no fitting statistics for {weight.name}; route {checkpoint.path} again"
            )


def stacked(weight: Weight) -> int:
    """How many matrices of a weight have statistics of their own."""
    return weight.matrices if weight.is_expert or (weight.site is not None and weight.site.heads) else 1


def merge(parts: Sequence[Stored]) -> Stored:
    """All statistics added up, domains united; CorpusError names what differs when the models do."""
    if not parts:
        raise CorpusError("nothing to merge: give at least one statistics file")
    for part in parts[1:]:
        _same_model(parts[0], part)
    origin = ", ".join(part.origin for part in parts)
    return Stored(parts[0].model, combine([part.calibration for part in parts]), origin)


def combine(parts: Sequence[Calibration]) -> Calibration:
    """Statistics of one model on several texts as if they had been one text."""
    first = parts[0]
    domains = tuple(dict.fromkeys(domain for part in parts for domain in part.domains))
    for part in parts[1:]:
        if part.inputs.keys() != first.inputs.keys() or len(part.routes) != len(first.routes):
            raise CorpusError(f"statistics of {part.source} and {first.source} are not of the same tensors")
    return Calibration(
        routes=tuple(
            _add_routes(routes, [part.domains for part in parts], domains)
            for routes in zip(*(part.routes for part in parts), strict=True)
        ),
        inputs={name: _add_inputs([part.inputs[name] for part in parts]) for name in first.inputs},
        rows=sum(part.rows for part in parts),
        tokens=sum(part.tokens for part in parts),
        source=" + ".join(dict.fromkeys(part.source for part in parts)),
        domains=domains,
    )


def _add_inputs(parts: Sequence[InputStats]) -> InputStats:
    sums = {name: sum_of([getattr(part, name) for part in parts]) for name in _INPUT_SUMS}
    peaks = [part.peak for part in parts if part.peak is not None]
    return InputStats(**sums, peak=torch.stack(peaks).amax(0) if len(peaks) == len(parts) else None)


def _add_routes(
    parts: Sequence[RouteStats], named: Sequence[tuple[str, ...]], domains: tuple[str, ...]
) -> RouteStats:
    """One layer's routes added; row d of a part's domain_tokens goes to the row of the same name."""
    tokens = sum_of([part.tokens for part in parts])
    by_domain = torch.zeros(len(domains), len(tokens), dtype=torch.int64)
    for part, names in zip(parts, named, strict=True):
        for row, name in enumerate(names):
            by_domain[domains.index(name)] += part.domain_tokens[row]
    return RouteStats(
        layer=parts[0].layer,
        tokens=tokens,
        gate_mass=sum_of([part.gate_mass for part in parts]),
        domain_tokens=by_domain,
        pairs=sum_of([part.pairs for part in parts]),
        gate_entropy=sum(part.gate_entropy for part in parts),
    )


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """Elementwise sum, a new tensor; CorpusError when the shapes differ."""
    if len({tensor.shape for tensor in tensors}) != 1:
        shapes = " and ".join(str(list(tensor.shape)) for tensor in tensors)
        raise CorpusError(f"statistics of shapes {shapes} cannot be merged: not the same model")
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total


def _same_model(one: Stored, two: Stored) -> None:
    # Models of two families differ in much: the family says it best.
    for key in sorted(one.model.keys() | two.model.keys(), key=lambda key: (key != "family", key)):
        mine, other = one.model.get(key), two.model.get(key)
        # Through JSON, because that is what the file kept.
        if json.dumps(mine) != json.dumps(other):
            raise CorpusError(
                f"{two.origin}: statistics of another model than {one.origin}: {key} is {other}, not {mine}"
            )


def _tensors(calibration: Calibration) -> dict[str, Tensor]:
    """Every tensor by its name in the file."""
    found: dict[str, Tensor] = {}
    for name, stats in calibration.inputs.items():
        for field in _INPUT_SUMS if stats.peak is None else (*_INPUT_SUMS, PEAK):
            found[f"input/{name}/{field}"] = getattr(stats, field)
    for route in calibration.routes:
        for field in _ROUTE_FIELDS:
            found[f"route/{route.layer}/{field}"] = getattr(route, field)
    return found


def _calibration(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Calibration:
    parts: dict[str, dict[str, dict[str, Tensor]]] = {"input": {}, "route": {}}
    for key, tensor in tensors.items():
        kind, rest = key.split("/", 1)
        name, field = rest.rsplit("/", 1)
        parts[kind].setdefault(name, {})[field] = tensor
    layers = sorted(parts["route"], key=int)
    return Calibration(
        routes=tuple(
            RouteStats(layer=int(layer), gate_entropy=float(entropy), **parts["route"][layer])
            for layer, entropy in zip(layers, meta["gate_entropy"], strict=True)
        ),
        inputs={name: InputStats(**stats) for name, stats in parts["input"].items()},
        rows=int(meta["rows"]),
        tokens=int(meta["tokens"]),
        source=str(meta["source"]),
        domains=tuple(meta["domains"]),
    )
