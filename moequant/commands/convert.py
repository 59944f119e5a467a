"""The straight line: open, route, plan, quantize, pack, verify, report."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from moequant import __version__, plan
from moequant.checkpoint import Checkpoint, load, open_checkpoint
from moequant.containers.gguf import imatrix
from moequant.containers.gguf import write as gguf
from moequant.containers.gguf.presets import ModelFacts
from moequant.containers.gguf.read import GgufFile
from moequant.containers.gguf.tokenizer.spec import TokenizerSpec, read_tokenizer
from moequant.containers.gguf.verify import verify
from moequant.errors import CheckpointError, CorpusError, PlanError
from moequant.evaluate import Comparison
from moequant.evaluate.side_by_side import Version, compare
from moequant.files import atomic, claim
from moequant.formats import Effort
from moequant.forward.stream import Resources
from moequant.plan import Budget
from moequant.plan.planner import choose, overhead
from moequant.plan.sensitivity import Probing, measure, wants_probes
from moequant.progress import Meter, available_bytes
from moequant.report import Report
from moequant.rounding.coupled import UNROUNDED, Rounding
from moequant.rounding.diagonal import Quantizer, pack_all, progress
from moequant.rounding.layerwise import round_checkpoint
from moequant.statistics import store
from moequant.statistics.calibrate import FREE, calibrate
from moequant.statistics.fisher import Needs, needs
from moequant.statistics.fisher import check_memory as fits
from moequant.statistics.importance import Gating
from moequant.text import corpus
from moequant.text.corpus import Rows
from moequant.text.rows import ROW, calibration_rows, split_probes, token_rows
from moequant.values import Calibration, ExpertLoss, Packed, Plan

LEFT_BY_HESSIANS = 0.78
"""Share of the plain search's KL divergence that rounding under Hessians leaves: seen on held-out
calibration text of a trained model, at llama.cpp's types for Q2_K_S."""

LEFT_COUPLED = 0.55
"""The same with coupled streams: 0.62 seen there, 0.48 on the demo model at Q4_K_M; between the two."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a conversion may be told; the defaults are the recommendation.

    How large: one of `size` (bytes of the file, as people write them), `bpw`, `plan` (a
    plan's JSON) or else `type`, a preset. `calib` and `eval` are texts as `corpus.read` takes
    them, None the bundled ones; `eval_tokens` 0 leaves the comparison out. `stats` (of
    `moequant route`) or `imatrix` (of llama-imatrix) stand in for the statistics pass;
    `imatrix_out` is written beside the file. `coupled` rounds each layer towards what full
    precision would have made of what the layers before it lost.
    """

    type: str = "Q4_K_M"
    calib: str | Path | None = None
    calib_tokens: int = 131_072
    eval: str | Path | None = None
    eval_tokens: int = 16_384
    effort: Effort = "default"
    gating: Gating = "gate2"
    seed: int = 0
    size: str | None = None
    bpw: float | None = None
    plan: Path | None = None
    coupled: bool = True
    stats: Path | None = None
    imatrix: Path | None = None
    imatrix_out: Path | None = None
    ram: int | None = None
    device: str = "cpu"
    overwrite: bool = False

    @property
    def budget(self) -> Budget:
        """The size that was asked for; PlanError for what is none."""
        if self.size is not None:
            return Budget.of_size(self.size)
        return Budget.of_bpw(self.bpw) if self.bpw is not None else Budget.of_preset(self.type)

    @property
    def inputs(self) -> tuple[str | Path | None, ...]:
        """What is read beside the model."""
        return (self.calib, self.eval, self.plan, self.stats, self.imatrix)

    @property
    def resources(self) -> Resources:
        """What passes over the model may use."""
        return Resources(ram=self.ram, device=self.device)


@dataclass(frozen=True, slots=True)
class Opened:
    """Everything known before any weight is read: headers, tokenizer, types, exact file size."""

    checkpoint: Checkpoint
    tokenizer: TokenizerSpec
    plan: Plan
    provenance: dict[str, str]
    file_bytes: int

    @property
    def quantizes(self) -> bool:
        """Whether any weight is rounded, so that calibration has something to say."""
        return any(choice.format not in UNROUNDED for choice in self.plan.choices)

    def limit(self, settings: Settings) -> int | None:
        """The largest file that may come out when types are still to be measured, None when they stay."""
        if not self.quantizes or settings.effort == "fast" or settings.plan is not None:
            return None
        types = {choice.weight: choice.format for choice in self.plan.choices}
        return self.file_bytes - plan.data_bytes(self.checkpoint.weights, types) + self.plan.budget


def open_model(model: Path, settings: Settings) -> Opened:
    """Read headers and tokenizer, choose every type. Raises what those raise."""
    if sum(each is not None for each in (settings.size, settings.bpw, settings.plan)) > 1:
        raise PlanError("size, bits per weight and plan each say how large the file is; give one of them")
    checkpoint = open_checkpoint(model)
    tokenizer = read_tokenizer(model)
    provenance = {"general.quantized_by": f"moequant {__version__}"}
    if settings.plan is not None:
        chosen = plan.read(settings.plan, checkpoint.weights)
    else:
        extra = overhead(checkpoint, tokenizer, provenance)
        chosen = choose(checkpoint, facts(checkpoint), settings.budget, extra)
    size = gguf.file_bytes(checkpoint, tokenizer, chosen, provenance)
    return Opened(checkpoint, tokenizer, chosen, provenance, size)


def convert(model: str | Path, out: str | Path, settings: Settings = Settings()) -> Report:  # frozen
    """Quantize the Hugging Face folder `model` into the GGUF file `out` and report what it cost.

    Raises a MoequantError with one clear line when something is wrong; `out` is then
    absent, or as it was before.
    """
    out = Path(out)
    outputs = claim(out, settings.imatrix_out, overwrite=settings.overwrite, inputs=(model, *settings.inputs))
    with outputs:
        return _convert(Path(model), out, settings)


def _convert(model: Path, out: Path, settings: Settings) -> Report:
    meter = Meter()
    with meter.stage("open"):
        opened = open_model(model, settings)
        gguf.check_target(out, opened.file_bytes, settings.overwrite)
        calibration = given_statistics(opened.checkpoint, settings)
        texts = _texts(opened, settings)
        check_memory(opened.checkpoint, models=2 if texts.evaluation else 1 if texts.calibration else 0)
        if texts.calibration is not None:
            gradients(opened.checkpoint, settings)
    if texts.calibration is not None and calibration is None:
        with meter.stage("route"):
            calibration = calibrate(opened.checkpoint, texts.calibration, settings.resources)
    if calibration is not None and settings.imatrix_out is not None:
        imatrix.write(settings.imatrix_out, opened.checkpoint, calibration, "none")
    if calibration is not None and texts.probes is not None and settings.plan is None:
        with meter.stage("plan"):
            opened = _measured(opened, settings, calibration, texts.probes)
    losses: list[ExpertLoss] = []
    with atomic(out) as partial:
        with meter.stage("quantize"):
            packed = _rounded(opened, settings, calibration, texts.calibration, losses)
            written = gguf.write(
                partial, opened.checkpoint, opened.tokenizer, opened.plan, packed, opened.provenance
            )
        with meter.stage("verify"):
            verify(written, opened.plan, opened.checkpoint.weights)
    comparison: Comparison | None = None
    if texts.evaluation is not None:
        with meter.stage("compare"):
            comparison = compare_with_file(opened.checkpoint, out, texts.evaluation, settings.resources)
    return Report(
        model=model,
        out=out,
        file_bytes=written.bytes,
        checkpoint=opened.checkpoint,
        plan=opened.plan,
        calibration=calibration,
        losses=tuple(losses),
        comparison=comparison,
        stages=tuple(meter.costs),
        notes=_notes(opened),
    )


def gradients(checkpoint: Checkpoint, settings: Settings) -> Needs | None:
    """What the gradients of effort best take, None at other efforts. CheckpointError: more than there is."""
    tokens = min(Rounding.of(settings.effort).fisher_tokens, settings.calib_tokens)
    if not tokens:
        return None
    needed = needs(checkpoint, tokens, settings.device)
    fits(needed, settings.device)
    return needed


def given_statistics(checkpoint: Checkpoint, settings: Settings) -> Calibration | None:
    """Statistics from a file, when one is named."""
    if settings.stats is not None and settings.imatrix is not None:
        raise CorpusError(f"{settings.stats}, {settings.imatrix}: two sources of statistics; name one")
    if settings.stats is not None:
        return store.load_for(checkpoint, settings.stats)
    return imatrix.read(settings.imatrix, checkpoint) if settings.imatrix is not None else None


def _measured(opened: Opened, settings: Settings, calibration: Calibration, probes: Rows) -> Opened:
    """The same with types chosen by what each would cost this model, measured."""
    checkpoint = opened.checkpoint
    ids = probes.ids if wants_probes(checkpoint) else None
    damages = measure(checkpoint, calibration, ids, Probing(gating=settings.gating))
    left = LEFT_COUPLED if settings.coupled else LEFT_BY_HESSIANS
    damages = damages.after({name: left for row in damages.table.values() for name in row})
    extra = overhead(checkpoint, opened.tokenizer, opened.provenance)
    chosen = choose(checkpoint, facts(checkpoint), settings.budget, extra, damages)
    size = gguf.file_bytes(checkpoint, opened.tokenizer, chosen, opened.provenance)
    return replace(opened, plan=chosen, file_bytes=size)


def _rounded(
    opened: Opened,
    settings: Settings,
    calibration: Calibration | None,
    rows: Rows | None,
    losses: list[ExpertLoss],
) -> Iterator[Packed]:
    """Every weight packed, in the plan's order: by the plain search at effort fast, else under Hessians."""
    quantizer = Quantizer(calibration, settings.effort, settings.gating)
    if rows is None or settings.effort == "fast":
        yield from pack_all(opened.checkpoint, opened.plan, quantizer, losses)
        return
    formats = {choice.weight: choice.format for choice in opened.plan.choices}
    rounding = Rounding.of(settings.effort, settings.coupled)
    rounded = round_checkpoint(
        opened.checkpoint, rows.ids, formats, quantizer.pack, rounding, settings.resources
    )
    for packed, loss in progress(rounded, opened.checkpoint):
        losses.append(loss)
        yield packed


def _notes(opened: Opened) -> tuple[str, ...]:
    """What a person should know about this file, and could not guess from the tables."""
    dense = "a dense model: there are no experts to treat one by one"
    return (*opened.tokenizer.notes, *([dense] if opened.checkpoint.n_experts == 0 else []))


def check_memory(checkpoint: Checkpoint, models: int, available: int | None = None) -> None:
    """CheckpointError when the largest layer does not fit: said before any work is done.

    `models` is 0 when nothing runs, 1 for calibration, 2 for a comparison as well. `available`
    bytes are what the machine has free when None; hidden states are not counted, they may spill.
    """
    free = available_bytes() if available is None else available
    needed = working_bytes(checkpoint, models) if models else 0
    if free is not None and needed > free:
        raise CheckpointError(
            f"{checkpoint.path}: {needed / 1e9:.1f} GB of memory are needed for its largest layer or head, "
            f"{free / 1e9:.1f} GB are free; use a larger machine (--eval-tokens 0 may need less)"
        )


def working_bytes(checkpoint: Checkpoint, models: int) -> int:
    """Bytes of weights in memory at once while `models` versions of the checkpoint run layer by layer.

    Experts keep the checkpoint's precision, all else and whatever was decoded is float32; a
    weight is there twice while it is copied into its place.
    """
    layers: dict[int, int] = {}
    largest = 0
    for weight in checkpoint.weights:
        stored = 4 if weight.sources[0].ref.dtype == "F32" else 2
        own = weight.numel * (stored if weight.role.is_expert else 4)
        once = own + (weight.numel * 4 if models > 1 else 0)
        if weight.layer is None:
            ends = (stored + 4 * models) * weight.numel if len(weight.shape) > 1 else 0
            largest = max(largest, ends)
        else:
            layers[weight.layer] = layers.get(weight.layer, 0) + once
    copied = max(weight.numel for weight in checkpoint.weights if weight.layer is not None)
    return max(largest, max(layers.values()) + copied * (4 if models > 1 else 2))


def facts(checkpoint: Checkpoint) -> ModelFacts:
    """What llama.cpp's type rules look at."""
    config = checkpoint.config
    gqa = int(config["num_attention_heads"]) // int(config["num_key_value_heads"])
    return ModelFacts(checkpoint.n_layers, checkpoint.n_experts, gqa, checkpoint.tied)


def compare_with_file(
    checkpoint: Checkpoint, file: Path, rows: Rows, resources: Resources = FREE
) -> Comparison:
    """Score the checkpoint and a GGUF file of it on `rows`, the file decoded by gguf-py."""
    (found,) = compare(
        checkpoint, Version("checkpoint", load), [Version(file.name, GgufFile(file).load)], rows, resources
    )
    return found.comparison


@dataclass(frozen=True, slots=True)
class Texts:
    """Rows to calibrate on, to probe the plan with and to evaluate on; None where not needed."""

    calibration: Rows | None
    probes: Rows | None
    evaluation: Rows | None


def _texts(opened: Opened, settings: Settings) -> Texts:
    """The rows that this conversion needs; probes and calibration share no row."""
    checkpoint, bos = opened.checkpoint, opened.tokenizer.leading
    calib = probes = evaluation = None
    if opened.quantizes:
        documents = corpus.read(settings.calib, "calibration")
        if settings.effort == "fast" or settings.plan is not None:
            calib = calibration_rows(checkpoint, documents, settings.calib_tokens, settings.seed, bos)
        else:
            tokens = settings.calib_tokens + Probing().rows * ROW
            calib, probes = split_probes(
                calibration_rows(checkpoint, documents, tokens, settings.seed, bos), Probing().rows
            )
    if settings.eval_tokens:
        documents = corpus.read(settings.eval, "evaluation")
        evaluation = token_rows(checkpoint, documents, settings.eval_tokens, settings.seed, bos)
    return Texts(calib, probes, evaluation)
