"""A forward pass cut at its layers: the same calls, and nothing is left changed."""

from __future__ import annotations

import pytest
import torch

from moequant.checkpoint import open_checkpoint
from moequant.forward.calls import Skeleton, beside
from moequant.forward.experts import EXPERTS
from moequant.forward.model import build_model
from tests import models


def made(folder, batches=None) -> Skeleton:
    checkpoint = open_checkpoint(folder)
    model = build_model(checkpoint, EXPERTS)
    ids = torch.arange(96).view(3, 2, 16) % models.VOCAB if batches is None else batches
    decoder = model.get_submodule(checkpoint.family.decoder)
    gives = beside(checkpoint, ids.shape[-1])
    return Skeleton(model, decoder, checkpoint.family.layers_at, list(ids), gives)


def same(ours: object, theirs: object) -> bool:
    """Equal, tensors by their values, whatever they are nested in."""
    if isinstance(theirs, torch.Tensor):
        return isinstance(ours, torch.Tensor) and torch.equal(ours, theirs)
    if isinstance(theirs, tuple | list):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in theirs)
    return ours is theirs or ours == theirs


@pytest.mark.parametrize("family", models.CONFIGS)
def test_a_layer_is_passed_what_an_ordinary_forward_passes_it(tiny, family: str) -> None:
    """Masks, positions, rotary angles: every layer of every batch, in every family."""
    folder = tiny(family)
    seen: list[tuple[tuple[object, ...], dict[str, object]]] = []
    checkpoint = open_checkpoint(folder)
    plain = build_model(checkpoint, EXPERTS)
    for layer in plain.get_submodule(checkpoint.family.layers_at):
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((args[1:], kwargs)), with_kwargs=True
        )
    skeleton = made(folder)
    for batch, ids in enumerate(skeleton.batches):
        seen.clear()
        with torch.inference_mode():
            plain.get_submodule(checkpoint.family.decoder)(input_ids=ids, use_cache=False)
        assert len(seen) == checkpoint.n_layers
        for number, (args, kwargs) in enumerate(seen):
            call = skeleton.call(number, batch)
            if kwargs.get("prev_topk_indices") is None:  # a layer that gets none chooses for itself
                call.kwargs.pop("prev_topk_indices", None)
                kwargs.pop("prev_topk_indices", None)
            for passed in (call.kwargs, kwargs):  # in short rows every token is chosen, in whatever order
                if isinstance(chosen := passed.get("prev_topk_indices"), torch.Tensor):
                    passed["prev_topk_indices"] = chosen.sort(-1).values
                passed.pop(
                    "shared_kv_states", None
                )  # a store that layers fill; those that read it are refused
            assert same(call.args, args) and same(call.kwargs, kwargs)


def test_cut_and_joined_it_computes_what_the_model_does(tiny) -> None:
    folder = tiny("qwen3_moe")
    skeleton, plain = made(folder), build_model(open_checkpoint(folder), EXPERTS)
    with torch.inference_mode():
        for batch, hidden in enumerate(skeleton.embed()):
            for number, layer in enumerate(skeleton.layers):
                hidden = skeleton.call(number, batch).run(layer, hidden)
            found = skeleton.finish(batch, hidden).last_hidden_state
            wanted = plain.model(input_ids=skeleton.batches[batch], use_cache=False)
            torch.testing.assert_close(found, wanted.last_hidden_state)


def test_the_embedding_is_restored_when_a_pass_fails(tiny) -> None:
    skeleton = made(tiny("mixtral"))
    embedding = skeleton.model.get_input_embeddings()
    skeleton.batches.append("not ids")
    with pytest.raises(AttributeError):
        skeleton.finish(3, torch.zeros(1))
    assert skeleton.model.get_input_embeddings() is embedding
