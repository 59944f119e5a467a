"""Fixtures that several test files share; models are built once a session and never changed."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests import forks, models
from tests.strike import kernel, struck  # noqa: F401  fixtures

# Processes that tests start share two cores with other tests: their threads would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A machine with other work must not turn a slow example into a failure.
settings.register_profile("moequant", deadline=None)
settings.load_profile("moequant")

# Tensors here are so small that a second thread costs more at its barriers than it brings; tests that
# run side by side have a better use for the core.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def not_told() -> Iterator[None]:
    """Long runs say where they stand. On a busy machine every run is long, and what a test reads on stderr
    does not depend on that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moequant.cli.output.SILENT", float("inf"))
        yield


@pytest.fixture(scope="module", autouse=True)
def settled() -> None:
    """What is alive between two modules stays: collecting garbage need not walk over it again and again.

    Imports make half a million objects, and a self-check collects garbage between models, 0.25 s each time.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """So that libraries which count what is left at the end find nothing."""
    gc.unfreeze()
    forks.close()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    """`tiny("mixtral", **changes)`: the folder of a tiny random checkpoint of that family."""
    built: dict[str, Path] = {}

    def get(family: str, **changes: object) -> Path:
        key = repr((family, sorted(changes.items())))
        if key not in built:
            built[key] = models.build(tmp_path_factory.mktemp(family), family, **changes)
        return built[key]

    return get


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of a few thousand tokens of the tiny checkpoints."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(models.TEXT) * 2, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def demo_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model, every number of it, as a file."""
    from moequant.commands.convert import Settings, convert  # a second's work, which most files do without
    from moequant.text import bundled

    path = tmp_path_factory.mktemp("demo") / "F32.gguf"
    convert(bundled.path("demo"), path, Settings("F32", eval_tokens=0, self_check=False))
    return path


@pytest.fixture(scope="session")
def mix() -> Path:
    """The shared trained Mixtral checkpoint; the test skips where it is absent."""
    path = models.SHARED / "models" / "mix"
    if not path.is_dir():
        pytest.skip(f"{path} is not on this machine")
    return path
