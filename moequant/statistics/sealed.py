"""Tensors with one JSON object as a safetensors file, sealed by a checksum of all that is in it.

The header's metadata has a single entry, `moequant`, the object: one entry because the library writes several
in no fixed order, and the same content must be the same bytes. safetensors itself notices no flipped bit.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moequant.checkpoint.headers import read_header
from moequant.errors import CheckpointError, UnreadableError
from moequant.files import atomic
from moequant.files.local import LocalFile
from moequant.files.read import unreadable

METADATA = "moequant"


def write(
    path: Path, meta: Mapping[str, Any], tensors: Mapping[str, Tensor], overwrite: bool = False
) -> None:
    """Write both to `path`, with their checksum as `crc32` of the object. OutputError when the disk
    refuses."""
    apart = _apart(tensors)
    sealed = {**meta, "crc32": checksum(meta, apart)}
    with atomic(path, overwrite) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        try:
            save_file(apart, partial, {METADATA: json.dumps(sealed, sort_keys=True)})
        except SafetensorError as error:
            raise OSError(str(error)) from error
        # The library makes files that only their owner can read.
        partial.chmod(mode)


def read(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """The JSON value, whatever it is, and the tensors; whether the checksum is right is the caller's to ask.

    ValueError for a file that is no safetensors file, or has no JSON. UnreadableError where the system does
    not let us read it: that is no damage.
    """
    try:
        read_header(LocalFile(path))  # the format's rules, before the library sees a byte
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get(METADATA, "null"))
            return meta, {name: file.get_tensor(name) for name in file.keys()}
    except UnreadableError:
        raise
    except OSError as error:
        raise unreadable(path, error) from None
    except (CheckpointError, SafetensorError, RecursionError) as error:
        raise ValueError(str(error)) from None


def opened(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The same without the checksum, which was right; ValueError for anything else."""
    meta, tensors = read(path)
    if not isinstance(meta, dict) or meta.pop("crc32", None) != checksum(meta, tensors):
        raise ValueError("checksum differs")
    return meta, tensors


def checksum(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of everything that is kept, tensors by name."""
    crc = zlib.crc32(json.dumps(meta, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data, crc)
    return crc


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same, each in memory of its own, as `save_file` wants them."""
    found: dict[str, Tensor] = {}
    shared: set[int] = set()
    for name, tensor in tensors.items():
        start = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if start in shared else tensor.contiguous()
        shared.add(start)
    return found
