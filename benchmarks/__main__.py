"""python -m benchmarks list | run NAME [--smoke] [--out FOLDER] [--OPTION VALUE …] | render NAME."""

from __future__ import annotations

import argparse
import shlex
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from benchmarks import page
from benchmarks.harness import Case, Row, load
from benchmarks.record import RESULTS, Record


def add_options(parser: argparse.ArgumentParser, given: Any) -> None:
    """An argument for every field of the options `given`, which are the defaults."""
    hints = typing.get_type_hints(type(given))
    for field in fields(given):
        name, default = "--" + field.name.replace("_", "-"), getattr(given, field.name)
        told = {"default": default, "help": f"[{page.shown(default)}]"} | kind(hints[field.name])
        parser.add_argument(name, **told)


def kind(hint: Any) -> dict[str, Any]:
    """How argparse reads a value of that type: plain, a Literal, either or None, or a tuple of them."""
    parts = typing.get_args(hint)
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(hint) is tuple:
        return {"nargs": "*"} | kind(parts[0])
    if typing.get_origin(hint) is typing.Literal:
        return {"choices": parts}
    return kind(next(part for part in parts if part is not types.NoneType)) if parts else {"type": hint}


def parser_of(case: Case, smoke: bool) -> argparse.ArgumentParser:
    """The arguments of one case."""
    parser = argparse.ArgumentParser(
        f"python -m benchmarks run {case.name}",
        description=f"{case.purpose}.\n\n{case.explanation}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--smoke", action="store_true", help="a run of seconds; what it shows means nothing")
    parser.add_argument(
        "--out", type=Path, help="folder of CASE.json and CASE.md [benchmarks/results; with --smoke none]"
    )
    add_options(parser, case.smoke if smoke else case.options)
    return parser


def run(case: Case, arguments: Sequence[str]) -> None:
    """Run one case, show its rows as they come, write its record and page."""
    told = vars(parser_of(case, "--smoke" in arguments).parse_args(arguments))
    smoke, out = told.pop("smoke"), told.pop("out")
    options = type(case.smoke)(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in told.items()}
    )
    if missing := case.missing(options):
        sys.exit(f"{case.name} needs what is not here: {', '.join(missing)}")
    seen: list[Row] = []

    def show(row: Row) -> None:
        before = len(list(page.lines(seen)))
        seen.append(row)
        print(*list(page.lines(seen))[before:], sep="\n", flush=True)

    torch.set_num_threads(1)
    record = case.run(options, shlex.join(["python", "-m", "benchmarks", "run", case.name, *arguments]), show)
    folder = out or (None if smoke else RESULTS)
    if folder is not None:
        print(f"\n{record.write(folder)}\n{page.write(record, folder)}")


def describe(case: Case) -> str:
    """A few lines: purpose, needs, and how old the results are."""
    paths = [getattr(case.options, field.name) for field in fields(case.options)]
    shared = any("shared" in Path(path).parts for path in paths if isinstance(path, Path))
    needs = [*case.needs, *(["shared/"] if shared else [])]
    file, page_of = RESULTS / f"{case.name}.json", RESULTS / f"{case.name}.md"
    if file.is_file():
        record = Record.read(file)
        state = f"results of {(record.commit or 'unknown')[:7]}" + (", stale" if record.stale else "")
    else:
        state = "results of older code only" if page_of.is_file() else "no results"
    return f"{case.name:12} {case.purpose}\n{'':12} {', '.join(needs) or 'needs nothing'}; {state}"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("action", choices=("list", "run", "render"))
    parser.add_argument("name", nargs="?", help="of a case")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="options of the run; NAME --help shows them")
    given = parser.parse_args(arguments)
    cases = load()
    if given.action == "list":
        print(*map(describe, cases.values()), sep="\n")
        return
    if given.name not in cases:
        parser.error(f"no case {given.name!r}; there is {', '.join(cases)}")
    if given.action == "run":
        run(cases[given.name], given.rest)
    else:
        print(page.write(Record.read(RESULTS / f"{given.name}.json"), RESULTS))


if __name__ == "__main__":
    main()
