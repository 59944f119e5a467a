"""Fishers: against gradients one token at a time, in another implementation of the experts, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from moequant.checkpoint import load, open_checkpoint
from moequant.containers.gguf.export import export
from moequant.errors import CheckpointError
from moequant.forward.experts import EXPERTS
from moequant.forward.model import build_model
from moequant.statistics import fisher
from moequant.statistics.fisher import PRIOR, Needs, check_memory, gather, needs, noise, shrink
from moequant.values import Weight
from moequant.values.ops import apply
from tests import models

ROWS, LENGTH, SEED = 5, 300, 11
"""More tokens than a batch holds, and batches that are not all as large."""


def text() -> Tensor:
    return torch.randint(5, models.VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(2))


def labels(chances: Tensor, generator: torch.Generator) -> Tensor:
    """What the documentation says: the index where the running sum of the chances passes a random number."""
    at = torch.rand(*chances.shape[:-1], 1, generator=generator, dtype=torch.float64)
    return (chances.double().cumsum(-1) < at * chances.double().sum(-1, keepdim=True)).sum(-1)


def in_batches(model: torch.nn.Module, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(ids, labels) of each batch, drawn from the float32 model."""
    generator, made = torch.Generator().manual_seed(SEED), []
    for batch in ids.split(max(1, fisher.BATCH_TOKENS // LENGTH)):
        with torch.inference_mode():
            chances = model(batch).logits.float().softmax(-1)
        made.append((batch, labels(chances, generator)))
    return made


def exact_gradients(folder: Path, ids: Tensor) -> dict[str, Tensor]:
    """Gradients f64 [n, outputs] at the outputs of the embedding and of layer 0.

    Experts run in transformers' own loop; products with their weights are recognised by where those are.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    drawn = in_batches(model, ids)
    model = model.double().requires_grad_(False)
    block = model.get_submodule("model.layers.0.mlp.experts")
    found: dict[str, list[Tensor]] = {}
    kept: list[tuple[str, Tensor]] = []
    plain = torch.nn.functional.linear

    def keep(name: str, output: Tensor) -> Tensor:
        output.requires_grad_() if output.is_leaf else output.retain_grad()
        kept.append((name, output))
        return output

    def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        output = plain(inputs, weight, bias)
        for leaf in ("gate_up_proj", "down_proj"):
            stack = getattr(block, leaf)
            size = stack.stride(0) * stack.element_size()
            at, inside = divmod(weight.data_ptr() - stack.data_ptr(), size)
            if not inside and 0 <= at < len(stack):
                keep(f"{leaf}.{at}", output)
        return output

    for name in ("q_proj", "v_proj", "o_proj"):
        module = model.get_submodule(f"model.layers.0.self_attn.{name}")
        module.register_forward_hook(lambda module, args, output, name=name: keep(name, output))
    embed = model.get_input_embeddings()
    embed.register_forward_hook(lambda module, args, output: keep("embedding", output))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", linear)
        for batch, wanted in drawn:
            kept.clear()
            logits = model(batch).logits
            torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), wanted.flatten(), reduction="sum"
            ).backward()
            for name, output in kept:
                assert output.grad is not None
                found.setdefault(name, []).append(output.grad.flatten(0, -2))
    return {name: torch.cat(each) for name, each in found.items()}


def shrunk(gradients: list[Tensor], prior: float = 0.0) -> Tensor:
    """f64 [E, out, out]: what the documentation says of experts that have seen gradients f64 [n, out]."""
    made, beside = [], 1 - torch.eye(gradients[0].shape[1], dtype=torch.float64)
    for own in gradients:
        weighed = [(1 + prior if each is own else prior, each) for each in gradients]
        gram = sum(share * each.T @ each for share, each in weighed)
        variance = sum(share**2 * (each**2).T @ each**2 for share, each in weighed)
        noise = float((variance * beside).sum() / (gram**2 * beside).sum())
        made.append(gram * (1 - min(1.0, noise) * beside))
    return torch.stack(made)


def rows_of(weight: Weight, outputs: int) -> Tensor:
    """Which of the outputs of its parameter a weight has, in its order."""
    return apply(weight.place.ops, torch.arange(float(outputs))[:, None])[:, 0].long()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_fishers_are_the_sums_that_the_definition_says(tiny, family: str) -> None:
    folder = tiny(family)
    checkpoint, ids = export(open_checkpoint(folder)).checkpoint, text()
    found = gather(checkpoint, ids, seed=SEED)
    exact = exact_gradients(folder, ids)

    def same(one: Tensor, other: Tensor) -> None:
        assert float((one.double() - other).norm()) < 2e-3 * float(other.norm())

    same(found.embedding, shrunk([exact["embedding"]])[0])
    for name, weight in (("v_proj", "attn_v"), ("o_proj", "attn_out")):
        same(found.outputs[f"layers.0.{weight}"], shrunk([exact[name]]))
    q = next(weight for weight in checkpoint.weights if weight.name == "layers.0.attn_q")
    order = rows_of(q, exact["q_proj"].shape[1])  # that of a file: rotary pairs for llama.cpp's `llama`
    same(found.outputs[q.name], shrunk([exact["q_proj"][:, order]]))
    for weight in checkpoint.weights:
        if weight.layer == 0 and weight.role.is_expert:
            leaf = weight.place.param.rpartition(".")[2]
            rows = rows_of(weight, exact[f"{leaf}.0"].shape[1])
            own = [exact[f"{leaf}.{expert}"][:, rows] for expert in range(weight.matrices)]
            prior = PRIOR * weight.shape[-2] / (ids.numel() * checkpoint.shape.experts_used)
            for one, other in zip(found.outputs[weight.name], shrunk(own, prior), strict=True):
                same(one, other)


def test_experts_that_lie_transposed_have_the_gradients_of_their_biases(tiny) -> None:
    """gpt-oss, a single token: the gradient at an expert's outputs is that of its bias."""
    folder, ids = tiny("gpt_oss"), torch.tensor([[7]])
    found = gather(open_checkpoint(folder), ids, seed=SEED)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    ((_, wanted),) = in_batches(model, ids)
    torch.nn.functional.cross_entropy(model(ids).logits[0], wanted[0]).backward()
    experts = model.get_submodule("model.layers.1.mlp.experts")
    gate_up, down = experts.gate_up_proj_bias.grad, experts.down_proj_bias.grad
    assert int((down.abs().sum(1) > 0).sum()) == 3
    for name, felt in (("gate", gate_up[:, ::2]), ("up", gate_up[:, 1::2]), ("down", down)):
        own = [each[None].double() for each in felt]
        expected = shrunk(own, PRIOR * felt.shape[1] / 3)
        difference = found.outputs[f"layers.1.experts.{name}"] - expected
        assert float(difference.norm()) < 1e-3 * float(expected.norm())


def test_the_experts_function_computes_the_model(tiny) -> None:
    checkpoint, ids = open_checkpoint(tiny("olmoe")), text()
    with torch.inference_mode():
        one = build_model(checkpoint, EXPERTS)(ids).logits
        two = build_model(checkpoint, fisher.EXPERTS)(ids).logits
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_the_seed_decides(tiny) -> None:
    checkpoint, ids = open_checkpoint(tiny("mixtral")), text()[:1]
    one, same, other = (gather(checkpoint, ids, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(one.outputs[name], same.outputs[name]) for name in one.outputs)
    assert not torch.equal(one.embedding, other.embedding)


def test_memory_is_refused_in_one_line_before_anything_is_read(tiny, monkeypatch) -> None:
    checkpoint = open_checkpoint(tiny("mixtral"))
    needed = needs(checkpoint, 4096)
    weights = sum(weight.numel for weight in checkpoint.weights)
    assert needed.bytes > 4 * weights and needed.seconds > 0 and needed.tokens == 4096
    check_memory(needed, free=needed.bytes)
    with pytest.raises(CheckpointError, match=r"3\.0 GB are needed, 2\.0 GB are free; use --effort default$"):
        check_memory(Needs(1, 3 * 10**9, 1.0), free=2 * 10**9)
    monkeypatch.setattr("moequant.forward.memory.available_bytes", lambda: 10**6)

    def never(weight: object) -> Tensor:
        raise AssertionError("a weight was read")

    with pytest.raises(CheckpointError, match="use --effort default"):
        gather(checkpoint, text(), never)


def test_a_gradient_that_is_not_finite_names_its_weight(tiny) -> None:
    checkpoint = open_checkpoint(tiny("mixtral"))

    def broken(weight: object) -> Tensor:
        values = load(weight)
        return values * torch.nan if weight.name == "norm" else values

    with pytest.raises(CheckpointError, match=r"^layers\.0\.attn_q: the loss has no finite gradient"):
        gather(checkpoint, text()[:1], broken)


def test_what_tokens_do_not_agree_on_is_left_out() -> None:
    """Of rows that are felt apart nothing is left beside the diagonal; of those felt together nearly all."""
    g = torch.Generator().manual_seed(5)
    apart = torch.randn(64, 48, generator=g)
    together = torch.randn(64, 1, generator=g) * torch.linspace(1, 2, 48) + 0.05 * apart
    kept = []
    for gradients in (apart, together):
        gram = (gradients.T @ gradients)[None]
        before = gram.clone()
        shrink(gram, noise(gradients)[None])
        assert torch.equal(gram.diagonal(dim1=1, dim2=2), before.diagonal(dim1=1, dim2=2))
        kept.append(float(gram[0, 0, 1] / before[0, 0, 1]))
    assert kept[0] < 0.1 and kept[1] > 0.9, kept


@pytest.mark.parametrize("other", [0.0, 1e-6, 1e-4])
def test_a_row_that_is_felt_much_more_leaves_the_others_numbers(other: float) -> None:
    """Little is beside the diagonal, less than float32 shows: it must not grow, or be no number."""
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        gradients = torch.randn(300, 4, generator=g) * torch.tensor([1.0, other, other, other])
        exact = gradients.double()
        beside = float(exact.T.mm(exact).square().fill_diagonal_(0).sum())
        squares = exact.square()
        expected = float(squares.T.mm(squares).fill_diagonal_(0).sum()) / beside if beside else 1.0
        gram = (gradients.T @ gradients)[None]
        before = gram.clone()
        shrink(gram, noise(gradients)[None])
        wanted = before[0, 0, 1] * (1 - min(1.0, expected))
        torch.testing.assert_close(gram[0, 0, 1], wanted, rtol=1e-2, atol=1e-12)
        assert bool(gram.isfinite().all())
