"""The shape of the package: imports run one way, and nothing heavy is imported before there is work."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import moequant

PACKAGE = Path(moequant.__file__).parent

ORDER = [
    {"errors", "escape"},
    {"values", "progress", "files"},
    {"formats", "families"},
    {"kernels", "checkpoint"},
    {"text"},
    {"forward"},
    {"statistics"},
    {"rounding"},
    {"containers"},
    {"runtimes"},
    {"evaluate"},
    {"plan"},
    {"inspection"},
    {"check"},
    {"report"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
"""Groups of modules; a module imports only from groups before its own, or within its own package."""

RANK = {name: rank for rank, group in enumerate(ORDER) for name in group}


def imports(path: Path) -> set[str]:
    """Names of moequant's top-level modules that a file imports at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "moequant":
            parts = node.module.split(".")[1:]
            found |= {parts[0]} if parts else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("moequant.")}
    return found - {"__version__"}


def test_imports_run_one_way() -> None:
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if module == "__init__":
            continue
        for name in imports(path) - {module}:
            if RANK[name] >= RANK[module]:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not wrong


def test_plan_and_families_do_without_torch() -> None:
    code = "import sys, moequant.plan, moequant.families; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_command_line_starts_without_torch() -> None:
    code = "import sys, moequant.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
