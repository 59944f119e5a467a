"""The same types as llama.cpp's files on other models: many experts, and starved ones."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import llama, measure
from benchmarks.cases.rounding import PROBES
from benchmarks.data import CALIB, DEMO, EVAL, MIX, ONE_TEXT, rows
from benchmarks.harness import Rows, case
from benchmarks.trained import MODELS
from moequant import Settings, convert
from moequant.evaluate import summarize
from moequant.formats import Effort
from moequant.report.summary import Report
from moequant.text import corpus
from moequant.text.rows import ROW, load_encoder

RIVALS = (
    "IQ2_XS", "IQ2_S", "IQ2_M", "Q2_K_S", "Q2_K", "IQ3_XXS", "IQ3_XS", "IQ3_S", "Q3_K_S", "IQ3_M", "Q3_K_M",
    "Q3_K_L", "IQ4_XS", "Q4_K_S", "Q4_K_M",
)  # fmt: skip
"""llama.cpp's types whose files a size is held against, smallest first; only those of 3/4 of it or more."""


@dataclass(frozen=True)
class Others:
    """Models of benchmarks/trained.py, trained on what `calib` holds after its first `tokens` tokens. Of
    `sizes` each is a type whose file says how large ours is. Models and llama.cpp's files are kept in
    `cache`, and found there again; `steps` 0 are the model's own."""

    models: tuple[str, ...] = ("experts32", "starved")
    ends: Path = MIX
    calib: Path = CALIB
    eval: Path = EVAL
    cache: str = "/tmp/moequant-others"
    steps: int = 0
    tokens: int = 51_200
    chunks: int = 60
    types: tuple[str, ...] = ("Q2_K_S", "Q4_K_M", "IQ3_S", "Q6_K", "Q3_K_M", "IQ2_XS", "Q5_K_M")
    sizes: tuple[str, ...] = ("Q3_K_S", "Q4_K_M")
    effort: Effort = "default"


SMOKE = Others(
    ("starved",), DEMO, ONE_TEXT, ONE_TEXT, "/tmp/moequant-smoke", 1, 1024, 2, ("Q4_K_M",), (), "fast"
)


@case(
    "Rounding on other models: 32 experts, starved experts",
    SMOKE,
    ("llama.cpp", "llama-quantize", "llama-imatrix"),
)
def others(o: Others) -> Rows:
    """llama.cpp's tools make their files: llama-imatrix on the tokens that calibrate, then llama-quantize.
    For every type our file of exactly the types that its tensors have; for every size ours of that size,
    types free, against the best of all its files that are no larger. Both are scored in llama.cpp against
    the F32 file; ± is paired by token. `TYPE:layers` keeps embeddings and head in F32 on both sides.

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000 in the environment keep glibc from handing every
    large activation of the training back to the kernel."""
    text = corpus.read(o.calib)[0].text
    seen = torch.tensor(load_encoder(o.ends).encode(text, add_special_tokens=False).ids)[o.tokens :]
    for name in o.models:
        folder = Path(o.cache) / name
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            MODELS[name].of(o.steps).train(o.ends, seen, folder)
        yield from one_model(o, folder)


def one_model(o: Others, model: Path) -> Rows:
    """Its files beside llama.cpp's, then how the calibration tokens spread over its experts."""
    exact = llama.exact_file(model, model)
    judge = llama.Judge.of(exact, rows(model, o.eval, "evaluation", o.chunks).ids)
    given = {"calib": o.calib, "eval_tokens": 0, "overwrite": True, "effort": o.effort}
    report: Report | None = None
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "ours.gguf"
        for label, other, wanted in files(o, judge, llama.Tools(exact, model), Path(name) / "plan.json"):
            report, spent = measure.cpu(partial(convert, model, path, Settings(**given, **wanted)))
            ours, theirs = judge.scores(path), judge.scores(other)
            sizes = {"bytes": path.stat().st_size, "its bytes": other.stat().st_size}
            its = llama.as_figures(summarize(theirs, other.name))
            fallbacks = sum(len(each.fallbacks) for each in report.losses)
            yield (
                {"model": model.name, "type": label}
                | sizes
                | llama.beside(summarize(ours, path.name), its)
                | {"± of the ratio": measure.ratio(ours.kl, theirs.kl)[1], "CPU s": spent}
                | {"fallbacks": fallbacks}
            )
    for route in report.calibration.routes if report and report.calibration else ():
        counts = route.tokens.sort().values.tolist()
        row = {"model": model.name, "layer": route.layer, "tokens if even": sum(counts) / len(counts)}
        yield row | {"fewest": ", ".join(map(str, counts[:8])), "most": counts[-1]}


def files(
    o: Others, judge: llama.Judge, tools: llama.Tools, plan: Path
) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """A row's label, llama.cpp's file, and the settings that make ours; `plan` is written anew for each."""
    imatrix = tools.imatrix(o.calib, o.tokens // ROW)
    for kind in o.types:
        other = tools.quantized(kind, imatrix)
        plan.write_text(json.dumps(llama.types_of(other)))
        yield kind, other, {"plan": plan, "calib_tokens": o.tokens}
    for kind in o.sizes:
        rivals = [tools.quantized(each, imatrix) for each in RIVALS[: RIVALS.index(kind) + 1]]
        size = rivals[-1].stat().st_size
        fitting = [each for each in rivals if 0.75 * size <= each.stat().st_size]
        best = min(fitting, key=lambda each: float(judge.scores(each).kl.mean()))
        wanted = {"size": str(size), "calib_tokens": o.tokens - PROBES}
        yield f"{kind}'s size / {best.name.split('-')[0]}", best, wanted
