"""Names that files bring along: what a person reads, and nothing that a terminal, page or card obeys."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml as pyyaml
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup
from matplotlib.figure import Figure
from rich.console import Console

from moequant import escape
from moequant.report import page
from moequant.report.style import line, table

HOSTILE = "a\x1b]0;owned\x07[/bold]$\\bad$\u202e<b>|`*x*`\nall hold"


def test_what_is_read_stays_and_what_steers_is_spelled_out() -> None:
    assert escape.plain("Qwen3-30B_A3B é 漢😀") == "Qwen3-30B_A3B é 漢😀"
    shown = escape.plain(HOSTILE)
    assert shown.startswith("a\\u{1b}]0;owned\\u{7}[/bold]$\\bad$\\u{202e}<b>") and shown.endswith(
        "⏎all hold"
    )
    assert escape.plain("\udc80\x85\u2028") == "\\u{dc80}\\u{85}\\u{2028}"


def test_reports_read_no_markup_and_keep_their_lines() -> None:
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system="standard")
    made = table(HOSTILE, HOSTILE, "number")
    made.add_row(HOSTILE, "[red]1[/red]")
    console.print(made)
    console.print(line(HOSTILE + "\n", style="bold"))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert printed.count("[/bold]$\\bad$") == 4 and "[red]1[/red]" in printed
    assert "\x1b]" not in printed and "\u202e" not in printed and "\nall hold" not in printed


@given(st.text(max_size=60))
def test_matplotlib_draws_any_name_as_it_is(text: str) -> None:
    figure = Figure()
    drawn = figure.text(0, 0, escape.mathtext(text))
    _, is_formula = drawn._preprocess_math(drawn.get_text())
    assert is_formula in (False, "TeX"), "no part of a name is a formula"
    seen, _ = drawn._preprocess_math(drawn.get_text())
    assert seen == escape.plain(text)


@pytest.mark.parametrize("text", [HOSTILE, "$\\bad$", "$", "a$b$c", r"\$x$"])
def test_a_picture_survives_any_name(text: str) -> None:
    figure = Figure()
    figure.text(0, 0, escape.mathtext(text))
    figure.savefig(file := io.StringIO(), format="svg")
    assert "\x1b" not in file.getvalue()


@given(st.text(max_size=60))
def test_front_matter_holds_any_name(text: str) -> None:
    scalar = escape.yaml(text)
    read = pyyaml.safe_load(f"---\nbase_model: {scalar}\n")
    assert "\n" not in scalar and read == {"base_model": escape.plain(text)}


@pytest.mark.parametrize("text", ["Tiny-OLMoE", "apache-2.0", "Qwen/Qwen3-30B-A3B"])
def test_plain_words_need_no_quotes(text: str) -> None:
    assert escape.yaml(text) == text


@pytest.mark.parametrize("text", ["yes", "null", "- a", "a: b", "1e3", "~", "", "a\nlicense: mit"])
def test_what_yaml_would_read_otherwise_is_quoted(text: str) -> None:
    assert pyyaml.safe_load(f"x: {escape.yaml(text)}") == {"x": escape.plain(text)}


def test_markdown() -> None:
    assert escape.markdown("Qwen3_moe-30B") == "Qwen3_moe-30B"
    assert escape.markdown("a|b [x](http://y) <img> _z_ `c`\n# d") == (
        r"a\|b \[x\](http://y) \<img\> \_z\_ \`c\`⏎# d"
    )
    assert escape.markdown("# top") == r"\# top"


def test_pages_show_no_hidden_characters() -> None:
    assert page.printed("a\u202eb\nc") == "a\\u{202e}b\nc"
    assert page.printed(Markup("<svg>\u200b</svg>")) == "<svg>\u200b</svg>" and page.printed(3) == 3


def test_commands_show_names(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    given = [
        "moequant",
        "compare",
        f"{tmp_path}/model",
        f"--html={tmp_path}/page.html",
        "--prompt",
        "yes/no? a b",
    ]
    assert escape.command(given) == "moequant compare model --html=page.html --prompt 'yes/no? a b'"
    assert escape.shown(Path(f"{tmp_path}/model")) == "model" and escape.shown(Path()) == Path.cwd().name


INSPECT = """
import sys
from moequant.cli import app
for encoding in sys.argv[2:]:
    if sys.stdout.encoding != encoding:
        sys.stdout.reconfigure(encoding=encoding, errors="strict")
    app(["inspect", sys.argv[1]], standalone_mode=False)
    sys.stdout.flush()
    sys.stdout.buffer.write(bytes(1))
"""


def test_a_terminal_that_lacks_a_character_gets_another(tiny) -> None:
    """`inspect` prints ≤, ×, → and names; none of them may end it."""
    folder, encodings = tiny("qwen3_moe"), ("ascii", "latin-1", "cp1252")
    surroundings = os.environ | {"LANG": "C", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-c", INSPECT, str(folder), *encodings],
        capture_output=True,
        env=surroundings | {"PYTHONIOENCODING": encodings[0]},
        check=False,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    *printed, nothing = done.stdout.split(bytes(1))
    assert not nothing
    for encoding, told in zip(encodings, printed, strict=True):
        assert "read per token" in told.decode(encoding)
    assert "±→漢\udc80".encode("ascii", escape.STAND_IN) == b"+-->\\u{6f22}\\u{dc80}"
