"""Calibration statistics against sums taken by hooks on transformers' own eager experts."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

from moequant.checkpoint import open_checkpoint
from moequant.errors import CheckpointError
from moequant.forward.experts import EXPERTS
from moequant.forward.model import build_model
from moequant.statistics.calibrate import calibrate
from moequant.statistics.importance import importance
from moequant.text.corpus import Rows
from tests import models

MOE = ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3"]


def rows(count: int = 6, length: int = 64, seed: int = 0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, models.VOCAB, (count, length), generator=generator)
    return Rows(ids, ("test",) * count, "random ids", ids.numel())


@pytest.mark.parametrize("family", models.CONFIGS)
def test_our_experts_give_the_eager_logits(tiny, family: str) -> None:
    folder = tiny(family)
    ours = build_model(open_checkpoint(folder), EXPERTS)
    theirs = models.reference(folder)
    with torch.inference_mode():
        ids = rows().ids
        assert (ours(input_ids=ids).logits - theirs(input_ids=ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize("family", MOE)
def test_moments_equal_a_float64_reference(tiny, family: str) -> None:
    """Every expert's moments recomputed from the block's input and the router's own output, in float64."""
    folder = tiny(family)
    checkpoint = open_checkpoint(folder)
    calibration = calibrate(checkpoint, rows())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    seen: list[tuple[torch.Tensor, ...]] = []
    block = model.model.layers[1].mlp
    block.experts.register_forward_pre_hook(lambda module, args: seen.append(args))
    with torch.inference_mode():
        for row in rows().ids:
            model(row[None])
    hidden, index, gate = (torch.cat(parts) for parts in zip(*seen, strict=True))
    up, down = (calibration.inputs[f"layers.1.experts.{side}"] for side in ("input", "inner"))
    for expert in range(checkpoint.n_experts):
        token, slot = torch.where(index == expert)
        x, g = hidden[token], gate[token, slot].double()
        one, two = linear(x, block.experts.gate_up_proj[expert]).chunk(2, -1)
        inner = torch.nn.functional.silu(one) * two
        for sums, inputs in ((up, x), (down, inner)):
            assert sums.tokens[expert] == len(token)
            torch.testing.assert_close(
                sums.moment[expert], inputs.double().square().sum(0), rtol=1e-4, atol=1e-9
            )
            gated = (g[:, None] * inputs.double()).square().sum(0)
            torch.testing.assert_close(sums.gated_moment[expert], gated, rtol=1e-4, atol=1e-9)
            torch.testing.assert_close(sums.gate_mass[expert], g.sum(), rtol=1e-5, atol=1e-9)
            assert sums.peak is not None
            largest = inputs.abs().max().double() if len(inputs) else torch.zeros((), dtype=torch.float64)
            torch.testing.assert_close(sums.peak[expert], largest, rtol=1e-4, atol=1e-9)


def test_dense_moments_and_the_head(tiny) -> None:
    folder = tiny("olmoe")
    checkpoint = open_checkpoint(folder)
    calibration = calibrate(checkpoint, rows())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen: dict[str, torch.Tensor] = {}
    for name in ("lm_head", "model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.k_proj"):
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.update({name: args[0].double().square().sum((0, 1))})
        )
    with torch.inference_mode():
        model(rows().ids)
    pairs = {
        "head.input": "lm_head",
        "layers.0.attn.output": "model.layers.0.self_attn.o_proj",
        "layers.1.attn.input": "model.layers.1.self_attn.k_proj",
    }
    for ours, theirs in pairs.items():
        torch.testing.assert_close(calibration.inputs[ours].moment[0], seen[theirs], rtol=1e-4, atol=1e-9)
        assert int(calibration.inputs[ours].tokens) == rows().ids.numel()


def test_token_counts_add_up(tiny) -> None:
    checkpoint = open_checkpoint(tiny("mixtral"))
    calibration = calibrate(checkpoint, rows())
    assert [route.layer for route in calibration.routes] == [0, 1]
    for route in calibration.routes:
        assert int(route.tokens.sum()) == 2 * rows().ids.numel()
        assert (
            abs(float(route.gate_mass.sum()) - rows().ids.numel()) < 1e-2
        )  # Mixtral's top-k weights add up to 1


def test_weights_that_are_not_finite_are_named(tmp_path) -> None:
    folder = models.build(tmp_path, "qwen3_moe")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.self_attn.v_proj.weight"][3, 5] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    named = r"model\.layers\.1\.self_attn\.v_proj\.weight \(layers\.1\.attn_v\): 1 of"
    with pytest.raises(CheckpointError, match=named):
        calibrate(open_checkpoint(folder), rows())


@pytest.mark.parametrize("seen", [0, 1, 2])
def test_experts_that_saw_next_to_nothing_have_finite_importance(tmp_path, seen: int) -> None:
    """A router that sends every token to two experts, but `seen` tokens of one id to two more."""
    folder = models.build(tmp_path, "qwen3_moe")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    hidden = tensors["model.embed_tokens.weight"].shape[1]
    embedding = torch.zeros(models.VOCAB, hidden, dtype=torch.bfloat16)
    embedding[:, 0], embedding[7, 0] = 4.0, -4.0  # token 7 points the other way
    embedding[:, 1:] = (
        torch.randn(models.VOCAB, hidden - 1, generator=torch.Generator().manual_seed(0)) * 0.01
    )
    router = torch.zeros(8, hidden, dtype=torch.bfloat16)
    router[:2, 0], router[2:4, 0] = 1.0, -1.0
    tensors["model.embed_tokens.weight"] = embedding
    tensors["model.layers.0.self_attn.o_proj.weight"].zero_()
    tensors["model.layers.0.mlp.gate.weight"] = router
    save_file(tensors, file, {"format": "pt"})
    ids = torch.randint(8, models.VOCAB, (2, 64), generator=torch.Generator().manual_seed(0))
    ids[0, :seen] = 7
    calibration = calibrate(open_checkpoint(folder), Rows(ids, ("test",) * 2, "ids", 128))
    assert calibration.routes[0].tokens.tolist() == [128 - seen] * 2 + [seen] * 2 + [0] * 4
    for side in ("input", "inner"):
        stats = calibration.inputs[f"layers.0.experts.{side}"]
        assert stats.tokens.tolist() == calibration.routes[0].tokens.tolist()
        for gating in ("none", "gate2"):
            found = importance(stats, gating)
            assert torch.isfinite(found).all() and (found > 0).all()
