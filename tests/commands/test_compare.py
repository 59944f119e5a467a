"""Comparison: llama-perplexity's definitions, streamed scores equal resident ones, damage is found."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from moequant.checkpoint import Checkpoint, load, open_checkpoint
from moequant.cli import app
from moequant.commands.compare import CompareSettings, run
from moequant.commands.convert import Settings, convert
from moequant.containers.gguf.export import export
from moequant.containers.gguf.weights import GgufWeights
from moequant.errors import CheckpointError, MoequantError, VerifyError
from moequant.evaluate import Scores, difference, score_row, summarize
from moequant.evaluate.activations import Rounded, by_32, by_256
from moequant.evaluate.divergence import PERCENTILES, join, score_tokens
from moequant.evaluate.open_source import open_source
from moequant.evaluate.side_by_side import Version, compare
from moequant.forward.experts import EXPERTS
from moequant.forward.model import Provider, build_model
from moequant.forward.resources import Resources
from moequant.report.compare import compare_value
from moequant.text import bundled
from moequant.text.corpus import Rows
from moequant.values import Weight
from tests import models

SMALL = Resources(threads=1, batch_tokens=128)


def rows(count: int = 6, length: int = 64) -> Rows:
    ids = torch.randint(0, models.VOCAB, (count, length), generator=torch.Generator().manual_seed(1))
    return Rows(ids, tuple("ab"[number % 2] for number in range(count)), "random ids", ids.numel())


@pytest.fixture(scope="module")
def file(tiny, text: Path, tmp_path_factory: pytest.TempPathFactory):
    """`file("mixtral", "Q4_K_M")`: a GGUF of the tiny model, made once."""
    folder = tmp_path_factory.mktemp("files")

    def get(family: str, type_: str) -> Path:
        path = folder / f"{family}-{type_}.gguf"
        if not path.exists():
            convert(
                tiny(family),
                path,
                Settings(
                    type_, calib=text, calib_tokens=1024, eval_tokens=0, effort="fast", self_check=False
                ),
            )
        return path

    return get


def settings(text: Path, **changes: object) -> CompareSettings:
    return CompareSettings(text, 1024, resources=SMALL, **changes)


def test_scores_by_hand() -> None:
    """Two tokens of vocabulary, everything computed on paper; only the second half of a row counts."""
    base = torch.tensor([[0.9, 0.1]] * 4).log()
    candidate = torch.tensor([[0.6, 0.4]] * 4).log()
    found = score_row(base, candidate, torch.tensor([0, 0, 1, 0]))
    assert len(found.kl) == 1, "position 2 predicts token 3"
    torch.testing.assert_close(found.base_nll, -torch.tensor([0.9]).log().double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.candidate_nll, -torch.tensor([0.6]).log().double(), rtol=1e-6, atol=0)
    kl = 0.9 * np.log(0.9 / 0.6) + 0.1 * np.log(0.1 / 0.4)
    assert abs(float(found.kl) - kl) < 1e-6
    assert found.same_top.tolist() == [1.0]


def test_terms_below_the_floor_are_left_out() -> None:
    base = torch.tensor([[0.0, -17.0]])
    candidate = torch.tensor([[0.0, 5.0]])
    found = score_row(base.repeat(4, 1), candidate.repeat(4, 1), torch.zeros(4, dtype=torch.int64))
    q = torch.log_softmax(candidate[0], -1)[0]
    assert abs(float(found.kl) + float(q)) < 1e-4, "only the first token's p·(log p - log q), p = 1"


def test_top_five_counts_what_is_shared() -> None:
    base = torch.arange(10.0, 0.0, -1.0)[None].repeat(4, 1)
    candidate = base.clone()
    candidate[:, 5] = 6.5  # the sixth overtakes the fifth
    found = score_row(base, candidate, torch.zeros(4, dtype=torch.int64))
    assert found.top5 is not None and found.top5.tolist() == [0.8] and found.same_top.tolist() == [1.0]


def test_scores_are_those_of_every_token_however_many_are_taken_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, candidate = torch.randn(2, 21, 50)
    target = torch.randint(50, (21,))
    whole = score_tokens(base, candidate, target)
    monkeypatch.setattr("moequant.evaluate.divergence.LOGITS", 4 * 50)
    parts = score_tokens(base, candidate, target)
    for one, two in ((whole.kl, parts.kl), (whole.base_nll, parts.base_nll), (whole.top5, parts.top5)):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-9)


def test_summary_has_the_errors_of_means() -> None:
    generator = torch.Generator().manual_seed(0)
    base, change, kl = torch.rand(3, 1000, generator=generator, dtype=torch.float64)
    scores = Scores(base, base + change, kl, torch.ones(1000, dtype=torch.float64))
    found = summarize(scores, "test")
    assert abs(found.log_ratio.value - float(change.mean())) < 1e-12
    assert abs(found.log_ratio.error - float(change.std() / 1000**0.5)) < 1e-12
    assert abs(found.perplexity.value / found.base_perplexity.value - float(change.mean().exp())) < 1e-12
    dp = (-base - change).exp() - (-base).exp()
    assert abs(found.dp_rms.value - float(dp.square().mean().sqrt())) < 1e-12
    at = dict(zip(PERCENTILES, found.kl_percentiles, strict=True))
    assert found.kl_median == at[50.0] and abs(found.kl_99 - np.percentile(kl.numpy(), 99)) < 1e-9
    assert found.kl_max == float(kl.max()) and found.top5 is None


def test_paired_errors_tell_apart_what_single_errors_do_not() -> None:
    """2 % more KL divergence on the same noisy tokens."""
    generator = torch.Generator().manual_seed(0)
    kl = torch.randn(5000, generator=generator, dtype=torch.float64).exp() * 0.02
    noise = 1.02 + 0.1 * torch.randn(5000, generator=generator, dtype=torch.float64)
    zeros = torch.zeros_like(kl)
    one, two = (Scores(zeros, zeros, value, zeros) for value in (kl, kl * noise))
    found = difference(("one", one), ("two", two))
    single = summarize(one, "").kl_mean.error
    assert abs(found.kl.value) < 2 * single, "their own errors overlap"
    assert found.sigmas > 3 and found.kl.value > 0


def test_parts_and_pieces_are_the_whole() -> None:
    values = torch.arange(12.0, dtype=torch.float64)
    whole = Scores(values, values, values, values, values)
    assert torch.equal(join([whole.part(values < 5), whole.part(values >= 5)]).kl, values)


def coarse(weight: Weight) -> torch.Tensor:
    """Values of two bits behind the point: a version of a weight that needs no file."""
    return load(weight).to(torch.float8_e5m2).float()


@pytest.mark.parametrize("family", models.CONFIGS)
def test_streamed_scores_equal_resident_ones(tiny, family: str) -> None:
    checkpoint = open_checkpoint(tiny(family))
    equals_the_resident(checkpoint, coarse)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_streamed_scores_of_a_file_equal_resident_ones(tiny, file, family: str) -> None:
    checkpoint = open_checkpoint(tiny(family))
    equals_the_resident(checkpoint, GgufWeights(file(family, "Q3_K_M"), export(checkpoint)).load)


def equals_the_resident(checkpoint: Checkpoint, candidate: Provider) -> None:
    """Scores and errors of a candidate, layer by layer, are those of two whole models."""
    text = rows()
    (found,) = compare(checkpoint, Version("base", load), [Version("q", candidate)], text, SMALL)
    with torch.inference_mode():
        logits = [build_model(checkpoint, EXPERTS, one)(text.ids).logits for one in (load, candidate)]
    expected = join([score_row(*pair) for pair in zip(*logits, text.ids, strict=True)])
    assert float(expected.kl.mean()) > 1e-3, "they differ"
    torch.testing.assert_close(found.scores.kl, expected.kl, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.scores.base_nll, expected.base_nll, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.scores.candidate_nll, expected.candidate_nll, rtol=1e-4, atol=1e-5)
    assert [part.source for part in found.domains] == ["a", "b"]
    assert sum(part.tokens for part in found.domains) == found.comparison.tokens == len(expected.kl)
    assert {one.weight for one in found.errors} == {weight.name for weight in checkpoint.weights}
    for one in found.errors:
        weight = next(weight for weight in checkpoint.weights if weight.name == one.weight)
        exact = load(weight).double().reshape(weight.matrices, -1)
        decoded = candidate(weight).double().reshape(weight.matrices, -1)
        energy = exact.square().sum(1).clamp_min(1e-300)  # a bias may be 0
        expected = (exact - decoded).square().sum(1) / energy
        torch.testing.assert_close(one.error, expected, rtol=1e-4, atol=1e-12)


def test_spilled_hidden_states_change_nothing(tiny, file) -> None:
    checkpoint = open_checkpoint(tiny("qwen3_moe"))
    weights = GgufWeights(file("qwen3_moe", "Q3_K_M"), export(checkpoint))
    versions = Version("base", load), [Version("q", weights.load), Version("again", weights.load)]
    plain = compare(checkpoint, *versions, rows(), SMALL)
    spilled = compare(checkpoint, *versions, rows(), replace(SMALL, ram=0, threads=2))
    for one, two in zip(plain, spilled, strict=True):
        assert torch.equal(one.scores.kl, two.scores.kl)
        assert one.routing == two.routing
    assert torch.equal(plain[0].scores.kl, plain[1].scores.kl)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_beside_itself_is_the_same(tiny, text: Path, tmp_path: Path, tied: bool) -> None:
    folder = tiny("qwen3_moe", tie_word_embeddings=tied)
    out = tmp_path / "same.gguf"
    convert(folder, out, Settings("F32", eval_tokens=0))
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    found = run(folder, [folder, copy, out], settings(text))
    for one in found.measured:
        assert one.comparison.kl_max == 0.0 and one.comparison.same_top == 1.0 and one.comparison.top5 == 1.0
        assert one.comparison.log_ratio.value == 0.0
        assert [layer.changed for layer in one.routing] == [0.0, 0.0]
        assert all(not weight.error.any() for weight in one.errors)


def damaged(file: Path, out: Path, name: str, expert: int, experts: int) -> Path:
    """A copy in which one expert's scales are doubled; Q8_0: 34 bytes a block, the scale first."""
    shutil.copyfile(file, out)
    tensor = next(one for one in gguf.GGUFReader(file).tensors if one.name == name)
    assert tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0
    size = int(tensor.n_bytes) // experts
    blocks = np.memmap(out, np.uint8, "r+", int(tensor.data_offset) + expert * size, (size // 34, 34))
    scales = blocks[:, :2].copy().view(np.float16) * 2
    blocks[:, :2] = scales.view(np.uint8)
    blocks.flush()
    return out


def test_a_damaged_expert_is_named_as_exactly_that_one(tiny, file, text: Path, tmp_path: Path) -> None:
    good = file("qwen3_moe", "Q8_0")
    bad = damaged(good, tmp_path / "bad.gguf", "blk.1.ffn_down_exps.weight", 5, 8)
    found = run(tiny("qwen3_moe"), [good, bad], settings(text))
    healthy, hurt = found.measured
    error, times, weight, expert = hurt.expert_errors[0]
    assert (weight.weight, weight.layer, expert) == ("layers.1.experts.down", 1, 5)
    assert 0.9 < error < 1.1 and times > 1000
    assert all(times < 4 for _, times, _, _ in healthy.expert_errors)
    assert all(times < 4 for _, times, _, _ in hurt.expert_errors[1:])
    assert hurt.comparison.kl_mean.value > 2 * healthy.comparison.kl_mean.value
    told = CliRunner().invoke(
        app, ["compare", str(tiny("qwen3_moe")), str(bad), "--eval", str(text), "--eval-tokens", "1024"]
    )
    assert told.exit_code == 0, told.output
    assert "1 experts err more than" in told.stdout and "1.5 down" in told.stdout


def test_tokens_of_experts_add_up(tiny, file, text: Path) -> None:
    found = run(tiny("mixtral"), [file("mixtral", "Q4_K_M")], settings(text))
    for weight in found.measured[0].errors:
        if weight.role.is_expert:
            assert weight.tokens is not None and int(weight.tokens.sum()) == 2 * found.tokens


def test_json_holds_every_figure(tiny, file, text: Path) -> None:
    paths = [file("mixtral", type_) for type_ in ("Q4_K_M", "Q2_K")]
    found = run(tiny("mixtral"), paths, settings(text))
    value = json.loads(json.dumps(compare_value(found)))
    assert [one["name"] for one in value["candidates"]] == [path.name for path in paths]
    assert value["candidates"][0]["bytes"] == paths[0].stat().st_size
    assert value["candidates"][1]["kl_mean"]["value"] > value["candidates"][0]["kl_mean"]["value"]
    assert value["differences"][0]["sigmas"] > 2
    assert len(value["candidates"][0]["rerouted"]) == 2


@pytest.mark.parametrize("engine", ["moequant", "llama.cpp"])
def test_a_base_that_is_a_file(tiny, file, text: Path, engine: str) -> None:
    """GGUF beside GGUF: our engine takes the model's folder for how to compute."""
    base, other = file("mixtral", "F32"), file("mixtral", "Q4_K_M")
    found = run(base, [other], settings(text, engine=engine, model=tiny("mixtral")))
    straight = run(tiny("mixtral"), [other], settings(text))
    kl, expected = (one.measured[0].comparison.kl_mean.value for one in (found, straight))
    assert abs(kl / expected - 1) < (1e-9 if engine == "moequant" else 0.2)


def refused(action, match: str) -> None:
    with pytest.raises(MoequantError, match=match) as error:
        action()
    assert "\n" not in str(error.value)


def test_wrong_pairs_are_one_line(tiny, file, text: Path, tmp_path: Path) -> None:
    mixtral, other = tiny("mixtral"), file("mixtral", "Q4_K_M")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.gguf").write_text("not a model")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(other.read_bytes()[: other.stat().st_size // 2])
    deeper = tiny("mixtral", num_hidden_layers=3)
    wider = tiny("mixtral", vocab_size=400)
    for base, candidate, match in (
        (mixtral, tmp_path / "absent.gguf", "no such file"),
        (tmp_path / "absent", other, "no such file"),
        (mixtral, tmp_path / "empty", "neither a GGUF file nor a model folder"),
        (mixtral, tmp_path / "text.gguf", "not a GGUF file"),
        (mixtral, cut, "is the download complete"),
        (mixtral, deeper, r"num_hidden_layers is 3, not 2"),
        (deeper, other, r"block_count is 2, not 3"),
        (mixtral, wider, r"vocab_size is 400, not 384"),
        (wider, other, r"vocab_size is 384, not 400"),
        (mixtral, file("qwen3_moe", "F32"), r"general.architecture is qwen3moe, not llama"),
        (other, other, r"name it with --model"),
    ):
        refused(lambda base=base, candidate=candidate: run(base, [candidate], settings(text)), match)


def test_wrong_pairs_of_files_in_llama_cpp_are_one_line(tiny, file, text: Path, tmp_path: Path) -> None:
    good = file("mixtral", "Q4_K_M")
    deeper, wider = tmp_path / "deeper.gguf", tmp_path / "wider.gguf"
    convert(tiny("mixtral", num_hidden_layers=3), deeper, Settings("F32", eval_tokens=0))
    convert(tiny("mixtral", vocab_size=400), wider, Settings("F32", eval_tokens=0))
    (tmp_path / "text.gguf").write_text("not a model")
    for other, match in (
        (deeper, "block_count is 3, not 2"),
        (wider, "another vocabulary than"),
        (file("qwen3_moe", "F32"), "general.architecture is qwen3moe, not llama"),
        (tmp_path / "text.gguf", "not a GGUF file"),
        (tmp_path / "absent.gguf", "no such file"),
    ):
        refused(lambda other=other: run(good, [other], settings(text, engine="llama.cpp")), match)


@pytest.mark.parametrize("value", ["many", [1, 2], "\x1b[31m\n"])
def test_keys_of_another_kind_are_another_model(tiny, text: Path, tmp_path: Path, value: object) -> None:
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "llama")
    if isinstance(value, str):
        writer.add_string("llama.attention.layer_norm_rms_epsilon", value)
    else:
        writer.add_array("llama.attention.layer_norm_rms_epsilon", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(
        lambda: run(tiny("mixtral"), [tmp_path / "odd.gguf"], settings(text)), "rms_epsilon is .*, not 1e-06"
    )


def test_another_vocabulary_of_the_same_size_is_refused(tiny, text: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny("mixtral"), tmp_path / "copy"))
    value = json.loads((copy / "tokenizer.json").read_text())
    vocab = value["model"]["vocab"]
    names = list(vocab)
    value["model"]["vocab"] = dict(zip(names, [vocab[name] for name in names[::-1]], strict=True))
    value["added_tokens"][0]["id"] = value["model"]["vocab"][value["added_tokens"][0]["content"]]
    (copy / "tokenizer.json").write_text(json.dumps(value))
    refused(lambda: run(tiny("mixtral"), [copy], settings(text)), "another vocabulary")


def test_llama_cpp_takes_files_only(tiny, file, text: Path) -> None:
    with pytest.raises(CheckpointError, match="runs GGUF files"):
        run(tiny("mixtral"), [file("mixtral", "Q4_K_M")], settings(text, engine="llama.cpp"))


def test_rounded_activations_are_ggml_s() -> None:
    """Values of blocks against gguf-py's own Q8_0, and the definition of Q8_K."""
    inputs = torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
    packed = gguf.quantize(inputs.numpy(), gguf.GGMLQuantizationType.Q8_0)
    expected = gguf.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_allclose(by_32(inputs).numpy(), expected, rtol=0, atol=1e-6)
    ours = by_256(inputs)
    for block, found in zip(inputs.view(-1, 256), ours.view(-1, 256), strict=True):
        step = block.abs().max() / 127
        assert (block - found).abs().max() <= step / 2 * 1.001
        assert torch.equal(found[block.abs().argmax()], block[block.abs().argmax()])
    assert torch.equal(by_256(torch.zeros(1, 256)), torch.zeros(1, 256))
    assert torch.equal(by_32(torch.zeros(1, 32)), torch.zeros(1, 32))


@pytest.mark.parametrize(("model", "type_"), [("demo", "Q2_K"), ("mix", "Q3_K_M")])
def test_our_engine_agrees_with_llama_cpp(
    request: pytest.FixtureRequest, tmp_path: Path, model: str, type_: str
) -> None:
    """Trained models, the same file and text in both: perplexity to 0.2 %, mean KL divergence to 3 %."""
    folder = bundled.path("demo") if model == "demo" else request.getfixturevalue("mix")
    data = None if model == "demo" else models.SHARED / "data"
    base, out = tmp_path / "F32.gguf", tmp_path / f"{type_}.gguf"
    convert(folder, base, Settings("F32", eval_tokens=0, self_check=False))
    calib = data and data / "calib.txt"
    quick = {"calib_tokens": 1024, "eval_tokens": 0, "effort": "fast", "self_check": False}
    convert(folder, out, Settings(type_, calib=calib, **quick))
    wanted = CompareSettings(
        data and data / "eval.txt", 4096, sample_tokens=0, resources=Resources(threads=1)
    )
    ours = run(folder, [base, out], wanted)
    theirs = run(base, [base, out], replace(wanted, engine="llama.cpp", model=folder))
    for one, two in zip(ours.measured, theirs.measured, strict=True):
        assert abs(one.comparison.perplexity.value / two.comparison.perplexity.value - 1) < 0.002
        assert abs(one.comparison.kl_mean.value - two.comparison.kl_mean.value) <= (
            0.03 * two.comparison.kl_mean.value + 1e-9
        )


def test_a_rounding_that_siblings_do_not_share_is_refused(tiny) -> None:
    checkpoint = open_checkpoint(tiny("mixtral"))
    types = dict.fromkeys((weight.name for weight in checkpoint.weights), "Q4_K")
    Rounded(checkpoint, types)
    with pytest.raises(VerifyError, match="rounds it in another way"):
        Rounded(checkpoint, types | {"layers.0.experts.up": "Q5_0"})


def test_open_source_knows_kind_and_types(tiny, file) -> None:
    checkpoint = open_checkpoint(tiny("mixtral"))
    folder = open_source(tiny("mixtral"), checkpoint)
    packed = open_source(file("mixtral", "Q8_0"), checkpoint)
    assert (folder.kind, packed.kind) == ("checkpoint", "GGUF")
    assert packed.bytes == file("mixtral", "Q8_0").stat().st_size
    assert packed.types["layers.0.experts.up"] == "Q8_0" and folder.types["head"] == "BF16"
