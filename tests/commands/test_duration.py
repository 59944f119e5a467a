"""What a conversion is expected to take: counts that hold, and when it is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moequant.checkpoint import open_checkpoint
from moequant.checkpoint.codecs.nvfp4 import Nvfp4, Nvfp4Across
from moequant.commands import duration
from moequant.commands.duration import Model, counted, forecast
from moequant.commands.job import open_jobs
from moequant.commands.pace import Speed, Work, decoding, speed
from moequant.commands.settings import Settings
from moequant.commands.text import Texts, texts
from moequant.hub import GgufModel
from moequant.rounding.rounder import UNROUNDED
from moequant.values import Codec, Origin, Stored
from tests.checkpoint.codecs.files import one, write
from tests.checkpoint.codecs.test_gptq_awq import AWQ, awq, config, gptq
from tests.cli.test_cli import run

Tiny = Callable[..., Path]


def work(model: Path, **given: object) -> dict[str, Work]:
    """The work of a conversion to Q4_K_M, or as `given` says."""
    settings = Settings(**({"type": "Q4_K_M", "calib_tokens": 2048, "eval_tokens": 1024} | given))  # type: ignore[arg-type]
    jobs = open_jobs(model, settings)
    read = texts(jobs[0].model, settings, True, jobs[0].measures)
    return counted(jobs, read, read.calibration is not None, lambda name: 100.0)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_the_operations_of_a_token_are_those_that_torch_counts(tiny: Tiny, family: str) -> None:
    folder, tokens = tiny(family), 64
    (job,) = open_jobs(folder, Settings(type="Q8_0"))
    told = Model.of(job.model, tokens)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    )
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.arange(tokens)[None])
    assert counter.get_total_flops() / tokens == pytest.approx(told.passed + told.head, rel=0.06)


def test_shared_stages_are_counted_once_and_grow_with_the_text(tiny: Tiny) -> None:
    model = tiny("qwen3_moe")
    one, two = work(model), work(model, type="Q4_K_M,Q3_K_M")
    assert list(one) == ["route", "plan", "quantize", "verify", "self-check", "compare"]
    assert two["route"] == one["route"] and two["plan"] == one["plan"]
    assert two["quantize Q4_K_M"] == one["quantize"] and "quantize Q3_K_M" in two
    assert two["compare"].products == pytest.approx(1.5 * one["compare"].products)
    checks = [two[f"self-check {type_}"].products for type_ in ("Q4_K_M", "Q3_K_M")]
    assert checks[0] == one["self-check"].products and checks[1] == pytest.approx(checks[0] / 2)
    fast = work(model, effort="fast")
    assert "plan" not in fast and fast["quantize"].products == 0
    both = work(model, effort="fast", type="IQ4_XS,Q4_K_S")
    less = work(model, effort="fast", type="Q4_K_S")["quantize"].numbers
    assert both["quantize Q4_K_S"].numbers < less, "the same weight in the same format is searched once"
    twice = work(model, effort="fast", calib_tokens=4096)
    assert twice["route"].products == pytest.approx(2 * fast["route"].products)
    assert "compare" not in work(model, eval_tokens=0) and "self-check" not in work(model, self_check=False)
    folder = work(model, type=None, format="safetensors")
    assert "plan" not in folder and folder["quantize"].products > 0


def test_effort_best_takes_gradients_and_rounds_longer(tiny: Tiny) -> None:
    folder, tokens = tiny("qwen3_moe"), 512
    best, default = (work(folder, effort=effort)["quantize"] for effort in ("best", "default"))
    (job,) = open_jobs(folder, Settings(type="Q4_K_M"))
    types = job.container.formats(job.plan)
    rounded = [w for w in job.container.checkpoint.weights if w.site and types.get(w.name) not in UNROUNDED]
    longer = (duration.LONGER - 1) * duration.FOLLOWED * sum(w.numel * w.n_in for w in rounded)
    used = job.model.shape.experts_used
    layers = [w for w in job.container.checkpoint.weights if w.site and w.layer is not None]
    grams = sum(2 * (used if w.is_expert else 1) * w.shape[-2] ** 2 for w in layers if len(w.shape) > 1)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    ).requires_grad_(False)
    embedded = model.get_input_embeddings()(
        torch.arange(tokens)[None] % job.model.shape.vocab
    ).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=embedded).logits.sum().backward()
    told = (best.products - default.products - longer) / 2048
    assert told == pytest.approx(counter.get_total_flops() / tokens + grams, rel=0.15)
    assert best.calls > default.calls and best.numbers > default.numbers


def test_a_self_check_starts_llama_cpp_for_files_and_is_of_what_fits(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("qwen3_moe")

    def checked(**given: object) -> Work:
        return work(model, **given)["self-check"]

    file, folder = checked(), checked(type=None, format="safetensors")
    assert file.calls - folder.calls == duration.STARTED and file.numbers > folder.numbers
    assert file.products == pytest.approx(4 / 3 * folder.products)
    many = work(tiny("qwen3_moe", num_experts=32), type=None, format="safetensors")["self-check"]
    assert many.calls - folder.calls == 2 * 3 * (32 - 8) * duration.HELD
    monkeypatch.setattr(duration, "usable_bytes", lambda ram: duration.WEIGHT * 10_000)
    part = checked()
    assert part.numbers == pytest.approx(10_000 * (duration.CHECKED + duration.UNPACKED))
    assert part.calls < file.calls / 1.5 and part.products < folder.products / 100


def test_the_machine_is_asked_briefly() -> None:
    found = speed()
    assert 1e8 < found.products < 1e13 and 1e7 < found.numbers < 1e11
    assert 1e3 < found.calls < 1e8 and found.cores > 0
    assert Speed(10, 5, 2, 1).seconds(Work(100, 10, 2)) == 13


def test_a_short_conversion_is_not_predicted(tiny: Tiny) -> None:
    def asked(**given: object) -> object:
        jobs = open_jobs(tiny("qwen3_moe"), Settings(**({"type": "Q4_K_M"} | given)))  # type: ignore[arg-type]
        return forecast(jobs, Texts(None, None, None), False)

    assert asked() is None and asked(effort="best") is None


def test_what_is_expected_is_said_and_kept(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(duration, "SHORT", 0.0)
    monkeypatch.setattr(duration, "TOLD", 0.0)
    asked = ("convert", tiny("olmoe"), "-t", "Q4_K_M", "--effort", "fast", "--calib-tokens", 2048)
    done = run(*asked, "--eval-tokens", 1024, "-o", tmp_path / "a.gguf", "--json")
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    found, took = value["forecast"], {stage["name"]: stage for stage in value["stages"]}
    assert took.keys() == {"open", *found["stages"]}
    assert found["cpu_seconds"] == pytest.approx(sum(found["stages"].values())) and found["seconds"] > 0
    assert max(stage["peak_bytes"] for stage in took.values()) < 1.5 * found["memory_bytes"]
    assert found["disk_bytes"] > 2 * value["files"][0]["bytes"]
    assert all(stage["cpu_seconds"] > 0 for stage in took.values())
    (said,) = [record.message for record in caplog.records if "will take about" in record.message]
    assert "GB of memory and" in said and "GB of disk" in said
    (job,) = open_jobs(GgufModel(tmp_path / "a.gguf", tiny("olmoe")), Settings(type="Q4_K_M"))
    handled = decoding(job.container.checkpoint, Speed(1e11, 1e9, 1e5, 1))
    assert handled > 1, "decoding costs more than reading floats"
    (job,) = open_jobs(tiny("olmoe"), Settings(type="Q4_K_M"))
    assert decoding(job.container.checkpoint, Speed(1e11, 1e9, 1e5, 1)) == 0
    plain, packed = (counted([job], Texts(None, None, None), False, lambda name: 1.0, n) for n in (0, 2))
    of_all = {name: packed[name].numbers - plain[name].numbers for name in plain}
    assert of_all["verify"] == 0 < of_all["quantize"] == 2 * Model.of(job.model, 1).seen


def decoded(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, *stored: Stored) -> list[tuple[type[Codec], int]]:
    """The codec and the rows of every decoding that is timed, for a model that stores just these."""
    checkpoint, seen = open_checkpoint(tiny("olmoe")), list[tuple[type[Codec], int]]()
    for kind in {type(each.codec) for each in stored}:

        def decode(self: Codec, stored: Stored, index: int | None, rows: range, real=kind.decode) -> Tensor:  # type: ignore[no-untyped-def]
            seen.append((type(self), len(rows)))
            return real(self, stored, index, rows)

        monkeypatch.setattr(kind, "decode", decode)
    weights = tuple(replace(checkpoint.weights[0], origin=Origin((each,))) for each in stored)
    assert decoding(replace(checkpoint, weights=weights), Speed(1e11, 1e9, 1e5, 1)) > 0
    return seen


def test_words_that_lie_across_a_matrix_are_timed_for_all_of_it(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All words are read for any rows: timed for some, a number would cost more the larger the matrix."""
    rows, columns, kinds = 4096, 128, list[Stored]()
    assert rows * columns > 1 << 18
    for layout in ("awq", "gptq", "rows"):
        (folder := tmp_path / layout).mkdir()
        if layout == "rows":
            scales = torch.ones(rows // 128, columns // 128)
            tensors = {
                "m.weight": torch.ones(rows, columns).to(torch.float8_e4m3fn),
                "m.weight_scale_inv": scales,
            }
            kinds.append(one(folder, tensors, {"quant_method": "fp8", "weight_block_size": [128, 128]}))
        elif layout == "awq":
            kinds.append(one(folder, awq(rows, columns, 64)[0], AWQ))
        else:
            kinds.append(one(folder, gptq(4, rows, columns, 32)[0], config(4, 32)))
    some = (1 << 18) // columns
    told = zip([type(each.codec) for each in kinds], (rows, rows, some), strict=True)
    assert decoded(tiny, monkeypatch, *kinds) == [each for each in told for _ in range(3)]


def test_codecs_of_one_name_are_timed_each(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    side, parts = 64, {"global_scale": torch.ones(1, 1, 1)}
    one_way = {
        "weight": torch.zeros(1, side, side // 2, dtype=torch.uint8),
        "scale": torch.ones(1, side, side // 16),
    }
    across = {name: tensor.transpose(1, 2) for name, tensor in one_way.items()}
    kinds = []
    for number, (codec, found) in enumerate(((Nvfp4(False), one_way), (Nvfp4Across(), across))):
        (folder := tmp_path / f"{number}").mkdir()
        found["scale"] = found["scale"].to(torch.float8_e4m3fn)
        kinds.append(Stored("w", (1, side, side), "F32", write(folder, found | parts), codec))
    seen = decoded(tiny, monkeypatch, *kinds)
    assert [kind for kind, _ in seen] == [Nvfp4] * 3 + [Nvfp4Across] * 3
