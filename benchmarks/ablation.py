"""What each step of the rounding buys, one after another: KL divergence and time at llama.cpp's own types.

    python benchmarks/ablation.py MODEL --calib TEXT --eval TEXT --baselines FOLDER

FOLDER holds `mix.json` (llama.cpp's figures) and `mix.types.json` (the types of its files), as
described in its README.md. Every row is a file with exactly those types (the last: with types
chosen freely, no larger), made from `--tokens` tokens and scored as in `rounding.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from gguf import GGUFReader

sys.path[0] = str(Path(__file__).parents[1])  # the tests' clients are found from here

from benchmarks.ladder import llama_logits, score  # noqa: E402
from benchmarks.router import Fit, refit  # noqa: E402
from moequant.checkpoint import Checkpoint, open_checkpoint  # noqa: E402
from moequant.commands.convert import Settings, convert, open_model  # noqa: E402
from moequant.containers import gguf  # noqa: E402
from moequant.containers.gguf.read import GgufFile  # noqa: E402
from moequant.containers.gguf.tokenizer.spec import read_tokenizer  # noqa: E402
from moequant.evaluate import Comparison  # noqa: E402
from moequant.forward.stream import LayerStream, Resources  # noqa: E402
from moequant.rounding.coupled import FISHER_TOKENS, Coupled, Rounding, Streams  # noqa: E402
from moequant.rounding.diagonal import Quantizer, pack_all  # noqa: E402
from moequant.rounding.feedback import Options  # noqa: E402
from moequant.rounding.shrinkage import Mix, Trial  # noqa: E402
from moequant.statistics.calibrate import calibrate  # noqa: E402
from moequant.text import corpus  # noqa: E402
from moequant.text.corpus import Rows  # noqa: E402
from moequant.text.rows import load_encoder, token_rows  # noqa: E402
from moequant.values import Calibration, Packed  # noqa: E402

RAW = Trial(mixes=(Mix(1, 0, 0),))
"""Nothing but an expert's own Hessian, or the diagonal where that rounds better."""

STEPS: dict[str, Rounding | None] = {
    "plain search": None,
    "+ feedback, raw H": Rounding(None, Options(rounds=0), trial=RAW),
    "+ shrinkage": Rounding(None, Options(rounds=0)),
    "+ coordinate descent": Rounding(None),
    "+ sequential target (default)": Rounding(),
    "+ two-sided": Rounding(fisher_tokens=FISHER_TOKENS),
    "+ longer search (best)": Rounding.of("best"),
}
"""Each adds to the one before; None is the search of every weight on its own."""

REFIT, PLAN = "+ routers fitted again", "+ types free"
"""Done to the file of the step before (`router.py`), and beside `best` without it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--baselines", type=Path, required=True)
    parser.add_argument("--chunks", type=int, default=240)
    parser.add_argument("--tokens", type=int, default=102_400)
    parser.add_argument("--types", default="Q2_K_S,Q4_K_S")
    parser.add_argument("--steps", default=",".join((*map(str, range(len(STEPS))), "refit", "plan")))
    arguments = parser.parse_args()
    results = json.loads((arguments.baselines / "mix.json").read_text())["results"]
    types = json.loads((arguments.baselines / "mix.types.json").read_text())
    documents = corpus.read(arguments.eval, "evaluation")
    ids = corpus.pack(documents, load_encoder(arguments.model), 512, arguments.chunks * 512).ids
    settings = Settings(
        calib=arguments.calib, calib_tokens=arguments.tokens, eval_tokens=0, effort="best", overwrite=True
    )
    with tempfile.TemporaryDirectory() as folder:
        exact, path, plan = (Path(folder) / name for name in ("F32.gguf", "out.gguf", "plan.json"))
        convert(arguments.model, exact, Settings("F32", eval_tokens=0))
        base = llama_logits(exact, ids)
        calibration, counted = statistics(arguments.model, settings)
        print("| types | step | mean KL | ratio to llama.cpp's | KL 99 % | same top | bytes | CPU s |")
        print("|---" * 8 + "|", flush=True)
        for name in arguments.types.split(","):
            other = next(each for each in results if each["type"] == name)
            plan.write_text(json.dumps(types[name]))
            spent = 0.0
            for step in arguments.steps.split(","):
                began = time.process_time()
                if step == "plan":
                    label = PLAN
                    convert(arguments.model, path, free(settings, other["bytes"]))
                elif step == "refit":
                    label = REFIT
                    fit_routers(arguments.model, path, settings)
                    began -= spent
                else:
                    label, rounding = list(STEPS.items())[int(step)]
                    write(arguments.model, path, replace(settings, plan=plan), calibration, rounding)
                    began -= counted
                spent = time.process_time() - began
                print(row(name, label, score(base, path, ids), other, path.stat().st_size, spent), flush=True)


def free(settings: Settings, size: int) -> Settings:
    """Types chosen for `size` bytes; the 16 rows that probe the plan come out of the same tokens."""
    return replace(settings, size=str(size), calib_tokens=settings.calib_tokens - 16 * 512)


def text(checkpoint: Checkpoint, settings: Settings) -> Rows:
    """The rows that calibrate."""
    documents = corpus.read(settings.calib, "calibration")
    leading = read_tokenizer(checkpoint.path).leading
    return token_rows(checkpoint, documents, settings.calib_tokens, settings.seed, leading)


def statistics(model: Path, settings: Settings) -> tuple[Calibration, float]:
    """What every file's plain search needs, and the CPU seconds that it took."""
    began, checkpoint = time.process_time(), open_checkpoint(model)
    calibration = calibrate(checkpoint, text(checkpoint, settings))
    return calibration, time.process_time() - began


def write(
    model: Path, out: Path, settings: Settings, calibration: Calibration, rounding: Rounding | None
) -> None:
    """A file of the types of `settings.plan`, its weights rounded that way."""
    opened, quantizer = open_model(model, settings), Quantizer(calibration)
    formats = {choice.weight: choice.format for choice in opened.plan.choices}

    def rounded(rounding: Rounding, folder: str) -> Iterator[Packed]:
        rows = text(opened.checkpoint, settings)
        with LayerStream(opened.checkpoint, rows.ids, Resources()) as stream:
            coupled = Coupled(stream, formats, quantizer.pack, rounding)
            yield from (packed for packed, _ in coupled.run(Streams.under(Path(folder), stream)))

    with tempfile.TemporaryDirectory() as folder:
        if rounding is None:
            packed = pack_all(opened.checkpoint, opened.plan, quantizer, [])
        else:
            packed = rounded(rounding, folder)
        gguf.write(out, opened.checkpoint, opened.tokenizer, opened.plan, packed, opened.provenance)


def fit_routers(model: Path, path: Path, settings: Settings) -> None:
    """Put routers that 60 rows fit to the file's own layers into the file."""
    checkpoint = open_checkpoint(model)
    ids = text(checkpoint, settings).ids[:60]
    routers = refit(checkpoint, GgufFile(path).load, ids, Fit(), len(ids)).routers
    reader = GGUFReader(path, "r+")
    for tensor in reader.tensors:
        if tensor.name in routers:
            tensor.data[:] = routers[tensor.name].numpy()
    reader.data.flush()


def row(name: str, step: str, found: Comparison, other: dict[str, float], size: int, spent: float) -> str:
    """One line of the table; `other` is llama.cpp's figure."""
    return (
        f"| {name} | {step} | {found.kl_mean.value:.5f} ± {found.kl_mean.error:.5f} "
        f"| {found.kl_mean.value / other['kld_mean']:.3f} | {found.kl_99:.4f} "
        f"| {100 * found.same_top:.2f} % | {size:,} | {spent:.0f} |"
    )


if __name__ == "__main__":
    main()
