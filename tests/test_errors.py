"""Which errors of others say that memory ran out."""

from __future__ import annotations

import pytest
import torch

from moequant.errors import FormatError, foreign, lacks_memory

CUDA = "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"
CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(CUDA), RuntimeError(CUBLAS)],
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
