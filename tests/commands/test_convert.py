"""The whole line against the real runtime: llama.cpp loads every file and computes what transformers does."""

from __future__ import annotations

import shutil
from itertools import cycle
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moequant.checkpoint import open_checkpoint
from moequant.commands.convert import Settings, convert, open_job
from moequant.containers.gguf import imatrix
from moequant.containers.gguf.export import export
from moequant.containers.gguf.presets import BASE_TYPES
from moequant.containers.gguf.weights import GgufWeights
from moequant.errors import CheckpointError, VerifyError
from moequant.forward.experts import EXPERTS
from moequant.forward.memory import check_memory
from moequant.forward.model import build_model
from moequant.text.rows import load_encoder
from tests import models
from tests.clients.llama import Llama

NARROW = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
"""A model so small that nothing takes time."""

FEW: dict[str, dict[str, int]] = {
    "mixtral": {"intermediate_size": 256},
    "qwen3_moe": {"num_experts": 4},
    "olmoe": {"num_experts": 4},
}
"""Families that are converted to all types in turn; `tests/families/test_conversion.py` has all of them."""


def settings(text: Path, type_: str | None, **changes: object) -> Settings:
    usual = {"calib": text, "calib_tokens": 2048, "eval": text, "eval_tokens": 1024, "effort": "fast"}
    return Settings(type_, **(usual | changes))


def ids_for(vocab: int, count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, vocab, (count,), generator=torch.Generator().manual_seed(seed))


def reference_logits(folder: Path, ids: torch.Tensor) -> np.ndarray:
    model = models.reference(folder)
    with torch.inference_mode():
        return model(ids[None]).logits[0].numpy()


def agrees(folder: Path, file: Path, count: int = 256, within: float = 1e-3) -> None:
    with Llama(file, threads=1) as llama:
        ids = ids_for(llama.n_vocab, count)
        difference = np.abs(llama.logits(ids.tolist()) - reference_logits(folder, ids))
    assert difference.max() < within


def test_what_llama_cpp_refuses_is_said_before_any_work(tmp_path: Path) -> None:
    """In llama.cpp's OLMoE keys have as many heads as queries; in transformers' they may have fewer."""
    folder = models.build(tmp_path / "model", "olmoe", num_hidden_layers=1, num_key_value_heads=1)
    asked = settings(tmp_path / "a text that nobody came to read", "Q4_K_M")
    with pytest.raises(VerifyError, match=r"attn_k_norm\.weight' has wrong shape; .*; nothing was written"):
        convert(folder, tmp_path / "a.gguf", asked)


def test_an_outline_has_the_size_of_the_file_and_takes_no_room(tiny, tmp_path: Path, text: Path) -> None:
    job, out = open_job(tiny("qwen3_moe"), settings(text, "Q4_K_M")), tmp_path / "a.gguf"
    job.container.outline(out, job.plan)
    assert out.stat().st_size == job.size > 8 * 512 * out.stat().st_blocks


def test_f32_of_the_trained_model(mix: Path, tmp_path: Path, text: Path) -> None:
    out = tmp_path / "f32.gguf"
    convert(mix, out, settings(text, "F32", eval_tokens=0))
    agrees(mix, out, 512)


def test_fused_and_tied_checkpoints_give_the_same_logits(tiny, tmp_path: Path, text: Path) -> None:
    for number, changes in enumerate(
        ({"save": {"save_original_format": False}}, {"tie_word_embeddings": True})
    ):
        folder, out = tiny("qwen3_moe", **changes), tmp_path / f"{number}.gguf"
        convert(folder, out, settings(text, "F32", eval_tokens=0))
        agrees(folder, out)


@pytest.mark.parametrize(("type_", "family"), [*zip(BASE_TYPES, cycle(FEW), strict=False)])
def test_every_type_loads_and_generates(tiny, tmp_path: Path, text: Path, family: str, type_: str) -> None:
    out, model = tmp_path / "model.gguf", tiny(family, num_hidden_layers=1, **FEW[family])
    report = convert(model, out, settings(text, type_, eval_tokens=0, self_check=False))
    assert report.file_bytes == out.stat().st_size
    with Llama(out, threads=1) as llama:
        produced = llama.generate([5, 6, 7], 8)
        assert len(produced) <= 8 and all(0 <= token < llama.n_vocab for token in produced)
        assert np.isfinite(llama.logits(ids_for(llama.n_vocab, 32).tolist())).all()


def test_our_decoded_weights_are_what_the_runtime_computes_with(tiny, tmp_path: Path, text: Path) -> None:
    """The candidate that `compare` scores is the file as llama.cpp runs it, but for its 8-bit activations.

    Those activations, and routers near a tie, move a random model's logits by about 1 % of
    their energy; two-bit weights move them by far more, and that must be common to both.
    """
    out = tmp_path / "q.gguf"
    convert(tiny("mixtral"), out, settings(text, "Q2_K", eval_tokens=0))
    checkpoint = open_checkpoint(tiny("mixtral"))
    with Llama(out, threads=1) as llama, torch.inference_mode():
        ids = ids_for(llama.n_vocab, 128)
        runtime = torch.from_numpy(llama.logits(ids.tolist())).double()
        decoded = (
            build_model(checkpoint, EXPERTS, GgufWeights(out, export(checkpoint)).load)(ids[None])
            .logits[0]
            .double()
        )
        original = build_model(checkpoint, EXPERTS)(ids[None]).logits[0].double()
    assert (runtime - decoded).square().sum() < 0.1 * (runtime - original).square().sum()


def test_perplexity_agrees_with_llama_cpp(mix: Path, tmp_path: Path) -> None:
    """Our engine and llama.cpp on the same file and text: within 0.5 %."""
    text = models.SHARED / "data" / "eval.txt"
    calib = models.SHARED / "data" / "calib.txt"
    out = tmp_path / "q.gguf"
    rows = 12
    report = convert(mix, out, Settings("Q4_K_M", calib, 1024, text, rows * 512, effort="fast"))
    tokens = torch.tensor(load_ids(mix, text)[: rows * 512]).view(rows, 512)
    nll = []
    with Llama(out, threads=1) as llama:
        for row in tokens:
            log_p = torch.log_softmax(torch.from_numpy(llama.logits(row.tolist())), -1)
            nll.append(-log_p[256:511].gather(1, row[257:, None])[:, 0])
    theirs = float(torch.cat(nll).double().mean().exp())
    assert report.comparison is not None
    assert abs(report.comparison.perplexity.value / theirs - 1) < 0.005


def load_ids(model: Path, text: Path) -> list[int]:
    return load_encoder(model).encode(text.read_bytes().decode(), add_special_tokens=False).ids


def test_rows_that_256_does_not_divide(tmp_path: Path, text: Path) -> None:
    folder = models.build(tmp_path / "model", "qwen3_moe", moe_intermediate_size=96)
    out = tmp_path / "q.gguf"
    report = convert(folder, out, settings(text, "Q4_K_M"))
    types = {choice.weight: choice for choice in report.plan.choices}
    assert types["layers.0.experts.down"].format in ("IQ4_NL", "Q5_0", "Q5_1", "Q8_0")
    assert "256 does not divide rows of 96" in report.summary()
    with Llama(out, threads=1) as llama:
        assert llama.generate([5, 6, 7], 4)


def test_experts_that_no_token_reached_are_quantized_and_named(tiny, tmp_path: Path, text: Path) -> None:
    """A router that starves experts on purpose: all are in the file, finite, and in the report."""
    folder = Path(shutil.copytree(tiny("qwen3_moe"), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    router = tensors["model.layers.1.mlp.gate.weight"]
    router[3:] = router[:3].repeat(2, 1)[:5] * 0.0
    tensors["model.layers.1.post_attention_layernorm.weight"] = torch.ones(256, dtype=torch.bfloat16) * 0.01
    router[:3] = 0.0
    tensors["model.layers.1.mlp.gate.weight"] = router
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    out = tmp_path / "q.gguf"
    report = convert(folder, out, settings(text, "Q2_K"))
    assert report.calibration is not None
    unseen = (report.calibration.routes[1].tokens == 0).nonzero()[:, 0].tolist()
    assert unseen, "all-zero logits send every token to the same two experts"
    summary = " ".join(report.summary().split())
    assert f"{len(unseen)} experts saw no token" in summary and f"1.{unseen[-1]}" in summary
    short = [each.split() for each in report.summary(details=False).splitlines()]
    rows = [each for each in short if each[:1] in (["0"], ["1"])]
    assert [each[0] for each in rows] == ["1"] and rows[0][-1] == str(len(unseen)), "of that layer alone"
    tensor = next(t for t in gguf.GGUFReader(out).tensors if t.name == "blk.1.ffn_down_exps.weight")
    decoded = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(8, 256, 256)
    for expert in unseen:
        assert np.isfinite(decoded[expert]).all() and np.abs(decoded[expert]).max() > 0
    with Llama(out, threads=1) as llama:
        assert np.isfinite(llama.logits([5, 6, 7])).all()


def test_the_report_has_what_it_promises(tiny, tmp_path: Path, text: Path) -> None:
    report = convert(tiny("mixtral"), tmp_path / "q.gguf", settings(text, "Q4_K_M"))
    summary = report.summary()
    for words in (
        "perplexity",
        "bits per weight",
        "KL divergence",
        "worst-hit experts",
        "median",
        "peak memory",
    ):
        assert words in summary
    assert [cost.name for cost in report.stages] == [
        "open",
        "route",
        "quantize",
        "verify",
        "self-check",
        "compare",
    ]
    assert report.comparison is not None and report.comparison.kl_mean.value > 0
    assert {loss.weight for loss in report.losses} == {weight.name for weight in report.checkpoint.weights}


def test_a_model_larger_than_memory_is_refused_at_the_start(tiny) -> None:
    checkpoint = open_checkpoint(tiny("mixtral"))
    check_memory(checkpoint, models=2, available=10**9)
    with pytest.raises(CheckpointError, match=r"GB of memory are needed for its largest layer"):
        check_memory(checkpoint, models=2, available=10**6)


def test_a_dense_model_is_converted_with_a_note(tiny, tmp_path: Path, text: Path) -> None:
    report = convert(tiny("llama"), tmp_path / "q.gguf", settings(text, "Q4_K_M"))
    assert "dense model" in report.summary()


def test_the_same_input_gives_the_same_bytes_in_any_memory(tiny, tmp_path: Path, text: Path) -> None:
    """With one byte of memory experts come one by one in every pass: the same plan, file and divergence."""
    found = []
    for name, ram in (("one", None), ("two", 1)):
        wanted = settings(text, "Q4_K_M", effort="default", calib_tokens=1024, ram=ram)
        # Rows of 64 and of 256: types with long blocks, whose search takes longest, for one weight alone.
        model = tiny("olmoe", **NARROW, intermediate_size=256)
        found.append(convert(model, tmp_path / f"{name}.gguf", wanted))
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()
    one, two = (report.measured for report in found)
    assert one is not None and two is not None and one.comparison == two.comparison
    assert found[0].plan == found[1].plan


@pytest.mark.parametrize("effort", ["fast", "default"])
def test_an_imatrix_comes_with_a_file_that_rounds_nothing(tiny, tmp_path: Path, text: Path, effort) -> None:
    out, matrix = tmp_path / "f32.gguf", tmp_path / "imatrix.gguf"
    wanted = settings(text, "F32", eval_tokens=0, effort=effort, imatrix_out=matrix)
    report = convert(tiny("mixtral"), out, wanted)
    assert "blk.1.ffn_down_exps.weight" in imatrix.parse(matrix).entries
    assert report.calibration is not None and not any(loss.fallbacks for loss in report.losses)
    convert(tiny("mixtral"), tmp_path / "plain.gguf", settings(text, "F32", eval_tokens=0))
    assert out.read_bytes() == (tmp_path / "plain.gguf").read_bytes()
