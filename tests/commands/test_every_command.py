"""Families whose weights are cut, stacked or packed: every command runs, packed numbers stay as they are."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moequant.checkpoint import open_checkpoint
from moequant.commands.check import CheckSettings, check
from moequant.commands.compare import CompareSettings, run
from moequant.commands.convert import convert
from moequant.containers.gguf import imatrix
from moequant.containers.gguf.export import export
from moequant.errors import FamilyError
from moequant.forward.resources import Resources
from moequant.report.summary import Report
from moequant.statistics.calibrate import calibrate
from moequant.text.corpus import Rows
from moequant.values import Role, Stack
from tests import models
from tests.cli import test_cli
from tests.clients.llama import Llama
from tests.commands.test_convert import agrees, ids_for, settings
from tests.containers.folders import test_compressed_tensors

PINNED: dict[str, tuple[str, ...]] = {"deepseek_v3": (), "gpt_oss": (".=Q5_0",)}
"""Of one family types are measured, of the other they are given."""

FAMILIES = [*PINNED]
IDS = torch.randint(1, models.VOCAB, (4, 128), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="session")
def small(tiny):
    """`small("gpt_oss")`: of each kind of layer one, dense and routed, with a window and without."""
    return lambda family: tiny(family, num_hidden_layers=2, hidden_size=128)


@pytest.fixture(scope="module")
def rounded(small, tmp_path_factory: pytest.TempPathFactory, text: Path):
    """`rounded("gpt_oss")`: a file rounded under Hessians, and the report on it, made once."""
    folder, known = tmp_path_factory.mktemp("rounded"), {}

    def get(family: str) -> tuple[Path, Report]:
        if family not in known:
            out = folder / f"{family}.gguf"
            usual = {"effort": "default", "calib_tokens": 2048, "eval_tokens": 0}
            wanted = settings(text, "Q5_K_M", tensor_type=PINNED[family], **usual)
            known[family] = out, convert(small(family), out, wanted)
        return known[family]

    return get


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_is_rounded_under_its_own_statistics(rounded, family: str) -> None:
    out, report = rounded(family)
    losses = {loss.weight: loss for loss in report.losses}
    types = {choice.weight: choice.format for choice in report.plan.choices}
    assert losses.keys() == types.keys() == {weight.name for weight in report.checkpoint.weights}
    assert not any(loss.fallbacks for loss in report.losses)
    for weight in report.checkpoint.weights:
        loss = losses[weight.name]
        assert loss.error.shape == (weight.matrices,) and bool(torch.isfinite(loss.error).all()), weight.name
        if weight.site is not None:
            stats = report.calibration.inputs[weight.site.name]
            assert stats.moment.shape == (weight.matrices, weight.n_in) and bool(
                (stats.moment > 0).any(1).all()
            )
            assert bool((loss.error > 0).all()), "rounded, every matrix of it"
    with Llama(out, threads=1) as llama:
        assert llama.generate([5, 6, 7], 4)


def test_heads_have_losses_of_their_own(rounded) -> None:
    _, report = rounded("deepseek_v3")
    parts = [weight for weight in report.checkpoint.weights if weight.role in (Role.K_B, Role.V_B)]
    assert [(weight.name, weight.stack) for weight in parts[:2]] == [
        ("layers.0.attn_k_b", Stack.HEADS),
        ("layers.0.attn_v_b", Stack.NONE),
    ]
    assert [weight.shape for weight in parts[:2]] == [(4, 64, 32), (4 * 48, 64)] and len(parts) == 4
    assert all(len(set(loss.error.tolist())) == 4 for loss in report.losses if loss.role is Role.K_B)


def test_what_heads_are_fed_is_what_transformers_feeds_them(small) -> None:
    """k_b is absorbed into the queries: it multiplies the unrotated part of each head's."""
    checkpoint = export(open_checkpoint(small("deepseek_v3"))).checkpoint
    found = calibrate(checkpoint, Rows(IDS, ("a",) * 4, "random ids", IDS.numel()))
    model = AutoModelForCausalLM.from_pretrained(small("deepseek_v3"), dtype=torch.float32)
    queries: list[Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.q_b_proj.register_forward_hook(lambda module, args, output: queries.append(output))
    with torch.inference_mode():
        model(IDS)
    for number, output in enumerate(queries):
        expected = output.double().view(-1, 4, 48)[..., :32].square().sum(0)
        stats = found.inputs[f"layers.{number}.attn.q_nope"]
        torch.testing.assert_close(stats.moment, expected, rtol=1e-4, atol=1e-6)
        assert stats.tokens.tolist() == [IDS.numel()] * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_check_and_compare_hold(small, rounded, text: Path, family: str) -> None:
    out, _ = rounded(family)
    checked = check(out, CheckSettings(baseline=small(family), calib=text, tokens=1024, device="cpu"))
    assert checked.damages == ()
    assert {tensor.name for tensor in checked.tensors} >= {"blk.1.ffn_down_exps.weight"}
    found = run(small(family), [out], CompareSettings(text, 1024, resources=Resources(threads=1)))
    (measured,) = found.measured
    assert 0 < measured.comparison.kl_mean.value < 0.1
    errors = {error.weight: error for error in measured.errors}
    model = open_checkpoint(small(family))
    assert errors.keys() == {weight.name for weight in model.weights}
    assert all(len(errors[w.name].error) == w.shape[0] for w in model.weights if w.is_expert)


@pytest.mark.parametrize("family", FAMILIES)
def test_inspect_and_fit_describe_them(small, rounded, family: str) -> None:
    out, _ = rounded(family)
    for path in (small(family), out):
        shown = test_cli.run("inspect", path, "--json")
        assert shown.returncode == 0, shown.stderr
        assert json.loads(shown.stdout)
        fitted = test_cli.run("fit", path, "--vram", "0", "--ram", "1G", "--ctx", "512", "--json")
        assert fitted.returncode == 0, fitted.stderr
        assert json.loads(fitted.stdout)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_imatrix_of_route_serves_a_conversion(small, text: Path, tmp_path: Path, family: str) -> None:
    stats, matrix, out = (tmp_path / name for name in ("s.safetensors", "i.gguf", "q.gguf"))
    done = test_cli.run(
        "route", small(family), "--calib", text, "--calib-tokens", 2048, "-o", stats, "--imatrix-out", matrix
    )
    assert done.returncode == 0, done.stderr
    exported = export(open_checkpoint(small(family)))
    entries = imatrix.parse(matrix).entries
    assert entries.keys() == {exported.names[w.name] for w in exported.weights if w.site is not None}
    for weight in exported.weights:
        if weight.site is not None:  # as llama-quantize wants it: one for each slice of the file's tensor
            shape, entry = exported.shapes[weight.name], entries[exported.names[weight.name]]
            slices = shape[0] if len(shape) == 3 else 1
            assert (entry.sums.numel(), len(entry.counts)) == (slices * weight.n_in, slices), weight.name
    for brought in ({"imatrix": matrix}, {"stats": stats}):
        wanted = settings(text, "Q2_K", eval_tokens=0, overwrite=True, **brought)
        report = convert(small(family), out, wanted)
        assert report.calibration is not None and report.calibration.tokens == 2048
        with Llama(out, threads=1) as llama:
            assert llama.generate([5, 6, 7], 4)


def test_latent_attention_in_a_folder(small, text: Path, tmp_path: Path) -> None:
    """kv_b stays whole there: transformers knows no halves of it."""
    out, matrix = tmp_path / "out", tmp_path / "i.gguf"
    wanted = settings(text, None, format="safetensors", group_size=32, quantize_attention=True)
    report = convert(small("deepseek_v3"), out, replace(wanted, imatrix_out=matrix))
    assert {"blk.0.attn_k_b.weight", "blk.0.attn_v_b.weight"} <= imatrix.parse(matrix).entries.keys()
    assert {choice.weight for choice in report.plan.choices if choice.format == "W4A16_G32"} >= {
        "layers.1.attn_kv_b",
        "layers.1.attn_q_a",
        "layers.1.experts.down",
        "layers.1.shared.up",
        "layers.0.ffn.down",
    }
    assert report.comparison is not None and report.comparison.kl_mean.value > 0
    test_compressed_tensors.agrees(small("deepseek_v3"), out)


def test_a_folder_cannot_name_experts_that_are_one_tensor(small, text: Path, tmp_path: Path) -> None:
    with pytest.raises(FamilyError, match=r"gpt_oss: .* no name for a single expert.* --scheme MXFP4A16"):
        convert(small("gpt_oss"), tmp_path / "out", settings(text, None, format="safetensors", group_size=32))
    assert not (tmp_path / "out").exists()


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes u8 [.., out, in / 32, 32] and scale bytes u8 [.., out, in / 32] of a weight [.., out, in]."""
    blocks = weight.float().unflatten(-1, (-1, 32))
    exponent = torch.floor(torch.log2(blocks.abs().amax(-1))) - 2
    near = (blocks[..., None] * 2.0 ** -exponent[..., None, None] - E2M1).abs().argmin(-1)
    return near.to(torch.uint8), (exponent + 127).to(torch.uint8)


@pytest.fixture(scope="module")
def shipped(small, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A gpt-oss with experts in MXFP4, as the release has them, and the same decoded by transformers."""
    folder, twin = (tmp_path_factory.mktemp("mxfp4") / name for name in ("packed", "decoded"))
    for copy in (folder, twin):
        shutil.copytree(small("gpt_oss"), copy)
    stored = load_file(folder / "model.safetensors")
    decoded = dict(stored)
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        nibbles, scales = codes(stored.pop(name).transpose(1, 2))
        stored[f"{name}_blocks"] = nibbles[..., 0::2] | nibbles[..., 1::2] << 4
        stored[f"{name}_scales"] = scales
        values = convert_moe_packed_tensors(stored[f"{name}_blocks"], scales, dtype=torch.bfloat16)
        assert values.shape == decoded[name].shape
        decoded[name] = values.contiguous()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    save_file(decoded, twin / "model.safetensors", {"format": "pt"})
    models.edit_config(folder, quantization_config={"quant_method": "mxfp4"})
    return folder, twin


def test_mxfp4_is_decoded_as_transformers_does(shipped, text: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "packed.gguf", tmp_path / "decoded.gguf"
    for folder, file in zip(shipped, (out, other), strict=True):
        convert(folder, file, settings(text, "F32", eval_tokens=0))
    agrees(shipped[1], out)
    with Llama(out, threads=1) as one, Llama(other, threads=1) as two:
        ids = ids_for(one.n_vocab, 64).tolist()
        assert (one.logits(ids) == two.logits(ids)).all()


@pytest.mark.parametrize("effort", ["fast", "default"])
def test_mxfp4_is_taken_over_bit_for_bit(shipped, text: Path, tmp_path: Path, effort: str) -> None:
    """4.25 bits a weight without any loss: no plan that has room for it takes anything else."""
    folder, out = shipped[0], tmp_path / "q.gguf"
    wanted = settings(text, "Q4_K_M", effort=effort, eval_tokens=0)
    report = convert(folder, out, wanted)
    experts = [weight.name for weight in report.checkpoint.weights if weight.is_expert]
    types = {choice.weight: choice for choice in report.plan.choices}
    assert {types[name].format for name in experts} == {"MXFP4"} and len(experts) == 6
    assert all(types[name].kl == 0 for name in experts)
    assert all(not loss.error.any() for loss in report.losses if loss.weight in experts)
    stored = load_file(folder / "model.safetensors")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}
    for layer in range(2):
        for file, name, rows in (
            ("gate", "gate_up", slice(0, None, 2)),
            ("up", "gate_up", slice(1, None, 2)),
            ("down", "down", slice(None)),
        ):
            at = f"model.layers.{layer}.mlp.experts.{name}_proj"
            packed, scales = (stored[f"{at}_{kind}"][:, rows] for kind in ("blocks", "scales"))
            order = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
            theirs = order[..., :16] | order[..., 16:] << 4  # ggml: element j low, element j + 16 high
            expected = torch.cat([scales[..., None], theirs], -1).flatten(-2)
            found = tensors[f"blk.{layer}.ffn_{file}_exps.weight"].data
            assert np.array_equal(found, expected.numpy()), (layer, file)
    with Llama(out, threads=1) as llama:
        assert llama.generate([5, 6, 7], 4)


def test_mxfp4_is_a_baseline_like_any_other(shipped, text: Path) -> None:
    """Released numbers are the model, however few bits they have."""
    found = run(shipped[0], [shipped[1]], CompareSettings(text, 1024, resources=Resources(threads=1)))
    assert found.base.kind == found.candidates[0].kind == "checkpoint"
    assert found.measured[0].comparison.kl_max == 0.0 and found.measured[0].comparison.same_top == 1.0
