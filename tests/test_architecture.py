"""The shape of the package: imports run one way, and nothing heavy is imported before there is work."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import moequant
from moequant import library
from tests import gguf_shapes

PACKAGE = Path(moequant.__file__).parent

ORDER = [
    {"errors", "escape", "document"},
    {"values", "progress", "files", "ranks", "native"},
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


WITHOUT_TORCH = {
    "--help": 0,
    "convert --help": 0,
    "convert --no-such-option": 2,
    "inspect nothing": 1,
    "push owner/name nothing": 1,
    "inspect {file}": 0,
    "fit {file} --vram 1GiB --ram 1GiB --ctx 64": 0,
}
"""Commands that need neither torch nor transformers, and the code with which they end."""

WITHOUT_MODELS = {
    "inspect {folder}": 0,
    "fit {folder} --vram 1GiB --ram 1GiB --ctx 64": 0,
    "fit {folder} --vram 2GiB --ctx 64 --format safetensors": 0,
    "convert nothing -o out.gguf": 1,
    "convert {folder} -o out.gguf --size all": 1,
    "check nothing": 1,
    "compare nothing nothing.gguf": 1,
    "plan nothing": 1,
    "route nothing": 1,
}
"""Commands that need no model of transformers': importing those takes seconds, which a user would wait even
for an error of one line."""

PROGRAM = (
    """
import sys
from pathlib import Path

from moequant.cli import app

def run(commands, needless):
    for command, code in commands.items():
        try:
            app(command.format(file="model.gguf", folder=sys.argv[1]).split())
        except SystemExit as end:
            assert end.code == code, command
        assert not needless & sys.modules.keys(), f"{command} imports {needless & sys.modules.keys()}"

torch = {"torch", "transformers"}
models = {"transformers.modeling_utils", "transformers.masking_utils", "torch._dynamo", "sympy"}
"""
    + f"run({WITHOUT_TORCH!r}, torch)\nrun({WITHOUT_MODELS!r}, models)"
    + """

from moequant.checkpoint import open_checkpoint
from moequant.forward.model import empty_model

empty_model(open_checkpoint(Path(sys.argv[1])))
assert torch | models <= sys.modules.keys(), "these are the names, and a model needs them all"
"""
)


def test_a_command_imports_what_it_needs(tiny, tmp_path: Path) -> None:
    """Of commands in one process, in this order, none has loaded what it does without."""
    sizes = {"hidden": 256, "heads": 2, "kv": 1, "experts": 4, "used": 2, "ff": 256, "vocab": 256}
    gguf_shapes.gqa(tmp_path / "model.gguf", "llama", layers=1, **sizes)
    ran = [sys.executable, "-c", PROGRAM, str(tiny("mixtral"))]
    done = subprocess.run(ran, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_library_has_every_name_in_its_table() -> None:
    names = sorted(name for each in library.PLACES.values() for name in each)
    assert names == sorted(library.__all__)
    assert all(getattr(library, name) for name in names)
