"""Is our imatrix as good as llama-imatrix's, in llama.cpp's own quantizer?

    python benchmarks/imatrix.py MODEL --calib TEXT --eval TEXT --theirs mix.imatrix.gguf \\
        --llama-quantize BIN

`--theirs` was made by llama-imatrix on the same `--tokens` of `--calib`. First table: how far
our sums lie from it, tensor by tensor and expert by expert. Second: every type quantized by
`llama-quantize` with their file, with ours in their definition (gating "none") and with our
importance ("gate2"); mean KL divergence in llama.cpp on `--chunks` chunks of 512 tokens of
`--eval` against the F32 file. ± is the standard error of the difference to their column,
paired by token.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.ladder import llama_logits
from moequant.checkpoint import Checkpoint, open_checkpoint
from moequant.commands.convert import Settings, convert
from moequant.containers.gguf import imatrix
from moequant.evaluate import score_row
from moequant.statistics.calibrate import calibrate
from moequant.text import corpus
from moequant.text.rows import ROW, load_encoder
from moequant.values import Calibration


def agreement(checkpoint: Checkpoint, ours: Calibration, theirs: Calibration) -> None:
    """One row a weight input: the worst expert's difference in tokens and in mean squares."""
    print("| input | tokens | mean squares, worst expert | worst single column |\n|---|---|---|---|")
    for name, other in theirs.inputs.items():
        if not other.tokens.any():
            continue
        mine = ours.inputs[name]
        tokens = float(((mine.tokens - other.tokens).abs() / other.tokens.clamp(min=1)).max())
        seen = (other.tokens > 0) & (mine.tokens > 0)
        one, two = (s.moment[seen] / s.tokens[seen, None] for s in (mine, other))
        total = float(((one - two).abs().sum(1) / two.sum(1)).max())
        column = float(((one - two).abs() / two).max())
        print(f"| {name} | {tokens:.3%} | {total:.3%} | {column:.2%} |")


def divergence(path: Path, base: list[Tensor], ids: Tensor) -> Tensor:
    """KL divergence f64 of every scored token in llama.cpp."""
    half = ids.shape[1] // 2
    parts = []
    for row, expected, found in zip(ids, base, llama_logits(path, ids), strict=True):
        blank = torch.zeros(half, expected.shape[-1])
        parts.append(score_row(torch.cat([blank, expected]), torch.cat([blank, found]), row).kl)
    return torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--theirs", type=Path, required=True)
    parser.add_argument("--llama-quantize", required=True)
    parser.add_argument("--tokens", type=int, default=204_800)
    parser.add_argument("--types", default="Q2_K,IQ3_S,Q4_K_M")
    parser.add_argument("--chunks", type=int, default=80)
    arguments = parser.parse_args()
    checkpoint, encoder = open_checkpoint(arguments.model), load_encoder(arguments.model)
    rows = corpus.pack(corpus.read(arguments.calib), encoder, ROW, arguments.tokens)
    ids = corpus.pack(corpus.read(arguments.eval, "evaluation"), encoder, ROW, arguments.chunks * ROW).ids
    ours = calibrate(checkpoint, rows)
    agreement(checkpoint, ours, imatrix.read(arguments.theirs, checkpoint))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = {"theirs": arguments.theirs}
        for gating in ("none", "gate2"):
            files[gating] = folder / f"{gating}.gguf"
            imatrix.write(files[gating], checkpoint, ours, gating)
        plain = folder / "F32.gguf"
        convert(arguments.model, plain, Settings("F32", eval_tokens=0))
        base = llama_logits(plain, ids)
        print("\n| type | theirs | ours, none | ours, gate2 | none / theirs | gate2 / theirs |")
        print("|---|---|---|---|---|---|")
        for kind in arguments.types.split(","):
            kl = {}
            for label, file in files.items():
                out = folder / f"{kind}.gguf"
                command = [arguments.llama_quantize, "--imatrix", file, plain, out, kind, "1"]
                subprocess.run(command, check=True, capture_output=True)
                kl[label] = divergence(out, base, ids)
            mean = float(kl["theirs"].mean())
            cells = [f"{float(found.mean()):.5f}" for found in kl.values()]
            for label in ("none", "gate2"):
                error = float((kl[label] - kl["theirs"]).std() / len(kl[label]) ** 0.5)
                cells.append(f"{float(kl[label].mean()) / mean:.3f} ± {error / mean:.3f}")
            print(f"| {kind} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
