"""What a pass over the model may use."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from moequant.errors import PlanError
from moequant.forward.memory import usable_bytes
from moequant.ranks import ALONE, Ranks

BATCH_TOKENS = 4096
"""Tokens per forward pass: enough for efficient products, few enough to bound the activations."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What a pass over the model may use.

    `ram` is the memory to use in bytes; past half of it hidden states go to disk; None is no limit. `device`
    is where layers run. `threads` is how many batches run at once on a CPU, each in one thread; None is one a
    core. `read_ahead` reads the next layer while this one runs, and needs memory for both; on an accelerator
    that is always so. `batch_tokens` cross a layer in one forward pass. `ranks` are the processes that share
    a pass, and all that it may use; sent to another of them, it becomes that one's.
    """

    ram: int | None = None
    device: str = "cpu"
    threads: int | None = None
    read_ahead: bool = False
    batch_tokens: int = BATCH_TOKENS
    ranks: Ranks = field(default=ALONE, repr=False)

    def __reduce__(self) -> tuple[type[Resources], tuple[Any, ...]]:
        return Resources, tuple(getattr(self, each.name) for each in fields(self))

    def __post_init__(self) -> None:
        """PlanError for a device that is not there."""
        object.__setattr__(self, "device", self.ranks.device(self.device))
        try:
            asked = torch.device(self.device)
        except RuntimeError:
            raise PlanError(f"--device {self.device}: cpu, cuda or cuda:1 was expected") from None
        # The one kind that torch knows beside the CPU here: cuda, also of ROCm, or whatever is registered.
        other = torch.accelerator.current_accelerator()
        kinds = {"cpu", "cuda"} | ({other.type} if other is not None else set())
        if asked.type not in kinds or (asked.type == "cpu" and asked.index):
            raise PlanError(f"--device {self.device}: cpu, cuda or cuda:1 was expected")
        there = torch.get_device_module(asked).device_count()
        if (asked.index or 0) >= there:
            raise PlanError(
                f"--device {self.device}: torch finds {there} devices of that kind; leave it out to run on "
                "the CPU"
            )

    @property
    def reads_ahead(self) -> bool:
        """Whether the next layer is read while this one runs."""
        return self.read_ahead or self.device != "cpu"

    @property
    def workers(self) -> int:
        """Batches that cross a layer at the same time."""
        if self.device != "cpu":
            return 1
        return self.threads or max(1, (os.cpu_count() or 1) // self.ranks.count)

    @property
    def share(self) -> int | None:
        """Bytes of memory for this process; None is no limit, which there is for several on one machine."""
        if self.ranks.count == 1:
            return self.ram
        usable = usable_bytes(self.ram)
        return None if usable is None else usable // self.ranks.count

    @property
    def apart(self) -> Resources:
        """For a pass that this process makes without the others, while they make theirs."""
        return replace(self, ram=self.share, threads=self.threads or self.workers, ranks=ALONE)


FREE = Resources()
