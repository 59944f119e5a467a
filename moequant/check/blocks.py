"""Whole MoE blocks: what the baseline's block makes of its inputs, and what the candidate's does."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature

import torch
from torch import Tensor, nn

from moequant.check.activations import Collector
from moequant.check.damage import error_limit
from moequant.check.figures import LOCAL_ROUTING, BlockFigures, Damage
from moequant.check.tensors import shape_of_error
from moequant.forward.taps import recording
from moequant.values import Site

CORRECTION = 0.5
"""Relative error that a block may have whose bytes are vouched for: rounding towards a corrected target
changes outputs on purpose. Seen: 0.17 in a trained model at 3 bits, 0.35 in a random one at 2."""


@dataclass(frozen=True, slots=True)
class Fed:
    """What both models were fed, the same tokens `ids` i64 [n] from the first on, and what is seen of it."""

    ids: Tensor
    seen: tuple[Collector, Collector]


def check_block(
    site: Site,
    models: tuple[nn.Module, nn.Module],
    fed: Fed,
    layer: int,
    expected: float,
    vouched: bool,
) -> tuple[BlockFigures, list[Damage]]:
    """The block whose experts are fed at `site`, baseline first in `models` and in what they were fed.

    `expected` is the relative error that the formats of its tensors add up to on normal weights, `vouched`
    whether checksums say that their bytes are those that were written.
    """
    x, own = fed.seen[0].hidden[site.name], [part.index[site.name] for part in fed.seen]
    block = site.module.rpartition(".")[0]
    ran = [_run(model.get_submodule(block), site.name, x, fed.ids) for model in models]
    (want, chosen), (got, other) = ran
    cosine, largest = shape_of_error(got, want)
    figures = BlockFigures(
        layer=layer,
        tokens=len(x),
        output_error=float((got - want).norm() / want.norm().clamp_min(1e-30)),
        limit=max(error_limit(expected), CORRECTION if vouched else 0.0),
        cosine=cosine,
        largest=largest,
        local_routing=_agreement(chosen, other),
        routing=_agreement(own[0], own[1]),
        top=float((own[0][:, 0] == own[1][:, 0]).double().mean()),
    )
    where, damages = f"layer {layer} MoE block", []
    if not figures.output_error <= figures.limit:
        what = f"output is off by {figures.output_error:.3f}, {figures.limit:.3f} at most was expected"
        damages.append(Damage(where, what))
    if not figures.local_routing >= LOCAL_ROUTING:
        what = f"on the same input {1 - figures.local_routing:.1%} of the chosen experts differ"
        damages.append(Damage(where, what))
    return figures, damages


def _run(block: nn.Module, name: str, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(output f32 [n, out], chosen experts i64 [n, k]) of a block for x [n, in] of the first n `ids`."""
    told = Collector()
    device = next(block.parameters()).device
    asks = "input_ids" in signature(block.forward).parameters  # it looks experts up by a token's number
    beside = {"input_ids": ids[None, : len(x)].to(device)} if asks else {}
    with torch.inference_mode(), recording(told):
        out = block(x[None].to(device), **beside)
    values: Tensor = out[0] if isinstance(out, tuple) else out
    return values.reshape(len(x), -1).float().cpu(), told.index[name]


def _agreement(a: Tensor, b: Tensor) -> float:
    """Share of the choices in a [n, k] that b has too, whatever their order."""
    return float((a[:, :, None] == b[:, None, :]).any(2).double().mean())
