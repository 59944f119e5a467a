"""Types that a person pins: `REGEX=TYPE` for all weights whose name has the pattern in it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from moequant.containers.gguf.presets import BASE_TYPES
from moequant.errors import PlanError, nearest
from moequant.plan.document import check_fit
from moequant.values import Weight

OPTION = "--tensor-type"

REASON = f"pinned by {OPTION}"

TYPES = frozenset({*BASE_TYPES.values(), "TQ1_0", "TQ2_0", "MXFP4", "NVFP4"})
"""Types that a weight can be packed in."""


def pinned(pins: Sequence[str], weights: Sequence[Weight], names: Mapping[str, str]) -> dict[str, str]:
    """The type of every weight that one of `pins` names, by its own name; of several the first counts.

    A pattern is searched for in a weight's own name and in its name in the file, which `names` has; norms and
    routers are passed over where it finds others. PlanError for one that is none or is nowhere, and for a
    type that does not exist or that the weight cannot have.
    """
    found: dict[str, str] = {}
    for pin in pins:
        pattern, name = parsed(pin)
        matching = [each for each in weights if pattern.search(each.name) or pattern.search(names[each.name])]
        if not matching:
            example = next((each for each in weights if each.is_expert), weights[-1])
            raise PlanError(
                f"{OPTION} {pin}: no weight has such a name; names are like {example.name} or, in the file, "
                f"{names[example.name]}"
            )
        # A pattern for a whole layer means what has a choice there: norms and routers stay as they are.
        able = [each for each in matching if each.fixed_type is None]
        for weight in able or matching:
            if weight.name not in found:
                check_fit(weight, name, f"{OPTION} {pin}")
                found[weight.name] = name
    return found


def parsed(pin: str) -> tuple[re.Pattern[str], str]:
    """Pattern and type. PlanError for a text that is not both."""
    text, equals, name = pin.rpartition("=")
    if not equals or not text:
        raise PlanError(f"{OPTION} {pin}: a pattern and a type were expected, such as experts.down=Q6_K")
    if name.upper() not in TYPES:
        raise PlanError(f"{OPTION} {pin}: unknown type {name!r}; {nearest(name, sorted(TYPES))}")
    try:
        return re.compile(text), name.upper()
    except re.error as error:
        raise PlanError(f"{OPTION} {pin}: {text!r} is no regular expression ({error})") from None
