"""Versions at work: timed and sampled in fresh processes, and the record of what the figures depend on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from moequant.checkpoint import load, open_checkpoint
from moequant.commands.compare import CompareSettings, run
from moequant.errors import MoequantError
from moequant.escape import plain
from moequant.evaluate import environment as record
from moequant.evaluate.samples import sample
from moequant.forward.resources import Resources
from moequant.report.compare_running import same_tokens, speeds
from moequant.runtimes.llama_cpp.binding import LlamaError
from moequant.runtimes.llama_cpp.engine import Llama
from moequant.runtimes.llama_cpp.serving import Prompt, Serving, serve
from moequant.text import bundled, corpus
from moequant.text.rows import load_encoder
from tests import models
from tests.forks import python

SHORT = Prompt("average", models.TEXT[0])


@pytest.fixture(scope="module")
def folder() -> Path:
    """Trained: of a random model's likeliest tokens the first two are too close for two implementations."""
    return bundled.path("demo")


@pytest.fixture(scope="module")
def file(demo_file: Path) -> Path:
    return demo_file


def test_a_file_is_timed_and_sampled_in_a_process_of_its_own(file: Path) -> None:
    found = serve(file, [SHORT, Prompt("long", models.TEXT[1] * 40)], 6, 1)
    with Llama(file, n_ctx=1024, threads=1, cache=None) as model:
        ids = model.tokenize(SHORT.text, add_special=True)
        made = model.generate(ids, 6)
        assert found.samples[0].ids == tuple(made) and found.samples[0].text == model.detokenize(made)
    assert [(one.prompt, one.cut) for one in found.samples] == [("average", 0), ("long", 0)]
    assert found.samples[0].fed == len(ids)
    for one in found.samples:
        assert len(one.seconds) == len(one.ids) and min(one.seconds) > 0
    later = [second for one in found.samples for second in one.seconds[1:]]
    assert found.latencies == sorted(later) and found.speed == len(later) / sum(later)
    assert found.latency(0.5) == sorted(later)[len(later) // 2] <= found.latency(0.95) == max(later)
    assert found.first_token("average") == found.samples[0].seconds[0]
    assert found.prompt_speed == found.samples[1].fed / found.samples[1].seconds[0]
    assert found.load_seconds > 0


def test_keys_and_values_are_kept_as_they_are_scored(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In continuations too: the candidate's as was asked for, the baseline's exactly."""
    asked: list[str | None] = []

    def served(*given: Any) -> Serving:
        asked.append(given[4])
        return serve(*given)

    monkeypatch.setattr("moequant.commands.compare.serve", served)
    for kind, expected in (("q8_0", ["f32", "q8_0"]), (None, [None, None])):
        settings = CompareSettings(eval_tokens=1024, engine="llama.cpp", cache_type=kind, sample_tokens=2)
        run(file, [file], settings)
        assert asked == expected
        asked.clear()


def test_a_cache_of_eight_bits_takes_less_memory(file: Path) -> None:
    """It reaches llama.cpp in the process of the file; tokens of this model do not differ by it."""
    exact, eight = (serve(file, [SHORT], 2, 1, cache) for cache in ("f32", "q8_0"))
    with Llama(file, n_ctx=2048, threads=1, vocab_only=True) as model:
        heads, layers = (
            int(model.meta(f"{model.meta('general.architecture')}.{key}") or 0)
            for key in ("attention.head_count_kv", "block_count")
        )
        width = int(model.meta(f"{model.meta('general.architecture')}.attention.key_length") or 0)
    saved = 2 * 2048 * heads * width * layers * (4 - 34 / 32)
    assert saved > 2e6 and exact.bytes - eight.bytes > 0.3 * saved


def test_memory_is_the_model_s_and_not_ours(file: Path) -> None:
    """Weights are all touched; torch, which this process has and the child has not, would be over 200 MB."""
    found = serve(file, [SHORT], 2, 1)
    assert found.bytes > file.stat().st_size
    assert found.bytes < found.process_bytes < found.bytes + 100e6


def test_a_prompt_that_is_too_long_loses_its_start(file: Path) -> None:
    with Llama(file, vocab_only=True) as vocabulary:
        ids = vocabulary.tokenize(bundled.prompts()["long"])
    found = serve(file, [Prompt("long", bundled.prompts()["long"])], 4, 1)
    assert found.n_ctx == 2048, "what the model was made for"
    assert (found.samples[0].fed, found.samples[0].cut) == (2044, len(ids) - 2044)
    with Llama(file, n_ctx=2048, threads=1, cache=None) as model:
        assert tuple(model.generate(ids[-2044:], 4)) == found.samples[0].ids


@pytest.mark.parametrize(
    ("prompt", "tokens", "match"),
    [(Prompt("user", ""), 4, "prompt user has no tokens"), (SHORT, 2048, "do not fit the model's context")],
)
def test_prompts_that_cannot_be_continued(
    file: Path, folder: Path, prompt: Prompt, tokens: int, match: str
) -> None:
    for action in (
        lambda: serve(file, [prompt], tokens, 1),
        lambda: sample(open_checkpoint(folder), load, [prompt], tokens),
    ):
        with pytest.raises(MoequantError, match=match) as error:
            action()
        assert "\n" not in str(error.value)


def test_what_llama_cpp_cannot_load_is_one_line(tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF\x03\0\0\0 nothing that follows")
    with pytest.raises(LlamaError, match=r"bad\.gguf: llama\.cpp did not get through") as error:
        serve(bad, [SHORT], 2, 1)
    assert "\n" not in str(error.value)


def test_transformers_says_what_llama_cpp_says(file: Path, folder: Path) -> None:
    """The same weights unrounded, two implementations, one greedy continuation."""
    prompts = [SHORT, *(Prompt(name, bundled.prompts()[name]) for name in ("average", "long"))]
    ours = sample(open_checkpoint(folder), load, prompts, 8)
    theirs = serve(file, prompts, 8, 1).samples
    assert [(one.fed, one.cut) for one in ours] == [(one.fed, one.cut) for one in theirs]
    # The long one lies beyond the positions that this model was trained on: what it says there is noise.
    assert [(one.ids, one.text) for one in ours[:2]] == [(one.ids, one.text) for one in theirs[:2]]


def settings(**changes: object) -> CompareSettings:
    return CompareSettings(eval_tokens=1024, resources=Resources(threads=1), **changes)


def test_every_version_runs_in_either_engine(file: Path, folder: Path) -> None:
    found = run(folder, [file], settings(sample_tokens=3, prompts=("mine", "and another")))
    assert [one.name for one in found.ran] == [folder.name, file.name]
    assert found.ran[0].serving is None and found.ran[1].serving is not None
    names = [one.prompt for one in found.ran[0].samples]
    assert names == ["easy", "average", "long", "malformed", "user 1", "user 2"]
    for one, two in zip(*(one.samples[:2] for one in found.ran), strict=True):
        assert same_tokens(one, two) == len(one.ids) == 3
    assert len(speeds(found.ran)) == 1


def test_who_samples_unasked() -> None:
    assert settings().tokens_sampled == 0
    assert settings(engine="llama.cpp").tokens_sampled == settings(prompts=("a",)).tokens_sampled == 32
    assert settings(engine="llama.cpp", sample_tokens=0).tokens_sampled == 0


def test_the_command_line_is_in_the_record(file: Path) -> None:
    words = ["compare", str(file), str(file), "--engine", "llama.cpp", "--eval-tokens", "1024", "--json"]
    words += ["--sample-tokens", "2", "--prompt", "a b"]
    done = python("-m", "moequant", *words)
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    kept = value["record"]
    named = " ".join(file.name if word == str(file) else word for word in words[:-1])
    assert kept["command"] == f"moequant {named} 'a b'", "names, not where they lie here"
    assert str(file.parent) not in done.stdout
    (digest,) = kept["origins"][1]["files"].values()
    assert digest == hashlib.sha256(file.read_bytes()).hexdigest()
    assert kept["settings"]["seed"] == 0 and kept["settings"]["context"] == 512
    assert kept["libraries"]["xllamacpp"] and kept["machine"]["cpu"] and kept["date"].endswith("+00:00")
    assert value["ran"][0]["samples"][-1]["prompt"] == "user"
    assert value["ran"][1]["bytes"] > 0 and value["ran"][1]["tokens_per_second"] > 0


def test_a_folder_s_files_and_precision_are_recorded(folder: Path, file: Path) -> None:
    found = run(folder, [file], settings())
    assert not found.ran
    ours, theirs = found.record.origins
    assert set(ours.files) >= {"config.json", "tokenizer.json", "model.safetensors"}
    assert ours.precision == {"BF16": len(open_checkpoint(folder).weights)} and set(theirs.precision) == {
        "F32"
    }
    ids = corpus.pack(corpus.read(split="evaluation"), load_encoder(folder), 512, 1024, 0, None).ids
    assert found.record.settings["tokens SHA-256"] == hashlib.sha256(ids.numpy().tobytes()).hexdigest()


def test_revisions_of_downloads_are_found(tmp_path: Path) -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    cached = tmp_path / "models--a--b" / "snapshots" / commit
    cached.mkdir(parents=True)
    assert record.revision(cached) == record.revision(cached / "model.gguf") == commit
    notes = tmp_path / "local" / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    (notes / "config.json.metadata").write_text(f"{commit}\netag\n1.0\n")
    assert record.revision(tmp_path / "local") == commit
    assert record.revision(tmp_path / "local" / "x.gguf") is None and record.revision(tmp_path) is None


def test_samples_cannot_steer_a_terminal() -> None:
    assert plain("a\x1b[31m\nb\u202ec\u200b é😀") == "a\\u{1b}[31m⏎b\\u{202e}c\\u{200b} é😀"
