"""moequant: mixture-of-experts aware quantization.

report = moequant.convert("./model", "model-Q4_K_M.gguf", moequant.Settings(type="Q4_K_M"))
print(report.summary())

The other verbs are in `moequant.library`; see docs/reference.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moequant.errors import MoequantError

if TYPE_CHECKING:
    from moequant.library import Settings, convert

__all__ = ["MoequantError", "Settings", "convert"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """torch and transformers load when `convert` is first asked for, not when moequant is imported."""
    if name in ("convert", "Settings"):
        from importlib import import_module

        return getattr(import_module("moequant.library"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
