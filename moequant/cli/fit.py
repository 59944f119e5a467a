"""`moequant fit`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from moequant.cli.common import MOST, AsJson, CacheDir, Format, guarded, place, tell
from moequant.errors import PlanError


class CacheType(StrEnum):
    """What keys and values are kept in: the first two are llama.cpp's, the others vLLM's."""

    f16 = "f16"
    q8_0 = "q8_0"
    auto = "auto"
    fp8 = "fp8"


_OF_FILES = ("ram", "ram_bandwidth", "disk_bandwidth", "min_speed")
_OF_FOLDERS = ("tp", "schemes", "gpu", "utilization")
_CACHES = {Format.gguf: (CacheType.f16, CacheType.q8_0), Format.safetensors: (CacheType.auto, CacheType.fp8)}


def memory(text: str) -> int:
    """Bytes of a size as every command reads it: 24GiB is 24 · 2³⁰, 24G is 24 · 10⁹; 0 is none."""
    from moequant.cli.common import memory_bytes

    try:
        return 0 if text.strip() == "0" else memory_bytes(text.strip())
    except PlanError as error:
        raise typer.BadParameter(f"{error}; 0 is none") from None


def fit(
    path: Annotated[
        str,
        typer.Argument(
            help="Hugging Face model folder (all types or schemes are tried), GGUF file, or name on the Hub: "
            "OWNER/NAME, OWNER/NAME@REVISION, OWNER/NAME:FILE.gguf."
        ),
    ],
    vram: Annotated[
        int,
        typer.Option(
            parser=memory, metavar="SIZE", help="Memory of the GPU (of each), such as 24GiB; 0 for no GPU."
        ),
    ],
    ram: Annotated[
        int | None,
        typer.Option(
            parser=memory,
            metavar="SIZE",
            help="System memory that the model may use, such as 64GiB. Needed for GGUF files.",
        ),
    ] = None,
    format_: Annotated[
        Format,
        typer.Option("--format", help="GGUF files in llama.cpp, or folders in vLLM, wholly on GPUs."),
    ] = Format.gguf,
    tp: Annotated[
        int | None, typer.Option(min=1, max=1024, help="How many GPUs share each weight of a folder.")
    ] = None,
    schemes: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Schemes of a folder to try, by commas.")
    ] = None,
    gpu: Annotated[
        float | None,
        typer.Option(min=5, max=20, help="Compute capability of the GPUs: leave out schemes it lacks."),
    ] = None,
    utilization: Annotated[
        float | None,
        typer.Option(help="Share of a GPU that vLLM may take (--gpu-memory-utilization; default 0.92)."),
    ] = None,
    ctx: Annotated[
        int | None,
        typer.Option(
            min=1, max=MOST, help="Tokens of context for each sequence (default 8192, or all of a model's)."
        ),
    ] = None,
    parallel: Annotated[
        int, typer.Option(min=1, max=1 << 20, help="How many sequences are served at once.")
    ] = 1,
    cache_type: Annotated[
        CacheType | None,
        typer.Option(help="Type of the KV cache: f16 (default) or q8_0; of folders auto (default) or fp8."),
    ] = None,
    vram_bandwidth: Annotated[
        float, typer.Option(min=1, help="Bandwidth of the GPU's memory, in GB/s.")
    ] = 900,
    ram_bandwidth: Annotated[
        float | None, typer.Option(min=1, help="Bandwidth of the system memory, in GB/s (default 60).")
    ] = None,
    disk_bandwidth: Annotated[
        float | None,
        typer.Option(min=0.01, help="Bandwidth of the disk, in GB/s. If given, experts may stay on disk."),
    ] = None,
    min_speed: Annotated[
        float | None, typer.Option(min=0, help="Leave out what is slower than so many tokens per second.")
    ] = None,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
) -> None:
    """Say what fits on a machine, where its experts go, how fast it can be, and how to start it."""
    given: dict[str, object] = {"ram": ram, "ram_bandwidth": ram_bandwidth, "disk_bandwidth": disk_bandwidth}
    given |= {"min_speed": min_speed, "tp": tp, "schemes": schemes, "gpu": gpu, "utilization": utilization}
    guarded(lambda: _check(format_, cache_type, given))
    if format_ is Format.safetensors:
        from moequant.library import FolderFitSettings, Gpus, Serving, fit_folder

        cache = (cache_type or CacheType.auto).value
        taken = {} if utilization is None else {"utilization": utilization}
        gpus = guarded(lambda: Gpus(vram, vram_bandwidth * 1e9, **taken))
        serving = Serving(ctx or 0, parallel, 1 if tp is None else tp, cache)
        asked = FolderFitSettings(gpus, serving, schemes, gpu)
        served = guarded(lambda: fit_folder(place(path, cache_dir), asked))
        tell(served, as_json)
        _end(served.found.best)
        return
    from moequant.inspection.fit import Hardware
    from moequant.library import FitSettings
    from moequant.library import fit as run
    from moequant.runtimes.llama_cpp.kv_cache import Load

    disk, system = disk_bandwidth * 1e9 if disk_bandwidth else None, (ram_bandwidth or 60) * 1e9
    hardware = guarded(lambda: Hardware(vram, ram or 0, vram_bandwidth * 1e9, system, disk))
    load = Load(ctx or 0, parallel, (cache_type or CacheType.f16).value)
    settings = FitSettings(hardware, load, min_speed or 0)
    result = guarded(lambda: run(place(path, cache_dir), settings))
    tell(result, as_json)
    _end(result.found.best)


def _check(format_: Format, cache: CacheType | None, given: dict[str, object]) -> None:
    """PlanError for options that the format does not have, and for one that it needs."""
    foreign = _OF_FILES if format_ is Format.safetensors else _OF_FOLDERS
    if named := [name for name in foreign if given[name] is not None]:
        other = "it is for GGUF files" if format_ is Format.safetensors else "it is for folders"
        option = f"--{named[0].replace('_', '-')}"
        raise PlanError(f"{option} does not go with --format {format_.value}; {other}")
    if cache is not None and cache not in _CACHES[format_]:
        known = " or ".join(each.value for each in _CACHES[format_])
        raise PlanError(f"--cache-type {cache.value}: --format {format_.value} has {known}")
    if format_ is Format.gguf and given["ram"] is None:
        raise PlanError("--ram is missing: the system memory that the model may use, such as 64GiB")


def _end(best: object) -> None:
    """Exit code 1 where nothing fits. That is an answer, not an error: the report says it."""
    if best is None:
        raise typer.Exit(1)
