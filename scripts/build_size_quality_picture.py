"""Draws docs/pictures/size-quality.png: KL divergence by size, our files and llama.cpp's.

    python scripts/build_size_quality_picture.py

The points are in benchmarks/results/size-quality.json, with where each series was measured.
"""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

ROOT = Path(__file__).parents[1]
POINTS = ROOT / "benchmarks" / "results" / "size-quality.json"
PICTURE = ROOT / "docs" / "pictures" / "size-quality.png"

OURS, THEIRS = "#1f5fa8", "#c2571a"
"""Blue and orange: told apart by everybody, and in grey print."""

NAMED = ("IQ1_M", "IQ2_XXS", "IQ2_M", "Q2_K", "IQ3_XXS", "Q3_K_M", "IQ4_XS", "Q4_K_M", "Q5_K_M", "Q6_K")
"""Types that have a label, few enough that none covers another."""


def draw(path: Path) -> None:
    """Both series, up to the size of Q6_K; some of llama.cpp's files are named."""
    series = json.loads(POINTS.read_text(encoding="utf-8"))
    figure = Figure(figsize=(7.4, 4.2), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    theirs, ours = series["llama.cpp"]["files"], series["moequant"]["files"]
    axes.plot(*_xy(theirs), "o", color=THEIRS, label="llama.cpp, imatrix: its presets")
    axes.plot(*_xy(ours), "s-", color=OURS, label="moequant, default effort, --size")
    for each in (file for file in theirs if file["type"] in NAMED):
        where = (each["bytes"] / 1e6, each["kl"])
        axes.annotate(
            each["type"], where, (-6, -9), textcoords="offset points", ha="right", fontsize=8, color=THEIRS
        )
    axes.set_yscale("log")
    axes.set_xlim(2.6, 8.2)
    axes.set_ylim(0.003, 0.7)
    axes.set_xlabel("size of the file, MB")
    axes.set_ylabel("mean KL divergence (less is better)")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="both", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    axes.set_title("A small trained Mixtral, 61,200 tokens of held-out text", fontsize=10)
    figure.savefig(path, metadata={"Software": None})


def _xy(files: list[dict[str, float]]) -> tuple[list[float], list[float]]:
    return [each["bytes"] / 1e6 for each in files], [each["kl"] for each in files]


if __name__ == "__main__":
    draw(PICTURE)
