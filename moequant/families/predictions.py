"""Layers behind the last, which predict the token after the next (DeepSeek-V3, 2024): transformers leaves
them out, llama.cpp drafts with them.

Each joins the embedding of a token with the hidden state in front of the head, and is then a decoder layer
like another one of the model, its twin. Nobody sees what it is fed: its weights have their twin's sites.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from moequant.errors import FamilyError, one_line
from moequant.families.base import Config, Get, Slot
from moequant.values import Role

PARTS = {
    "join": Role.NEXTN,
    "embedding_norm": Role.NORM,
    "hidden_norm": Role.NORM,
    "embedding": Role.NEXTN,
    "norm": Role.NORM,
    "head": Role.NEXTN,
}
"""What is around the decoder layer, by our names: what joins its two inputs [h, 2h], their norms, and what
stands in for the model's own embedding, final norm and head."""

REQUIRED = ("join", "embedding_norm", "hidden_norm")

APPENDED = {
    "join": "eh_proj",
    "embedding_norm": "enorm",
    "hidden_norm": "hnorm",
    "embedding": "embed_tokens",
    "norm": "shared_head.norm",
    "head": "shared_head.head",
}
"""What DeepSeek, and those after it, call them within the layer."""

BESIDE = {
    "join": "fc",
    "embedding_norm": "pre_fc_norm_embedding",
    "hidden_norm": "pre_fc_norm_hidden",
    "norm": "norm",
}
"""What Qwen calls them under `mtp.`."""


def like(slots: tuple[Slot, ...], twin: int, number: int, stored: str) -> tuple[Slot, ...]:
    """The slots of layer `twin` as those of layer `number`, stored under the prefix `stored`."""
    own = f"layers.{twin}."
    return tuple(
        replace(
            slot,
            name=slot.name.replace(own, f"layers.{number}.", 1),
            param="",
            ops=(),
            adds=False,
            get=tuple(_within(way, own, stored) for way in slot.ways if own in way.name),
        )
        for slot in slots
    )


def _within(way: Get, own: str, stored: str) -> Get:
    """The way of a tensor of a layer, in another one under the prefix `stored`."""
    name, *below = (stored + each.partition(own)[2] for each in (way.name, *way.below))
    return replace(way, name=name, below=tuple(below))


def last_of(kinds: Sequence[str], kind: str) -> int:
    """The last layer of a kind; the last of all where there is none."""
    return max((number for number, each in enumerate(kinds) if each == kind), default=len(kinds) - 1)


def parts(number: int, stored: Mapping[str, str]) -> tuple[Slot, ...]:
    """What is around the layer; `stored` are full names without `.weight`, by ours."""
    return tuple(
        Slot(
            f"layers.{number}.nextn.{ours}",
            PARTS[ours],
            "",
            (Get(f"{theirs}.weight"),),
            optional=ours not in REQUIRED,
        )
        for ours, theirs in stored.items()
    )


MOST = 16
"""More such layers than this are a slip of the config, and would be looped over."""

Layer = Callable[[Config, int], tuple[Slot, ...]]


def count(config: Config) -> int:
    """How many such layers a config tells of. FamilyError for something else than a number."""
    keys = ("num_nextn_predict_layers", "num_mtp_layers")
    key, told = next(((key, told) for key in keys if (told := getattr(config, key, None))), (keys[0], 0))
    if not isinstance(told, int):
        raise FamilyError(f"config.json: {key} = {one_line(told, 60)}: a number of layers was expected")
    return min(told, MOST)


def appended(
    config: Config, layer: Layer, names: Mapping[str, str] = APPENDED, twin: int | None = None
) -> tuple[tuple[Slot, ...], ...]:
    """Layers that are numbered on behind the last one; `twin` is the last unless it is given."""
    last = int(config.num_hidden_layers)
    twin = last - 1 if twin is None else twin
    found = []
    for number in range(last, last + count(config)):
        at = f"model.layers.{number}."
        whole = {ours: at + theirs for ours, theirs in names.items()}
        found.append((*like(layer(config, twin), twin, number, at), *parts(number, whole)))
    return tuple(found)


def beside(config: Config, layer: Layer, twin: int) -> tuple[tuple[Slot, ...], ...]:
    """One layer under `mtp.`; of several, nobody knows how llama.cpp would run them."""
    if int(getattr(config, "mtp_num_hidden_layers", None) or 1) != 1:
        return ()
    number = int(config.num_hidden_layers)
    whole = {ours: f"mtp.{theirs}" for ours, theirs in BESIDE.items()}
    return ((*like(layer(config, twin), twin, number, "mtp.layers.0."), *parts(number, whole)),)
