"""A forward pass that stops in front of every layer: same calls, no memory, no leftovers."""

from __future__ import annotations

import gc

import torch
from greenlet import greenlet

from moequant.checkpoint import open_checkpoint
from moequant.forward.calls import Skeleton
from moequant.forward.experts import EXPERTS
from moequant.forward.model import build_model
from tests import models


def made(folder) -> Skeleton:
    model = build_model(open_checkpoint(folder), EXPERTS)
    ids = torch.arange(96).view(3, 2, 16) % models.VOCAB
    return Skeleton(model, model.get_decoder(), "model.layers", list(ids))


def test_the_model_decides_what_a_layer_is_passed(tiny) -> None:
    """Masks, positions and rotary angles are those of an ordinary forward, per layer."""
    folder = tiny("qwen3")
    seen: list[tuple[tuple[object, ...], dict[str, object]]] = []
    plain = build_model(open_checkpoint(folder), EXPERTS)
    for layer in plain.model.layers:
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((args[1:], kwargs)), with_kwargs=True
        )
    skeleton = made(folder)
    with torch.inference_mode():
        plain.get_decoder()(input_ids=skeleton.batches[1], use_cache=False)
        skeleton.begin()
        for number, (args, kwargs) in enumerate(seen):
            call = skeleton.calls[1]
            assert call.args == args and call.kwargs.keys() == kwargs.keys()
            for ours, theirs in zip(
                call.kwargs["position_embeddings"], kwargs["position_embeddings"], strict=True
            ):
                assert torch.equal(ours, theirs)
            if number + 1 < len(seen):
                skeleton.advance()
    skeleton.close()


def test_closing_ends_every_pass(tiny) -> None:
    skeleton = made(tiny("mixtral"))
    with torch.inference_mode():
        skeleton.begin()
        skeleton.begin()  # the first passes end
        skeleton.advance()
    skeleton.close()
    gc.collect()
    alive = [thing for thing in gc.get_objects() if type(thing) is greenlet and thing.gr_frame is not None]
    assert not [one for one in alive if one.parent is not None]


def test_embedding_is_restored_when_a_pass_fails(tiny) -> None:
    skeleton = made(tiny("mixtral"))
    embedding = skeleton.model.get_input_embeddings()
    skeleton.batches.append("not ids")
    try:
        skeleton.begin()
    except Exception as error:
        assert "str" in str(error) or "not ids" in str(error)
    else:
        raise AssertionError("a batch that is not ids was accepted")
    assert skeleton.model.get_input_embeddings() is embedding
    skeleton.close()
