"""What makes a comparison repeatable: files by their hashes, versions, machine, settings, command line."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from moequant import __version__
from moequant.containers.gguf.read import shards
from moequant.errors import CheckpointError
from moequant.evaluate.open_source import Source
from moequant.progress import total_memory

LIBRARIES = ("torch", "transformers", "tokenizers", "gguf", "xllamacpp", "compressed-tensors", "numpy")

Setting = str | int | bool | None


@dataclass(frozen=True, slots=True)
class Origin:
    """One compared version: `revision` of the repository that it was downloaded from, None when no file
    tells; SHA-256 by file name; `precision`, its types with how many tensors have each."""

    path: Path
    kind: str
    revision: str | None
    files: Mapping[str, str]
    precision: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Record:
    """Everything that the figures depend on; `command` is None where Python called."""

    origins: tuple[Origin, ...]
    settings: Mapping[str, Setting]
    libraries: Mapping[str, str]
    machine: Mapping[str, str]
    date: str
    command: str | None


def make(sources: Sequence[Source], settings: Mapping[str, Setting], command: str | None) -> Record:
    """The record of a comparison of `sources`. Reads every file once, for its hash."""
    return Record(
        origins=tuple(_origin(source) for source in sources),
        settings=settings,
        libraries=libraries(),
        machine=machine(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
    )


def _origin(source: Source) -> Origin:
    counts = Counter(source.types.values())
    return Origin(
        source.path, source.kind, revision(source.path), hashes(source.path), dict(counts.most_common())
    )


def hashes(path: Path) -> dict[str, str]:
    """File name → SHA-256 of a GGUF file, all its shards, or of what defines a folder."""
    if path.is_dir():
        named = [path / name for name in ("config.json", "tokenizer.json")]
        files = [file for file in (*named, *sorted(path.glob("*.safetensors"))) if file.is_file()]
    else:
        files = shards(path)
    found = {}
    for file in files:
        try:
            with file.open("rb") as opened:
                found[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read ({error.strerror or error})") from None
    return found


def revision(path: Path) -> str | None:
    """The commit that Hugging Face's downloads leave behind: in the cache's path, or in a local folder."""
    found = re.search(r"/snapshots/([0-9a-f]{40})(/|$)", path.absolute().as_posix())
    if found:
        return found[1]
    folder, name = (path, "config.json") if path.is_dir() else (path.parent, path.name)
    try:
        note = folder / ".cache/huggingface/download" / f"{name}.metadata"
        first = note.read_text(encoding="utf-8").split("\n")[0]
    except (OSError, ValueError):
        return None
    return first if re.fullmatch(r"[0-9a-f]{40}", first) else None


def digest(ids: Tensor) -> str:
    """SHA-256 of token rows as little-endian 64-bit integers."""
    return hashlib.sha256(ids.contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def text_digest(texts: Sequence[str]) -> str:
    """SHA-256 of texts, each ended by a NUL."""
    return hashlib.sha256("".join(f"{text}\0" for text in texts).encode()).hexdigest()


def libraries() -> dict[str, str]:
    """Versions of what computes; a library that is not installed is left out."""
    found = {"moequant": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, str]:
    """Processor, memory and system; GPU and driver when there is one."""
    found = {"cpu": _cpu(), "cores": str(os.cpu_count()), "system": platform.platform()}
    if memory := total_memory():
        found["memory"] = f"{memory / 2**30:.1f} GiB"
    if torch.cuda.is_available():
        found["gpu"] = ", ".join(torch.cuda.get_device_name(at) for at in range(torch.cuda.device_count()))
        found["cuda"] = str(torch.version.cuda)
        found["driver"] = _driver()
    return found


def _cpu() -> str:
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    # Virtual machines often hide the model's name; family and model number still tell.
    keys = ("model name", "cpu family", "model")
    found = [re.search(rf"^{key}\s*: (.+)$", info, re.MULTILINE) for key in keys]
    named = [match[1] for match in found if match]
    return f"{named[0]} (family {named[1]}, model {named[2]})" if len(named) == 3 else platform.machine()


def _driver() -> str:
    try:
        found = re.search(
            r"Kernel Module\s+(?:for \S+\s+)?([\d.]+)", Path("/proc/driver/nvidia/version").read_text()
        )
    except OSError:
        return "unknown"
    return found[1] if found else "unknown"
