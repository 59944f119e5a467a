"""Streaming computes what the resident model computes, reads every tensor once, and cleans up."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moequant.checkpoint import Checkpoint, load, open_checkpoint
from moequant.containers.gguf.export import export
from moequant.errors import CheckpointError
from moequant.forward.experts import EXPERTS
from moequant.forward.model import build_model
from moequant.forward.resources import Resources
from moequant.forward.stream import LayerStream, Reader, sites
from moequant.forward.taps import recording, watch
from moequant.statistics import store
from moequant.statistics.calibrate import calibrate
from moequant.statistics.moments import Moments
from moequant.text.corpus import Rows
from moequant.values import Calibration, Weight
from tests import models
from tests.forks import python

SMALL = Resources(threads=1, batch_tokens=128)


def rows(count: int = 7, length: int = 64) -> Rows:
    ids = torch.randint(0, models.VOCAB, (count, length), generator=torch.Generator().manual_seed(1))
    domains = tuple("ab"[number % 2] for number in range(count))
    return Rows(ids, domains, "random ids", ids.numel())


def saved(checkpoint: Checkpoint, calibration: Calibration, path: Path) -> bytes:
    store.save(path, store.stored(checkpoint, calibration))
    return path.read_bytes()


@pytest.mark.parametrize("family", models.CONFIGS)
def test_statistics_equal_a_resident_run(tiny, family: str) -> None:
    """The whole model at once, all rows in one batch, under the same recorder; cut as a file is, so that
    heads of a stack and parts of a module's output are seen as well."""
    checkpoint, text = export(open_checkpoint(tiny(family))).checkpoint, rows()
    found = calibrate(checkpoint, text, SMALL)
    model = build_model(checkpoint, EXPERTS)
    watch(model, sites(checkpoint.weights))
    domains = torch.tensor(["ab".index(d) for d in text.domains])
    resident = Moments(checkpoint.n_experts, domains, 2)
    with torch.inference_mode(), recording(resident):
        model.get_submodule(checkpoint.family.decoder)(input_ids=text.ids, use_cache=False)
    assert found.inputs.keys() == resident.inputs.keys()
    for name, stats in resident.inputs.items():
        for field in ("tokens", "gate_mass", "gate_square", "moment", "gated_moment"):
            ours, theirs = getattr(found.inputs[name], field), getattr(stats, field)
            scale = theirs.double().abs().max()
            assert (ours.double() - theirs.double()).abs().max() <= 1e-5 * scale, (name, field)
    for ours, theirs in zip(found.routes, resident.routes.values(), strict=True):
        assert torch.equal(ours.tokens, theirs.tokens)
        assert torch.equal(ours.domain_tokens, theirs.domain_tokens)
        assert torch.equal(ours.pairs, theirs.pairs)


@pytest.mark.parametrize(
    "changes",
    [{"threads": 2}, {"threads": 3}, {"ram": 0}, {"ram": 0, "threads": 2}, {"read_ahead": True}],
    ids=str,
)
def test_threads_spilling_and_reading_ahead_change_no_byte(tiny, tmp_path: Path, changes) -> None:
    checkpoint = open_checkpoint(tiny("qwen3_moe"))
    plain = saved(checkpoint, calibrate(checkpoint, rows(), SMALL), tmp_path / "plain.safetensors")
    other = calibrate(checkpoint, rows(), replace(SMALL, **changes))
    assert saved(checkpoint, other, tmp_path / "other.safetensors") == plain


@pytest.mark.parametrize("read_ahead", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_is_read_at_most_once_a_pass(tiny, tied: bool, read_ahead: bool) -> None:
    checkpoint = open_checkpoint(tiny("qwen3_moe", tie_word_embeddings=tied))
    reader = Reader()
    calibrate(checkpoint, rows(), replace(SMALL, read_ahead=read_ahead), reader)
    assert max(reader.reads.values()) == 1
    unread = {weight.name for weight in checkpoint.weights} - reader.reads.keys()
    assert unread == (set() if tied else {"head"})
    read = [weight for weight in checkpoint.weights if weight.name not in unread]
    assert reader.bytes == sum(weight.numel for weight in read) * 2


def test_a_reader_that_keeps_reads_nothing_twice(tiny) -> None:
    checkpoint, reader = open_checkpoint(tiny("mixtral")), Reader(keep=True)
    first = calibrate(checkpoint, rows(), SMALL, reader)
    second = calibrate(checkpoint, rows(), SMALL, reader)
    assert max(reader.reads.values()) == 1
    assert torch.equal(first.routes[1].gate_mass, second.routes[1].gate_mass)


def test_only_the_layer_at_work_has_memory(tiny) -> None:
    checkpoint = open_checkpoint(tiny("mixtral"))

    def in_memory(stream: LayerStream) -> set[str]:
        names = {name for name, p in stream.model.named_parameters(remove_duplicate=False) if not p.is_meta}
        names |= {
            f"model.layers.{number}.{name}"
            for number, layer in enumerate(stream.skeleton.layers)
            for name, parameter in layer.named_parameters()
            if not parameter.is_meta
        }
        return names

    with LayerStream(checkpoint, rows().ids, SMALL) as stream:
        hidden = stream.new_hidden(Path())
        stream.embed(hidden)
        assert in_memory(stream) == set()
        for layer in stream.layers():
            assert in_memory(stream) == {weight.place.param for weight in stream.weights(layer)}
            list(stream.cross(layer, hidden, lambda batch: None, hidden))
        list(stream.finish(hidden, lambda batch: None))
        assert in_memory(stream) == set()


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True}, {"output_router_logits": True}], ids=str
)
def test_the_whole_model_gives_its_logits(tiny, changes) -> None:
    """With the head; a config that asks for router logits changes nothing."""
    checkpoint = open_checkpoint(tiny("mixtral", **changes))
    model = build_model(checkpoint, EXPERTS)
    with LayerStream(checkpoint, rows().ids, SMALL, whole=True) as stream, torch.inference_mode():
        hidden = stream.new_hidden(Path())
        stream.embed(hidden)
        for layer in stream.layers():
            list(stream.cross(layer, hidden, lambda batch: None, hidden))
        logits = torch.cat([result.logits for _, result in stream.finish(hidden, lambda batch: None)])
        assert (logits - model(rows().ids, output_router_logits=False).logits).abs().max() < 1e-4
        assert all(p.is_meta for p in stream.model.parameters())


class Broken(Exception):
    pass


@pytest.mark.parametrize("read_ahead", [False, True])
def test_an_error_while_reading_comes_out_and_leaves_no_thread(tiny, read_ahead: bool) -> None:
    def provider(weight: Weight) -> Tensor:
        if weight.name == "layers.1.ffn_norm":
            raise Broken(weight.name)
        return load(weight)

    before = threading.active_count()
    with pytest.raises(Broken, match=r"layers\.1\.ffn_norm"):
        calibrate(open_checkpoint(tiny("mixtral")), rows(), replace(SMALL, read_ahead=read_ahead), provider)
    assert threading.active_count() == before


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_inside_a_layer_comes_out_and_leaves_no_thread(tiny, threads: int) -> None:
    """Other batches wait in front of the layer and in the queue; none may hang."""
    before = threading.active_count()
    crossed: list[int] = []

    def make(batch: int) -> None:
        crossed.append(batch)
        if batch == 1:
            raise Broken
        return None

    checkpoint = open_checkpoint(tiny("mixtral"))
    resources = replace(SMALL, threads=threads)
    with LayerStream(checkpoint, rows(40).ids, resources) as stream:
        hidden = stream.new_hidden(Path())
        stream.embed(hidden)
        with pytest.raises(Broken):
            for layer in stream.layers():
                list(stream.cross(layer, hidden, make, hidden))
    assert threading.active_count() == before
    assert len(crossed) < 20, "what was queued behind the error does not run"


def test_a_consumer_that_stops_early_leaves_no_thread(tiny) -> None:
    before = threading.active_count()
    with LayerStream(open_checkpoint(tiny("mixtral")), rows(40).ids, replace(SMALL, threads=2)) as stream:
        hidden = stream.new_hidden(Path())
        stream.embed(hidden)
        for layer in stream.layers():
            crossing = stream.cross(layer, hidden, lambda batch: None, hidden)
            next(crossing)
            crossing.close()
            break
    assert threading.active_count() == before


def test_layers_can_be_refilled_and_the_end_repeated(tiny) -> None:
    """Two versions of the weights cross the same layers: each gives what its own model gives."""
    checkpoint = open_checkpoint(tiny("qwen3_moe"))

    def doubled(weight: Weight) -> Tensor:
        return load(weight).float() * (2.0 if weight.name == "layers.1.experts.down" else 1.0)

    with LayerStream(checkpoint, rows().ids, SMALL) as stream, torch.inference_mode():
        one, two = stream.new_hidden(Path()), stream.new_hidden(Path())
        stream.embed(one)
        stream.embed(two, doubled)
        for layer in stream.layers():
            list(stream.cross(layer, one, lambda batch: None, one))
            stream.refill(layer, doubled)
            list(stream.cross(layer, two, lambda batch: None, two))
        for hidden, provider in ((one, load), (two, doubled)):
            ends = stream.finish(hidden, lambda batch: None, provider)
            found = torch.cat([result.last_hidden_state for _, result in ends])
            expected = build_model(checkpoint, EXPERTS, provider).get_decoder()(rows().ids).last_hidden_state
            assert (found - expected).abs().max() < 1e-4


def test_a_weight_of_another_shape_is_named(tiny) -> None:
    def provider(weight: Weight) -> Tensor:
        return load(weight)

    checkpoint = open_checkpoint(tiny("mixtral"))
    wrong = tuple(
        replace(weight, shape=(4, 512, 128)) if weight.name == "layers.0.experts.up" else weight
        for weight in checkpoint.weights
    )
    with pytest.raises(CheckpointError, match=r"layers\.0\.experts\.up: shape"):
        calibrate(replace(checkpoint, weights=wrong), rows(), SMALL, provider)


def test_memory_does_not_grow_with_depth(tmp_path: Path) -> None:
    """A model of 24 layers needs a few layers more than one of two, which is what malloc keeps for itself."""
    # glibc keeps freed blocks below 32 MB for later; told to map those of a megabyte, it gives them back.
    # The benchmark measures in processes that it starts anew.
    surroundings = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576"}
    how = ("--layers", 2, 24, "--out", tmp_path)
    done = python("-m", "benchmarks", "run", "depth", *how, env=surroundings)
    assert done.returncode == 0, done.stderr[-2000:]
    shallow, deep = json.loads((tmp_path / "depth.json").read_text(encoding="utf-8"))["rows"]
    more = deep["growth"] - shallow["growth"]
    assert (shallow["layers"], deep["layers"]) == (2, 24)
    assert more < 8 * deep["layer bytes"], "the 22 layers more are not kept"
    assert deep["reads of a tensor"] == 1
