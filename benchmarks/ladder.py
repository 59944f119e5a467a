"""Our files beside llama.cpp's, type by type, scored by llama.cpp itself.

    python benchmarks/ladder.py MODEL --calib TEXT --eval TEXT --baselines mix.json

For every type: our file (sizes are exact), its perplexity and KL divergence in
llama.cpp on the first `--chunks` chunks of 512 tokens against the F32 file in the same
runtime, and the ratio to the figures that llama.cpp's own tools reached on the same
text (`--baselines`, see README.md of the folder it comes from).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from moequant.commands.convert import Settings, convert
from moequant.containers.gguf.presets import BASE_TYPES
from moequant.evaluate import Comparison, Scores, score_row, summarize
from moequant.text import corpus
from moequant.text.rows import load_encoder
from tests.clients.llama import Llama


def llama_logits(path: Path, ids: Tensor) -> list[Tensor]:
    """Second-half logits f32 of every row of `ids` [rows, n] in llama.cpp."""
    with Llama(path, n_ctx=ids.shape[1], threads=1) as model:
        half = ids.shape[1] // 2
        return [
            torch.from_numpy(model.logits(row.tolist()))[half:].clone() for row in tqdm(ids, disable=None)
        ]


def score(base: list[Tensor], path: Path, ids: Tensor) -> Comparison:
    """Our definitions on llama.cpp's logits of both files."""
    parts = []
    half = ids.shape[1] // 2
    with Llama(path, n_ctx=ids.shape[1], threads=1) as model:
        for row, expected in zip(ids, base, strict=True):
            logits = torch.from_numpy(model.logits(row.tolist()))
            full = torch.cat([logits[:half], expected])
            parts.append(score_row(full, logits, row))
    columns = zip(*((p.base_nll, p.candidate_nll, p.kl, p.same_top) for p in parts), strict=True)
    return summarize(Scores(*(torch.cat(column) for column in columns)), path.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--baselines", type=Path, required=True)
    parser.add_argument("--chunks", type=int, default=240)
    parser.add_argument("--tokens", type=int, default=204_800)
    parser.add_argument("--types", default=",".join(sorted(BASE_TYPES.keys() - {"F32", "BF16", "F16"})))
    parser.add_argument("--effort", default="default")
    arguments = parser.parse_args()
    theirs = {row["type"]: row for row in json.loads(arguments.baselines.read_text())["results"]}
    documents = corpus.read(arguments.eval, "evaluation")
    ids = corpus.pack(documents, load_encoder(arguments.model), 512, arguments.chunks * 512).ids
    print("| type | bytes | of llama.cpp's | perplexity | its | mean KL | its | ratio | same top |")
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "F32.gguf"
        convert(arguments.model, path, Settings("F32", eval_tokens=0))
        base = llama_logits(path, ids)
        for name in arguments.types.split(","):
            path = Path(folder) / f"{name}.gguf"
            settings = Settings(
                name, arguments.calib, arguments.tokens, eval_tokens=0, effort=arguments.effort
            )
            made, other = convert(arguments.model, path, settings), theirs[name]
            found = score(base, path, ids)
            ppl, kl = found.perplexity.value, found.kl_mean.value
            print(
                f"| {name} | {made.file_bytes:,} | {made.file_bytes / other['bytes']:.4f} | "
                f"{ppl:.3f} | {other['ppl']:.3f} | {kl:.5f} | {other['kld_mean']:.5f} | "
                f"{kl / other['kld_mean']:.3f} | {found.same_top:.2%} |",
                flush=True,
            )
            path.unlink()
        print(f"\nF32 in llama.cpp: perplexity {found.base_perplexity.value:.4f}")


if __name__ == "__main__":
    main()
