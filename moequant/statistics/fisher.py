"""What the loss makes of each weight's outputs: Fishers from one backward pass over some of the tokens.

With g the gradient of the cross-entropy at the outputs of a weight, G [out, out] is the sum of g gᵀ over
tokens, and tr(G E H Eᵀ) (`twosided`) is what an error E of the weight does to the loss, as far as g and the
inputs vary apart (Martens and Grosse 2015). Labels are drawn from the model's own predictions, so that G is
the curvature of the KL divergence to it and not of the text's surprise. An expert's outputs are taken before
the router's weight scales them: their g carries that weight, as tokens do in the Hessians (`paired`).

The model is resident in float32 while this runs, with the activations of a few rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import one_hot

from moequant.checkpoint import Checkpoint, load
from moequant.errors import CheckpointError, ShortageError
from moequant.forward.experts import EXPERTS
from moequant.forward.memory import free_bytes
from moequant.forward.model import Provider, empty_model, fill
from moequant.forward.stream import sites
from moequant.forward.taps import Recorder, recording, watch
from moequant.values import Role, Weight
from moequant.values.ops import Transposed, apply

BATCH_TOKENS = 1024
"""Tokens of a forward and backward pass: their activations in every layer are there at once."""

OVERHEAD = 3.0
"""Seconds that a pass takes over those of its products at full speed; measured 3.5 on a small model."""

PRIOR = 1.0
"""An expert's Fisher is shrunk to its layer's as if it had seen so many more of its tokens per row."""

TINY = 1e-300
"""Below it no ratio of sums of squares is taken."""


@dataclass(frozen=True, slots=True)
class Fishers:
    """Sums of g gᵀ: `outputs` f32 [E, out, out] by weight, rows in the weight's order; `embedding` f32
    [h, h], of the stream that enters the first layer."""

    outputs: dict[str, Tensor]
    embedding: Tensor


@dataclass(frozen=True, slots=True)
class Needs:
    """What gathering takes: tokens, bytes of memory, seconds as the device multiplies now."""

    tokens: int
    bytes: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"effort best: a backward pass over {self.tokens:,} tokens with the model in float32, "
            f"{self.bytes / 1e9:.1f} GB, about {self.seconds:.0f} s"
        )


def needs(checkpoint: Checkpoint, tokens: int, device: str = "cpu") -> Needs:
    """What `gather` will take for so many tokens, before it starts."""
    wanted = _wanted(checkpoint)
    top = checkpoint.shape.experts_used or 1
    flops, activations = 0, 0
    for weight in checkpoint.weights:
        if len(weight.shape) > 1 and weight.role not in (Role.EMBEDDING, Role.LOOKUP):
            share = top if weight.is_expert else 1
            out = weight.shape[-2]
            felt = out if weight in wanted else 0
            flops += 2 * share * out * (2 * weight.n_in + felt)
            activations += 3 * share * (out + weight.n_in)
    held = sum(weight.numel for weight in checkpoint.weights)
    held += sum(weight.matrices * weight.shape[-2] ** 2 for weight in wanted)
    held += activations * min(BATCH_TOKENS, tokens)
    return Needs(tokens, 4 * held, OVERHEAD * flops * tokens / _speed(device))


def check_memory(needed: Needs, device: str = "cpu", free: int | None = None) -> None:
    """ShortageError when the device has not that much memory; `free` bytes, None: as it says itself."""
    free = free_bytes(device) if free is None else free
    if free is not None and needed.bytes > free:
        raise ShortageError(
            f"effort best holds the whole model for its gradients: {needed.bytes / 1e9:.1f} GB are needed, "
            f"{free / 1e9:.1f} GB are free; use --effort default"
        )


def gather(
    checkpoint: Checkpoint, ids: Tensor, provider: Provider = load, device: str = "cpu", seed: int = 0
) -> Fishers:
    """Fishers of every weight of the layers, over rows of tokens ids i64 [rows, n].

    Experts that saw few tokens lean on their layer's, and what tokens do not agree on is left out (`shrink`).
    The same seed draws the same labels.
    Raises ShortageError when memory is short (`needs`), CheckpointError when a gradient is not finite.
    """
    check_memory(needs(checkpoint, ids.numel(), device), device)
    model = empty_model(checkpoint, EXPERTS, device)
    fill(model, checkpoint.weights, provider, device=device)
    if checkpoint.tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    sums = _Sums(model, _wanted(checkpoint), checkpoint.shape.hidden, device)
    generator = torch.Generator().manual_seed(seed)
    for batch in torch.split(ids, max(1, BATCH_TOKENS // ids.shape[1])):
        with torch.enable_grad(), recording(sums):
            logits = model(batch.to(device), use_cache=False).logits
        chances = torch.softmax(logits.detach().float(), -1)
        labels = _draw(chances, generator)
        logits.backward(chances - one_hot(labels, chances.shape[-1]))
    return sums.finished()


def _draw(chances: Tensor, generator: torch.Generator) -> Tensor:
    """i64 [...]: an index by each row of chances [..., n], where its running sum passes a random number."""
    at = torch.rand(*chances.shape[:-1], 1, generator=generator, dtype=torch.float64).to(chances.device)
    running = chances.double().cumsum(-1)
    return torch.searchsorted(running, at * running[..., -1:]).squeeze(-1).clamp_max(chances.shape[-1] - 1)


class _Sums(Recorder):
    """A recorder of what experts give, hooks in a model, and the sums that both add to."""

    def __init__(
        self, model: transformers.PreTrainedModel, wanted: Sequence[Weight], width: int, device: str
    ) -> None:
        self.wanted, self.device = wanted, device
        self.grams = {
            weight.name: torch.zeros(weight.matrices, *[weight.shape[-2]] * 2, device=device)
            for weight in wanted
        }
        self.tokens = {weight.name: torch.zeros(weight.matrices, device=device) for weight in wanted}
        self.noise = {
            weight.name: torch.zeros(weight.matrices, dtype=torch.float64, device=device) for weight in wanted
        }
        self.embedding = torch.zeros(width, width, device=device)
        self.embedding_noise = torch.zeros((), dtype=torch.float64, device=device)
        model.get_input_embeddings().register_forward_hook(self._embedded)
        self.by_site: dict[str, list[Weight]] = {}
        by_module: dict[str, list[Weight]] = {}
        for weight in wanted:
            assert weight.site is not None
            if weight.is_expert:
                self.by_site.setdefault(weight.site.name, []).append(weight)
            else:
                by_module.setdefault(weight.place.param.rpartition(".")[0], []).append(weight)
        watch(model, [site for site in sites(wanted) if site.side in ("experts", "inner")])
        for module, weights in by_module.items():
            model.get_submodule(module).register_forward_hook(self._dense(weights))

    def _embedded(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        output = output.detach().requires_grad_()

        def add(gradient: Tensor) -> None:
            flat = gradient.flatten(0, -2).float()
            self.embedding.addmm_(flat.T, flat)
            self.embedding_noise += noise(flat)

        output.register_hook(add)  # type: ignore[no-untyped-call]
        return output

    def _dense(self, weights: list[Weight]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self._watch(output, weights, 0)

        return hook

    def gave(self, site: str, expert: int, outputs: Tensor) -> None:
        """See `forward.experts.Told`."""
        self._watch(outputs, self.by_site.get(site, []), expert)

    def _watch(self, output: Tensor, weights: list[Weight], expert: int) -> None:
        """When the gradient of `output` [..., rows] is known, add it to these weights' rows of it."""

        def add(gradient: Tensor) -> None:
            for weight in weights:
                felt = _rows(weight, gradient.flatten(0, -2))
                self.grams[weight.name][expert].addmm_(felt.T, felt)
                self.tokens[weight.name][expert] += len(felt)
                self.noise[weight.name][expert] += noise(felt)

        output.register_hook(add)  # type: ignore[no-untyped-call]

    def finished(self) -> Fishers:
        """The sums, few tokens' shrunk; CheckpointError: not finite."""
        for weight in self.wanted:
            gram, tokens, spread = (each[weight.name] for each in (self.grams, self.tokens, self.noise))
            if not bool(gram.isfinite().all()):
                raise CheckpointError(
                    f"{weight.name}: the loss has no finite gradient there; use --effort default"
                )
            if weight.matrices > 1:
                prior = PRIOR * gram.shape[-1] / tokens.sum().clamp_min(1)
                gram += prior * gram.sum(0)
                spread = (1 + 2 * prior) * spread + prior**2 * spread.sum()
            shrink(gram, spread)
        shrink(self.embedding[None], self.embedding_noise[None])
        return Fishers(self.grams, self.embedding)


def noise(gradients: Tensor) -> Tensor:
    """f64: by how much the sum of g gᵀ over gradients [n, out] may be off beside its diagonal, squared: the
    variance of a sum of n independent terms, their means counted in, which are small."""
    squares = gradients.double().square()  # where one row is felt most, float32 leaves nothing of the others
    return squares.sum(1).square().sum() - squares.square().sum()


def shrink(gram: Tensor, spread: Tensor) -> None:
    """Make what is beside the diagonal of gram f32 [E, n, n] smaller, in place: by the share of its squares
    that is noise, spread f64 [E].

    Of all such shares it leaves the smallest error on average (Ledoit and Wolf 2004, with the target of
    Schäfer and Strimmer 2005). Few tokens would otherwise couple rows that the loss does not.
    """
    for matrix, off in zip(gram, spread, strict=True):
        diagonal = matrix.diagonal().clone()
        matrix.diagonal().zero_()
        beside = matrix.double().square().sum()
        matrix *= 1 - (off / beside.clamp_min(TINY)).clamp(0, 1)
        matrix.diagonal().copy_(diagonal)


def _rows(weight: Weight, outputs: Tensor) -> Tensor:
    """Of what a parameter's product gives, [n, out] in the parameter's order, the outputs of a weight's
    rows, in its order: [n, rows]."""
    ops = weight.place.ops
    if ops and isinstance(ops[0], Transposed):  # the parameter lies [in, out], as outputs do
        return apply(ops, outputs).mT
    return apply(ops, outputs.mT).mT


def _wanted(checkpoint: Checkpoint) -> tuple[Weight, ...]:
    """Weights of the layers that may be rounded."""
    return tuple(
        weight
        for weight in checkpoint.weights
        if weight.layer is not None
        and weight.runs
        and weight.site is not None
        and not weight.site.heads
        and len(weight.shape) > 1
    )


def _speed(device: str) -> float:
    """Floating-point operations a second of a product that is as large as a layer's, measured."""
    n = 4096 if torch.device(device).type == "cuda" else 512
    x = torch.ones(n, n, device=device)
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        float((x @ x)[0, 0])  # waits for the device
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 / min(seconds)
