"""The config is proven, not believed: what transformers makes of the untouched folder, beside what we make
of it, and what llama.cpp makes of the file.

moequant reads config.json, names and layouts with code of its own, and its comparison before and after runs
both sides under that one reading. So a misread rotary base would cancel out. Here the other side is
transformers' `from_pretrained` on the folder as it is. Logits of a few tokens must be equal. A file has keys
of its own, which our engine never reads: where llama.cpp is installed, it computes them from the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moequant.checkpoint import Checkpoint, load
from moequant.errors import VerifyError, foreign, one_line
from moequant.evaluate import ties
from moequant.evaluate.activations import by_32
from moequant.evaluate.misreadings import MISREADINGS
from moequant.evaluate.reference import logits_of, reference
from moequant.families.config import LAYERS
from moequant.forward.memory import usable_bytes
from moequant.forward.model import Provider, build_model
from moequant.runtimes.llama_cpp import logits as llama_cpp
from moequant.runtimes.llama_cpp.binding import LlamaError

TOKENS = 96
"""Tokens of a row: past most windows of tiny models, and a second's work for large ones."""

ROWS = 2

LIMIT = 1e-3
"""Largest difference of a logit, in units of the largest logit where that is above 1."""

QUANTILE = 0.75
"""Of the tokens, so many must be within the limit: a router near a tie sends a few elsewhere."""

WEIGHT = 6
"""Bytes of memory for each weight that is checked: in float32, and the pages of files read for it."""

RUNTIME_LIMIT = 0.25
"""Largest difference of a token's logits in llama.cpp, in units of their own spread, for the median token:
llama.cpp rounds what it multiplies weights of few bits with to 8 bits."""

AMPLIFIED = 3.0
"""Some models amplify that rounding to more than RUNTIME_LIMIT: a difference may be so many times what the
same rounding does to our own logits."""

WORST_LIMIT = 0.7
"""Never more: models that have nothing in common are 1.4 apart."""


@dataclass(frozen=True, slots=True)
class Output:
    """What was written: its decoded weights, whether they are the checkpoint's `exact` numbers, and the
    `file` that llama.cpp loads, None where it loads none. `plain`: it computes with float32 alone."""

    load: Provider
    exact: bool
    file: Path | None = None
    plain: bool = False


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """What was found: the largest difference of a logit over the tokens up to QUANTILE, `source` for our
    reading of the folder, `decoded` for what was written where that keeps every number. `runtime` is the
    median difference of llama.cpp from the decoded weights, in units of the logits' spread. `skipped` says
    why `source` is None; `differs` names what transformers is known to read otherwise; of `layers` (the
    first so many, of so many) where not all fitted into memory. `read` is what `runtime` is, of a GGUF file
    that was the source. `tied` says why llama.cpp told nothing of a model whose routers tie."""

    source: float | None = None
    decoded: float | None = None
    runtime: float | None = None
    skipped: str | None = None
    differs: str | None = None
    layers: tuple[int, int] | None = None
    read: float | None = None
    tied: str | None = None

    @property
    def note(self) -> str:
        """One sentence for the report."""
        if self.read is not None:
            wrote = "" if self.runtime is None else f", and from what was written up to {self.runtime:.1%}"
            return f"llama.cpp computes the same from the file that was read, up to {self.read:.1%}{wrote}"
        part = "" if self.layers is None else ", {} of {} layers, which fit memory".format(*self.layers)
        if self.tied is not None and self.source is None and self.skipped is None:
            return self.tied
        if self.skipped is not None:
            found = f"not compared with transformers: {self.skipped}"
        else:
            found = (
                f"compared with transformers on the untouched folder{part}: logits differ by "
                f"{self.source:.1g} at most"
            )
        if self.differs is not None:
            found += f"; {self.differs}"
        if self.tied is not None:
            found += f"; {self.tied}"
        if self.runtime is not None:
            found += f"; llama.cpp computes the same from the file, up to {self.runtime:.1%}"
        return found


def self_check(checkpoint: Checkpoint, output: Output | None, available: int | None = None) -> SelfCheck:
    """Compare logits of random tokens: transformers on the folder, our reading of it, what was written, and
    llama.cpp on the file.

    `available` bytes of memory may be used, None: all that are free. VerifyError when the logits differ.
    """
    return SelfChecks(checkpoint, output is not None and output.exact).of(output, available)


@dataclass(frozen=True, slots=True)
class Reading:
    """The original, read and run: the `checkpoint`, whole or its first layers, the tokens `ids` and what was
    `found`. `ours` f32 [rows, n, vocab] are our logits where they are needed again; without `ids` nothing can
    be held against it."""

    checkpoint: Checkpoint
    found: SelfCheck
    ids: Tensor | None = None
    ours: Tensor | None = None


@dataclass(slots=True)
class SelfChecks:
    """`self_check` of every output of a checkpoint, any of which may be `exact`.

    The original is read and run once for all of them, and again only where memory has room for other layers.
    """

    checkpoint: Checkpoint
    exact: bool
    _readings: dict[int, Reading] = field(default_factory=dict)

    def of(self, output: Output | None, available: int | None = None) -> SelfCheck:
        """One of them."""
        whole, free = self.checkpoint.n_layers, usable_bytes(available)
        layers = whole if free is None else _layers_within(self.checkpoint, free)
        if layers not in self._readings:
            self._readings = {layers: _reading(self.checkpoint, layers, self.exact)}
        reading = self._readings[layers]
        if output is None or reading.ids is None:
            return reading.found
        # llama.cpp is asked only of the whole: its file has all layers.
        return _against(reading, reading.ids, output if layers == whole else replace(output, file=None))


def _reading(checkpoint: Checkpoint, layers: int, exact: bool) -> Reading:
    """The original with so many of its layers, from the first."""
    if layers == checkpoint.n_layers:
        return _read(checkpoint, exact)
    skipped: str | None = None
    if checkpoint.encodes:
        skipped = "it does not fit memory, and a part of an encoder is no model"
    elif not layers:
        skipped = f"{_bytes(checkpoint, 1) / 1e9:.1f} GB are needed for its first layer"
    elif checkpoint.gguf is not None:
        skipped = "it does not fit memory, and llama.cpp runs GGUF files as a whole"
    if skipped is not None:
        return Reading(checkpoint, SelfCheck(skipped=skipped))
    return _first_layers(checkpoint, layers, exact)


def _read(checkpoint: Checkpoint, exact: bool) -> Reading:
    """A model that fits; our logits are kept for `exact` outputs."""
    length = min(TOKENS, checkpoint.shape.context)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, checkpoint.shape.vocab, (ROWS, length), generator=generator)
    if checkpoint.gguf is not None:
        return _of_file(checkpoint, ids, exact)
    theirs: Tensor | None = None
    skipped: str | None = None
    try:
        theirs = reference(checkpoint, ids, dict(checkpoint.raw))
    except Exception as error:  # transformers and its quantizers raise what they like
        said = one_line(error, 160).partition(". For details look at")[0]  # at a report that was not printed
        skipped = f"transformers does not run it here ({said})"
    with foreign(VerifyError, f"{checkpoint.path}: transformers cannot run what config.json describes"):
        ours = _ours(checkpoint, load, ids)
    source, differs = (None, None) if theirs is None else _source(checkpoint, ids, theirs, ours)
    found = SelfCheck(source, skipped=skipped, differs=differs)
    return Reading(checkpoint, found, ids, ours if exact else None)


def _of_file(checkpoint: Checkpoint, ids: Tensor, exact: bool) -> Reading:
    """A GGUF file as a source, which transformers does not load: llama.cpp runs it."""
    if not llama_cpp.available():
        skipped = "llama.cpp, which would run the GGUF file that was read, is not here"
        return Reading(checkpoint, SelfCheck(skipped=skipped))
    ours = _ours(checkpoint, load, ids)
    stored = (each for weight in checkpoint.weights for each in weight.origin.stored)
    plain = computes_plainly(checkpoint, (ref.dtype for each in stored for ref in each.parts.values()))
    try:
        read = _in_llama_cpp(checkpoint, Output(load, True, checkpoint.gguf, plain), ids, ours)
    except ties.TiedError as error:
        return Reading(checkpoint, SelfCheck(tied=str(error)))
    return Reading(checkpoint, SelfCheck(read=read), ids, ours if exact else None)


def computes_plainly(checkpoint: Checkpoint, types: Iterable[str]) -> bool:
    """Whether llama.cpp computes with float32 alone, given a file's types."""
    acts = [str(getattr(checkpoint.config, key, "")) for key in ("hidden_act", "hidden_activation")]
    # llama.cpp looks GELU up in a table of half precision.
    return set(types) == {"F32"} and "gelu" not in "".join(acts)


def _against(reading: Reading, ids: Tensor, output: Output) -> SelfCheck:
    """What was found of the original, and what was written held against it."""
    checkpoint = reading.checkpoint
    written = _ours(checkpoint, output.load, ids)
    decoded = _distance(reading.ours, written) if output.exact and reading.ours is not None else None
    if not torch.isfinite(written).all() or (decoded is not None and not decoded <= LIMIT):
        off = "are no numbers" if decoded is None else f"differ by {decoded:.2g}, at most {LIMIT:g} expected"
        raise VerifyError(
            f"{checkpoint.path}: what was written computes something else (logits {off}); nothing was kept, "
            "please report it"
        )
    found = replace(reading.found, decoded=decoded)
    try:
        return replace(found, runtime=_in_llama_cpp(checkpoint, output, ids, written))
    except ties.TiedError as error:
        return replace(found, tied=str(error))


def _source(checkpoint: Checkpoint, ids: Tensor, theirs: Tensor, ours: Tensor) -> tuple[float, str | None]:
    """How far our reading of the folder is off, and what transformers is known to read otherwise. VerifyError
    where it is too far."""
    source, differs = _distance(theirs, ours), None
    if not source <= LIMIT:
        differs, source = _known(checkpoint, ids, (theirs, ours), source)
    if differs is None and not source <= LIMIT:
        raise VerifyError(
            f"{checkpoint.path}: transformers computes something else of this folder than moequant (logits "
            f"differ by {source:.2g}, at most {LIMIT:g} was expected); nothing was written, please report it "
            "(--no-self-check writes it all the same)"
        )
    return source, differs


def _bytes(checkpoint: Checkpoint, layers: int) -> int:
    """What the first layers of a model take in float32, with the pages of files that are read for them."""
    return WEIGHT * sum(weight.numel for weight in checkpoint.weights if (weight.layer or 0) < layers)


def _layers_within(checkpoint: Checkpoint, free: int) -> int:
    """How many layers, from the first, fit into so many bytes beside embedding and head."""
    return max((n for n in range(1, checkpoint.n_layers + 1) if _bytes(checkpoint, n) <= free), default=0)


def _first_layers(checkpoint: Checkpoint, layers: int, exact: bool) -> Reading:
    """A model as if it had only its first layers."""
    whole = checkpoint.n_layers
    try:
        short = replace(
            checkpoint,
            raw=_shortened(checkpoint.raw, whole, layers),
            config=type(checkpoint.config).from_dict(_shortened(checkpoint.config.to_dict(), whole, layers)),
            shape=replace(checkpoint.shape, layers=layers),
            weights=tuple(weight for weight in checkpoint.weights if (weight.layer or 0) < layers),
        )
    except Exception as error:  # classes of configs raise what they like
        skipped = f"its first {layers} layers make no model ({one_line(error, 160)})"
        return Reading(checkpoint, SelfCheck(skipped=skipped))
    reading = _read(short, exact)
    part = None if reading.found.source is None else (layers, whole)
    return replace(reading, found=replace(reading.found, layers=part))


def _shortened(raw: Mapping[str, Any], whole: int, layers: int) -> dict[str, Any]:
    """A config.json of fewer layers: their number, and every list that has an entry for each."""
    found: dict[str, Any] = {}
    for key, value in raw.items():
        if isinstance(value, dict):
            found[key] = _shortened(value, whole, layers)
        elif isinstance(value, list) and len(value) == whole:
            found[key] = value[:layers]
        else:
            found[key] = layers if key in LAYERS and value == whole else value
    return found


def _known(
    checkpoint: Checkpoint, ids: Tensor, both: tuple[Tensor, Tensor], off: float
) -> tuple[str | None, float]:
    """A difference that is explained, in words, and what is left of it; else None, and all. The family's
    dialect explains one, and so does a mistake of transformers: made here as well, logits are equal."""
    theirs, ours = both
    raw = dict(checkpoint.raw)
    given = checkpoint.family.dialect(raw)
    if changed := sorted(key for key in given if given[key] != raw.get(key)):
        left = _distance(reference(checkpoint, ids, given), ours)
        if left <= LIMIT:
            of = ", ".join(changed)
            return f"transformers takes no account of the release's {of}, which alone is {off:.1g}", left
    for known in MISREADINGS:
        if any(known.concerns(weight) for weight in checkpoint.weights):
            left = _distance(theirs, _ours(checkpoint, known.load, ids))
            if left <= LIMIT:
                return f"transformers {known.words}, which alone is {off:.1g}", left
    return None, off


def _in_llama_cpp(checkpoint: Checkpoint, output: Output, ids: Tensor, written: Tensor) -> float | None:
    """How far llama.cpp is off with the file; None where it is not asked. VerifyError where it is too far,
    and TiedError where that may be because of ties."""
    if output.file is None or not llama_cpp.available():
        return None
    try:
        found = torch.from_numpy(llama_cpp.logits(output.file, ids.numpy(), torch.get_num_threads()).copy())
    except LlamaError as error:
        raise VerifyError(f"{error}; nothing was kept (--no-self-check keeps it all the same)") from None
    if found.shape != written.shape:
        raise VerifyError(
            f"{output.file.name}: llama.cpp gives logits {list(found.shape)}, {list(written.shape)} were "
            "expected; nothing was kept, please report it"
        )
    median, limit = _spread_apart(found, written), LIMIT if output.plain else RUNTIME_LIMIT
    if not median <= limit and not output.plain:
        model = build_model(checkpoint, provider=output.load)
        _round_inputs(model)
        limit = min(max(limit, AMPLIFIED * _spread_apart(logits_of(model, ids), written)), WORST_LIMIT)
    if not median <= limit:
        ties.check(checkpoint)
        raise VerifyError(
            f"{output.file.name}: llama.cpp computes something else with the file than moequant with its "
            f"weights (logits differ by {median:.2g} of their spread, at most {limit:.2g} was expected); "
            "nothing was kept, please report it (--no-self-check keeps it all the same)"
        )
    return median


def _spread_apart(found: Tensor, written: Tensor) -> float:
    """The median token's difference of logits, in units of their spread; infinite for what is no number."""
    spread = (written - written.mean(-1, keepdim=True)).norm(dim=-1)
    off = (found - written).norm(dim=-1) / spread.clamp(min=1e-30)
    return float(off.nan_to_num(nan=torch.inf).median())


def _round_inputs(model: torch.nn.Module) -> None:
    """Round what every matrix of the model is fed as llama.cpp does in front of most types."""

    def hook(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (by_32(args[0]), *args[1:]) if args and args[0].shape[-1] % 32 == 0 else args

    for module in model.modules():
        stacks = [each for each in module.parameters(recurse=False) if each.ndim == 3]
        if isinstance(module, torch.nn.Linear) or stacks:
            module.register_forward_pre_hook(hook)


def _ours(checkpoint: Checkpoint, provider: Provider, ids: Tensor) -> Tensor:
    return logits_of(build_model(checkpoint, provider=provider), ids)


def _distance(theirs: Tensor, ours: Tensor) -> float:
    """Largest difference of a logit of each token, its quantile over the tokens; infinite for what is no
    number."""
    scale = max(1.0, float(theirs.abs().max()))
    off = (theirs - ours).abs().amax(-1).flatten() / scale
    return float(torch.nan_to_num(off, nan=torch.inf).quantile(QUANTILE))
