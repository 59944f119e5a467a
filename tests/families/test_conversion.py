"""Every family, whole: what llama.cpp computes with its file is what transformers computes of its folder."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from moequant.checkpoint import Checkpoint, load, open_checkpoint
from moequant.commands.convert import Settings, convert
from moequant.containers.gguf.container import GgufContainer
from moequant.containers.gguf.header import Header
from moequant.containers.gguf.read import read_header
from moequant.containers.opened import open_model
from moequant.forward.model import Provider, build_model
from moequant.forward.resources import Resources
from moequant.forward.stream import LayerStream
from moequant.hub import GgufModel
from moequant.hub.fetch import headers
from moequant.inspection.presets import preset_files
from moequant.report.summary import Report
from moequant.rounding.coupled import Coupled
from moequant.rounding.diagonal import Quantizer
from moequant.rounding.feedback import Options
from moequant.rounding.results import decoded
from moequant.rounding.rounder import Rounding
from moequant.rounding.shrinkage import DIAGONAL, Trial
from moequant.rounding.streams import Streams
from moequant.runtimes.llama_cpp.kv_cache import UNMODELLED, Load, compute_bytes, kv_bytes
from moequant.values import Role, Weight
from moequant.values.ops import Exp, NegativeExp, Plus
from tests import models
from tests.clients.llama import Llama

MOST = {"jamba": 0.8}
"""KL divergence at Q4_K_M, 0.5 where no other is said. Rounding its inputs to 8 bits moves the logits of this
random model by 0.24 of their spread, ten times as much as others, and at Q8_0 its KL divergence is 0.10."""

TIES = 0.99
"""The share of positions at which logits agree: at others the router's choice may have been a tie."""

INEXACT = (Plus, NegativeExp, Exp)
"""Ops that round: what they are given back is off by as much."""

QUICK = Rounding(
    options=Options(effort="fast", rounds=0, threads=1),
    trial=Trial(mixes=(DIAGONAL,), experts=1, rows=4),
)
"""Coupled rounding with no search in it: what is tested here is who is fed what."""


def converted(folder: Path, out: Path, text: Path, type_: str, **changes: object) -> Report:
    given = {"effort": "fast", "eval_tokens": 0, "overwrite": True} | changes
    return convert(folder, out, Settings(type_, text, 1024, text, **given))


def reference(folder: Path, ids: torch.Tensor) -> np.ndarray:
    """transformers' own logits of the folder as it is, f32 [n, vocab]."""
    model = models.reference(folder)
    with torch.inference_mode():
        return model(ids[None]).logits[0].numpy()


def released(folder: Path, family: str) -> Path:
    """A tiny checkpoint as people release it."""
    return models.as_released(models.build(folder / "model", family), family)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory):
    """`saved("mixtral")`: a tiny checkpoint as transformers saves it, built once."""
    return cache(lambda family: models.build(tmp_path_factory.mktemp(family) / "model", family))


@pytest.fixture(scope="module")
def exact(saved, tmp_path_factory: pytest.TempPathFactory, text: Path):
    """`exact("mixtral")`: the file that has every number of it, made once. transformers saves no MTP."""

    def get(family: str) -> Path:
        out = tmp_path_factory.mktemp(family) / "f32.gguf"
        converted(saved(family), out, text, "F32", self_check=False, mtp=False)
        return out

    return cache(get)


@pytest.mark.parametrize("family", models.CONFIGS)
def test_an_f32_file_gives_the_logits_of_transformers(saved, exact, family: str) -> None:
    """At every position: a wrong transpose or permutation shows."""
    with Llama(exact(family), threads=1) as llama:
        ids = torch.randint(1, llama.n_vocab, (256,), generator=torch.Generator().manual_seed(0))
        difference = np.abs(llama.logits(ids.tolist()) - reference(saved(family), ids)).max(1)
    assert np.quantile(difference, TIES) < models.WITHIN.get(family, 5e-4)


SCALED = {
    "attention factor": {"attention_factor": 1.5},
    "two mscales": {"mscale": 0.8, "mscale_all_dim": 0.5},
    "equal mscales": {"mscale": 1.0, "mscale_all_dim": 1.0},
    "half an mscale": {"mscale": 0.8},
}
"""What configs say of how much YaRN multiplies queries and keys by."""


@pytest.mark.parametrize("scale", SCALED)
def test_yarn_scales_attention_as_in_transformers(tmp_path: Path, text: Path, scale: str) -> None:
    yarn = models.YARN | SCALED[scale]
    folder = models.build(tmp_path / "model", "qwen3_moe", rope_parameters=yarn)
    converted(folder, tmp_path / "f32.gguf", text, "F32", self_check=False)
    with Llama(tmp_path / "f32.gguf", threads=1) as llama:
        ids = torch.randint(1, llama.n_vocab, (300,), generator=torch.Generator().manual_seed(0))
        difference = np.abs(llama.logits(ids.tolist()) - reference(folder, ids)).max(1)
    assert np.quantile(difference, TIES) < 5e-4


@pytest.mark.parametrize("family", models.CONFIGS)
def test_however_it_is_saved_the_file_is_the_same(exact, tmp_path: Path, text: Path, family: str) -> None:
    """As it is released, as transformers 5 saves it, and with the experts in one tensor."""
    fused = models.build(tmp_path / "fused" / "model", family, save={"save_original_format": False})
    for number, folder in enumerate((released(tmp_path / "released", family), fused)):
        file = tmp_path / f"{number}.gguf"
        converted(folder, file, text, "F32", self_check=False, mtp=False)
        assert file.read_bytes() == exact(family).read_bytes()


def without_weights(folder: Path, to: Path) -> Path:
    """The folder's config and tokenizer alone; of its name, since files say it."""
    return shutil.copytree(folder, to / folder.name, ignore=shutil.ignore_patterns("*.safetensors*"))


@pytest.mark.parametrize("family", models.CONFIGS)
def test_a_file_of_a_file_is_the_same(saved, exact, tmp_path: Path, text: Path, family: str) -> None:
    """A file as the source: its tensors are gone back to the weights, and then forth again."""
    second, source = tmp_path / "2.gguf", GgufModel(exact(family), without_weights(saved(family), tmp_path))
    converted(source, second, text, "F32", self_check=False)
    assert second.read_bytes() == exact(family).read_bytes()
    theirs = {weight.name: weight for weight in open_model(headers(source)).weights}
    mine = open_checkpoint(saved(family)).weights
    assert theirs.keys() == {weight.name for weight in mine}
    for weight in mine:
        other = theirs[weight.name]
        rounds = any(isinstance(op, INEXACT) for ops, _ in other.origin.pieces for op in ops)
        torch.testing.assert_close(
            load(other).float(), load(weight).float(), rtol=0, atol=1e-6 if rounds else 0, msg=weight.name
        )


@pytest.mark.parametrize("family", models.CONFIGS)
def test_a_quantized_file_is_compared_and_generates(saved, tmp_path: Path, text: Path, family: str) -> None:
    folder, out = saved(family), tmp_path / "q.gguf"
    report = converted(folder, out, text, "Q4_K_M", eval_tokens=1024)
    assert report.comparison is not None and 0 < report.comparison.kl_mean.value < MOST.get(family, 0.5)
    with Llama(out, threads=1) as llama:
        produced = llama.generate([5, 6, 7], 4)
        assert produced and np.isfinite(llama.logits(produced)).all()
    if (header := read_header(out)).arch not in UNMODELLED:
        planned = next(made.header for made in preset_files(headers(folder)) if made.name == "Q4_K_M")
        assert memory(planned) == memory(header), "fit answers for the folder as for its file"


def memory(header: Header) -> tuple[object, ...]:
    """What a server needs beside the weights."""
    load = Load(256)
    return kv_bytes(header, load), compute_bytes(header, load)


@pytest.mark.parametrize("family", models.CONFIGS)
def test_every_weight_is_rounded_under_what_it_is_fed(saved, tmp_path: Path, family: str) -> None:
    """Two streams, exact and rounded, end where the two models do, whatever was taken from memory between."""
    checkpoint = GgufContainer(open_checkpoint(saved(family))).checkpoint
    matrices = [weight for weight in checkpoint.weights if not weight.role.keeps_precision]
    types = {weight.name: "Q8_0" if weight.n_in % 32 == 0 else "F16" for weight in matrices}
    ids = torch.randint(1, models.VOCAB, (4, 48), generator=torch.Generator().manual_seed(0))
    plain = Quantizer(None, "fast").pack
    with LayerStream(checkpoint, ids, Resources(threads=1, batch_tokens=96)) as stream:
        streams = Streams.under(tmp_path, stream)
        made = {
            packed.weight.name: (packed, loss)
            for packed, loss in Coupled(stream, types, plain, QUICK).run(streams)
        }
        ends = [
            torch.cat([hidden.get(stream.n_layers, batch) for batch in range(len(stream.batches))])
            for hidden in (streams.exact, streams.rounded)
        ]
    assert made.keys() == types.keys()
    assert all(weight.site or weight.role in (Role.EMBEDDING, Role.LOOKUP) for weight in matrices)
    assert not [loss for _, loss in made.values() if loss.fallbacks]
    for weight in matrices:
        packed, loss = made[weight.name]
        assert packed.data.shape[:-1] == weight.shape[:-1]
        assert loss.error.shape == (weight.matrices,) and bool(loss.error.isfinite().all())
        assert float(loss.error.max()) < 1e-3, weight.name

    def rounded(weight: Weight) -> torch.Tensor:
        return decoded(made[weight.name][0]) if weight.name in made else load(weight)

    for end, provider in zip(ends, (load, rounded), strict=True):
        difference = (end - last_states(checkpoint, provider, ids)).abs().amax(-1)
        assert float(difference.quantile(TIES)) < 1e-3


def last_states(checkpoint: Checkpoint, provider: Provider, ids: torch.Tensor) -> torch.Tensor:
    """What the last layer of the whole model gives, f32 [rows, n, h]."""
    model, seen = build_model(checkpoint, provider=provider), []
    layers = model.get_submodule(checkpoint.family.layers_at)
    layers[-1].register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.inference_mode():
        model(input_ids=ids, use_cache=False)
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]
