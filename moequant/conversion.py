"""The straight line: open, route, plan, quantize, pack, verify, report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from moequant import __version__, corpus, plan
from moequant.checkpoint import Checkpoint, load, open_checkpoint
from moequant.compare import Comparison
from moequant.compare.sources import GgufFile
from moequant.compare.streaming import Version, compare
from moequant.containers import gguf
from moequant.containers.tokenizer import TokenizerSpec, read_tokenizer
from moequant.corpus import Rows
from moequant.errors import CheckpointError, TokenizerError
from moequant.formats import Effort
from moequant.meter import Meter, available_bytes
from moequant.presets import BASE_TYPES, ModelFacts
from moequant.quantize import Quantizer, pack_all
from moequant.report import Report
from moequant.routing.calibrate import calibrate
from moequant.routing.statistics import Gating
from moequant.values import Calibration, ExpertLoss, Plan
from moequant.verify import verify

ROW = 512
"""Tokens in a row: llama.cpp's context for perplexity and imatrix."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a conversion may be told; the defaults are the recommendation.

    `type` is a preset name; `calib` and `eval` are texts as `corpus.read` takes them, None
    the bundled ones; `eval_tokens` 0 leaves the comparison out.
    """

    type: str = "Q4_K_M"
    calib: str | Path | None = None
    calib_tokens: int = 131_072
    eval: str | Path | None = None
    eval_tokens: int = 16_384
    effort: Effort = "default"
    gating: Gating = "gate2"
    seed: int = 0
    overwrite: bool = False


@dataclass(frozen=True, slots=True)
class Opened:
    """Everything known before any weight is read: headers, tokenizer, types, exact file size."""

    checkpoint: Checkpoint
    tokenizer: TokenizerSpec
    plan: Plan
    provenance: dict[str, str]
    file_bytes: int


def open_model(model: Path, settings: Settings) -> Opened:
    """Read headers and tokenizer, choose every type. Raises what those raise."""
    checkpoint = open_checkpoint(model)
    tokenizer = read_tokenizer(model)
    chosen = plan.preset_plan(checkpoint.weights, settings.type, facts(checkpoint))
    provenance = {"general.quantized_by": f"moequant {__version__}"}
    size = gguf.file_bytes(checkpoint, tokenizer, chosen, provenance)
    return Opened(checkpoint, tokenizer, chosen, provenance, size)


def convert(model: str | Path, out: str | Path, settings: Settings = Settings()) -> Report:  # frozen
    """Quantize the Hugging Face folder `model` into the GGUF file `out` and report what it cost.

    Raises a MoequantError with one clear line when something is wrong; `out` is then
    absent, or as it was before.
    """
    model, out, meter = Path(model), Path(out), Meter()
    with meter.stage("open"):
        opened = open_model(model, settings)
        gguf.check_target(out, opened.file_bytes, settings.overwrite)
        calib_rows, eval_rows = _texts(opened, settings)
        check_memory(opened.checkpoint, models=2 if eval_rows else 1 if calib_rows else 0)
    calibration: Calibration | None = None
    if calib_rows is not None:
        with meter.stage("route"):
            calibration = calibrate(opened.checkpoint, calib_rows)
    losses: list[ExpertLoss] = []
    with gguf.atomic(out) as partial:
        with meter.stage("quantize"):
            packed = pack_all(
                opened.checkpoint,
                opened.plan,
                Quantizer(calibration, settings.effort, settings.gating),
                losses,
            )
            written = gguf.write(
                partial, opened.checkpoint, opened.tokenizer, opened.plan, packed, opened.provenance
            )
        with meter.stage("verify"):
            verify(written, opened.plan, opened.checkpoint.weights)
    comparison: Comparison | None = None
    if eval_rows is not None:
        with meter.stage("compare"):
            comparison = compare_with_file(opened.checkpoint, out, eval_rows)
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


def compare_with_file(checkpoint: Checkpoint, file: Path, rows: Rows) -> Comparison:
    """Score the checkpoint and a GGUF file of it on `rows`, the file decoded by gguf-py."""
    (found,) = compare(
        checkpoint, Version("checkpoint", load), [Version(file.name, GgufFile(file).load)], rows
    )
    return found.comparison


def _texts(opened: Opened, settings: Settings) -> tuple[Rows | None, Rows | None]:
    """Calibration rows (None when no type needs them) and evaluation rows (None when not wanted)."""
    encoder = load_encoder(opened.checkpoint.path)
    bos = opened.tokenizer.ids.get("bos") if opened.tokenizer.add_bos else None
    config = opened.checkpoint.config
    limits = {"max_length": int(config["max_position_embeddings"]), "vocab_size": int(config["vocab_size"])}
    calib = evaluation = None
    if BASE_TYPES[settings.type] not in ("F32", "F16", "BF16"):
        documents = corpus.read(settings.calib, "calibration")
        calib = corpus.pack(documents, encoder, ROW, settings.calib_tokens, settings.seed, bos)
        calib = corpus.check(calib, **limits)
    if settings.eval_tokens:
        documents = corpus.read(settings.eval, "evaluation")
        evaluation = corpus.pack(documents, encoder, ROW, settings.eval_tokens, settings.seed, bos)
        evaluation = corpus.check(evaluation, **limits)
    return calib, evaluation


def load_encoder(folder: Path) -> Tokenizer:
    """The folder's tokenizer.json, told to neither truncate nor pad."""
    file = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise TokenizerError(f"{file}: cannot be read ({error})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
