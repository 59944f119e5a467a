"""Do routers that are fitted to the rounded layers before them make a file better?

    python benchmarks/router.py MODEL FILE --text TEXT

FILE is a GGUF file of MODEL. Layer by layer its router W (F32) becomes the least-squares answer to W X,
what the original routes by, from X_q, what the file's own layers feed the router with:

    W' = W + strength · W (X - X_q) S X_qᵀ (X_q S X_qᵀ + ridge · mean diagonal · I)⁻¹

S weights the tokens, for each expert's row of W on its own. The first `--rows` rows of 512 tokens of TEXT
fit; the `--held-out` rows behind `--skip` others (those that calibrated FILE) judge: the KL divergence
between the routers' softmaxes and the share of tokens with the same experts, both means over the layers, and
the KL divergence of the model in our own engine. ± is the standard error of the difference, paired by token.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moequant.checkpoint import Checkpoint, load, open_checkpoint
from moequant.containers.gguf.read import GgufFile
from moequant.evaluate import score_row
from moequant.forward.experts import EXPERTS
from moequant.forward.model import Provider, build_model
from moequant.forward.stream import LayerStream
from moequant.rounding.paired import Capture
from moequant.text import corpus
from moequant.text.rows import load_encoder
from moequant.values import Role


def _contested(logits: Tensor, top: int) -> Tensor:
    chances = logits.softmax(-1)
    return chances * (1 - chances)


def _chosen(logits: Tensor, top: int) -> Tensor:
    return torch.zeros_like(logits).scatter_(1, logits.topk(top, -1).indices, 1.0)


TOKENS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "all": lambda logits, top: torch.ones_like(logits),
    "p(1-p)": _contested,
    "chosen": _chosen,
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
    seen, top = rows * ids.shape[1], int(checkpoint.config["num_experts_per_tok"])
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
            name = next(str(w.input) for w in file.weights(layer) if w.role is Role.UP)
            exact, rounded = (
                torch.cat(
                    [
                        told.inputs.clone()
                        for told in stream.cross(
                            layer, hidden, lambda _, name=name: Capture(name, "", False), None
                        )
                    ]
                )
                for stream, hidden in streams
            )
            weight = provider(router).float()
            new = fit.router(weight, exact[:seen], rounded[:seen], top)
            file.model.get_parameter(router.param).data.copy_(new)
            made[router.name] = new
            judged.append(_judge(exact[seen:] @ weight.T, rounded[seen:] @ new.T, top))
            for stream, hidden in streams:
                for _ in stream.cross(layer, hidden, lambda _: Capture("", "", False), hidden):
                    pass
    divergence, same = (sum(each) / len(judged) for each in zip(*judged, strict=True))
    return Refitted(made, divergence, same)


def _judge(exact: Tensor, found: Tensor, top: int) -> tuple[float, float]:
    if not len(exact):
        return 0.0, 0.0
    before, after = exact.log_softmax(-1), found.log_softmax(-1)
    same = (_chosen(exact, top) == _chosen(found, top)).all(-1)
    return float((before.exp() * (before - after)).sum(-1).mean()), float(same.float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--text", required=True)
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--skip", type=int, default=540)
    parser.add_argument("--held-out", type=int, default=60)
    arguments = parser.parse_args()
    checkpoint, provider = open_checkpoint(arguments.model), GgufFile(arguments.file).load
    ids = corpus.pack(corpus.read(arguments.text), load_encoder(arguments.model), 512).ids
    held_out = ids[arguments.rows + arguments.skip :][: arguments.held_out]
    ids = torch.cat([ids[: arguments.rows], held_out])

    def logits(weights: Provider) -> list[Tensor]:
        model = build_model(checkpoint, EXPERTS, weights)
        with torch.inference_mode():
            return [model(row[None]).logits[0] for row in held_out]

    exact, before = logits(load), None
    print("| tokens | strength | ridge | routers' KL | same experts | model's KL | ratio |")
    print("|---" * 7 + "|", flush=True)
    fits = [Fit(strength=0), Fit(), Fit(strength=0.5, ridge=0.01), Fit("all"), Fit("chosen")]
    for fit in fits:
        found = refit(checkpoint, provider, ids, fit, arguments.rows)

        def changed(weight, found=found):
            return found.routers[weight.name] if weight.role is Role.ROUTER else provider(weight)

        rows = zip(exact, logits(changed), held_out, strict=True)
        kl = torch.cat([score_row(*each).kl for each in rows])
        before = kl if before is None else before
        error = float((kl - before).std() / len(kl) ** 0.5 / before.mean())
        print(
            f"| {fit.tokens} | {fit.strength} | {fit.ridge} | {found.divergence:.5f} "
            f"| {100 * found.same:.2f} % | {float(kl.mean()):.5f} "
            f"| {float(kl.mean() / before.mean()):.4f} ± {error:.4f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
