"""What a model family is: which stored tensors make which weights of the transformers model.

A family is a small file of data and tiny functions. It lists, layer by layer, the weights that the model
computes with: what checkpoints call them, where transformers keeps them, and which activations they
multiply. It knows no output file. Whatever no family names is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moequant.values import ModelShape, Role, Site, Stack
from moequant.values.ops import Ops

Config = Any
"""The config object of the family's own class in transformers: absent keys filled, both dialects read."""


@dataclass(frozen=True, slots=True)
class Get:
    """A stored tensor: its name, `{e}` in it for one tensor an expert, and the ops that make of it a weight,
    or one matrix of it. `rows` is how many each matrix has, where two ways differ in nothing else. `below`
    are further tensors, whose rows follow those of the first."""

    name: str
    ops: Ops = ()
    rows: int | None = None
    below: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Slot:
    """One weight of the model.

    `name` is our own; `param` is the parameter or buffer of the transformers model that holds it, `ops`
    make the weight of it. `get` are the ways in which checkpoints store it, the release's own first; by
    default there is one, under the parameter's name. An `optional` one may be absent; `asked` says which
    config key asks for one that other models of the family do not have.
    """

    name: str
    role: Role
    param: str
    get: tuple[Get, ...] = ()
    ops: Ops = ()
    site: Site | None = None
    stack: Stack = Stack.NONE
    adds: bool = False
    optional: bool = False
    asked: str = ""

    @property
    def ways(self) -> tuple[Get, ...]:
        """`get`, with its default."""
        return self.get or (Get(self.param, self.ops),)


def as_it_is(raw: dict[str, Any]) -> dict[str, Any]:
    """The class reads every spelling of a config.json."""
    return raw


PREDICTION = "multi-token prediction"
"""Why a stored tensor is skipped that belongs to layers behind the last: they predict the token after the
next, and transformers does not run them."""


def nothing_predicted(config: Config) -> tuple[tuple[Slot, ...], ...]:
    """No layers behind the last that containers know."""
    return ()


def no_constants(config: Config) -> Mapping[str, tuple[int, ...]]:
    """The class computes nothing that checkpoints hold."""
    return {}


def nothing_skipped(config: Config) -> Mapping[str, str]:
    """Every stored tensor is used."""
    return {}


@dataclass(frozen=True, slots=True)
class Family:
    """A model family.

    `classes` are the names in `architectures` of config.json, `model_type` is transformers' name of the
    text model's config; `dialect` rewrites what config.json says in a way that its class does not read.
    `layer` lists the slots of a decoder layer in the order in which they compute, `ends` those outside.
    `known` are the config keys that these functions, or every container, take account of. `says` has keys
    that the class ignores, with the values that say what it computes anyway. `skipped` gives regular
    expressions of stored names that are left out on purpose, with the reason. `predictions` lists the slots
    of layers behind the last, among what `skipped` calls PREDICTION: they have no `param`. `constants` are
    buffers of whole numbers that the class makes of its config and checkpoints hold as well: what they hold
    has to be the same. `renamed` turns prefixes of stored names into those that `get` uses. `hoisted` are
    paths of keys outside `text_config` that belong to the text's config as well, ("", key) for one of the
    whole. `layers_at` is where the decoder layers are. `attention_gives` is how many values attention modules
    give, their output first. `chosen` is for models whose layers also give, and are given, which tokens
    attention looks at: how many those are at most.
    """

    name: str
    classes: tuple[str, ...]
    model_type: str
    shape: Callable[[Config], ModelShape]
    layer: Callable[[Config, int], tuple[Slot, ...]]
    ends: Callable[[Config], tuple[Slot, ...]]
    known: frozenset[str] = frozenset()
    says: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    skipped: Callable[[Config], Mapping[str, str]] = nothing_skipped
    predictions: Callable[[Config], tuple[tuple[Slot, ...], ...]] = nothing_predicted
    constants: Callable[[Config], Mapping[str, tuple[int, ...]]] = no_constants
    renamed: tuple[tuple[str, str], ...] = ()
    hoisted: tuple[tuple[str, str], ...] = ()
    layers_at: str = "model.layers"
    attention_gives: int = 2
    chosen: Callable[[Config], int] | None = None
    dialect: Callable[[dict[str, Any]], dict[str, Any]] = as_it_is

    @property
    def decoder(self) -> str:
        """The module of the model that has the layers: all of it but the head."""
        return self.layers_at.rpartition(".")[0]
