"""Whether our engine's figures are llama.cpp's: the same files on the same text in both.

    python benchmarks/engines.py ../shared/models/mix demo OLMOE --text ../shared/data/eval.txt

For every model a float32 file as the baseline and a file of each type, made with `--effort fast`. Printed
are both engines' perplexity and mean KL divergence and how far ours is from llama.cpp's; `exact` is our
engine without the rounding of activations. The third model is one from benchmarks/train_tiny.py.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])

from moequant.commands.compare import CompareSettings, run  # noqa: E402
from moequant.commands.convert import Settings, convert  # noqa: E402
from moequant.forward.stream import Resources  # noqa: E402
from moequant.report.compare import Compared  # noqa: E402


def files(model: Path, types: list[str], folder: Path) -> list[Path]:
    """The float32 file and one of each type, calibrated on the bundled text."""
    made = []
    for type_ in ["F32", *types]:
        made.append(folder / f"{model.name}-{type_}.gguf")
        if not made[-1].exists():
            settings = Settings(type_, calib_tokens=8192, eval_tokens=0, effort="fast")
            convert(model, made[-1], settings)
    return made


def scored(model: Path, made: list[Path], options: argparse.Namespace, kind: str) -> Compared:
    """All files against the first, by "llama.cpp", by "ours", or "exact"."""
    settings = CompareSettings(
        options.text,
        options.tokens,
        engine="llama.cpp" if kind == "llama.cpp" else "moequant",
        model=model,
        exact=kind == "exact",
        sample_tokens=0,
        resources=Resources(threads=1),
    )
    return run(made[0], made[1:], settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--text", default=None, help="evaluation text (default: the bundled one)")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--types", default="Q8_0,Q4_K_M,Q2_K")
    parser.add_argument(
        "--keep", type=Path, default=None, help="folder for the files (default: a temporary one)"
    )
    options = parser.parse_args()
    print("| model | file | perplexity, llama.cpp | ours | | KL, llama.cpp | ours | | exact | |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        for model in options.models:
            made = files(model, options.types.split(","), options.keep or Path(temporary))
            found = [scored(model, made, options, kind).measured for kind in ("llama.cpp", "ours", "exact")]
            for theirs, ours, exact in zip(*found, strict=True):
                t, o, e = (one.comparison for one in (theirs, ours, exact))
                kl, change = t.kl_mean.value, o.perplexity.value / t.perplexity.value - 1
                print(
                    f"| {model.name} | {theirs.name} | {t.perplexity.value:.4f} | {o.perplexity.value:.4f} "
                    f"| {change:+.3%} | {kl:.6f} ± {t.kl_mean.error:.6f} "
                    f"| {o.kl_mean.value:.6f} | {o.kl_mean.value / kl - 1:+.2%} | {e.kl_mean.value:.6f} "
                    f"| {e.kl_mean.value / kl - 1:+.2%} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
