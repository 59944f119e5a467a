"""The shape of the package: imports run one way, and nothing heavy is imported before there is work."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import moequant

PACKAGE = Path(moequant.__file__).parent

ORDER = [
    {"errors", "escape", "document"},
    {"values", "progress", "files", "ranks"},
    {"formats", "families"},
    {"kernels", "checkpoint"},
    {"text"},
    {"forward"},
    {"statistics"},
    {"rounding"},
    {"containers"},
    {"hub"},
    {"runtimes"},
    {"evaluate"},
    {"plan"},
    {"inspection"},
    {"check"},
    {"report"},
    {"commands"},
    {"library"},
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


FILE_NAMES = re.compile(r"blk\\?\\?\.|token_embd|ffn_(gate|up|down)_exps|attn_output\.weight|output_norm")
"""What tensors are called in GGUF files."""

DRAWING = {"rich", "jinja2", "matplotlib"}


def within(path: Path, *folders: str) -> bool:
    return str(path.relative_to(PACKAGE)).startswith(folders)


def test_names_of_gguf_stay_with_gguf() -> None:
    """Everything else speaks of weights by our own names: another container is then another folder."""
    there = {path for path in PACKAGE.rglob("*.py") if FILE_NAMES.search(path.read_text(encoding="utf-8"))}
    assert PACKAGE / "containers/gguf/families/names.py" in there, "the pattern finds them"
    assert not [path for path in there if not within(path, "containers/gguf/", "runtimes/llama_cpp/")]


def test_only_reports_and_the_command_line_draw() -> None:
    wrong, drawing = [], set()
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found = DRAWING & {name.split(".")[0] for name in names}
            drawing |= found
            if found and not within(path, "report/", "cli/"):
                wrong.append(f"{path.relative_to(PACKAGE)} imports {', '.join(found)}")
    assert not wrong
    assert drawing == DRAWING, "somebody draws"


def test_matplotlib_is_imported_where_something_is_drawn() -> None:
    """It takes half a second, and most commands draw nothing."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert "matplotlib" not in {name.split(".")[0] for name in names}, path


def test_plan_and_families_do_without_torch() -> None:
    code = "import sys, moequant.plan, moequant.families; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_command_line_starts_without_torch() -> None:
    code = "import sys, moequant.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
