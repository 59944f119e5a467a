"""--json: what docs/json.md says of each command, errors too; and how much is said beside it."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm
from typer.testing import CliRunner

from moequant.cli import app
from moequant.cli.output import command
from moequant.document import SCHEMA, document
from tests.cli.test_cli import run
from tests.models import ROOT

FAST = ("--type", "Q4_K_M", "--effort", "fast")


def documented() -> dict[str, set[str]]:
    """The keys of each command in docs/json.md."""
    rows = re.findall(
        r"^\| (`[a-z][^|]*`) \| (`.*) \|$", (ROOT / "docs/json.md").read_text(encoding="utf-8"), re.M
    )
    found = {
        name: set(re.findall(r"`([a-z_]+)`", keys))
        for names, keys in rows
        for name in re.findall(r"`([^`]+)`", names)
    }
    return {name: keys for name, keys in found.items() if name not in ("schema", "command", "error")}


PATHS = {"convert": {"out"}, "fit": {"file", "command", "convert"}}
"""Keys that docs/json.md lets hold paths, as they were typed."""


def naming(folder: str, value: Any, key: str = "") -> set[str]:
    """Keys under which that folder of this machine is named."""
    if isinstance(value, dict):
        return {found for name, each in value.items() for found in naming(folder, each, name)}
    if isinstance(value, list):
        return {found for each in value for found in naming(folder, each, key)}
    return {key} if isinstance(value, str) and folder in value else set()


def printed(name: str, *arguments: object) -> dict[str, Any]:
    """What a command prints with --json: the keys that the page says, no others, and paths where it says."""
    done = run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    value: dict[str, Any] = json.loads(done.stdout)
    assert value.pop("schema") == SCHEMA == 1 and value.pop("command") == name.split()[0]
    assert value.keys() == documented()[name] - ({"coverage"} if name == "route" else set())
    folders = {str(each.parent) for each in arguments if isinstance(each, Path)}
    assert folders and {key for each in folders for key in naming(each, value)} <= PATHS.get(
        name.split()[0], set()
    )
    return value


def test_every_command_is_on_the_page() -> None:
    names = {info.callback.__name__ for info in app.registered_commands if info.callback}
    assert {name.split()[0] for name in documented()} == names


def test_what_every_command_prints(tiny, text: Path, tmp_path: Path) -> None:
    """One line through all of them, each on what the one before it made."""
    model, out, stats = tiny("qwen3_moe"), tmp_path / "q.gguf", tmp_path / "s.safetensors"
    some = ("--calib", text, "--calib-tokens", 1024)
    assert printed("inspect", "inspect", model)["experts"] == 8
    folders = ("--format", "safetensors", "--vram", "4G", "--ctx", 512)
    assert printed("fit --format safetensors", "fit", model, *folders)["candidates"]
    assert printed("fit", "fit", model, "--vram", "1G", "--ram", "4G", "--ctx", 512)["candidates"]
    dry = printed("convert --dry-run", "convert", model, "-o", out, *FAST, "--dry-run")
    assert dry["revision"] is None and not out.exists()
    routed = printed("route", "route", model, *some, "-o", stats)
    assert len(routed["layers"][0]["expert_tokens"]) == 8
    made = printed(
        "convert", "convert", model, "-o", out, *FAST, "--stats", stats, "--eval", text, "--eval-tokens", 1024
    )
    (file,) = made["files"]
    (meant,) = dry["files"]
    assert (
        file["bytes"] == out.stat().st_size == meant["bytes"] and file["comparison"]["kl_mean"]["value"] > 0
    )
    assert file["out"] == str(out), "as it was typed"
    assert printed("fit", "fit", out, "--vram", 0, "--ram", "4G", "--ctx", 512)["candidates"][0][
        "file"
    ] == str(out)
    assert file["types"] == meant["types"] and len(file["losses"][-1]["relative_error"]) >= 1
    compared = printed("compare", "compare", model, out, "--eval", text, "--eval-tokens", 1024)
    assert compared["candidates"][0]["name"] == "q.gguf"
    planned = printed(
        "plan", "plan", model, "--stats", stats, "--no-probes", "--effort", "fast", "--type", "Q4_K_M"
    )
    assert planned["wanted"][0]["types"] and planned["curve"][0]["bytes"] < planned["curve"][-1]["bytes"]
    assert printed("check", "check", out, "--device", "cpu", "--sample", 2)["holds"] is True
    for file in (out, stats):
        places = [str(place).encode() for place in (tmp_path, text.parent, model.parent)]
        assert not [place for place in places if place in file.read_bytes()], "files tell no place either"


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (("inspect", "/none/here/x"), "CheckpointError"),
        (("convert", "/none/here/x", "-o", "x.gguf"), "CheckpointError"),
        (("plan", "/none/here/x", "--sizes", "many"), "PlanError"),
        (("route", "/none/here/x", "--ram", "much"), "PlanError"),
    ],
)
def test_errors_are_json_too(arguments: tuple[str, ...], kind: str) -> None:
    done = run(*arguments, "--json")
    value = json.loads(done.stdout)
    assert done.returncode == 1 and (value["schema"], value["command"]) == (SCHEMA, arguments[0])
    assert value["error"]["kind"] == kind and done.stderr == f"moequant: {value['error']['message']}\n"
    assert not run(*arguments).stdout, "without --json nothing is said on stdout"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("convrt", "demo"), "no such command 'convrt'; did you mean 'convert'? `moequant --help`"),
        (("convert", "demo"), "missing option '--out' / '-o'; `moequant convert --help` shows what there is"),
        (("convert", "demo", "-o", "x", "--typ", "Q8_0"), "no such option: --typ"),
        (
            ("compare", "demo", "x", "--engine", "llamacpp"),
            "'llamacpp' is not one of 'moequant', 'llama.cpp'",
        ),
        (("inspect",), "missing argument 'path'; `moequant inspect --help`"),
        (("fit", "demo", "--vram", "24"), "is 24 bytes; write 24GiB"),
        (("--nothing",), "no such option: --nothing; `moequant --help`"),
    ],
)
def test_what_is_typed_wrongly_is_one_line_and_json(arguments: tuple[str, ...], says: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2 and not done.stdout
    assert says in done.stderr and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("moequant: ")
    value = json.loads(run(*arguments, "--json").stdout)
    assert value["schema"] == SCHEMA and value["error"]["kind"] == "UsageError"
    assert f"moequant: {value['error']['message']}\n" == done.stderr or "--nothing" in arguments


def test_what_the_parser_misses_is_shown_by_the_help_of_the_command() -> None:
    """Its errors do not say of which command they are."""
    for typed, where in (
        (("--json", "convert", "demo", "--type"), "moequant"),
        (("convert", "demo", "--json", "--type"), "moequant convert"),
        (("fit", "--json=3"), "moequant fit"),
        (("--version=3", "convert"), "moequant"),
    ):
        done = run(*typed)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
        assert done.stderr.endswith(f"; `{where} --help` shows what there is\n"), done.stderr
    value = json.loads(run("convert", "demo", "--json", "--type").stdout)
    assert value["command"] == "convert" and value["error"]["kind"] == "UsageError"


def test_numbers_that_json_has_not() -> None:
    value = json.loads(document("x", {"a": [float("nan"), 1.5, (float("inf"), 2)], 3: {"b": -float("inf")}}))
    assert value["a"] == [None, 1.5, [None, 2]] and value["3"] == {"b": None}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("quiet", "drawn"), [(True, False), (False, True)])
def test_quiet_draws_no_bars(quiet: bool, drawn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)

    def work() -> None:
        for _ in tqdm(range(3), disable=None):
            pass
        print("an error", file=sys.stderr)

    command(work)(quiet=quiet, verbose=False)
    assert ("3/3" in terminal.getvalue()) == drawn and "an error" in terminal.getvalue()


def test_verbose_says_what_stages_take_and_quiet_says_nothing(
    tiny: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run("inspect", "/none/here/x", "--verbose").returncode == 1
    assert "where it was raised" in caplog.text and "Traceback" in caplog.text
    caplog.clear()
    done = run("inspect", "/none/here/x", "--quiet")
    assert not caplog.text and done.stderr.count("\n") == 1
    asked = ("convert", tiny("olmoe"), *FAST, "--calib-tokens", 2048, "--eval-tokens", 1024, "--json")
    done = run(*asked, "-o", tmp_path / "a.gguf", "--verbose")
    assert done.returncode == 0 and json.loads(done.stdout)["command"] == "convert"
    said = [line.split()[1] for line in done.stderr.splitlines()]
    assert said == ["open:", "route:", "quantize:", "verify:", "self-check:", "compare:"], done.stderr
    assert "done in" in done.stderr and "calibrate 2,048 tokens" in done.stderr
    done = run(*asked, "-o", tmp_path / "b.gguf", "--quiet")
    assert done.returncode == 0 and done.stderr == ""


def test_shells_are_taught() -> None:
    asked = {"_MOEQUANT_COMPLETE": "source_bash"}
    shown = CliRunner().invoke(app, [], env=asked, prog_name="moequant").output
    assert "complete -o default -F _moequant_completion moequant" in shown


def test_no_colour_where_it_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    from moequant.cli.output import console

    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = console()
    coloured.print("x", style="red")
    assert "\x1b[31m" in sys.stdout.getvalue()  # type: ignore[attr-defined]
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    console().print("x", style="red")
    assert "\x1b[31m" not in sys.stdout.getvalue()  # type: ignore[attr-defined]
