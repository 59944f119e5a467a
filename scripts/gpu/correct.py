"""First on a lent GPU: every kernel, compiled there, against float64 over the test's shapes.

    python scripts/gpu/correct.py --seconds 220

One line a case as it ends, so that a run that is cut short leaves what it saw; then what is wrong. Cases of
one format follow each other. Exit code 1 when a case is off.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.kernels.cases import cases, run

LIMIT = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=220.0, help="no case is started after so long")
    parser.add_argument("--only", default="", help="cases whose names contain this")
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if args.device == "cuda" else "Triton's interpreter"
    print(json.dumps({"on": name, "torch": torch.__version__}), flush=True)
    begin, wrong, left = time.monotonic(), [], 0
    for case in (case for case in cases() if args.only in case.name):
        if time.monotonic() - begin > args.seconds:
            left += 1
            continue
        for name, error in run(case, args.device).items():
            print(json.dumps({"case": name, "error": error}), flush=True)
            if not error <= LIMIT:
                wrong.append(name)
    print(json.dumps({"wrong": wrong, "not run": left, "seconds": round(time.monotonic() - begin, 1)}))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
