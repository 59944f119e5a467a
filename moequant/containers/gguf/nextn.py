"""Layers that predict the token after the next, as llama.cpp's NextN: blocks behind the last one."""

from __future__ import annotations

from moequant.checkpoint import Checkpoint
from moequant.containers.gguf.families import Export, Key
from moequant.families import Config
from moequant.families.base import PREDICTION
from moequant.values import Weight


def kept(checkpoint: Checkpoint, way: Export) -> tuple[tuple[Weight, ...], tuple[str, ...]]:
    """The weights of these layers that a file holds, and what a person should know of that."""
    found = checkpoint.predictions
    if not found.stored:
        return (), ()
    out = f"left out: {len(found.stored):,} tensors, {PREDICTION}"
    if found.unfit is not None:
        return (), (f"{out}: {found.unfit}",)
    if way.predictions is None or len(_layers(found.weights)) != 1:
        return (), (f"{out}: not kept for llama.cpp's {way.arch!r}",)
    return found.weights, (
        f"{PREDICTION} kept: llama.cpp drafts with it, transformers does not run it. Its weights are rounded "
        "under the statistics of the layer that they are like, in types one step safer; --no-mtp leaves them "
        "out",
    )


def counted(way: Export, config: Config, keys: tuple[Key, ...], kept: tuple[Weight, ...]) -> tuple[Key, ...]:
    """The keys of a file with these layers: counted as blocks, also in lists with one entry a block."""
    more = len(_layers(kept))
    if not more or way.predictions is None:
        return keys
    layers, own = int(config.num_hidden_layers), way.predictions(config)
    found = []
    for key in keys:
        if key.name == "block_count":
            key = Key(key.name, key.kind, layers + more)
        elif key.name in own:
            key = Key(key.name, key.kind, [*key.value, *[own[key.name]] * more])
        found.append(key)
    return (*found, Key("nextn_predict_layers", "u32", more))


def _layers(weights: tuple[Weight, ...]) -> set[int | None]:
    return {weight.layer for weight in weights}
