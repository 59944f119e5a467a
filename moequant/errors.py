"""Everything moequant raises on purpose.

MoequantError
├── CheckpointError    a model folder that cannot be read: missing, truncated, NaN, …
├── FamilyError        an architecture, tensor or config key nobody has described
├── TokenizerError     a tokenizer that cannot be written faithfully
├── CorpusError        calibration text that cannot be used
├── FormatError        a type that does not exist, weights it cannot hold
├── PlanError          a budget or an override that cannot be met
├── OutputError        a path that cannot be written
└── VerifyError        the file on disk is not what was meant

Each message is one line: the thing, what was expected, what to do next. The
command line prints it and exits with 1; anything else is a bug in moequant.
"""


class MoequantError(Exception):
    """Base of every error that moequant raises on purpose."""


class CheckpointError(MoequantError):
    """A model folder that cannot be read as it should."""


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
