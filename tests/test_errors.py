"""Which errors of others say that memory ran out."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from moequant.errors import FormatError, UnreadableError, foreign, lacks_memory

CUDA = "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"
CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError(CUDA),
        RuntimeError(CUBLAS),
        RuntimeError("std::bad_alloc"),
        RuntimeError("can't start new thread"),
        ImportError("_core.so: failed to map segment from shared object"),
    ],
)
def test_a_lack_of_memory_is_no_fault_of_a_file(error: BaseException) -> None:
    assert lacks_memory(error)
    with pytest.raises(type(error)), foreign(FormatError, "a file"):
        raise error


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: an illegal memory access was encountered"), ValueError(CUDA)]
)
def test_other_failures_are_not_a_lack_of_memory(error: BaseException) -> None:
    assert not lacks_memory(error)


def test_what_the_system_refuses_is_no_fault_of_a_file() -> None:
    refused = OSError(errno.EMFILE, os.strerror(errno.EMFILE), "model.safetensors")
    with (
        pytest.raises(UnreadableError, match=r"model\.safetensors: cannot be read \(Too many open files"),
        foreign(FormatError, "a file"),
    ):
        raise refused
    with pytest.raises(FormatError, match=r"a file \(no such layer"), foreign(FormatError, "a file"):
        raise OSError("no such layer")  # libraries say so what they do not like in a file
