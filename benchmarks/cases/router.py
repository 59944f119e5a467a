"""Do routers that are fitted to the rounded layers before them make a file better?

Layer by layer a router W (F32) becomes the least-squares answer to W X, what the original routes by, from
X_q, what the file's own layers feed the router with:

    W' = W + strength · W (X - X_q) S X_qᵀ (X_q S X_qᵀ + ridge · mean diagonal · I)⁻¹

S weights the tokens, for each expert's row of W on its own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import llama, measure
from benchmarks.data import CALIB, DEMO, MIX, rows
from benchmarks.engine import Judge
from benchmarks.harness import Rows, case
from moequant import Settings, convert
from moequant.checkpoint import Checkpoint
from moequant.containers.gguf.weights import GgufWeights
from moequant.forward.model import Provider
from moequant.forward.stream import LayerStream
from moequant.forward.taps import Recorder
from moequant.rounding.paired import Capture
from moequant.values import Role, Weight


def contested(logits: Tensor, top: int) -> Tensor:
    """By the doubt about each expert."""
    chances = logits.softmax(-1)
    return chances * (1 - chances)


def chosen(logits: Tensor, top: int) -> Tensor:
    """An expert's own tokens."""
    return torch.zeros_like(logits).scatter_(1, logits.topk(top, -1).indices, 1.0)


TOKENS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "all": lambda logits, top: torch.ones_like(logits),
    "p(1-p)": contested,
    "chosen": chosen,
}
"""S [n, E] of the original logits [n, E]: tokens alike, by the router's doubt, or an expert's own."""


@dataclass(frozen=True, slots=True)
class Fit:
    """How a router is fitted, see above."""

    tokens: str = "p(1-p)"
    strength: float = 1.0
    ridge: float = 0.1

    def router(self, weight: Tensor, exact: Tensor, rounded: Tensor, top: int) -> Tensor:
        """W' [E, h] of `weight`, for inputs [n, h] of both streams."""
        share = TOKENS[self.tokens](exact @ weight.T, top)
        made = weight.double().clone()
        for expert, row in enumerate(weight.double()):
            weighted = rounded * share[:, expert, None]
            own, cross = (weighted.T @ rounded).double(), (exact.T @ weighted).double()
            drift = row @ (cross - own)
            own.diagonal().add_(self.ridge * own.diagonal().mean().clamp_min(1e-30))
            made[expert] += self.strength * torch.linalg.solve(own, drift)
        return made.float()


@dataclass(frozen=True, slots=True)
class Refitted:
    """Routers by name, and how far held-out tokens are routed as before: KL divergence, share of the same."""

    routers: dict[str, Tensor]
    divergence: float
    same: float


def refit(checkpoint: Checkpoint, provider: Provider, ids: Tensor, fit: Fit, rows: int) -> Refitted:
    """Fit the routers of `provider`'s weights on the first rows of tokens ids [m, n], judge on the others."""
    seen, top = rows * ids.shape[1], checkpoint.shape.experts_used
    made: dict[str, Tensor] = {}
    judged: list[tuple[float, float]] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        LayerStream(checkpoint, ids) as original,
        LayerStream(checkpoint, ids, provider=provider) as file,
    ):
        streams = [(each, each.new_hidden(Path(folder))) for each in (original, file)]
        for stream, hidden in streams:
            stream.embed(hidden)
        for layer, _ in zip(original.layers(), file.layers(), strict=True):
            router = next(w for w in file.weights(layer) if w.role is Role.ROUTER)
            site = next(w.site for w in file.weights(layer) if w.role is Role.UP and w.site is not None)
            exact, rounded = (
                torch.cat(
                    [
                        told.inputs.clone()
                        for told in stream.cross(
                            layer, hidden, lambda _, site=site: Capture(site, site.name, "", False), None
                        )
                    ]
                )
                for stream, hidden in streams
            )
            weight = provider(router).float()
            new = fit.router(weight, exact[:seen], rounded[:seen], top)
            file.model.get_parameter(router.place.param).data.copy_(new)
            made[router.name] = new
            judged.append(judge(exact[seen:] @ weight.T, rounded[seen:] @ new.T, top))
            for stream, hidden in streams:
                for _ in stream.cross(layer, hidden, lambda _: Recorder(), hidden):
                    pass
    divergence, same = (sum(each) / len(judged) for each in zip(*judged, strict=True))
    return Refitted(made, divergence, same)


def judge(exact: Tensor, found: Tensor, top: int) -> tuple[float, float]:
    """KL divergence of routers' logits [n, E], and the share of tokens with the same experts."""
    if not len(exact):
        return 0.0, 0.0
    before, after = exact.log_softmax(-1), found.log_softmax(-1)
    same = (chosen(exact, top) == chosen(found, top)).all(-1)
    return float((before.exp() * (before - after)).sum(-1).mean()), float(same.float().mean())


@dataclass(frozen=True)
class Options:
    """`type` says which types the file has; `skip` rows calibrated it besides those that fit."""

    model: Path = MIX
    text: Path | None = CALIB
    type: str = "Q2_K_S"
    rows: int = 60
    skip: int = 200
    held_out: int = 60


FITS = (Fit(strength=0), Fit(), Fit(strength=0.5, ridge=0.01), Fit("all"), Fit("chosen"))


@case(
    "Routers fitted to the rounded layers before them",
    Options(DEMO, None, rows=4, skip=4, held_out=4),
)
def router(o: Options) -> Rows:
    """The first rows fit; rows behind those that calibrated the file judge: the routers' KL divergence and
    the share of tokens with the same experts, means over the layers, and the model's KL divergence in our
    engine. ± is the standard error, paired by token."""
    exported, ids = llama.as_file(o.model), rows(o.model, o.text).ids
    checkpoint = exported.checkpoint
    held_out = ids[o.rows + o.skip :][: o.held_out]
    seen = torch.cat([ids[: o.rows], held_out])
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "ours.gguf"
        plan = llama.plan_of(o.model, o.type, Path(name) / "plan.json")
        tokens = (o.rows + o.skip) * ids.shape[1]
        convert(o.model, path, Settings(plan=plan, calib=o.text, calib_tokens=tokens, eval_tokens=0))
        provider = GgufWeights(path, exported).as_cut
        model, before = Judge.of(checkpoint, held_out), None
        for fit in FITS:
            found = refit(checkpoint, provider, seen, fit, o.rows)

            def changed(weight: Weight, routers: dict[str, Tensor] = found.routers) -> Tensor:
                return routers[weight.name] if weight.role is Role.ROUTER else provider(weight)

            kl = model.kl(changed).flatten()
            before = kl if before is None else before
            ratio, error = measure.ratio(kl, before)
            yield {
                "tokens": fit.tokens,
                "strength": fit.strength,
                "ridge": fit.ridge,
                "routers' KL": found.divergence,
                "same experts": found.same,
                "model's KL": float(kl.mean()),
                "ratio": ratio,
                "±": error,
            }
