"""Which program serves which tokens of which expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Schedule:
    """Which program serves which tokens, made once for all matrices of an MoE block.

    `order` i32 [pairs] are (token, choice) pairs sorted by expert; program i takes up to
    `tokens` of them, from `first[i]`, below `end[i]`, for `expert[i]`. Unsorted (`order` None),
    program i serves pair i.
    """

    tokens: int
    expert: Tensor
    order: Tensor | None
    first: Tensor | None
    end: Tensor | None


def unsorted(experts: Tensor) -> Schedule:
    """One token a program: nothing to sort."""
    return Schedule(1, experts.reshape(-1).int(), None, None, None)


def grouped(experts: Tensor, n_experts: int, tokens: int) -> Schedule:
    """Up to `tokens` tokens a program, on the device of the ids [tokens, k] without waiting for it.

    How many programs there are does not depend on the ids; some may have nothing to do.
    """
    ids = experts.reshape(-1).long()
    pairs = ids.numel()
    counts = torch.zeros(n_experts, dtype=torch.int64, device=ids.device)
    counts.scatter_add_(0, ids, torch.ones_like(ids))
    ends, works = counts.cumsum(0), (counts + tokens - 1) // tokens
    work_ends = works.cumsum(0)
    bound = min(pairs, (pairs + min(n_experts, pairs) * (tokens - 1)) // tokens)
    work = torch.arange(bound, device=ids.device)
    expert = torch.searchsorted(work_ends, work, right=True)
    idle = expert >= n_experts
    expert = expert.clamp(max=n_experts - 1)
    first = (ends - counts)[expert] + (work - (work_ends - works)[expert]) * tokens
    end = torch.where(idle, torch.zeros_like(first), ends[expert])
    order = torch.argsort(ids, stable=True)
    return Schedule(tokens, expert.int(), order.int(), first.int(), end.int())
