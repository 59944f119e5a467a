"""Fourth on a lent GPU: layers of Qwen3-30B's shape through the whole line, beside the same on the CPU.

    python scripts/gpu/layer.py --seconds 220                    # tiny on both devices, then the real shape
    python scripts/gpu/layer.py --device cpu                     # tiny shapes, to find typos

Needs transformers 5.20, gguf and compressed-tensors; what is missing there travels as wheels. One JSON line a
stage as a conversion ends. First a tiny model is converted on both devices and compared with its original on
both: "bytes as on the CPU" is the share of the file's bytes that agree, "KL over the CPU's" the quotient of
the divergences. Then one layer (128 experts of 768 x 2048, 8 a token) by each effort.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.synthetic import Shape, build
from moequant.commands.convert import Settings, convert
from moequant.evaluate.environment import libraries
from moequant.report.summary import Report

QWEN3 = Shape(1, 2048, 128, 768, 4096, 0, top_k=8, heads=32, kv_heads=4, head=128)
TINY = Shape(1, 256, 4, 256, 1024, 0)


def converted(folder: Path, out: Path, device: str, effort: str, tokens: int, scored: int) -> Report:
    """A conversion to Q4_K_M on that device."""
    settings = Settings(
        "Q4_K_M",
        calib_tokens=tokens,
        eval_tokens=scored,
        effort=effort,  # type: ignore[arg-type]  # one of the three
        device=device,
        overwrite=True,
        self_check=False,
    )
    return convert(folder, out, settings)


def both(folder: Path, device: str) -> dict[str, object]:
    """The tiny model on the device and on the CPU."""
    found = []
    for where in (device, "cpu"):
        out = folder / f"{where}.gguf"
        report = converted(folder / "tiny", out, where, "default", 2048, 1024)
        assert report.comparison is not None
        found.append((torch.frombuffer(bytearray(out.read_bytes()), dtype=torch.uint8), report.comparison))
    (bytes_, ours), (theirs, base) = found
    same = float((bytes_ == theirs).float().mean()) if len(bytes_) == len(theirs) else 0.0
    return {
        "model": "tiny",
        "bytes as on the CPU": same,
        "KL over the CPU's": ours.kl_mean.value / base.kl_mean.value,
        "perplexity over the CPU's": ours.base_perplexity.value / base.base_perplexity.value,
    }


def stages(folder: Path, device: str, effort: str, tokens: int) -> Iterator[dict[str, object]]:
    """Every stage of one conversion, and the weights a second of all of them."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    report = converted(folder / "layer", folder / "layer.gguf", device, effort, tokens, 0)
    told = {"model": "Qwen3-30B, one layer", "effort": effort, "tokens": tokens}
    for cost in report.stages:
        yield told | {"stage": cost.name, "seconds": cost.seconds, "peak GB": cost.peak_bytes / 1e9}
    weights = sum(weight.numel for weight in report.checkpoint.weights)
    seconds = sum(cost.seconds for cost in report.stages)
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None
    yield told | {"stage": "all", "seconds": seconds, "Mw/s": weights / seconds / 1e6, "peak GB of GPU": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--seconds", type=float, default=220.0, help="nothing is started after so long")
    parser.add_argument("--efforts", nargs="+", default=["fast", "default"])
    parser.add_argument("--tokens", nargs="+", type=int, default=None, help="[16384 131072; tiny: 1024]")
    args = parser.parse_args()
    begin, large = time.monotonic(), args.device == "cuda"
    told = {"on": torch.cuda.get_device_name() if large else "CPU"}
    print(json.dumps(told | libraries()), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for each, shape in (("tiny", TINY), ("layer", QWEN3 if large else TINY)):
            (folder / each).mkdir()
            build(folder / each, shape)
        print(json.dumps(both(folder, args.device)), flush=True)
        for tokens in args.tokens or ([16_384, 131_072] if large else [1024]):
            for effort in args.efforts:
                if time.monotonic() - begin < args.seconds:
                    for row in stages(folder, args.device, effort, tokens):
                        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
