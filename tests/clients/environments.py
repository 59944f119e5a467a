"""Programs that cannot share our environment have their own: a script there prints JSON."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

MINUTES = 15
"""How long a test waits for an environment that is being made."""

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))


@dataclass(frozen=True, slots=True)
class Environment:
    """That of `program`, which `tests/clients/NAME_env.sh` makes."""

    program: str
    name: str

    def required(self) -> None:
        """The test waits while somebody makes it, and skips where nobody has."""
        if (lock := self._folder.with_name(f"{self.name}.lock")).is_file():
            with lock.open() as held:
                for _ in range(MINUTES * 60):
                    try:
                        fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
                        break
                    except BlockingIOError:
                        time.sleep(1)
        if not (self._folder / "complete").is_file():
            made = f"tests/clients/{self.name}_env.sh makes it"
            pytest.skip(f"{self.program}'s environment {self._folder} is absent: {made}")

    def told(self, script: Path, *arguments: Path, **variables: str) -> Any:
        """The last line that a script prints there."""
        run = subprocess.run(
            [self._folder / "bin" / "python", script, *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=1800,
            env=os.environ | variables,
        )
        assert run.returncode == 0, run.stderr[-3000:]
        return json.loads(run.stdout.strip().splitlines()[-1])

    @property
    def _folder(self) -> Path:
        return CACHE / "moequant" / self.name


VLLM = Environment("vLLM", "vllm")
SGLANG = Environment("SGLang", "sglang")
