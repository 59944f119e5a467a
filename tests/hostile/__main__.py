"""`python -m tests.hostile --inputs 2000`: the long mode. Exits 1 when something broke."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from pathlib import Path

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: forks and its threads do not go together


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests.hostile", description=__doc__)
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="kinds, by commas")
    parser.add_argument("--keep", type=Path, help="a new folder in which what broke is kept")
    return parser.parse_args()


if __name__ == "__main__":
    from tests.hostile.judge import main

    asked = _arguments()
    warnings.simplefilter("ignore")
    if asked.keep is not None:
        asked.keep.mkdir()
        sys.exit(main(asked.inputs, asked.seed, asked.only, asked.keep.resolve()) > 0)
    with tempfile.TemporaryDirectory() as made:
        sys.exit(main(asked.inputs, asked.seed, asked.only, Path(made).resolve()) > 0)
