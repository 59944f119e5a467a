"""`moequant compare`."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from moequant import escape
from moequant.cli.common import (
    MOST,
    AsJson,
    CacheDir,
    Device,
    Overwrite,
    Ram,
    Seed,
    guarded,
    local,
    place,
    ram_bytes,
    tell,
)


class Engine(StrEnum):
    """Who computes."""

    moequant = "moequant"
    llama_cpp = "llama.cpp"


class Cache(StrEnum):
    """How llama.cpp keeps keys and values."""

    f32 = "f32"
    f16 = "f16"
    q8_0 = "q8_0"


def compare(
    base: Annotated[
        str,
        typer.Argument(
            help="The baseline: model folder, GGUF file, or a name on the Hub: "
            "OWNER/NAME[@REVISION][:FILE.gguf]."
        ),
    ],
    candidates: Annotated[
        list[str],
        typer.Argument(
            help="What is compared with it: GGUF files, folders and names on the Hub, in any mix."
        ),
    ],
    eval_: Annotated[
        str | None,
        typer.Option(
            "--eval",
            help="Text to score: file, folder, .jsonl or Hugging Face dataset (default: the bundled set).",
        ),
    ] = None,
    eval_tokens: Annotated[
        int, typer.Option(min=1, max=MOST, help="At most so many tokens of text; half of them are scored.")
    ] = 16_384,
    ctx: Annotated[
        int | None,
        typer.Option(
            min=2,
            max=MOST,
            help="Tokens in a row of that text, such as 4096: longer rows show what long contexts lose "
            "(default: 512).",
        ),
    ] = None,
    seed: Seed = 0,
    engine: Annotated[
        Engine,
        typer.Option(help="What computes the models; llama.cpp takes only GGUF files and needs xllamacpp."),
    ] = Engine.moequant,
    cache_type: Annotated[
        Cache | None,
        typer.Option(
            help="With --engine llama.cpp: how candidates keep keys and values; the baseline then keeps f32 "
            "(default: f32 to score, f16 to continue prompts)."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="The unquantized model, folder or name, when it is not among the compared ones."),
    ] = None,
    exact: Annotated[
        bool,
        typer.Option("--exact", help="Compute exactly: do not round activations as llama.cpp or vLLM does."),
    ] = False,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="A prompt of yours to continue, beside the bundled ones; may be repeated."),
    ] = None,
    sample_tokens: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=MOST,
            help="Continue each prompt by so many tokens; 0 for none. GGUF files run in llama.cpp and are "
            "timed (default: 32 with --engine llama.cpp or --prompt, else 0).",
        ),
    ] = None,
    ram: Ram = None,
    threads: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Threads to use (default: one a core).")
    ] = None,
    device: Device = "cpu",
    as_json: AsJson = False,
    html: Annotated[
        Path | None, typer.Option(help="Also write the result as a page: one file that needs no network.")
    ] = None,
    cache_dir: CacheDir = None,
    overwrite: Overwrite = False,
) -> None:
    """Score CANDIDATES against BASE: perplexity, KL divergence, routing, and every expert's error."""
    from moequant.commands.compare import CompareSettings  # torch is imported only when there is work
    from moequant.files import claim
    from moequant.forward.resources import Resources
    from moequant.library import compare as run
    from moequant.report.page import write

    resources = guarded(lambda: Resources(ram_bytes(ram), device, threads))
    sources = [place(each, cache_dir) for each in (base, *candidates)]
    shape = None if model is None else place(model, cache_dir)
    settings = CompareSettings(
        eval=eval_,
        eval_tokens=eval_tokens,
        ctx=ctx,
        seed=seed,
        engine=engine.value,
        cache_type=None if cache_type is None else cache_type.value,
        model=shape,
        exact=exact,
        prompts=tuple(prompt or ()),
        sample_tokens=sample_tokens,
        command=escape.command(["moequant", *sys.argv[1:]]),
        resources=resources,
    )

    def work() -> None:
        with claim(html, overwrite=overwrite, inputs=(*map(local, sources), local(shape), eval_)):
            result = run(sources[0], sources[1:], settings)
            tell(result, as_json)
            if html is not None:
                write(result.html(), html)

    guarded(work)
