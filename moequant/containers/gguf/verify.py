"""The file on disk, read again: every byte as written, every tensor decoded by gguf-py to the same floats."""

from __future__ import annotations

import zlib
from math import prod

import numpy as np
import torch

from moequant import formats
from moequant.containers.base import Written
from moequant.containers.gguf.export import Exported
from moequant.containers.gguf.read import WHOLE, Bytes, GgufFile, decode
from moequant.errors import VerifyError
from moequant.progress import counted
from moequant.values import Plan

SAMPLE_ROWS = 64
"""Rows of each tensor that both decoders decode; the checksum covers all bytes."""


def verify(written: Written, plan: Plan, exported: Exported) -> int:
    """Check the file against what was meant; the number of weights that both decoders decoded.

    Raises VerifyError naming the tensor for a missing or extra tensor, another type or
    shape, a byte that differs, values that are not finite, or decoders that disagree.
    """
    on_disk = GgufFile(written.path)
    if differing := on_disk.tensors.keys() ^ set(exported.names.values()):
        raise VerifyError(f"{written.path}: tensor {min(differing)} is in only one of plan and file")
    decoded = 0
    for choice in counted("verify", plan.choices, "tensor"):
        name, shape = exported.names[choice.weight], exported.shapes[choice.weight]
        found = on_disk.info(name)
        if found.type != choice.format or found.shape != shape:
            raise VerifyError(
                f"{written.path}: {name} is {found.type} {found.shape}, planned {choice.format} {shape}"
            )
        crc, rows = _read(on_disk, name)
        if crc != written.checksums[choice.weight]:
            raise VerifyError(
                f"{written.path}: bytes of {name} are not those that were written; is the disk healthy?"
            )
        if choice.format != WHOLE:
            decoded += _compare_decoders(name, choice.format, rows)
    return decoded


def _read(file: GgufFile, name: str) -> tuple[int, Bytes]:
    """The checksum of a tensor, read some rows at a time, and rows spread over it."""
    count = prod(file.info(name).shape[:-1])
    wanted = np.unique(np.linspace(0, count - 1, SAMPLE_ROWS).astype(np.int64))
    crc, found = 0, list[Bytes]()
    for rows, data in file.bands(name):
        crc = zlib.crc32(data.data, crc)
        found.append(data[wanted[(wanted >= rows.start) & (wanted < rows.stop)] - rows.start])
    return crc, np.concatenate(found)


def _compare_decoders(name: str, format_name: str, rows: Bytes) -> int:
    """Rows decoded twice; the number of weights compared."""
    theirs = decode(rows, format_name, name)
    ours = formats.dequantize(formats.get(format_name), torch.from_numpy(rows)).numpy()
    if not np.isfinite(theirs).all():
        raise VerifyError(f"{name}: decodes to values that are not finite")
    if not np.array_equal(ours.view(np.uint32), theirs.view(np.uint32)):
        raise VerifyError(f"{name}: gguf-py decodes {format_name} to other floats than moequant")
    return int(ours.size)
