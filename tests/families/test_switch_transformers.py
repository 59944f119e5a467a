"""Switch Transformers: an encoder and a decoder as one list of layers, in folders alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM

from moequant.checkpoint import load, open_checkpoint
from moequant.commands.compare import CompareSettings, run
from moequant.commands.convert import Settings, convert
from moequant.containers.folders import compressed_tensors
from moequant.errors import FamilyError, MoequantError
from moequant.forward.causal import logits
from moequant.forward.joined import halves
from moequant.forward.model import build_model
from moequant.forward.stream import LayerStream, Resources
from moequant.hub.fetch import headers
from moequant.inspection.fit import Hardware
from moequant.inspection.folder import inspect_folder
from moequant.inspection.served import Gpus
from moequant.library import FitSettings, FolderFitSettings, fit, fit_folder
from moequant.report.summary import Report
from moequant.rounding.coupled import Coupled
from moequant.rounding.diagonal import Quantizer
from moequant.rounding.results import decoded
from moequant.rounding.streams import Streams
from moequant.statistics.calibrate import calibrate
from moequant.text import corpus
from moequant.text.corpus import Rows
from moequant.text.rows import token_rows
from moequant.values import Role, Weight
from tests.families import switch
from tests.families.test_conversion import QUICK, last_states

IDS = torch.randint(3, switch.VOCAB, (5, 101), generator=torch.Generator().manual_seed(0))
CUT = 50
SPARSE = (1, 3, 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return switch.build(tmp_path_factory.mktemp("switch"))


@pytest.fixture(scope="module")
def whole(folder: Path) -> nn.Module:
    return switch.reference(folder)


@pytest.fixture(scope="module")
def made(folder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory):
    """A folder rounded at each effort, and the report on it."""
    found: dict[str, tuple[Path, Report]] = {}
    for effort in ("default", "fast"):
        out = tmp_path_factory.mktemp("made") / effort
        how = {"calib": text, "calib_tokens": 2048, "eval": text, "eval_tokens": 1024, "group_size": 32}
        found[effort] = out, convert(folder, out, Settings(format="safetensors", effort=effort, **how))
    return found


def theirs(whole: nn.Module, ids: Tensor, **asked: bool):
    """What transformers makes of rows."""
    source, target = halves(whole.config, ids)
    with torch.inference_mode():
        return whole(input_ids=source, decoder_input_ids=target, **asked)


def ours(folder: Path, ids: Tensor, provider=load) -> Tensor:
    with torch.inference_mode():
        return logits(build_model(open_checkpoint(folder), provider=provider), ids)


def test_a_row_is_read_by_both(whole: nn.Module) -> None:
    source, target = halves(whole.config, IDS)
    assert torch.equal(source[:, :-1], IDS[:, : CUT - 1]) and bool((source[:, -1] == 1).all())
    assert torch.equal(target[:, 1:], IDS[:, CUT + 1 :]) and bool((target[:, 0] == 0).all())


def test_the_logits_are_those_of_transformers(folder: Path, whole: nn.Module) -> None:
    """Of rows together and alone: an expert takes so many tokens of a row, whatever is beside it."""
    expected = theirs(whole, IDS).logits
    assert (ours(folder, IDS) - expected).abs().max() < 1e-5
    for row in IDS.split(1):
        assert (theirs(whole, row).logits - ours(folder, row)).abs().max() < 1e-5
    alone = torch.cat([theirs(whole, row).logits for row in IDS.split(1)])
    assert (alone - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {"router_bias": True, "num_sparse_encoder_layers": 4, "num_sparse_decoder_layers": 0},
        {"num_sparse_encoder_layers": 0, "num_decoder_layers": None, "d_kv": 16, "dense_act_fn": "gelu"},
        {"num_layers": 1, "num_sparse_encoder_layers": 1, "expert_capacity": 1},
    ],
    ids=str,
)
def test_whichever_layers_are_sparse(tmp_path: Path, changes: dict[str, object]) -> None:
    model = switch.build(tmp_path / "model", **changes)
    assert (ours(model, IDS) - theirs(switch.reference(model), IDS).logits).abs().max() < 1e-5


@pytest.mark.parametrize("ram", [None, 0])
def test_every_layer_gives_what_that_of_transformers_gives(
    folder: Path, whole: nn.Module, tmp_path: Path, ram: int | None
) -> None:
    """Also with states on the disk and experts that come one by one."""
    expected = theirs(whole, IDS, output_hidden_states=True)
    checkpoint = open_checkpoint(folder)
    with LayerStream(checkpoint, IDS, Resources(ram=ram, threads=1, batch_tokens=202)) as stream:
        assert [bool(stream.chunks(layer)) for layer in SPARSE] == [ram == 0] * 3
        hidden = stream.new_hidden(tmp_path)
        stream.embed(hidden)
        for layer in stream.layers():
            found = torch.cat([hidden.get(layer, batch) for batch in range(len(stream.batches))])
            encoded = expected.encoder_hidden_states[min(layer, 4)]
            said = expected.decoder_hidden_states[max(layer - 4, 0)]
            assert (found - torch.cat([encoded, said], 1)).abs().max() < 1e-4, layer
            for _ in stream.cross(layer, hidden, lambda batch: None, hidden):  # type: ignore[arg-type,return-value]
                pass
        ends = [end.last_hidden_state for _, end in stream.finish(hidden, lambda batch: None)]  # type: ignore[arg-type,return-value]
    # Of a tied head transformers scales the last states, as we do.
    last = expected.decoder_hidden_states[-1] * 64**-0.5
    assert (torch.cat(ends)[:, CUT:] - last).abs().max() < 1e-5
    assert not torch.cat(ends)[:, :CUT].any()


def test_statistics_are_of_the_tokens_that_each_half_sees(folder: Path, whole: nn.Module) -> None:
    counted: list[Tensor] = []
    routers = [module for module in whole.modules() if type(module).__name__.endswith("Top1Router")]
    hooks = [
        router.register_forward_hook(lambda module, args, out: counted.append(out[0].sum((0, 1))))
        for router in routers
    ]
    expected = theirs(whole, IDS)
    for hook in hooks:
        hook.remove()
    rows = Rows(IDS, ("a", "b", "a", "a", "b"), "random ids", IDS.numel())
    found = calibrate(open_checkpoint(folder), rows, Resources(threads=1, batch_tokens=202))
    assert [route.layer for route in found.routes] == [*SPARSE]
    for route, theirs_ in zip(found.routes, counted, strict=True):
        assert torch.equal(route.tokens, theirs_) and torch.equal(route.domain_tokens.sum(0), theirs_)
        seen = 5 * (CUT if route.layer < 4 else 101 - CUT)
        assert 0 < route.tokens.sum() < seen, "some are past what their expert may take"
        assert torch.equal(found.inputs[f"layers.{route.layer}.experts.inner"].tokens, theirs_)
    source = found.inputs["layers.6.cross.source"]
    assert int(source.tokens[0]) == 5 * CUT
    squares = expected.encoder_last_hidden_state.double().square().sum((0, 1))
    assert torch.allclose(source.moment[0], squares, rtol=1e-5)


def test_every_weight_is_rounded_under_what_it_is_fed(folder: Path, tmp_path: Path) -> None:
    """Two streams, exact and rounded, end where the two models do, whatever was taken from memory between."""
    checkpoint = open_checkpoint(folder)
    matrices = [weight for weight in checkpoint.weights if not weight.role.keeps_precision]
    types = {weight.name: "Q8_0" for weight in matrices}
    with LayerStream(checkpoint, IDS, Resources(threads=1, batch_tokens=202)) as stream:
        streams = Streams.under(tmp_path, stream)
        done = {
            packed.weight.name: (packed, loss)
            for packed, loss in Coupled(stream, types, Quantizer(None, "fast").pack, QUICK).run(streams)
        }
        ends = [
            torch.cat([hidden.get(stream.n_layers, batch) for batch in range(len(stream.batches))])
            for hidden in (streams.exact, streams.rounded)
        ]
    assert done.keys() == types.keys()
    assert all(weight.site or weight.role is Role.EMBEDDING for weight in matrices)
    assert not [loss for _, loss in done.values() if loss.fallbacks]

    def rounded(weight: Weight) -> Tensor:
        return decoded(done[weight.name][0]) if weight.name in done else load(weight)

    for end, provider in zip(ends, (load, rounded), strict=True):
        difference = (end - last_states(checkpoint, provider, IDS)).abs().amax(-1)
        assert float(difference.quantile(0.99)) < 1e-3


@pytest.mark.parametrize("effort", ["default", "fast"])
def test_folders_load_in_transformers(made, folder: Path, effort: str) -> None:
    out, report = made[effort]
    experts = [weight for weight in report.checkpoint.weights if weight.is_expert]
    assert {loss.weight for loss in report.losses} == {weight.name for weight in experts}
    assert not any(loss.fallbacks for loss in report.losses)
    assert report.checked is not None and "compared with transformers" in report.checked
    loaded, told = AutoModelForSeq2SeqLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not [key for key, value in told.items() if value]
    expected = ours(folder, IDS, compressed_tensors.open_folder(out).load)
    with torch.inference_mode():
        found = logits(nn.Module.float(loaded.eval()), IDS)
    assert (found - expected).abs().max() < 1e-4
    assert (found - ours(folder, IDS)).abs().max() > 1e-2, "it is rounded"
    card = (out / "README.md").read_text()
    assert "AutoModelForSeq2SeqLM" in card and "vllm" not in card
    assert "the encoder reads the first half" in card and "pipeline_tag: text2text-generation" in card


def test_hessians_lose_less_than_the_plain_search(made) -> None:
    default, fast = (made[effort][1].comparison for effort in ("default", "fast"))
    assert default is not None and fast is not None
    assert 0 < default.kl_mean.value < 0.75 * fast.kl_mean.value


def test_compare_scores_the_decoder(made, folder: Path, whole: nn.Module, text: Path) -> None:
    """The second half of each row, given the first."""
    settings = CompareSettings(text, 1024, resources=Resources(threads=1, batch_tokens=256))
    found = run(folder, [made["fast"][0]], settings).measured[0]
    rows = token_rows(open_checkpoint(folder), corpus.read(text, "evaluation"), 1024, 0, None)
    assert rows.ids.shape == (8, 128)
    said = torch.log_softmax(theirs(whole, rows.ids).logits[:, :-1].double(), -1)
    scores = said.gather(2, rows.ids[:, 65:, None])
    expected = pytest.approx(float((-scores.mean()).exp()), rel=1e-4)
    assert found.comparison.base_perplexity.value == expected
    assert len(found.scores.kl) == 8 * 63


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ({}, "no architecture with an encoder.*--format safetensors"),
        ({"format": "gptq"}, "transformers loads no GPTQ.*--format safetensors"),
        ({"format": "safetensors", "size": "1M"}, "one scheme.*--scheme"),
    ],
    ids=str,
)
def test_what_nobody_would_load_is_refused(folder: Path, tmp_path: Path, what: dict, named: str) -> None:
    with pytest.raises(MoequantError, match=named) as caught:
        convert(folder, tmp_path / "out", Settings(**what))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "asked",
    [
        lambda folder: fit(folder, FitSettings(Hardware(8 << 30, 8 << 30))),
        lambda folder: fit_folder(folder, FolderFitSettings(Gpus(8 << 30))),
    ],
    ids=["gguf", "folder"],
)
def test_nothing_fits_what_no_server_runs(folder: Path, asked: Callable[[Path], object]) -> None:
    with pytest.raises(MoequantError, match="--format safetensors") as caught:
        asked(folder)
    assert "\n" not in str(caught.value)


def test_prompts_are_not_continued(made, folder: Path, text: Path) -> None:
    with pytest.raises(MoequantError, match="answers a text and does not continue it"):
        run(folder, [made["fast"][0]], CompareSettings(text, 1024, prompts=("Hello",)))


def test_inspect_knows_both_halves(folder: Path) -> None:
    found = inspect_folder(headers(folder))
    assert (found.layers, found.experts, found.experts_per_token) == (7, 5, 1)
    assert "other" not in {each.role for each in found.roles}
    assert any("--format safetensors" in line for line in found.missing)
    assert not any("unknown" in line for line in found.missing)


def test_the_embedding_may_be_stored_again(folder: Path, tmp_path: Path) -> None:
    """As older versions of transformers saved it, under any of its names; another table is refused."""
    tensors = load_file(folder / "model.safetensors")
    table = tensors.pop("shared.weight")
    names = [
        f"{name}.weight" for name in ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head")
    ]

    def opened(changed: dict[str, Tensor]):
        other = tmp_path / "other"
        other.mkdir(exist_ok=True)
        (other / "config.json").write_bytes((folder / "config.json").read_bytes())
        save_file(tensors | changed, other / "model.safetensors", {"format": "pt"})
        return open_checkpoint(other)

    for stored in (names, names[1:2], names[3:]):
        found = opened({name: table.clone() for name in stored})
        assert found.tied and not found.skipped
        assert torch.equal(load(found.weights[0]), table)
    with pytest.raises(FamilyError, match="tie_word_embeddings"):
        opened({name: table * (1 + number) for number, name in enumerate(names)})


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": False},
        {"eos_token_id": None},
        {"eos_token_id": 160},
        {"is_gated_act": True},
        {"router_dtype": "bfloat16"},
        {"num_selected_experts": 2},
    ],
    ids=str,
)
def test_other_models_of_the_class_are_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    (key,) = changes
    with pytest.raises(FamilyError, match=key):
        open_checkpoint(switch.build(tmp_path / "model", **changes))


def test_keys_of_releases_are_read(tmp_path: Path) -> None:
    """Those that the first releases have and transformers' class has no use for."""
    kept = {
        "num_selected_experts": 1,
        "output_past": True,
        "task_specific_params": {"a": {"max_length": 200}},
    }
    folder = switch.build(tmp_path / "model")
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | kept))
    assert open_checkpoint(folder).n_experts == switch.SHAPE["num_experts"]
