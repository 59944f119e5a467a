"""`python -m tests.hostile.keys [FAMILY …]`: every key of every config, with values that are none.

A model is opened and laid out as a GGUF file, which reads all of its config. Whatever is raised is one of our
own errors. Exits 1 when something else was.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from moequant.checkpoint import open_checkpoint
from moequant.containers.gguf.export import export
from moequant.errors import MoequantError
from tests import models
from tests.hostile.judge import where

VALUES: tuple[Any, ...] = (
    None, True, -1, 1.5, 10**9, 10**12, -(10**12), 1e30, "x", "\0", [], [None], [-1], ["x"], [[]], {"": None},
    {"a": [1]},
)  # fmt: skip

OFTEN = {"num_nextn_predict_layers", "num_mtp_layers", "rope_scaling", "rope_parameters"}
"""Keys that are tried whether or not the family knows them."""


def broken(folder: Path) -> Iterator[str]:
    """What goes wrong with a model folder in which one key of config.json has another value."""
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    known = open_checkpoint(folder).family.known
    try:
        for key in sorted({*_text(raw), *known, *OFTEN}):
            for value in VALUES:
                changed = copy.deepcopy(raw)
                _text(changed)[key] = value
                path.write_text(json.dumps(changed))
                if why := _tried(folder):
                    yield f"{folder.name}: {key} = {json.dumps(value)}: {why}"
    finally:
        path.write_text(json.dumps(raw))


def _text(raw: dict[str, Any]) -> dict[str, Any]:
    inner = raw.get("text_config")
    return inner if isinstance(inner, dict) else raw


def _tried(folder: Path) -> str | None:
    try:
        export(open_checkpoint(folder))
    except MoequantError:
        return None
    except Exception as error:
        return where((type(error), error, error.__traceback__))
    return None


def main(families: list[str]) -> int:
    """How much broke, of these families or of all."""
    torch.set_num_threads(1)
    found = 0
    with tempfile.TemporaryDirectory() as made:
        for family in families or models.CONFIGS:
            for line in broken(models.build(Path(made) / family, family)):
                print(line, flush=True)
                found += 1
            print(f"{family}: tried", flush=True)
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main(sys.argv[1:]) > 0)
