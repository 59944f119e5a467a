"""What a run leaves behind: its rows, and everything needed to say of which code and machine they are."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moequant.evaluate import environment

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Record:
    """One run. `dirty`: the working tree had changes that `commit` lacks; `load`: the machine's before it."""

    case: str
    purpose: str
    command: str
    options: dict[str, Any]
    commit: str | None
    dirty: bool
    date: str
    seconds: float
    cpu_seconds: float
    load: float
    machine: dict[str, str]
    libraries: dict[str, str]
    rows: list[dict[str, Any]]

    def write(self, folder: Path) -> Path:
        """Write it as `folder`/CASE.json."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.case}.json"
        path.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return path

    @classmethod
    def read(cls, path: Path) -> Record:
        """What `write` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    @property
    def stale(self) -> bool:
        """Whether the package has changed since; not known without git, and then said to be so."""
        return self.commit is None or git("diff", "--quiet", self.commit, "--", "moequant") is None


def provenance() -> dict[str, Any]:
    """Commit, date, load, machine and versions at this moment."""
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--", ".", ":!benchmarks/results")),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load": round(os.getloadavg()[0], 1),
        "machine": environment.machine(),
        "libraries": environment.libraries(),
    }


def git(*arguments: str) -> str | None:
    """What git prints about this checkout; None where it fails or is not there."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
