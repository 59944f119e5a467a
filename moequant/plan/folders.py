"""A scheme for every weight of a folder within a budget of bytes, spent where it buys most.

Experts of a layer are one unit, because vLLM reads one scheme for all of them; of what is dense, weights that
multiply the same inputs are, because it fuses them. What has no scheme keeps the checkpoint's numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from moequant.checkpoint import Checkpoint
from moequant.containers.folders import schemes
from moequant.containers.folders.plan import (
    KEPT,
    FolderSettings,
    check_tp,
    choice_of,
    kept_choice,
    kept_dtype,
    quantizable,
    refusal,
)
from moequant.containers.folders.schemes import Scheme
from moequant.containers.gguf.sizes import Budget
from moequant.errors import PlanError
from moequant.plan.allocate import Option, Unit, allocate
from moequant.plan.document import check_rows
from moequant.plan.sensitivity import Sensitivities, prior_sensitivities
from moequant.values import Choice, Plan, Weight

USUAL = ("W4A16_G32", "W4A16", "W8A16", "FP8_BLOCK", "FP8_DYNAMIC", "NVFP4A16")
"""Schemes that a plan chooses from unless somebody says otherwise."""

RELATIVE_ERROR: Mapping[str, float] = {
    "W2A16": 0.13, "W3A16": 0.035, "W4A16": 9.4e-3, "W5A16": 2.5e-3, "W6A16": 6.4e-4, "W7A16": 1.7e-4,
    "W8A16": 4.2e-5, "W8A8": 6.3e-5, "FP8_DYNAMIC": 6.5e-4, "FP8_BLOCK": 7e-4, "FP8": 7e-4,
    "MXFP4A16": 1.25e-2, "NVFP4A16": 6.6e-3, "NVFP4": 6.6e-3,
}  # fmt: skip
"""Squared error over square of normal weights, for when nothing was measured; groups of 128."""

INPUT_ERROR: Mapping[str, float] = {
    "W8A8": 1.3e-4,
    "FP8_DYNAMIC": 6.5e-4,
    "FP8_BLOCK": 6.5e-4,
    "FP8": 7e-4,
    "NVFP4": 8.6e-3,
}
"""What rounding the inputs adds, where a token's largest is five times its root mean square."""

SHARES = (0.0, 0.3)
"""Where the two plans that say how sensitivities add up lie between the smallest and the largest."""


@dataclass(frozen=True)
class FolderMenu:
    """See `plan.menu.Menu`: the schemes that were allowed, for weights that can have them."""

    checkpoint: Checkpoint
    settings: FolderSettings
    allowed: tuple[Scheme, ...]

    @classmethod
    def of(cls, checkpoint: Checkpoint, settings: FolderSettings) -> FolderMenu:
        """What the settings allow. PlanError for unknown schemes, when a GPU has none of them, and for a
        model that nobody serves with several."""
        if checkpoint.encodes:
            raise PlanError(
                f"{checkpoint.family.name}: only transformers runs it, and reads one scheme for all experts; "
                "name it with --scheme"
            )
        names = USUAL if settings.schemes is None else tuple(map(str.strip, settings.schemes.split(",")))
        if "" in names:
            raise PlanError(
                f"--schemes '{settings.schemes}': names with a comma between were expected, such as "
                "W4A16,FP8_BLOCK"
            )
        found = [schemes.find(name, "--schemes") for name in names]
        if settings.gpu is not None:
            runs = [scheme for scheme in found if scheme.capability <= settings.gpu * 10 + 0.5]
            if not runs:
                least = min(scheme.capability for scheme in found) / 10
                raise PlanError(
                    f"--gpu {settings.gpu:g}: none of {', '.join(s.name for s in found)} runs below "
                    f"compute capability {least:g}; allow others with --schemes"
                )
            found = runs
        menu = cls(checkpoint, settings, tuple(dict.fromkeys(found)))
        check_tp(checkpoint, menu.choosable.values(), settings.tp)
        return menu

    @cached_property
    def choosable(self) -> dict[str, Weight]:
        """Weights that may have a scheme, by name."""
        return {weight.name: weight for weight in quantizable(self.checkpoint, attention=True)}

    def candidates(self, weight: Weight) -> tuple[str, ...]:
        """See `Menu`: smallest first, the checkpoint's own type last."""
        own = kept_dtype(weight)
        if weight.name not in self.choosable:
            return (own,)
        fitting = [s for s in self.allowed if refusal(weight, s, self.settings) is None]
        return (*(s.name for s in sorted(fitting, key=lambda s: choice_of(weight, s, "").bytes)), own)

    def measured(self, weight: Weight) -> tuple[str, ...]:
        """See `Menu`."""
        return self.candidates(weight)

    def exact(self, weight: Weight) -> str | None:
        """See `Menu`."""
        return kept_dtype(weight)

    def block_format(self, name: str, weight: Weight) -> str:
        """See `Menu`."""
        if name in KEPT or name.startswith("INT"):
            return name
        return schemes.find(name).storage((torch.bfloat16,)).block_format(weight.n_in)

    def input_error(self, name: str) -> float:
        """See `Menu`."""
        return INPUT_ERROR.get(name, 0.0)

    def groups(self, weights: tuple[Weight, ...]) -> list[tuple[Weight, ...]]:
        """See `Menu`."""
        found: dict[object, list[Weight]] = {}
        choosable = self.choosable
        for weight in weights:
            if weight.is_expert:
                key: object = (weight.layer, "experts")
            else:
                key = weight.site.name if weight.site and weight.name in choosable else weight.name
            found.setdefault(key, []).append(weight)
        return [tuple(group) for group in found.values()]

    def units(self, weights: tuple[Weight, ...], sensitivities: Sensitivities) -> list[Unit]:
        """See `Menu`."""
        made = []
        for group in self.groups(weights):
            names = [set(self.candidates(weight)) for weight in group]
            common = [name for name in self.candidates(group[0]) if all(name in each for each in names)]
            options = [self._option(group, name, sensitivities) for name in common]
            made.append(Unit(group, tuple(options)))
        return made

    def _option(self, group: Sequence[Weight], name: str, sensitivities: Sensitivities) -> Option:
        size = sum(self.choice(weight, name, "").bytes for weight in group)
        return Option(name, size, sum(sensitivities.table[weight.name][name] for weight in group))

    def choice(self, weight: Weight, name: str, reason: str, kl: float | None = None) -> Choice:
        """A weight in one of its candidates."""
        if name in KEPT:
            return replace(kept_choice(weight), kl=kl)
        return choice_of(weight, schemes.find(name), reason, kl)

    def given(self, weights: tuple[Weight, ...], types: Mapping[str, str], source: str) -> Plan:
        """The plan of these schemes, and of the checkpoint's own type for what has none; see `document.Made`.

        PlanError names the row that is unknown, missing, does not fit, or is unlike one that it shares a
        scheme with.
        """
        check_rows(weights, types, source)
        kinds = {weight.name: self._given(weight, types[weight.name], source) for weight in weights}
        for group in self.groups(weights):
            for other in group[1:]:
                if kinds[other.name] != kinds[group[0].name]:
                    raise PlanError(
                        f"{source}: {group[0].name} is {kinds[group[0].name]}, {other.name} is "
                        f"{kinds[other.name]}; vLLM reads one scheme for both, write the same"
                    )
        choices = tuple(self.choice(weight, kinds[weight.name], f"given by {source}") for weight in weights)
        return Plan(_preset(choices), choices, sum(choice.bytes for choice in choices), source)

    def _given(self, weight: Weight, name: str, source: str) -> str:
        """The name of the scheme that a row means; PlanError where the weight cannot have it."""
        own = kept_dtype(weight)
        if name.upper() == own:
            return own
        if weight.name not in self.choosable or name.upper() in KEPT:
            raise PlanError(f"{source}: {weight.name}: stays {own}, not {name}; write {own}")
        found = schemes.find(name, f"{source}: {weight.name}:")
        if reason := refusal(weight, found, self.settings):
            raise PlanError(f"{source}: {reason}")
        return found.name

    def checks(self, weights: tuple[Weight, ...], units: Sequence[Unit]) -> tuple[int, ...]:
        """See `Menu`."""
        low = sum(min(option.bytes for option in unit.options) for unit in units)
        high = sum(max(option.bytes for option in unit.options) for unit in units)
        return tuple(round(low + share * (high - low)) for share in SHARES)

    def prior(self, weights: tuple[Weight, ...], layers: int) -> Sensitivities:
        """See `Menu`."""
        known = prior_sensitivities(weights, layers)
        table = {
            weight.name: {
                name: 0.0 if name in KEPT else known.per_error[weight.name] * _usual_error(name)
                for name in self.candidates(weight)
            }
            for weight in weights
        }
        return replace(known, table=table)


def _usual_error(name: str) -> float:
    scheme = schemes.find(name)
    finer = 0.7 if scheme.kind == "integers" and scheme.group == 32 else 1.0
    return RELATIVE_ERROR[scheme.preset] * finer + INPUT_ERROR.get(name, 0.0)


def budget_plan(
    menu: FolderMenu, budget: Budget, size: Callable[[Plan], int], sensitivities: Sensitivities | None = None
) -> Plan:
    """The plan of least KL divergence whose weight files have at most `budget.file_bytes`, as `size` counts.

    Without measured sensitivities tables of other models decide. PlanError says the smallest possible size
    when the budget is below it.
    """
    assert budget.file_bytes is not None
    checkpoint = menu.checkpoint
    weights = checkpoint.weights
    known = sensitivities or menu.prior(weights, checkpoint.n_layers)
    units = menu.units(weights, known)
    smallest = _made(menu, units, [min(u.options, key=lambda o: o.bytes) for u in units], known, budget)
    if (least := size(smallest)) > budget.file_bytes:
        raise PlanError(
            f"--size {budget.text.removeprefix('at most ')}: the smallest folder of "
            f"{', '.join(scheme.name for scheme in menu.allowed)} has {least:,} bytes of weights; "
            "ask for more, or allow smaller schemes with --schemes"
        )
    limit = budget.file_bytes
    while True:  # headers of files depend on what is chosen
        options = allocate(units, max(limit, smallest.bytes))
        made = _made(menu, units, options, known, budget)
        if (over := size(made) - budget.file_bytes) <= 0:
            return made
        # Not below the limit alone: with room for headers in it, the same plan would come again and again.
        limit = min(limit, sum(option.bytes for option in options)) - over


def bounds(menu: FolderMenu, size: Callable[[Plan], int], known: Sensitivities) -> tuple[int, int]:
    """Bytes of the weight files of the smallest folder, and of the one where nothing is rounded."""
    units = menu.units(menu.checkpoint.weights, known)
    least = [min(unit.options, key=lambda option: option.bytes) for unit in units]
    most = [max(unit.options, key=lambda option: option.bytes) for unit in units]
    whole = Budget("any size", file_bytes=0)
    low, high = (size(_made(menu, units, options, known, whole)) for options in (least, most))
    return low, max(low, high)  # a tiny model's headers can grow by more than its codes save


def _made(
    menu: FolderMenu, units: Sequence[Unit], options: Sequence[Option], known: Sensitivities, budget: Budget
) -> Plan:
    """The plan of one option a unit."""
    names = {w.name: o.format for u, o in zip(units, options, strict=True) for w in u.weights}
    raw = {name: known.table[name][kind] for name, kind in names.items()}
    total = sum(raw.values())
    share = known.predict(total) / total if total else 1.0
    reason = "measured" if known.measured else "tables"
    choices = tuple(
        menu.choice(weight, names[weight.name], f"{reason}: its bytes pay", raw[weight.name] * share)
        for weight in menu.checkpoint.weights
    )
    assert budget.file_bytes is not None
    return Plan(_preset(choices), choices, budget.file_bytes, budget.text)


def _preset(choices: Sequence[Choice]) -> str:
    """The one scheme of a plan, or that it has several, or none."""
    used = list(dict.fromkeys(choice.format for choice in choices if choice.format not in KEPT))
    return used[0] if len(used) == 1 else "mixed" if used else "kept"
