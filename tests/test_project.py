"""What surrounds the code: declared packages, one version, pages and settings that agree with it."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import moequant
from tests.models import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

ELSEWHERE = {"vllm", "llmcompressor", "auto_round", "sglang"}
"""What tests/clients and benchmarks/served_tool.py run in environments of their own."""

OURS = {"moequant", "tests", "scripts", "benchmarks"}


def imported(folder: str) -> dict[str, Path]:
    """Packages of others that the code of a folder imports at any depth, each with a file that does."""
    found: dict[str, Path] = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                found.setdefault(name.split(".")[0], path.relative_to(ROOT))
    known = set(sys.stdlib_module_names) | OURS | ELSEWHERE
    return {name: path for name, path in found.items() if name not in known}


def normal(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(*extras: str) -> set[str]:
    """Distributions that pyproject.toml names, those of some extras among them."""
    lines = [
        *PROJECT["dependencies"],
        *(e for name in extras for e in PROJECT["optional-dependencies"][name]),
    ]
    return {normal(re.match(r"[\w.-]+", line)[0]) for line in lines}  # type: ignore[index]


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("moequant", ("datasets", "gpu")),
        ("tests", ("gpu", "test")),
        ("scripts", ("gpu",)),
        ("benchmarks", ("gpu", "test")),
    ],
)
def test_every_imported_package_is_declared(folder: str, extras: tuple[str, ...]) -> None:
    homes = importlib.metadata.packages_distributions()
    wanted = declared(*extras)
    missing = {
        f"{name} ({path})"
        for name, path in imported(folder).items()
        if not wanted & {normal(home) for home in homes.get(name, [name])}
    }
    assert imported(folder) and not missing


def test_every_dependency_is_imported() -> None:
    homes = importlib.metadata.packages_distributions()
    used = {normal(home) for name in imported("moequant") for home in homes.get(name, [name])}
    assert not declared() - used


def test_constraints_hold_every_dependency() -> None:
    held = {
        normal(line.split("==")[0])
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    assert not declared("test") - held


def test_the_version_is_in_one_place() -> None:
    """The package says it, pyproject.toml reads it there, and the changelog begins with it and a date."""
    assert "version" in PROJECT["dynamic"]
    first = re.search(
        r"^## (\S+) \((\d{4}-\d\d-\d\d)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M
    )
    assert first and first[1] == moequant.__version__
    assert "version:" not in (ROOT / "CITATION.cff").read_text(encoding="utf-8").replace("cff-version:", "")


def test_continuous_integration_runs_what_a_person_runs() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]
    pythons = jobs["linux"]["strategy"]["matrix"]["python"]
    lowest = PROJECT["requires-python"].removeprefix(">=")
    assert pythons[0] == lowest and len(pythons) == 4
    assert any(step.get("run") == ".ci/run" for step in jobs["linux"]["steps"])
    here = {line.strip() for line in (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()}
    there = {step.get("run") for step in jobs["windows"]["steps"]}
    assert {"ruff check .", "ruff format --check .", "mypy", "pytest -n 2 --dist loadfile"} <= here & there
    assert all("workflow_dispatch" in jobs[name]["if"] for name in ("macos", "windows")), "never seen to pass"


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem
)
def test_issue_forms_have_what_a_forge_wants(path: Path) -> None:
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.stem != "config":
        assert {"name", "description", "body"} <= form.keys()
        assert all(
            {"type", "attributes"} <= part.keys() and "label" in part["attributes"] for part in form["body"]
        )


def test_what_pages_of_the_project_name_is_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"\]\(([^)#:]+)\)|`((?:moequant|tests|scripts|docs)/[\w./-]+\.(?:py|md))`", text)
    paths = [one or two for one, two in named if "NAME" not in one + two]
    assert len(paths) > 6 and not [path for path in paths if not (ROOT / path).exists()]
    commands = re.findall(r"(?:pytest|python) ((?:tests|scripts)/\S+)", text)
    assert commands and not [path for path in commands if not (ROOT / path).exists()]


def test_the_readme_says_whether_there_is_a_licence() -> None:
    """It is the owner's to choose."""
    says_none = "No licence has been chosen yet" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert says_none != bool(list(ROOT.glob("LICENSE*")))
