"""Everything moequant raises on purpose.

MoequantError
├── CheckpointError    a model folder that cannot be read: missing, truncated, NaN, …
│   ├── UnreadableError    a file of it that the system does not let us read now
│   └── ShortageError      memory that the machine has not free now
├── HubError           a model of the Hub that cannot be had: no such name, gated, offline, …
├── FamilyError        an architecture, tensor or config key nobody has described
├── TokenizerError     a tokenizer that cannot be written faithfully
├── CorpusError        calibration text that cannot be used
├── FormatError        a type that does not exist, weights it cannot hold
├── PlanError          a budget or an override that cannot be met
├── OutputError        a path that cannot be written
├── VerifyError        the file on disk is not what was meant
└── RankError          another process of the same run has ended

Each message is one line: the thing, what was expected, what to do next. The
command line prints it and exits with 1; anything else is a bug in moequant.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

LONGEST = 1000
"""Characters of a message: files may hold names and values of any length."""


def one_line(error: object, limit: int = 300) -> str:
    """What an exception of somebody else's says, or any text, as one line of at most `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[: limit * 2 // 3]} … {text[3 - limit + limit * 2 // 3 :]}"


def few(names: Iterable[object], most: int = 10) -> str:
    """Names for a message: of a long list the first, and how many more there are."""
    shown = [str(name) for name in names]
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")


def nearest(word: str, known: Iterable[str]) -> str:
    """What to write instead of a name that is none: the one that looks like it, else some that exist."""
    names = {name.upper(): name for name in known}
    found = get_close_matches(word.upper(), names, 1)
    return f"did you mean {names[found[0]]}?" if found else f"known: {few(names.values())}"


class MoequantError(Exception):
    """Base of every error that moequant raises on purpose. Its text is one line of LONGEST characters at
    most."""

    def __init__(self, message: str) -> None:
        super().__init__(message if len(message) <= LONGEST else one_line(message, LONGEST))


class CheckpointError(MoequantError):
    """A model folder that cannot be read as it should."""


class UnreadableError(CheckpointError):
    """A file of a model that the system does not let us read. It may be there another time."""


class ShortageError(CheckpointError):
    """A model that needs more memory than the machine has free. It may have it another time."""


class HubError(MoequantError):
    """A model of the Hugging Face Hub that cannot be had."""


class FamilyError(MoequantError):
    """An architecture, tensor name or config key that no family describes."""


class TokenizerError(MoequantError):
    """A tokenizer that GGUF cannot express, or that is missing."""


class CorpusError(MoequantError):
    """Calibration or evaluation text that cannot be used."""


class FormatError(MoequantError):
    """An unknown quantization type, or weights that a type cannot hold."""


class PlanError(MoequantError):
    """A budget, preset or override that cannot be met."""


class OutputError(MoequantError):
    """An output path that cannot be written."""


class VerifyError(MoequantError):
    """The file on disk decodes to something else than was written."""


class RankError(MoequantError):
    """Another process of the same run has ended."""


_NO_MEMORY = (
    "DefaultCPUAllocator",
    "std::bad_alloc",
    "Cannot allocate memory",
    "can't start new thread",
    "failed to map segment",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""In messages of a plain RuntimeError, of torch and of Python's threads, or of a library's ImportError."""


MEMORY_ERRORS = (MemoryError, RuntimeError, ImportError)
"""What `lacks_memory` may be true of."""


def lacks_memory(error: BaseException) -> bool:
    """Whether it says that memory ran out: Python's and numpy's error, or torch's for a CPU or another
    device. What C++ lacks, a thread, or CUDA itself for its context or for cuBLAS, is told as any other
    failure."""
    if isinstance(error, MemoryError):
        return True
    if not isinstance(error, MEMORY_ERRORS):
        return False
    return type(error).__name__ == "OutOfMemoryError" or any(each in str(error) for each in _NO_MEMORY)


@contextmanager
def foreign(kind: type[MoequantError], what: str) -> Iterator[None]:
    """Whatever code of others raises in the block, as an error of ours that begins with `what`.

    For code that is given values from files and does not say what it raises: classes of transformers, and
    decoders. Our own errors, and a lack of memory, pass. What the system refuses is no fault of a file.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, MoequantError) or lacks_memory(error):
            raise
        if isinstance(error, OSError) and error.errno is not None:  # without: a library's own words
            raise UnreadableError(f"{error.filename or what}: cannot be read ({error.strerror})") from error
        raise kind(f"{what} ({one_line(error)})") from error
