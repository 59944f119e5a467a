"""`moequant compare`."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from moequant import escape
from moequant.cli.common import MOST, Device, Overwrite, Ram, Seed, console, guarded, ram_bytes


class Engine(StrEnum):
    """Who computes."""

    moequant = "moequant"
    llama_cpp = "llama.cpp"


def compare(
    base: Annotated[Path, typer.Argument(help="The baseline: model folder or GGUF file.")],
    candidates: Annotated[
        list[Path], typer.Argument(help="What is held against it: GGUF files and folders, in any mix.")
    ],
    eval_: Annotated[
        str | None,
        typer.Option(
            "--eval", help="Text: file, folder, .jsonl or Hugging Face dataset (default: the bundled set)."
        ),
    ] = None,
    eval_tokens: Annotated[
        int, typer.Option(min=1, max=MOST, help="Tokens to read, at most; half are scored.")
    ] = 16_384,
    seed: Seed = 0,
    engine: Annotated[
        Engine, typer.Option(help="Who computes; llama.cpp takes GGUF files and needs xllamacpp.")
    ] = Engine.moequant,
    model: Annotated[
        Path | None,
        typer.Option(help="The model's unquantized folder, when it is not among what is compared."),
    ] = None,
    exact: Annotated[
        bool,
        typer.Option("--exact", help="Do not round the inputs of products as llama.cpp or vLLM does."),
    ] = False,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="A prompt of yours, beside the bundled ones, for samples; may be repeated."),
    ] = None,
    sample_tokens: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Tokens that each prompt is continued by; 0 for none. GGUF files run in llama.cpp and are "
            "timed (default: 32 with --engine llama.cpp or --prompt, else 0).",
        ),
    ] = None,
    ram: Ram = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads (default: one a core).")] = None,
    device: Device = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    html: Annotated[Path | None, typer.Option(help="Page to write: one file, no network needed.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Score CANDIDATES against BASE: perplexity, KL divergence, routing, and every expert's error."""
    from moequant.commands.compare import CompareSettings, run  # torch is imported only when there is work
    from moequant.files import claim
    from moequant.forward.stream import Resources
    from moequant.report.compare import compare_json, compare_tables
    from moequant.report.html import write

    resources = guarded(lambda: Resources(ram_bytes(ram), device, threads))
    settings = CompareSettings(
        eval=eval_,
        eval_tokens=eval_tokens,
        seed=seed,
        engine=engine.value,
        model=model,
        exact=exact,
        prompts=tuple(prompt or ()),
        sample_tokens=sample_tokens,
        command=escape.command(["moequant", *sys.argv[1:]]),
        resources=resources,
    )

    def work() -> None:
        with claim(html, overwrite=overwrite, inputs=(base, *candidates, model, eval_)):
            found = run(base, candidates, settings)
            if as_json:
                typer.echo(compare_json(found))
            else:
                console().print(compare_tables(found))
            if html is not None:
                write(found, html)

    guarded(work)
