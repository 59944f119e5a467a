"""The straight line: open, route, plan, quantize, pack, verify, report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from moequant import __version__, corpus, plan
from moequant.checkpoint import Checkpoint, open_checkpoint
from moequant.compare import Comparison, compare
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
from moequant.routing.experts import EXPERTS
from moequant.routing.model import build_model
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
    """CheckpointError when so many float32 copies of the model do not fit: said before any work is done.

    `available` bytes are what the machine has free when None.
    """
    free = available_bytes() if available is None else available
    needed = models * 4 * sum(weight.numel for weight in checkpoint.weights)
    if free is not None and needed > free:
        raise CheckpointError(
            f"{checkpoint.path}: {needed / 1e9:.1f} GB of memory are needed "
            f"({models} x the model in float32), {free / 1e9:.1f} GB are free; use a larger machine "
            "(--eval-tokens 0 needs half)"
        )


def facts(checkpoint: Checkpoint) -> ModelFacts:
    """What llama.cpp's type rules look at."""
    config = checkpoint.config
    gqa = int(config["num_attention_heads"]) // int(config["num_key_value_heads"])
    return ModelFacts(checkpoint.n_layers, checkpoint.n_experts, gqa, checkpoint.tied)


def compare_with_file(checkpoint: Checkpoint, file: Path, rows: Rows) -> Comparison:
    """Score the checkpoint and a GGUF file of it on `rows`, the file decoded by gguf-py."""
    base = build_model(checkpoint, EXPERTS)
    candidate = build_model(checkpoint, EXPERTS, gguf.GgufWeights(file).load)
    return compare(base, candidate, rows.ids, rows.source)


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
