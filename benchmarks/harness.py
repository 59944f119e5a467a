"""A case is a function of options that yields rows of plain data; the harness finds, runs and records it.

Options are a frozen dataclass whose defaults are those of the real run. A case is registered with an
instance of it that takes seconds on the demo model, its smoke run:

    @dataclass(frozen=True)
    class Ladder:
        model: Path = MIX
        types: tuple[str, ...] = ("Q2_K", "Q4_K_M")

    @case("Our presets beside llama.cpp's", smoke=Ladder(DEMO, ("Q4_K_M",)), needs=("llama.cpp",))
    def ladder(o: Ladder) -> Rows: ...
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases
from benchmarks.record import Record, provenance

Cell = str | int | float | None
Row = dict[str, Cell]
Rows = Iterator[Row]


def installed(distribution: str) -> bool:
    """Whether pip has installed it."""
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def runs(program: str) -> bool:
    """Whether the program can be started; llama-quantize ends with 1 after its help, a loader without a
    library with 127."""
    try:
        return subprocess.run([program, "--help"], capture_output=True, check=False).returncode in (0, 1)
    except OSError:
        return False


TOOLS: dict[str, Callable[[], bool]] = {
    "llama.cpp": lambda: installed("xllamacpp"),
    "ggml": lambda: installed("libggml-python"),
    "CUDA": torch.cuda.is_available,
    "triton": lambda: installed("triton"),
    "llama-quantize": lambda: runs("llama-quantize"),
    "llama-imatrix": lambda: runs("llama-imatrix"),
}
"""What a case may need besides files: name → whether it is here. Programs are looked for in PATH."""


@dataclass(frozen=True)
class Case:
    """A benchmark; `smoke` are the options of a run of seconds, and their class those of the real one."""

    name: str
    purpose: str
    work: Callable[[Any], Rows]
    smoke: Any
    needs: tuple[str, ...]

    @property
    def options(self) -> Any:
        """The options of the real run."""
        return type(self.smoke)()

    @property
    def explanation(self) -> str:
        """What is measured, and how: the docstring of the case."""
        return inspect.cleandoc(self.work.__doc__ or "")

    def missing(self, options: Any) -> list[str]:
        """What a run with these options lacks here: tools, and files that options name."""
        tools = [name for name in self.needs if not TOOLS[name]()]
        values = [getattr(options, field.name) for field in fields(options)]
        paths = [path for value in values for path in (value if isinstance(value, tuple) else (value,))]
        return tools + [str(path) for path in paths if isinstance(path, Path) and not path.exists()]

    def run(self, options: Any, command: str, show: Callable[[Row], None] = lambda row: None) -> Record:
        """All rows with where they come from; each is shown as it is made."""
        origin, rows, began, spent = provenance(), [], time.perf_counter(), time.process_time()
        for row in self.work(options):
            show(row)
            rows.append(row)
        return Record(
            case=self.name,
            purpose=self.purpose,
            command=command,
            options={name: plain(value) for name, value in asdict(options).items()},
            seconds=round(time.perf_counter() - began, 1),
            cpu_seconds=round(time.process_time() - spent, 1),
            rows=rows,
            **origin,
        )


def plain(value: Any) -> Any:
    """A value of an option as JSON has it."""
    if isinstance(value, tuple):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


CASES: dict[str, Case] = {}
"""By name; `load` fills it."""


def case(
    purpose: str, smoke: Any, needs: tuple[str, ...] = ()
) -> Callable[[Callable[[Any], Rows]], Callable[[Any], Rows]]:
    """Register a function under its name, dashes for underscores; one at the end does not count."""

    def register(work: Callable[[Any], Rows]) -> Callable[[Any], Rows]:
        name = work.__name__.rstrip("_").replace("_", "-")
        assert name not in CASES, f"two cases are called {name}"
        CASES[name] = Case(name, purpose, work, smoke, needs)
        return work

    return register


def load() -> dict[str, Case]:
    """Every case of `benchmarks/cases/`, by name."""
    for module in pkgutil.iter_modules(cases.__path__):
        importlib.import_module(f"{cases.__name__}.{module.name}")
    return dict(sorted(CASES.items()))
