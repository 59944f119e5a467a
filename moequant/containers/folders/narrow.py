"""Scales that are too small for f16 to hold with all its digits: whoever reads the report hears of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moequant.containers.folders.shards import Entry

LEAST = float(torch.finfo(torch.float16).tiny)
"""Below it every halving costs a digit; below 2^-24 there is nothing."""


@dataclass(slots=True)
class NarrowScales:
    """Counts scales as they are written; `first` is the tensor of the first that is too small."""

    scales: int = 0
    small: int = 0
    first: str = ""

    def seen(self, entry: Entry, parts: Iterable[Tensor]) -> Iterator[Tensor]:
        """The parts of a rounded weight's tensor, each counted: what it has in f16 is scales."""
        for part in parts:
            if entry.dtype == "F16":
                small = int(((part != 0) & (part.abs() < LEAST)).sum())
                self.scales += part.numel()
                self.small += small
                self.first = self.first or (entry.name if small else "")
            yield part

    def notes(self, advice: str) -> tuple[str, ...]:
        """What a person should know, none where all scales have their digits."""
        if not self.small:
            return ()
        return (
            f"{self.small:,} of {self.scales:,} scales are below {LEAST:.1e}, where F16 has fewer digits, "
            f"the first in {self.first}{advice}",
        )
