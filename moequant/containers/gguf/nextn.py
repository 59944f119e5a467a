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
    if (why := refusal(way, len(_layers(found.weights)))) is not None:
        return (), (f"{out}: {why}",)
    return found.weights, (
        f"{PREDICTION} kept: llama.cpp drafts with it, transformers does not run it. Its weights are rounded "
        "under the statistics of the layer that they are like, in types one step safer; --no-mtp leaves them "
        "out",
    )


def refusal(way: Export, layers: int) -> str | None:
    """Why a file does not hold so many described layers that predict; None where it does."""
    if way.drafting is None:
        return f"llama.cpp's {way.arch!r} has no graph that drafts with it"
    if not layers:
        return "nobody describes it for this family"
    if layers > way.drafting.most:
        return f"llama.cpp's {way.arch!r} drafts with {way.drafting.most} such layer, and here are {layers}"
    return None


def counted(way: Export, config: Config, keys: tuple[Key, ...], kept: tuple[Weight, ...]) -> tuple[Key, ...]:
    """The keys of a file with these layers: counted as blocks, also in lists with one entry a block."""
    more = len(_layers(kept))
    if not more or way.drafting is None:
        return keys
    own = [way.drafting.lists(config, number) for number in range(more)]
    found = []
    for key in keys:
        if key.name == "block_count":
            key = Key(key.name, key.kind, int(config.num_hidden_layers) + more)
        elif key.name in own[0]:
            key = Key(key.name, key.kind, [*key.value, *(each[key.name] for each in own)])
        found.append(key)
    return (*found, Key("nextn_predict_layers", "u32", more))


def _layers(weights: tuple[Weight, ...]) -> set[int | None]:
    return {weight.layer for weight in weights}
