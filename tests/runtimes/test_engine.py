"""What llama.cpp says is wrong is found among all that it says."""

import pytest

from moequant.runtimes.llama_cpp.binding import cause

SAID = {
    "loading tensor a\nllama_model_load: error loading model: tensor 'a' not found\nfailed to load":
        "tensor 'a' not found",
    "ops.cpp:63: GGML_ASSERT(n % 2 == 0) failed\n30 wait4.c: No such file or directory.":
        "GGML_ASSERT(n % 2 == 0) failed",
    "something\n  else": "something else",
}  # fmt: skip
"""What it logs and prints, and what of that is the reason."""


@pytest.mark.parametrize("said", SAID)
def test_the_reason_is_found(said: str) -> None:
    assert cause(said) == SAID[said]
