"""What each step of the rounding buys: the same types as llama.cpp's file, other bytes.

    python benchmarks/rounding.py MODEL --calib TEXT --eval TEXT --baselines FOLDER

FOLDER holds `mix.json` (llama.cpp's figures) and `mix.types.json` (the types of its files), as
described in its README.md. For every type and variant our file of exactly those types is
made from `--tokens` tokens, scored in llama.cpp on the first `--chunks` chunks of 512 tokens
against the F32 file in the same runtime, and its mean KL divergence divided by llama.cpp's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # the tests' clients are found from here

from benchmarks.ladder import llama_logits, score  # noqa: E402
from moequant.commands.convert import Settings, convert  # noqa: E402
from moequant.evaluate import Comparison  # noqa: E402
from moequant.plan import parse_size  # noqa: E402
from moequant.text import corpus  # noqa: E402
from moequant.text.rows import load_encoder  # noqa: E402

VARIANTS = {
    "search": {"effort": "fast"},
    "Hessians": {"coupled": False},
    "coupled": {},
    "best": {"effort": "best"},
}
"""Name → settings: each adds a step to the one before."""


HEAD = (
    "| {} | variant | mean KL | llama.cpp's | ratio | KL 99 % | its | same top | its "
    "| perplexity | its | CPU s |"
)


def row(name: str, variant: str, found: Comparison, other: dict[str, float], spent: float) -> str:
    """One line of the table; `other` is llama.cpp's figure."""
    return (
        f"| {name} | {variant} | {found.kl_mean.value:.5f} ± {found.kl_mean.error:.5f} "
        f"| {other['kld_mean']:.5f} | {found.kl_mean.value / other['kld_mean']:.3f} "
        f"| {found.kl_99:.4f} | {other['kld_99']:.4f} | {100 * found.same_top:.2f} % "
        f"| {other['same_top_percent']:.2f} % | {found.perplexity.value:.3f} | {other['ppl']:.3f} "
        f"| {spent:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--baselines", type=Path, required=True)
    parser.add_argument("--chunks", type=int, default=240)
    parser.add_argument("--tokens", type=int, default=204_800)
    parser.add_argument("--types", default="Q2_K_S,Q2_K,Q3_K_S,Q3_K_M,Q4_K_S,Q4_K_M,IQ4_XS,Q5_K_M,Q6_K")
    parser.add_argument("--sizes", help="instead of types, such as 3.3M,4.2M: held against its best file")
    parser.add_argument("--variants", default="coupled", help=", ".join(VARIANTS))
    arguments = parser.parse_args()
    results = json.loads((arguments.baselines / "mix.json").read_text())["results"]
    types = json.loads((arguments.baselines / "mix.types.json").read_text())
    documents = corpus.read(arguments.eval, "evaluation")
    ids = corpus.pack(documents, load_encoder(arguments.model), 512, arguments.chunks * 512).ids
    with tempfile.TemporaryDirectory() as folder:
        exact = Path(folder) / "F32.gguf"
        convert(arguments.model, exact, Settings("F32", eval_tokens=0))
        base = llama_logits(exact, ids)
        print(HEAD.format("size" if arguments.sizes else "type"), "|---" * 12 + "|", sep="\n", flush=True)
        for name in (arguments.sizes or arguments.types).split(","):
            if arguments.sizes:
                # The rows that probe the plan come on top of those that calibrate.
                wanted = {"size": name, "calib_tokens": arguments.tokens - 16 * 512}
                fitting = [each for each in results if each["bytes"] <= parse_size(name)]
                other = min(fitting, key=lambda each: each["kld_mean"])
            else:
                plan = Path(folder) / f"{name}.json"
                plan.write_text(json.dumps(types[name]))
                wanted = {"plan": plan, "calib_tokens": arguments.tokens}
                other = next(each for each in results if each["type"] == name)
            for variant in arguments.variants.split(","):
                path = Path(folder) / "out.gguf"
                began = time.process_time()
                settings = {"calib": arguments.calib, "eval_tokens": 0, "overwrite": True}
                convert(arguments.model, path, Settings(**settings, **wanted, **VARIANTS[variant]))
                spent = time.process_time() - began
                label = f"{name} ({path.stat().st_size:,})" if arguments.sizes else name
                their = f"{variant} / {other['type']}" if arguments.sizes else variant
                print(row(label, their, score(base, path, ids), other, spent), flush=True)


if __name__ == "__main__":
    main()
