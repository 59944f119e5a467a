"""The command line: translates arguments, prints, exits. A command is a file here and a name below."""

from __future__ import annotations

from typing import Annotated

import typer

import moequant
from moequant.cli.check import check
from moequant.cli.common import Commands
from moequant.cli.compare import compare
from moequant.cli.convert import convert
from moequant.cli.demo import demo
from moequant.cli.fit import fit
from moequant.cli.inspect import inspect
from moequant.cli.output import command as with_output
from moequant.cli.output import start_logging
from moequant.cli.plan import plan
from moequant.cli.push import push
from moequant.cli.route import route

app = typer.Typer(
    name="moequant",
    cls=Commands,
    help="Quantize mixture-of-experts models: every expert measured, packed and checked.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

for command in (check, compare, convert, demo, fit, inspect, plan, push, route):
    app.command()(with_output(command))


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Quantize mixture-of-experts models: every expert measured, packed and checked."""
    start_logging()
    if version:
        typer.echo(f"moequant {moequant.__version__}")
        raise typer.Exit
