"""How tiny models are trained: rows without end, Muon and AdamW, a schedule by steps or by the clock.

`scripts/train_demo.py` trains the demo model with it, `benchmarks/trained.py` the models of benchmarks.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

ROW = 512
"""llama.cpp's perplexity window; rows of this length make every position it scores a trained one."""

BATCH = 8
"""Rows a step."""


@dataclass(frozen=True)
class Recipe:
    """What decides a run besides model and text. `steps` 0 means: as many as `minutes` allow."""

    seed: int = 0
    minutes: float = 0
    steps: int = 0
    rate: float = 0.03  # peak learning rate of Muon; AdamW's is a quarter of it
    balance: float = 0.005  # weight of the load-balancing loss

    def share(self, step: int, seconds: float) -> float:
        """How much of the run is done, 0..1."""
        return step / self.steps if self.steps else seconds / (60 * self.minutes)


def rows(ids: Tensor, seed: int) -> Iterator[Tensor]:
    """Rows i64[ROW + 1] of tokens `ids` without end; every epoch is cut elsewhere and shuffled.

    Consecutive rows share one token: the last target of a row is the first input of the next.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        start = int(torch.randint(ROW, (), generator=generator))
        cut = ids[start:].unfold(0, ROW + 1, ROW)
        yield from cut[torch.randperm(len(cut), generator=generator)]


def sorted_experts(experts: nn.Module, hidden: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
    """Experts function for transformers: one matrix product per expert over its tokens, made contiguous.

    hidden [T, d], chosen i64[T, k], gates [T, k] -> [T, d]. The weights are unbound at once: the gradient of
    indexing would be as large as the stack for every expert.
    """
    k = chosen.shape[1]
    order = chosen.flatten().argsort(stable=True)
    counts = chosen.flatten().bincount(minlength=experts.num_experts).tolist()
    parts = hidden[order // k].split(counts), experts.gate_up_proj.unbind(), experts.down_proj.unbind()
    outputs = []
    for tokens, gate_up, down in zip(*parts, strict=True):
        gate, up = F.linear(tokens, gate_up).chunk(2, dim=-1)
        outputs.append(F.linear(F.silu(gate) * up, down))
    unsorted = torch.cat(outputs)[order.argsort()].unflatten(0, (-1, k))
    return (unsorted * gates.unsqueeze(-1)).sum(dim=1)


ALL_EXPERTS_FUNCTIONS.register("sorted", sorted_experts)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for matrices and stacks of matrices (K. Jordan et al., 2024).

    torch.optim.Muon takes 2-D parameters only; the experts here are [E, out, in].
    """

    def __init__(self, parameters: list[nn.Parameter], rate: float) -> None:
        super().__init__(parameters, {"lr": rate, "initial_lr": rate})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.05)
                update = orthogonal(p.grad.lerp(momentum, 0.95))
                p.mul_(1 - 0.1 * group["lr"])
                p.add_(update, alpha=-group["lr"] * max(1, p.shape[-2] / p.shape[-1]) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """[..., out, in] -> the nearest semi-orthogonal matrix, roughly, by five quintic Newton-Schulz steps."""
    wide = matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix
    x = wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if matrix.shape[-2] > matrix.shape[-1] else x


def optimizers(model: nn.Module, rate: float) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for attention and experts, AdamW for embeddings, output, router and norms."""
    named = dict(model.named_parameters())
    hidden = [n for n in named if n.endswith(("_proj.weight", "gate_up_proj", "down_proj"))]
    others = [p for n, p in named.items() if n not in hidden]
    adam = torch.optim.AdamW(others, lr=rate / 4, betas=(0.9, 0.95), weight_decay=0.01)
    adam.param_groups[0]["initial_lr"] = rate / 4
    return Muon([named[n] for n in hidden], rate), adam


def schedule(progress: float) -> float:
    """Share of the peak rate at `progress` 0..1: 3 % warm-up, then a cosine down to 2 %."""
    warm = min(1.0, progress / 0.03)
    return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def imbalance(router_logits: Tensor, active: int) -> Tensor:
    """[T, E] of one layer -> the Switch Transformer's load-balancing loss; 1 when evenly loaded.

    transformers pools the layers before multiplying, so that one layer may make up for another.
    """
    probabilities = router_logits.softmax(dim=-1)
    experts = probabilities.shape[1]
    load = probabilities.topk(active).indices.flatten().bincount(minlength=experts) / len(probabilities)
    return experts / active * (load * probabilities.mean(dim=0)).sum()


def train(
    model: nn.Module, data: Iterator[Tensor], recipe: Recipe, save: Callable[[], None] | None = None
) -> int:
    """Train in place, print the loss curve, `save` every five minutes; the number of steps taken."""
    steppers, active = optimizers(model.train(), recipe.rate), model.config.num_experts_per_tok
    begin = printed = saved = time.monotonic()
    step, losses = 0, []
    while (progress := recipe.share(step, time.monotonic() - begin)) < 1:
        for group in (g for o in steppers for g in o.param_groups):
            group["lr"] = group["initial_lr"] * schedule(progress)
        batch = torch.stack([next(data) for _ in range(BATCH)])
        answer = model(batch[:, :-1], output_router_logits=True, use_cache=False)
        loss = F.cross_entropy(answer.logits.flatten(0, 1), batch[:, 1:].flatten())
        uneven = sum(imbalance(logits, active) for logits in answer.router_logits)
        (loss + recipe.balance * uneven).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in steppers:
            optimizer.step()
        model.zero_grad()
        step, losses = step + 1, [*losses, loss.item()]
        now = time.monotonic()
        if now - printed > 20:
            speed = len(losses) * BATCH * ROW / (now - printed)
            mean = sum(losses) / len(losses)
            print(f"{progress:6.1%}  step {step:5}  loss {mean:.3f}  {speed:,.0f} tokens/s", flush=True)
            printed, losses = now, []
        if save and now - saved > 300:
            save()
            saved = now
    return step
