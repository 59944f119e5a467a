"""A layer whose experts are in memory some at a time gives the numbers of the whole layer, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moequant import formats
from moequant.checkpoint import load, open_checkpoint
from moequant.evaluate.activations import Rounded
from moequant.evaluate.side_by_side import Version, compare
from moequant.forward.hidden import OnDisk
from moequant.forward.memory import chunks, layer_bytes
from moequant.forward.stream import LayerStream, Reader
from moequant.forward.taps import Recorder
from moequant.plan.probes import divergences
from moequant.statistics.calibrate import calibrate
from moequant.values import Weight
from tests.forward.test_stream import SMALL, rows, saved

TINY = replace(SMALL, ram=0)
"""One expert at a time, and hidden states on disk."""

FAMILIES = ("mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "dbrx", "llama4", "nemotron_h_latent")
"""Shared experts, dense layers, biases and transposed matrices, classes with a forward of their own, latent
experts."""


def rounded(weight: Weight) -> Tensor:
    """Its experts by themselves, so that nothing depends on how many are asked for."""
    if weight.role.keeps_precision or len(weight.shape) < 2:
        return load(weight)
    return formats.dequantize("Q4_0", formats.quantize("Q4_0", load(weight), None, "fast"))


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_have_the_same_bytes(tiny, tmp_path: Path, family: str) -> None:
    checkpoint = open_checkpoint(tiny(family))
    found = []
    for name, resources in (("whole", SMALL), ("parts", TINY), ("threads", replace(TINY, threads=2))):
        reader = Reader()
        found.append(saved(checkpoint, calibrate(checkpoint, rows(), resources, reader), tmp_path / name))
        running = [each for each in checkpoint.weights if each.name in reader.reads]
        assert reader.bytes == sum(each.numel * (4 if each.origin.dtype == "F32" else 2) for each in running)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("family", FAMILIES)
def test_comparisons_give_the_same_numbers(tiny, family: str) -> None:
    """Two candidates, one of them with rounded inputs."""
    checkpoint, text = open_checkpoint(tiny(family)), rows()
    types = {each.name: "Q4_0" for each in checkpoint.weights}
    candidates = [
        Version("a", rounded),
        Version("b", lambda w: rounded(w) * 1.01, Rounded(checkpoint, types)),
    ]
    whole, parts = (compare(checkpoint, Version("base", load), candidates, text, r) for r in (SMALL, TINY))
    for one, two in zip(whole, parts, strict=True):
        assert torch.equal(one.scores.kl, two.scores.kl)
        assert one.comparison == two.comparison
        assert one.routing == two.routing
        for a, b in zip(one.errors, two.errors, strict=True):
            assert (a.weight, a.error.tolist()) == (b.weight, b.error.tolist())


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_probes_give_the_same_numbers(tiny, family: str) -> None:
    checkpoint, ids = open_checkpoint(tiny(family)), rows(2, 32).ids
    names = [each.name for each in checkpoint.weights if each.layer == 1 and len(each.shape) > 1]
    versions = [{name: "Q4_0"} for name in names]
    versions.append({each.name: "Q4_0" for each in checkpoint.weights if len(each.shape) > 1})
    found = [divergences(checkpoint, ids, versions, lambda w, _: rounded(w), r) for r in (SMALL, TINY)]
    assert found[0] == found[1]
    assert max(found[0]) > 0


def test_a_comparison_reads_every_tensor_once(tiny) -> None:
    checkpoint, readers = open_checkpoint(tiny("mixtral")), [Reader(), Reader()]
    compare(checkpoint, Version("base", readers[0]), [Version("a", readers[1])], rows(), TINY)
    every = sum(each.numel for each in checkpoint.weights) * 2
    assert [reader.bytes for reader in readers] == [every, every]


class Told(Recorder):
    """Keeps what it is told, in order, of sites that every token passes and of experts."""

    def __init__(self) -> None:
        self.dense_names: list[str] = []
        self.experts: list[tuple[str, int, Tensor]] = []
        self.outputs: list[Tensor] = []

    def dense(self, name: str, inputs: Tensor) -> None:
        self.dense_names.append(name)

    def routed(self, name: str, hidden: Tensor, index: Tensor, gates: Tensor) -> None:
        self.dense_names.append(name)

    def expert(self, name: str, expert: int, inputs: Tensor, gates: Tensor) -> None:
        self.experts.append((name, expert, inputs.clone()))

    def gave(self, site: str, expert: int, outputs: Tensor) -> None:
        self.outputs.append(outputs.clone())

    def fed(self, site: str, inputs: Tensor) -> Tensor:
        return inputs.half().float()


def test_recorders_are_told_the_same(tiny, tmp_path: Path) -> None:
    """Once, in the same order; what they change is changed."""
    checkpoint = open_checkpoint(tiny("deepseek_v3"))
    found = []
    for resources in (SMALL, TINY):
        with LayerStream(checkpoint, rows().ids, resources) as stream:
            hidden = stream.new_hidden(tmp_path / str(resources.ram))
            assert isinstance(hidden, OnDisk) == (resources is TINY)
            stream.embed(hidden)
            for layer in stream.layers():
                assert len(stream.chunks(layer)) == (8 if resources is TINY and layer else 0)
                found.append(list(stream.cross(layer, hidden, lambda batch: Told(), hidden)))
            found.append([hidden.get(stream.n_layers, batch) for batch in range(len(stream.batches))])
    half = len(found) // 2
    assert all(torch.equal(a, b) for a, b in zip(found[half - 1], found[-1], strict=True))
    for whole, parts in zip(found[: half - 1], found[half:-1], strict=True):
        for one, two in zip(whole, parts, strict=True):
            assert one.dense_names == two.dense_names
            assert [each[:2] for each in one.experts] == [each[:2] for each in two.experts]
            assert all(torch.equal(a[2], b[2]) for a, b in zip(one.experts, two.experts, strict=True))
            assert all(torch.equal(a, b) for a, b in zip(one.outputs, two.outputs, strict=True))
    assert any(told.outputs for told in found[1])


def test_memory_decides_how_many_experts_are_there(tiny) -> None:
    checkpoint = open_checkpoint(tiny("qwen3_moe"))
    layer = [each for each in checkpoint.weights if each.layer == 1]
    whole = layer_bytes(layer, 1)
    assert chunks(layer, 1, None) == chunks(layer, 1, 2 * whole) == ()
    some = chunks(layer, 1, 2 * whole - 2)
    assert 1 < len(some) < 8 and [each for part in some for each in part] == list(range(8))
    assert len(chunks(layer, 1, 0)) == 8
    assert len(chunks(layer, 2, 2 * whole - 2)) > len(some), "two versions take more"
    assert not chunks([each for each in layer if not each.is_expert], 1, 0)
