"""The size/quality curve of a folder: what every size buys, and what one scheme for all experts costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from moequant.containers.folders.plan import scheme_plan
from moequant.containers.folders.schemes import Scheme
from moequant.containers.gguf.sizes import Budget
from moequant.errors import PlanError
from moequant.plan.curve import Point
from moequant.plan.folders import FolderMenu, bounds, budget_plan
from moequant.plan.sensitivity import Sensitivities
from moequant.values import Plan


@dataclass(frozen=True, slots=True)
class FolderPoints:
    """Plans of one folder; `size` says how many bytes its weight files have with a plan."""

    menu: FolderMenu
    size: Callable[[Plan], int]
    known: Sensitivities

    def of(self, budgets: Iterable[Budget]) -> list[Point]:
        """The best plan for each budget, in their order. PlanError for one that is too small."""
        made = []
        for budget in budgets:
            plan = budget_plan(self.menu, budget, self.size, self.known)
            made.append(Point(self.size(plan), plan.kl or 0.0, budget.text, plan))
        return made

    def curve(self, steps: int = 16) -> list[Point]:
        """Plans at `steps` sizes from the smallest possible folder to the largest, evenly by ratio; a plan
        that is the best for several of them comes once."""
        low, high = bounds(self.menu, self.size, self.known)
        ratio = (high / low) ** (1 / max(1, steps - 1))
        sizes = sorted({min(high, round(low * ratio**step)) for step in range(steps)} | {low, high})
        found = self.of(Budget(f"{size:,}", file_bytes=size) for size in sizes)
        return list({point.file_bytes: point for point in found}.values())

    def uniform(self) -> list[tuple[Point, Point]]:
        """Every scheme that all experts can have, smallest first, and our plan of that size.

        Left out are schemes that do not fit some weight, and those whose folder is smaller than any plan's,
        as headers of tiny models make it.
        """
        made = []
        for scheme in self.menu.allowed:
            try:
                theirs = self.of_scheme(scheme)
                (ours,) = self.of([Budget(f"the size of {scheme.name}", file_bytes=theirs.file_bytes)])
            except PlanError:
                continue
            made.append((theirs, ours))
        return sorted(made, key=lambda pair: pair[0].file_bytes)

    def of_scheme(self, scheme: Scheme) -> Point:
        """All experts in one scheme of the menu, all else as it is. PlanError where it does not fit them."""
        asked = replace(self.menu.settings, scheme=scheme.name, schemes=None, gpu=None)
        plan = scheme_plan(self.menu.checkpoint, asked)
        total = sum(self.known.table[choice.weight][choice.format] for choice in plan.choices)
        return Point(self.size(plan), self.known.predict(total), scheme.name, plan)
