"""Folders rounded under Hessians: less is lost, loaders read them, and nothing is silent."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from moequant.checkpoint import load, open_checkpoint
from moequant.commands.compare import CompareSettings
from moequant.commands.compare import run as compare
from moequant.commands.convert import Settings, convert
from moequant.containers.folders import awq, compressed_tensors, gptq
from moequant.containers.folders.plan import storage
from moequant.errors import CheckpointError, PlanError
from moequant.evaluate import score_row
from moequant.forward.experts import EXPERTS
from moequant.forward.model import build_model
from moequant.report.summary import Report
from moequant.text import corpus
from moequant.text.rows import token_rows
from moequant.values import Role
from tests import models
from tests.clients import transformers_folder
from tests.containers.folders.cases import own_decoder
from tests.statistics.starving import never_chosen, rewrite

IDS = torch.randint(5, models.VOCAB, (6, 64), generator=torch.Generator().manual_seed(9))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return words(tmp_path_factory.mktemp("text") / "calib.txt", seed=0)


def words(path: Path, seed: int) -> Path:
    """Words of the tiny models' text in random order: two seeds are two texts of one kind."""
    pool, chosen = " ".join(models.TEXT).split(), random.Random(seed)
    path.write_text("\n".join(" ".join(chosen.choices(pool, k=40)) for _ in range(120)), encoding="utf-8")
    return path


def made(model: Path, out: Path, text: Path, **changes: object) -> Report:
    usual = {"format": "safetensors", "group_size": 64, "calib_tokens": 2048, "self_check": False}
    return convert(model, out, Settings(calib=text, eval_tokens=0, **(usual | changes)))


def kl(model: Path, folder: Path, ids: Tensor) -> float:
    checkpoint = open_checkpoint(model)
    base, rounded = (
        build_model(checkpoint, EXPERTS),
        build_model(checkpoint, EXPERTS, own_decoder(folder).load),
    )
    with torch.inference_mode():
        pairs = zip(base(ids).logits, rounded(ids).logits, ids, strict=True)
        return float(torch.cat([score_row(*each).kl for each in pairs]).mean())


def first_hessians(model: Path, text: Path) -> Tensor:
    """f64 [E, in, in]: sums of g² x xᵀ, x what the first layer feeds its experts, by transformers' code."""
    checkpoint = open_checkpoint(model)
    rows = token_rows(checkpoint, corpus.read(text), 4096, 0, None)
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, experts_implementation="eager")
    block, seen = whole.get_submodule("model.layers.0.mlp"), {}
    block.register_forward_pre_hook(lambda module, args: seen.update(x=args[0].flatten(0, 1)))
    found = torch.zeros(8, 256, 256, dtype=torch.float64)
    with torch.inference_mode():
        for ids in rows.ids.split(4):
            whole(ids)
            _, gates, index = block.gate(seen["x"])
            for expert in range(8):
                tokens, choice = (index == expert).nonzero(as_tuple=True)
                x = seen["x"][tokens].double() * gates[tokens, choice].double()[:, None]
                found[expert] += x.T @ x
    return found


def correlated(folder: Path) -> Path:
    """A model whose experts are fed inputs that share few directions, as those of trained models do."""
    made = torch.Generator().manual_seed(4)
    few = torch.randn(models.VOCAB, 24, generator=made) @ torch.randn(24, 256, generator=made) / 24**0.5
    embedding = few + 0.3 * torch.randn(models.VOCAB, 256, generator=made)
    return rewrite(models.build(folder, "qwen3_moe"), {"model.embed_tokens.weight": embedding})


def test_outputs_lose_less_than_by_the_plain_search(tmp_path: Path, text: Path) -> None:
    model = correlated(tmp_path / "model")
    made(model, tmp_path / "plain", text, effort="fast", calib_tokens=4096)
    alone = made(model, tmp_path / "alone", text, coupled=False, calib_tokens=4096)
    made(model, tmp_path / "both", text, calib_tokens=4096)
    hessians = first_hessians(model, text)
    weights = {w.name: w for w in alone.checkpoint.weights}
    for name in ("layers.0.experts.gate", "layers.0.experts.up"):
        exact = load(weights[name]).double()
        lost = []
        for folder in ("plain", "alone"):
            off = exact - own_decoder(tmp_path / folder).load(weights[name]).double()
            lost.append(((off @ hessians) * off).sum((1, 2)))
        assert bool((lost[1] < 0.8 * lost[0]).all()), ("every expert", lost[1] / lost[0])
    other = token_rows(open_checkpoint(model), corpus.read(words(tmp_path / "other.txt", 1)), 4096, 0, None)
    found = [kl(model, tmp_path / folder, other.ids) for folder in ("plain", "alone", "both")]
    assert found[1] < found[0] and found[2] < found[0], found
    card = (tmp_path / "both" / "README.md").read_text()
    assert "under the Hessian of its own inputs, each layer towards undoing" in card
    assert "a search of scales, then every weight" in (tmp_path / "plain" / "README.md").read_text()


@pytest.mark.parametrize(("family", "attention"), [("mixtral", True), ("qwen3_moe", False), ("olmoe", True)])
def test_transformers_computes_what_our_decoder_predicts(
    tiny, tmp_path: Path, text: Path, family: str, attention: bool
) -> None:
    """Rotary rows are turned for llama.cpp only: in the folder they stand as transformers has them."""
    model, out = tiny(family, num_hidden_layers=2 if family == "olmoe" else 1), tmp_path / "out"
    report = made(model, out, text, quantize_attention=attention)
    loaded, ours = (
        transformers_folder.load(out),
        build_model(report.checkpoint, EXPERTS, own_decoder(out).load),
    )
    values = dict(loaded.named_parameters())
    for name, expected in ours.named_parameters():
        assert torch.equal(values[name].float(), expected.float()), name
    with torch.inference_mode():
        assert (loaded(IDS[:1]).logits - ours(IDS[:1]).logits).abs().max() < 1e-4
    reader = compressed_tensors.open_folder(out)
    for loss in report.losses:
        assert loss.format == "W4A16_G64" and bool((loss.error < 0.05).all()) and not loss.fallbacks
        (weight,) = (w for w in report.checkpoint.weights if w.name == loss.weight)
        # Correction may turn an attention output far; rows in another order would have a cosine of 0.
        exact, decoded = (x.flatten().double() for x in (load(weight), reader.load(weight)))
        assert float(exact @ decoded / (exact.norm() * decoded.norm())) > 0.5, loss.weight
    assert any(loss.role is Role.ATTN_Q for loss in report.losses) == attention


def test_what_rounded_inputs_lose_is_in_the_report(tiny, tmp_path: Path, text: Path) -> None:
    """The figures of the card are those of `compare`: what the folder loses where it is served."""
    model, out = tiny("qwen3_moe"), tmp_path / "out"
    scored = {"eval": text, "eval_tokens": 1024, "effort": "fast", "self_check": False}
    report = convert(model, out, Settings(format="safetensors", scheme="FP8_DYNAMIC", calib=text, **scored))
    asked = CompareSettings(eval=text, eval_tokens=1024)
    served, exact = (compare(model, [out], each).measured[0] for each in (asked, replace(asked, exact=True)))
    assert report.comparison == served.comparison != exact.comparison
    assert "scored with inputs rounded as vLLM rounds them" in report.notes


@pytest.mark.parametrize("layout, group", [(gptq, -1), (awq, 32)])
def test_other_layouts_hold_the_same_codes(
    tiny, tmp_path: Path, text: Path, layout: ModuleType, group: int
) -> None:
    model, readers, kinds = tiny("olmoe", num_hidden_layers=1, num_experts=4), [], []
    for format_, opened in (("safetensors", compressed_tensors), (layout.__name__.split(".")[-1], layout)):
        wanted = {"format": format_, "bits": 4, "group_size": group}
        report = made(model, tmp_path / format_, text, **wanted)
        readers.append(opened.open_folder(tmp_path / format_))
        settings = Settings(**wanted).folder
        kinds.append(storage(report.checkpoint, settings.wanted, settings.layout))
    for weight in (w for w in report.checkpoint.weights if w.role.is_expert):
        for expert in range(weight.matrices):
            (codes, scales), (theirs, halves) = (
                kind.integers(reader.stored(weight, expert), weight.n_in)
                for kind, reader in zip(kinds, readers, strict=True)
            )
            assert torch.equal(codes, theirs) and torch.equal(scales.float(), halves.float())


def test_experts_without_tokens_are_rounded_too(tmp_path: Path, text: Path) -> None:
    report = made(never_chosen(tmp_path / "model", 3), tmp_path / "out", text)
    for loss in report.losses:
        assert loss.tokens is not None and loss.tokens[5:].tolist() == [0, 0, 0]
        (weight,) = (w for w in report.checkpoint.weights if w.name == loss.weight)
        exact, decoded = load(weight).float(), own_decoder(tmp_path / "out").load(weight).float()
        off = (exact - decoded).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
        assert bool((off[5:] < 0.2).all())
    summary = " ".join(report.summary().split())
    assert "calibrated on 2,048 tokens of: " in summary, "the text of Hessians alone"
    assert f"2,048 tokens of {text.name}" in report.html()
    assert "6 experts saw no token" in summary and "0.5, 0.6, 0.7, 1.5, 1.6, 1.7" in summary
    assert "worst-hit experts" in summary


def test_fallbacks_are_counted_and_shown(tmp_path: Path, text: Path) -> None:
    """Where a layer's up projections are 0, so is all that its down projections are ever fed."""
    model = models.build(tmp_path / "model", "qwen3_moe")
    up = {f"model.layers.0.mlp.experts.{e}.up_proj.weight": torch.zeros(256, 256) for e in range(8)}
    report = made(rewrite(model, up), tmp_path / "out", text)
    reasons = {loss.weight: loss.fallbacks for loss in report.losses if loss.fallbacks}
    assert reasons == {"layers.0.experts.down": ("no input was seen",) * 8}
    assert "rounded by the plain search, 8 times: no input was seen" in report.summary()


@pytest.mark.parametrize("scheme", ["W4A16", "FP8"])
def test_an_expert_with_nan_is_named(tiny, tmp_path: Path, text: Path, scheme: str) -> None:
    """In the last layer, whose outputs no statistics see. The file's tensor is named, and nothing is left."""
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny("qwen3_moe", moe_intermediate_size=128), model)
    name = "model.layers.1.mlp.experts.5.down_proj.weight"

    values = load_file(model / "model.safetensors")[name]
    values[3, 5] = torch.nan
    rewrite(model, {name: values})
    settings = Settings(calib=text, calib_tokens=1024, eval_tokens=0, self_check=False)
    with pytest.raises(CheckpointError, match="1 of 32768 values are NaN") as error:
        convert(model, out, replace(settings, format="safetensors", scheme=scheme))
    assert name in str(error.value) and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_size_that_keeps_everything_is_refused(tiny, tmp_path: Path, text: Path) -> None:
    settings = Settings(calib=text, calib_tokens=1024, eval_tokens=0, format="safetensors", size="1T")
    with pytest.raises(
        PlanError, match="--size 1T: nothing would be quantized; the weights as they are take"
    ):
        convert(tiny("qwen3_moe"), tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()
