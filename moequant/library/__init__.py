"""The verbs of moequant as functions: a model, frozen settings, and a result that can be shown and kept.

A model is a folder, a GGUF file where that makes sense, or a name of the Hub (`OWNER/NAME`, `@REVISION`,
`:FILE.gguf`), as text or as a path. Every verb takes `progress`, which is called with a `Progress` at every
step, in the thread that works; what it raises ends the run and leaves no half of a file. What goes wrong on
purpose is a MoequantError whose text is one line. `convert`, `convert_all`, `plan` and `route` also take a
`GgufModel`, a GGUF file with a folder or Hub name for its config.json and tokenizer.

Results have `.summary()` (text), `.to_json()` (what the command prints with --json), `.save(path)` (.json,
.html or .txt) and show themselves in notebooks. Sizes are bytes, times seconds, speeds tokens per second.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moequant.commands.settings import Settings
    from moequant.hub import GgufModel
    from moequant.library.checking import CheckSettings, check
    from moequant.library.comparing import CompareSettings, compare
    from moequant.library.converting import Conversion, Report, convert, convert_all
    from moequant.library.fitting import FitSettings, Hardware, Load, fit
    from moequant.library.inspecting import inspect
    from moequant.library.planning import PlanOutputs, PlanSettings, plan
    from moequant.library.pushing import PushSettings, push
    from moequant.library.routing import RouteOutputs, RouteSettings, route
    from moequant.library.serving import FolderFitSettings, Gpus, Serving, fit_folder
    from moequant.report.shown import Result

__all__ = [
    "CheckSettings",
    "CompareSettings",
    "Conversion",
    "FitSettings",
    "FolderFitSettings",
    "GgufModel",
    "Gpus",
    "Hardware",
    "Load",
    "PlanOutputs",
    "PlanSettings",
    "PushSettings",
    "Report",
    "Result",
    "RouteOutputs",
    "RouteSettings",
    "Serving",
    "Settings",
    "check",
    "compare",
    "convert",
    "convert_all",
    "fit",
    "fit_folder",
    "inspect",
    "plan",
    "push",
    "route",
]

PLACES = {
    "moequant.commands.settings": ("Settings",),
    "moequant.hub": ("GgufModel",),
    "moequant.library.checking": ("CheckSettings", "check"),
    "moequant.library.comparing": ("CompareSettings", "compare"),
    "moequant.library.converting": ("Conversion", "Report", "convert", "convert_all"),
    "moequant.library.fitting": ("FitSettings", "Hardware", "Load", "fit"),
    "moequant.library.inspecting": ("inspect",),
    "moequant.library.planning": ("PlanOutputs", "PlanSettings", "plan"),
    "moequant.library.pushing": ("PushSettings", "push"),
    "moequant.library.routing": ("RouteOutputs", "RouteSettings", "route"),
    "moequant.library.serving": ("FolderFitSettings", "Gpus", "Serving", "fit_folder"),
    "moequant.report.shown": ("Result",),
}
"""The module of every name: it is imported when the name is first asked for, with whatever the verb needs."""


def __getattr__(name: str) -> Any:
    """See `PLACES`. torch and transformers take seconds to import, and few verbs need all of both."""
    for place, names in PLACES.items():
        if name in names:
            return getattr(import_module(place), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
