"""The pages under docs/: their commands run, what they show is what is printed, and the reference is current.

A block fenced as ```sh run (a moequant command a line) or ```python run is executed, block after block of a
page in one folder that holds the demo model. A block fenced as ```text behind it is what it printed: every
line must be in the output, numbers aside; … stands for anything left out. Commands in other sh and console
blocks, of README.md too, must exist.
"""

from __future__ import annotations

import inspect
import io
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moequant import families, formats
from moequant.cli import app
from moequant.runtimes.llama_cpp.kv_cache import UNMODELLED
from moequant.text import bundled
from scripts import build_cli_reference, build_library_reference
from tests.models import ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, bool, str]]:
    """(language, whether to run it, text) of every fenced block."""
    return [
        (language, "run" in words.split(), text)
        for language, words, text in BLOCK.findall(page.read_text(encoding="utf-8"))
    ]


def masked(text: str) -> list[str]:
    """Lines without blanks at the ends, runs of blanks and rules as one, every number as #."""
    lines = (re.sub(r"[─━═]+", "-", " ".join(line.split())) for line in text.splitlines())
    return [re.sub(r"\d[\d,]*(\.\d+)?", "#", line) for line in lines]


RUNNABLE = [page for page in PAGES if any(run for _, run, _ in blocks(page))]


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").symlink_to(bundled.path("demo"))
    monkeypatch.chdir(tmp_path)
    printed = ""
    for language, run, text in blocks(page):
        if run:
            printed = executed(language, text)
        elif language == "text" and printed:
            known = set(masked(printed))
            strange = [line for line in masked(text) if line.strip("… ") and line not in known]
            assert not strange, f"{page.name} shows lines that were not printed: {strange}\n{printed}"


def executed(language: str, text: str) -> str:
    """What a block prints; it must end well."""
    if language == "python":
        with redirect_stdout(io.StringIO()) as out:
            exec(compile(text, "docs", "exec"), {})
        return out.getvalue()
    printed = ""
    for line in text.splitlines():
        program, *arguments = shlex.split(line)
        assert program == "moequant", f"only moequant is run here, not {line!r}"
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"{line}\n{result.output}{result.exception!r}"
        printed += result.stdout
    return printed


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda p: p.stem)
def test_commands_that_are_shown_exist(page: Path) -> None:
    lines = [
        line.removeprefix("$ ")
        for language, _, text in blocks(page)
        if language in ("sh", "console")
        for line in text.replace("\\\n", " ").splitlines()
    ]
    for line in lines:
        for part in re.findall(r"(?:^|&& |\| )moequant ([^|&#]*)", line):
            name, *words = shlex.split(part)
            if name.startswith("-"):
                continue
            known = options_of(name)
            used = [word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)]
            assert set(used) <= known, f"{page.name}: {line!r}: {sorted(set(used) - known)}"


def options_of(name: str) -> set[str]:
    """Every option that the help of a command names."""
    shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "300", "TERMINAL_WIDTH": "300"})
    assert shown.exit_code == 0, f"no command {name!r}"
    return set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", shown.stdout))


def test_the_reference_of_commands_is_current() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert page == build_cli_reference.render(), "run: python scripts/build_cli_reference.py"


def test_the_reference_of_the_library_is_current() -> None:
    """Every verb, its settings and its results are on it: the page is made of them."""
    made = page("reference")
    assert made == build_library_reference.render(), "run: python scripts/build_library_reference.py"
    for verb in build_library_reference.VERBS:
        assert f"### {verb}\n" in made, verb


def test_the_reference_has_what_help_has() -> None:
    """Names and help as the program itself prints them, on a terminal wide enough for every line."""
    page = build_cli_reference.render()
    names = {info.callback.__name__ for info in app.registered_commands if info.callback}
    assert set(re.findall(r"^## moequant (\w+)$", page, re.MULTILINE)) == names
    for name in names:
        section = page.split(f"## moequant {name}\n")[1].split("\n## ")[0]
        rows = re.findall(r"^\| `(-[^`]*)`", section, re.MULTILINE)
        listed = {word for row in rows for word in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", row)}
        assert listed <= options_of(name) and listed, name
        own = {entry.strip("_").replace("_", "-") for entry in signature(name)}
        assert len(rows) + len(re.findall(r"^\| `[A-Z]", section, re.MULTILINE)) == len(own)


def signature(name: str) -> list[str]:
    (callback,) = [i.callback for i in app.registered_commands if i.callback and i.callback.__name__ == name]
    return list(inspect.signature(callback).parameters)


def test_links_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "README.md"]:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_table_of_types_is_right() -> None:
    """Every type with its bits and block, and none that does not exist."""
    page = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \| (\d+) \|", page, re.MULTILINE)
    assert {name: (float(bits), int(block)) for name, bits, block in rows} == {
        name: (round(fmt.bits, 4), fmt.block) for name, fmt in formats.FORMATS.items()
    }


PLANNED = """
import sys
from pathlib import Path
from typer.testing import CliRunner
import moequant
from moequant.cli import app
for model in sys.argv[1:]:
    done = CliRunner().invoke(app, ["convert", model, "-o", "q.gguf", "--dry-run"])
    sys.stderr.write(done.stderr)
    print(Path(moequant.__file__).parent, done.exit_code)
"""


def test_a_family_is_what_the_page_shows(tiny, tmp_path: Path) -> None:
    """Without the lines of its diff OLMoE is refused by name, and everything else works as before."""
    (diff,) = re.findall(r"^```diff olmoe\n(.*?)^```$", page("extending"), re.MULTILINE | re.DOTALL)
    shutil.copytree(ROOT / "moequant", tmp_path / "moequant")
    for name, added in re.findall(r"^\+\+\+ (\S+)\n(.*?)(?=^\+\+\+|\Z)", diff, re.MULTILINE | re.DOTALL):
        text = (ROOT / name).read_text(encoding="utf-8")
        for run in added.split("@@\n"):
            lines = "".join(line[1:] for line in run.splitlines(keepends=True))
            assert f"\n{lines}" in f"\n{text}", f"{name} has no longer:\n{lines}"
            text = text.replace(lines, "", 1)
        if name.startswith("moequant/"):
            (tmp_path / name).write_text(text, encoding="utf-8")
        assert "olmoe" not in text.lower(), f"more of OLMoE in {name} than the page shows"
    command = [sys.executable, "-c", PLANNED, tiny("mixtral"), tiny("olmoe")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-2:] == [f"{tmp_path / 'moequant'} 0", f"{tmp_path / 'moequant'} 1"]
    assert "OlmoeForCausalLM is not supported yet" in done.stderr and len(done.stderr.splitlines()) == 1


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def test_pages_name_every_family_and_every_unknown_cache() -> None:
    pages = {name: page(name) for name in ("families", "limits")}
    for name in (name for family in families.FAMILIES for name in family.classes):
        assert f"`{name}`" in pages["families"], name
    for name in UNMODELLED:
        assert f"`{name}`" in pages["limits"], name


def test_the_glossary_has_the_words_that_people_meet() -> None:
    """A page short enough to be read: every word of it is on another page, or in what the program prints."""
    page = ROOT / "docs" / "glossary.md"
    words = re.findall(r"^\| \*\*(.+?)\*\*", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert 20 <= len(words) <= 25
    others = [each for each in (*PAGES, ROOT / "README.md") if each != page]
    sources = (ROOT / "moequant").rglob("*.py")
    met = "\n".join(each.read_text(encoding="utf-8") for each in others)
    printed = "\n".join(
        text for each in sources for text in re.findall(r'"[^"\n]+"', each.read_text("utf-8"))
    )
    unmet = [
        word
        for row in words
        for word in row.split(", ")
        if not re.search(rf"\b{re.escape(word)}", met + printed, re.IGNORECASE)
    ]
    assert not unmet
