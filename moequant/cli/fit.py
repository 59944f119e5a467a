"""`moequant fit`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from moequant.cli.common import MOST, AsJson, CacheDir, guarded, place, tell
from moequant.errors import PlanError
from moequant.escape import plain


class CacheType(StrEnum):
    """What llama.cpp keeps keys and values in."""

    f16 = "f16"
    q8_0 = "q8_0"


def memory(text: str) -> int:
    """Bytes of a size as every command reads it: 24GiB is 24 · 2³⁰, 24G is 24 · 10⁹; 0 is none."""
    from moequant.plan import parse_size

    try:
        return 0 if text.strip() == "0" else parse_size(text.strip())
    except PlanError as error:
        raise typer.BadParameter(f"{error}; memory is sold in GiB, such as 24GiB, and 0 is none") from None


def fit(
    path: Annotated[
        str,
        typer.Argument(
            help="Hugging Face model folder (all types are tried), GGUF file, or a name on the Hub: "
            "OWNER/NAME, OWNER/NAME@REVISION, OWNER/NAME:FILE.gguf."
        ),
    ],
    vram: Annotated[
        int, typer.Option(parser=memory, metavar="SIZE", help="GPU memory, such as 24GiB; 0 for no GPU.")
    ],
    ram: Annotated[
        int,
        typer.Option(
            parser=memory, metavar="SIZE", help="System memory that the model may use, such as 64GiB."
        ),
    ],
    ctx: Annotated[int, typer.Option(min=1, max=MOST, help="Tokens of context for each sequence.")] = 8192,
    parallel: Annotated[
        int, typer.Option(min=1, max=1 << 20, help="How many sequences are served at once.")
    ] = 1,
    cache_type: Annotated[CacheType, typer.Option(help="Type of the KV cache.")] = CacheType.f16,
    vram_bandwidth: Annotated[
        float, typer.Option(min=1, help="Bandwidth of the GPU's memory, in GB/s.")
    ] = 900,
    ram_bandwidth: Annotated[
        float, typer.Option(min=1, help="Bandwidth of the system memory, in GB/s.")
    ] = 60,
    disk_bandwidth: Annotated[
        float | None,
        typer.Option(min=0.01, help="Bandwidth of the disk, in GB/s. If given, experts may stay on disk."),
    ] = None,
    min_speed: Annotated[
        float, typer.Option(min=0, help="Leave out what is slower than so many tokens per second.")
    ] = 0,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
) -> None:
    """Say what fits on a machine, where its experts go, how fast it can be, and how to start llama-server."""
    from moequant.inspection.fit import Hardware
    from moequant.library import FitSettings
    from moequant.library import fit as run
    from moequant.report.fit import nothing_fits
    from moequant.runtimes.llama_cpp.kv_cache import Load

    disk = disk_bandwidth * 1e9 if disk_bandwidth else None
    hardware = guarded(lambda: Hardware(vram, ram, vram_bandwidth * 1e9, ram_bandwidth * 1e9, disk))
    load = Load(ctx, parallel, cache_type.value)
    settings = FitSettings(hardware, load, min_speed)
    result = guarded(lambda: run(place(path, cache_dir), settings))
    tell(result, as_json)
    if result.found.best is None:
        typer.echo(f"moequant: {plain(nothing_fits(result.found))}", err=True)
        raise typer.Exit(1)
