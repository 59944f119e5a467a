"""Sums and peaks over one batch of what every weight is fed and where the router sends tokens."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from moequant.forward.taps import Recorder
from moequant.values import InputStats, RouteStats


class Moments(Recorder):
    """A recorder that sums the squares of what every weight is fed, and where the router sends tokens.

    `experts` is E; `domains` i64 [rows] is the domain of every row of the batch, out of `n_domains`.
    Squares are float32 as computed by the model and so are sums over one batch; batches
    are added in float64, so that rounding does not grow with the number of tokens.
    """

    def __init__(self, experts: int, domains: Tensor, n_domains: int) -> None:
        self.experts, self.domains, self.n_domains = experts, domains, n_domains
        self._sums: dict[str, InputStats] = {}  # where layers run, which nobody waits for an expert at a time
        self.routes: dict[str, RouteStats] = {}

    @property
    def inputs(self) -> dict[str, InputStats]:
        """The sums of every site, on the CPU."""
        return {
            name: InputStats(*(getattr(sums, each.name).cpu() for each in fields(sums)))
            for name, sums in self._sums.items()
        }

    def dense(self, name: str, inputs: Tensor) -> None:
        """One moment for all tokens."""
        flat = inputs.reshape(-1, inputs.shape[-1])
        self._add(name, 1, 0, flat, torch.ones(len(flat), device=flat.device))

    def heads(self, name: str, inputs: Tensor) -> None:
        """The moments of each head, which every token crosses."""
        count = inputs.shape[-2]
        flat = inputs.reshape(-1, count, inputs.shape[-1])
        ones = torch.ones(len(flat), device=flat.device)
        for head in range(count):
            self._add(name, count, head, flat[:, head], ones)

    def expert(self, name: str, expert: int, inputs: Tensor, gates: Tensor) -> None:
        """The moments of one expert's tokens."""
        self._add(name, self.experts, expert, inputs, gates)

    def routed(self, name: str, hidden: Tensor, index: Tensor, gates: Tensor) -> None:
        """Counts of experts, of pairs of them, and by domain."""
        n, experts = len(index), self.experts
        # One more, for what is sent to no expert.
        chosen = torch.zeros(n, experts + 1, device=index.device).scatter_(1, index, 1.0)[:, :experts]
        domains = torch.zeros(n, self.n_domains, device=index.device)
        of_tokens = self.domains.to(index.device).repeat_interleave(n // len(self.domains))
        domains.scatter_(1, of_tokens[:, None], 1.0)
        shares = gates.double() / gates.double().sum(1, keepdim=True).clamp_min(1e-30)
        mass = torch.zeros(experts + 1, dtype=torch.float64, device=index.device)
        mass.index_add_(0, index.reshape(-1), gates.reshape(-1).double())
        self.routes[name] = RouteStats(
            layer=-1,
            tokens=chosen.sum(0).long().cpu(),
            gate_mass=mass[:experts].cpu(),
            domain_tokens=(domains.T @ chosen).long().cpu(),
            pairs=(chosen.T @ chosen).long().cpu(),
            gate_entropy=float(torch.special.entr(shares).sum()),
        )

    def _add(self, name: str, experts: int, expert: int, inputs: Tensor, gates: Tensor) -> None:
        if name not in self._sums:
            self._sums[name] = empty_stats(experts, inputs.shape[-1], inputs.device)
        sums, g = self._sums[name], gates.float()
        squares = g * g
        moments = torch.stack([torch.ones_like(g), squares]) @ inputs.float().square()
        sums.tokens[expert] += len(inputs)
        sums.gate_mass[expert] += g.double().sum()
        sums.gate_square[expert] += squares.double().sum()
        sums.moment[expert] += moments[0].double()
        sums.gated_moment[expert] += moments[1].double()
        assert sums.peak is not None
        sums.peak[expert] = torch.maximum(sums.peak[expert], inputs.abs().amax().double())


def empty_stats(experts: int, n_in: int, device: torch.device) -> InputStats:
    """Zero sums for E = `experts` matrices with rows of `n_in`; counts of tokens, which the CPU knows, on it,
    all else on `device`."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=device)

    return InputStats(
        tokens=torch.zeros(experts, dtype=torch.int64),
        gate_mass=zeros(experts),
        gate_square=zeros(experts),
        moment=zeros(experts, n_in),
        gated_moment=zeros(experts, n_in),
        peak=zeros(experts),
    )
