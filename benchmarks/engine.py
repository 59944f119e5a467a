"""Our own engine as a judge: a small model whole in memory, with any weights in place of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moequant.checkpoint import Checkpoint, load
from moequant.evaluate import score_row
from moequant.forward.experts import EXPERTS
from moequant.forward.model import Provider, build_model
from moequant.rounding.diagonal import Quantizer
from moequant.rounding.results import decoded
from moequant.values import Weight


def logits(checkpoint: Checkpoint, ids: Tensor, provider: Provider = load) -> list[Tensor]:
    """Of every row of `ids`, with the provider's weights."""
    model = build_model(checkpoint, EXPERTS, provider)
    with torch.inference_mode():
        return [model(input_ids=row[None], use_cache=False).logits[0] for row in ids]


@dataclass(frozen=True)
class Judge:
    """The unquantized model's logits on `ids`, and what other weights are scored against."""

    checkpoint: Checkpoint
    ids: Tensor
    base: list[Tensor]

    @classmethod
    def of(cls, checkpoint: Checkpoint, ids: Tensor) -> Judge:
        """The judge of one model on some rows."""
        return cls(checkpoint, ids, logits(checkpoint, ids))

    def kl(self, provider: Provider) -> Tensor:
        """KL divergence of every scored token, f64 [rows, tokens]."""
        found = zip(self.base, logits(self.checkpoint, self.ids, provider), self.ids, strict=True)
        return torch.stack([score_row(*each).kl for each in found])


def plain_search(quantizer: Quantizer, types: Mapping[str, str]) -> Provider:
    """Weights rounded to those types by the plain search."""
    return rounded(types, lambda weight, name: decoded(quantizer.pack(weight, name)[0]))


def rounded(types: Mapping[str, str], encode: Callable[[Weight, str], Tensor]) -> Provider:
    """Weights rounded to those types by `encode`; routers and norms stay."""

    def provider(weight: Weight) -> Tensor:
        return load(weight) if weight.role.keeps_precision else encode(weight, types[weight.name])

    return provider
