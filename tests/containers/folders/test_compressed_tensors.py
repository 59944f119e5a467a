"""transformers and compressed-tensors load what is written, every expert, and compute what we decode."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from moequant.checkpoint import load, open_checkpoint
from moequant.containers.folders import compressed_tensors
from moequant.errors import VerifyError
from moequant.forward.experts import EXPERTS
from moequant.forward.model import build_model
from moequant.rounding.diagonal import Quantizer
from moequant.statistics.calibrate import calibrate
from moequant.statistics.importance import importance
from moequant.text.corpus import Rows
from tests import models
from tests.clients import transformers_folder
from tests.containers.folders.cases import own_decoder, quantized

MOE = ["mixtral", "qwen3_moe", "olmoe"]
IDS = torch.randint(1, models.VOCAB, (1, 96), generator=torch.Generator().manual_seed(0))


def agrees(model: Path, folder: Path) -> None:
    """transformers' own loader against our decoder in our model, at every position."""
    loaded = transformers_folder.load(folder)
    checkpoint, decoder = open_checkpoint(model), own_decoder(folder)
    ours = build_model(checkpoint, EXPERTS, decoder.load)
    values = dict(loaded.named_parameters())
    for name, expected in ours.named_parameters():
        assert torch.equal(values[name], expected), name  # all experts, decoded by compressed-tensors
    with torch.inference_mode():
        assert (loaded(IDS).logits - ours(IDS).logits).abs().max() < 1e-4


@pytest.mark.parametrize(
    "family, bits, group",
    [*((family, 4, 128) for family in MOE), ("qwen3_moe", 4, 32), ("mixtral", 4, -1), ("olmoe", 8, 64)],
)
def test_transformers_computes_what_our_decoder_predicts(
    tiny, tmp_path: Path, family: str, bits: int, group: int
) -> None:
    quantized(tiny(family), tmp_path / "out", bits=bits, group_size=group)
    agrees(tiny(family), tmp_path / "out")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_with_attention_too(tiny, tmp_path: Path, family: str) -> None:
    """Mixtral's q and k have their rows turned in GGUF: here they stay as transformers has them."""
    quantized(tiny(family), tmp_path / "out", quantize_attention=True, group_size=64)
    agrees(tiny(family), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not any("self_attn" in name for name in config["quantization_config"]["ignore"])


@pytest.mark.parametrize(
    "changes",
    [{"save": {"save_original_format": False}}, {"tie_word_embeddings": True}, {"dtype": torch.float16}],
)
@pytest.mark.parametrize("family", ["mixtral"])
def test_fused_tied_and_f16_checkpoints(
    tiny, tmp_path: Path, family: str, changes: dict[str, object]
) -> None:
    folder = models.build(tmp_path / "model", "mixtral", **changes)
    quantized(folder, tmp_path / "out")
    agrees(folder, tmp_path / "out")
    names = own_decoder(tmp_path / "out").tensors
    assert any(".experts.3." in name and name.endswith("weight_packed") for name in names)
    assert not any("gate_up_proj" in name for name in names)


def test_fused_or_not_the_files_are_the_same(tiny, tmp_path: Path) -> None:
    for number, save in enumerate(({}, {"save": {"save_original_format": False}})):
        quantized(tiny("mixtral", **save), tmp_path / str(number))
    one, two = ((tmp_path / str(number) / "model.safetensors").read_bytes() for number in range(2))
    assert one == two


def test_a_dense_model_has_its_feed_forward_quantized(tiny, tmp_path: Path) -> None:
    for family in ("llama", "qwen3"):
        out = tmp_path / family
        quantized(tiny(family), out)
        loaded = transformers_folder.load(out)
        ours = build_model(open_checkpoint(tiny(family)), EXPERTS, own_decoder(out).load)
        with torch.inference_mode():
            assert (
                loaded(IDS).logits - ours(IDS).logits
            ).abs().max() < 2e-2  # bf16 products of dense linears


@pytest.mark.parametrize("family", MOE)
def test_the_reader_decodes_every_weight_as_we_do(tiny, tmp_path: Path, family: str) -> None:
    out = tmp_path / "out"
    made, losses = quantized(tiny(family), out, quantize_attention=True)
    theirs, ours = compressed_tensors.open_folder(out), own_decoder(out)
    formats = {choice.weight: choice.format for choice in made.plan.choices}
    for weight in made.checkpoint.weights:
        decoded = theirs.load(weight)
        assert torch.equal(decoded, ours.load(weight)) and decoded.shape == weight.shape
        exact = load(weight)
        if theirs.is_quantized(weight):
            assert formats[weight.name] == "W4A16"
            off = (decoded.float() - exact.float()).square().sum((-1, -2)) / exact.float().square().sum(
                (-1, -2)
            )
            assert (off < 0.02).all(), "an expert is not itself"
            (loss,) = (loss for loss in losses if loss.weight == weight.name)
            assert torch.allclose(loss.error, off.double().reshape(-1), rtol=1e-3)
        else:
            assert torch.equal(decoded, exact), "kept weights are copied"


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("family", MOE)
def test_every_linear_is_either_quantized_or_named(
    tiny, tmp_path: Path, family: str, attention: bool
) -> None:
    quantized(tiny(family), tmp_path / "out", quantize_attention=attention)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    ignored = set(config.pop("quantization_config")["ignore"])
    stored = own_decoder(tmp_path / "out").tensors
    packed = {name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny(family)))
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert linears and linears <= ignored | packed and not ignored & packed
    routers = {name.removesuffix(".weight") for name in stored if name.endswith(".gate.weight")}
    assert len(routers) == 2 and routers <= ignored


def test_calibrated_importance_decides_what_is_kept_best(tiny, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny("mixtral"))
    rows = torch.randint(1, models.VOCAB, (4, 256), generator=torch.Generator().manual_seed(1))
    calibration = calibrate(checkpoint, Rows(rows, ("random",) * 4, "random tokens", 1024))
    aware = quantized(tiny("mixtral"), tmp_path / "aware", calibration)[1]
    blind_made, _ = quantized(tiny("mixtral"), tmp_path / "blind")
    reader = compressed_tensors.open_folder(tmp_path / "blind")
    quantizer = Quantizer(calibration)
    for loss in aware:
        weight = next(w for w in blind_made.checkpoint.weights if w.name == loss.weight)
        w = importance(quantizer.stats(weight))[:, None].double()
        exact, decoded = load(weight).double(), reader.load(weight).double()
        blind = ((exact - decoded).square() * w).sum((1, 2)) / (exact.square() * w).sum((1, 2))
        assert (loss.error < blind).all()
        assert loss.tokens is not None and len(loss.tokens) == weight.matrices


def test_damage_is_named(tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made, _ = quantized(tiny("qwen3_moe"), out)
    weight = next(w for w in made.checkpoint.weights if w.role == "down")
    for what, change, message in (
        ("absent", lambda folder: (folder / "model.safetensors").unlink(), "not a readable model folder"),
        ("plain", lambda folder: models.edit_config(folder, quantization_config={}), "is not quantized"),
        (
            "gptq",
            lambda folder: models.edit_config(folder, quantization_config={"quant_method": "gptq"}),
            "is gptq, expected compressed-tensors",
        ),
    ):
        folder = Path(shutil.copytree(out, tmp_path / what))
        change(folder)
        with pytest.raises(VerifyError, match=message):
            compressed_tensors.open_folder(folder)
    reader = compressed_tensors.open_folder(out)
    with pytest.raises(VerifyError, match=r"mlp.experts.7.up_proj.weight is missing"):
        reader.tensor("model.layers.0.mlp.experts.7.up_proj.weight")
    with pytest.raises(VerifyError, match=r"experts.0.down_proj is \[256, 256\], expected \[256, 128\]"):
        reader.load(replace(weight, shape=(8, 256, 128)))
