"""Write docs/reference.md from the library itself: signatures, docstrings, and fields with their defaults.

python scripts/build_library_reference.py          write it
python scripts/build_library_reference.py --check  exit 1 when it is not current
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moequant import errors, library, progress
from moequant.check.figures import CheckReport
from moequant.commands.compare import CacheType, Engine
from moequant.commands.plan import Survey
from moequant.commands.route import Routed
from moequant.commands.settings import FormatName
from moequant.evaluate import Comparison, Estimate, Measured, RoutingChange, WeightError
from moequant.evaluate.compared import Compared
from moequant.formats import Effort
from moequant.forward.stream import Resources
from moequant.hub.publish import Piece, Push
from moequant.inspection import Inspection
from moequant.inspection.fit import Fit
from moequant.inspection.served import FolderFit
from moequant.plan.curve import PlannedFormat
from moequant.report.shown import Result, Shown
from moequant.statistics.importance import Gating
from moequant.values import Calibration, Choice, ExpertLoss, Plan, RouteStats

PAGE = Path(__file__).parents[1] / "docs" / "reference.md"

HEAD = """# The library

Made by `python scripts/build_library_reference.py` from the docstrings; a test fails when it is stale.

`import moequant` is light: torch loads when a verb is first asked for. `moequant.convert` and
`moequant.Settings` are there for the usual case. All verbs are in `moequant.library`.
"""

EXAMPLES = """## Examples

These run as tests. First, what a model is, and a file of it:

```python run
from moequant import library

model = library.inspect("demo")
print(model.found.experts, "experts,", model.found.parameters, "parameters")

settings = library.Settings(type="Q4_K_M", effort="fast", calib_tokens=4096, eval_tokens=2048)
report = library.convert("demo", "demo.gguf", settings)
print(report.summary(details=False))
report.save("report.html")
report.save("report.json")
```

```text
8 experts, 4586048 parameters
…
```

A callback hears of every step. What it raises ends the run:

```python run
from moequant import library


def show(step):
    if step.total and step.done == step.total:
        print(step.stage, int(step.total), step.unit)


settings = library.CompareSettings(eval_tokens=2048)
result = library.compare("demo", ["demo.gguf"], settings, progress=show)
for candidate in result.found.measured:
    kl = candidate.comparison.kl_mean
    print(candidate.name, f"{kl.value:.4f} ± {kl.error:.4f}")
```

```text
compare 2 layer
demo.gguf 0.0089 ± 0.0011
```

Errors that are raised on purpose are a `MoequantError` of one line:

```python run
from moequant import MoequantError, library

try:
    library.check("nothing.gguf")
except MoequantError as error:
    print(type(error).__name__, error)
```

```text
VerifyError nothing.gguf: no such file or folder
```
"""

VERBS = (
    "inspect",
    "fit",
    "fit_folder",
    "plan",
    "route",
    "convert",
    "convert_all",
    "compare",
    "check",
    "push",
)

SETTINGS = (
    library.Settings,
    library.FitSettings,
    library.Hardware,
    library.Load,
    library.FolderFitSettings,
    library.Gpus,
    library.Serving,
    library.PlanSettings,
    library.PlanOutputs,
    library.RouteSettings,
    library.RouteOutputs,
    library.CompareSettings,
    library.CheckSettings,
    library.PushSettings,
    Resources,
)

FOUND = (
    Result,
    Inspection,
    Fit,
    FolderFit,
    Survey,
    Routed,
    Calibration,
    RouteStats,
    library.Report,
    library.Conversion,
    Plan,
    Choice,
    ExpertLoss,
    Compared,
    Measured,
    Comparison,
    Estimate,
    WeightError,
    RoutingChange,
    CheckReport,
    Push,
    Piece,
    progress.Progress,
    progress.StageCost,
    progress.Forecast,
)


CHOICES = {
    name: " | ".join(map(repr, typing.get_args(kind)))
    for name, kind in {
        "Effort": Effort,
        "Gating": Gating,
        "FormatName": FormatName,
        "PlannedFormat": PlannedFormat,
        "Engine": Engine,
        "CacheType": CacheType,
    }.items()
}
"""What stands behind the names of choices."""


def render() -> str:
    """The page."""
    parts = [HEAD, _doc(library), EXAMPLES, "## Verbs"]
    parts += [_function(name, getattr(library, name)) for name in VERBS]
    parts += ["## Settings", *map(_class, SETTINGS)]
    parts += ["## Results", "What every result can do:", _methods(Shown), *map(_class, FOUND)]
    parts += ["## Errors", _doc(errors), "| error | |\n|---|---|\n" + "\n".join(map(_error, _errors()))]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _doc(thing: Any) -> str:
    """A docstring as Markdown: paragraphs on one line each, drawings as they are."""
    parts = (inspect.getdoc(thing) or "").split("\n\n")
    return "\n\n".join(
        f"```\n{part}\n```" if part.startswith(("    ", "MoequantError")) else " ".join(part.split())
        for part in parts
    )


def _function(name: str, function: Callable[..., Any]) -> str:
    signature = inspect.signature(function)
    lines = [f"    {_parameter(each)}," for each in signature.parameters.values()]
    shown = "\n".join([f"{name}(", *lines, f") -> {signature.return_annotation}"])
    return f"### {name}\n\n```python\n{shown}\n```\n\n{_doc(function)}"


def _parameter(given: inspect.Parameter) -> str:
    """A parameter with its default; settings that say nothing else as `Settings()`."""
    if given.default is inspect.Parameter.empty:
        return f"{given.name}: {given.annotation}"
    made = f"{given.annotation}()" if dataclasses.is_dataclass(given.default) else repr(given.default)
    return f"{given.name}: {given.annotation} = {made}"


def _class(kind: type) -> str:
    """A dataclass: what it is, and a row a field."""
    rows = "\n".join(map(_field, dataclasses.fields(kind)))
    properties = [
        f"| `.{name}` | {_cell(_doc(each).splitlines()[0])} |"
        for name, each in vars(kind).items()
        if isinstance(each, property) and not _doc(each).startswith("See `")
    ]
    name = {library.PlanOutputs: "PlanOutputs", library.RouteOutputs: "RouteOutputs"}.get(kind, kind.__name__)
    more = "\n\n| property | |\n|---|---|\n" + "\n".join(properties) if properties else ""
    return f"### {name}\n\n{_doc(kind)}\n\n| field | type | default |\n|---|---|---|\n{rows}{more}"


def _field(field: dataclasses.Field[Any]) -> str:
    """A row: name, type and default of a field."""
    made: Any = dataclasses.MISSING
    if field.default is not dataclasses.MISSING:
        made = field.default
    elif field.default_factory is not dataclasses.MISSING:
        made = field.default_factory()
    shown = "" if made is dataclasses.MISSING else f"`{_cell(repr(made))}`"
    return f"| `{field.name}` | `{_cell(CHOICES.get(str(field.type), str(field.type)))}` | {shown} |"


def _methods(kind: type) -> str:
    """A row a method that a caller uses."""
    rows = [
        f"| `.{name}{_cell(str(inspect.signature(each, eval_str=False)))}` | {' '.join(_doc(each).split())} |"
        for name, each in vars(kind).items()
        if inspect.isfunction(each) and name not in ("renderable", "value")
    ]
    plain = (row.replace("(self, ", "(").replace("(self)", "()").replace("'", "") for row in rows)
    return "| method | |\n|---|---|\n" + "\n".join(plain)


def _errors() -> list[type[Exception]]:
    return [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]


def _error(kind: type[Exception]) -> str:
    return f"| `{kind.__name__}` | {' '.join(_doc(kind).split())} |"


def _cell(text: str) -> str:
    """For a table, in which | ends a cell."""
    return text.replace("|", "\\|")


def main() -> None:
    """Write the page, or compare it."""
    page = render()
    if "--check" in sys.argv[1:]:
        sys.exit(PAGE.read_text(encoding="utf-8") != page)
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
