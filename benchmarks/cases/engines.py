"""Our engine beside llama.cpp."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.data import DEMO, EVAL, MIX
from benchmarks.harness import Rows, case
from moequant import Settings, convert
from moequant.commands.compare import CompareSettings, run
from moequant.evaluate import Comparison
from moequant.forward.resources import Resources


@dataclass(frozen=True)
class Engines:
    """A third family is made by the case `train`."""

    models: tuple[Path, ...] = (DEMO, MIX)
    text: Path | None = EVAL
    tokens: int = 8192
    types: tuple[str, ...] = ("Q8_0", "Q4_K_M", "Q2_K")


@case(
    "Our engine's figures beside llama.cpp's",
    Engines((DEMO,), None, 1024, ("Q4_K_M",)),
    ("llama.cpp",),
)
def engines(o: Engines) -> Rows:
    """The same files on the same text in both: perplexity and mean KL divergence against the F32 file, and
    how far ours is from llama.cpp's. `exact` is our engine without the rounding of activations."""
    for model in o.models:
        with tempfile.TemporaryDirectory() as name:
            made = [Path(name) / f"{type_}.gguf" for type_ in ("F32", *o.types)]
            for path in made:
                settings = Settings(path.stem, calib_tokens=8192, eval_tokens=0, effort="fast")
                convert(model, path, settings)
            found = [scored(o, model, made, kind) for kind in ("llama.cpp", "ours", "exact")]
            for type_, theirs, ours, exact in zip(o.types, *found, strict=True):
                kl, ppl = theirs.kl_mean.value, theirs.perplexity.value
                yield {
                    "model": model.name,
                    "type": type_,
                    "perplexity, llama.cpp": ppl,
                    "ours": ours.perplexity.value,
                    "off by": ours.perplexity.value / ppl - 1,
                    "KL, llama.cpp": kl,
                    "±": theirs.kl_mean.error,
                    "our KL": ours.kl_mean.value,
                    "KL off by": ours.kl_mean.value / kl - 1,
                    "exact": exact.kl_mean.value,
                    "exact off by": exact.kl_mean.value / kl - 1,
                }


def scored(o: Engines, model: Path, made: list[Path], kind: str) -> list[Comparison]:
    """All files against the first, by "llama.cpp", by "ours", or "exact"."""
    settings = CompareSettings(
        o.text,
        o.tokens,
        engine="llama.cpp" if kind == "llama.cpp" else "moequant",
        model=model,
        exact=kind == "exact",
        sample_tokens=0,
        resources=Resources(threads=1),
    )
    return [each.comparison for each in run(made[0], made[1:], settings).measured]
