"""Layers of a checkpoint behind its last: kept for runtimes that draft with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from moequant.checkpoint.slots import weight_of
from moequant.errors import CheckpointError
from moequant.families import Config, Family
from moequant.values import ModelShape, Stored, Weight


@dataclass(frozen=True, slots=True)
class Predictions:
    """What is stored of layers that predict the token after the next, and transformers does not run.

    `weights` are those that the family describes, numbered on behind the last layer; each has the site of
    the weight of the model that it is like. Where the stored tensors are not what the family describes,
    there are none, and `unfit` says why.
    """

    stored: tuple[Stored, ...] = ()
    weights: tuple[Weight, ...] = ()
    unfit: str | None = None

    @classmethod
    def of(
        cls,
        family: Family,
        config: Config,
        shape: ModelShape,
        model: Sequence[Weight],
        stored: Mapping[str, Stored],
    ) -> Self:
        """Those among the `stored` tensors that no weight of the `model` is made of."""
        if not stored:
            return cls()
        every = tuple(stored.values())
        sites = sites_of(model)
        found: list[Weight] = []
        claimed: set[str] = set()
        try:
            for number, slots in enumerate(family.predictions(config), shape.layers):
                for slot in slots:
                    weight = weight_of(slot, number, shape, stored)
                    if weight is not None:
                        claimed |= {each.name for each in weight.origin.stored}
                        found.append(fed(weight, sites))
        except CheckpointError as error:
            return cls(every, unfit=str(error))
        if found and (rest := [each.name for each in every if each.name not in claimed]):
            return cls(every, unfit=f"{rest[0]} is unknown")
        return cls(every, tuple(found))


def sites_of(model: Sequence[Weight]) -> dict[str, Weight]:
    """A weight of the model for each of its sites."""
    return {weight.site.name: weight for weight in model if weight.site is not None}


def fed(weight: Weight, sites: Mapping[str, Weight]) -> Weight:
    """The weight, without a site where nothing is like it, or what is has another width."""
    if weight.site is None:
        return weight
    twin = sites.get(weight.site.name)
    if twin is not None and (twin.matrices, twin.n_in) == (weight.matrices, weight.n_in):
        return weight
    return replace(weight, site=None)
