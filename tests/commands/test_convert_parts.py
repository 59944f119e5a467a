"""A file in parts, as llama.cpp cuts it: what the whole file holds, for the runtime and for every command."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from typer.testing import CliRunner, Result

from moequant.cli import app
from moequant.commands.convert import convert, open_job
from moequant.containers.gguf import checksums
from moequant.containers.gguf.read import GgufFile
from moequant.files import part_names
from tests.clients.llama import Llama
from tests.commands.test_convert import ids_for, settings

SPLIT = 600_000


@pytest.fixture(scope="module")
def folder(tiny) -> Path:
    return tiny("qwen3_moe")


@pytest.fixture(scope="module")
def whole(folder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "q.gguf"
    convert(folder, out, settings(text, "Q4_K_M", eval_tokens=0))
    return out


@pytest.fixture(scope="module")
def parts(folder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    out = tmp_path_factory.mktemp("parts") / "q.gguf"
    convert(folder, out, settings(text, "Q4_K_M", eval_tokens=0, split_size=str(SPLIT)))
    found = tuple(sorted(out.parent.iterdir()))
    assert found == part_names(out, len(found)) and len(found) > 2
    return found


@pytest.fixture
def copies(parts: tuple[Path, ...], tmp_path: Path) -> tuple[Path, ...]:
    """Parts that a test may damage."""
    return tuple(Path(shutil.copy(part, tmp_path)) for part in parts)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def test_they_hold_what_the_whole_file_holds(whole: Path, parts: tuple[Path, ...]) -> None:
    one, many = GgufFile(whole), GgufFile(parts[0])
    assert list(one.tensors) == list(many.tensors) and checksums.recorded(one) == checksums.recorded(many)
    assert checksums.recorded(one) is not None
    for name in one.tensors:
        assert one.data(name).tobytes() == many.data(name).tobytes()
    split = {key: value for key, value in many.header.metadata.items() if key.startswith("split.")}
    assert split == {"split.no": 0, "split.count": len(parts), "split.tensors.count": len(one.tensors)}
    assert many.header.metadata == one.header.metadata | split
    for number, part in enumerate(parts):
        alone = GGUFReader(part)
        assert sum(int(tensor.n_bytes) for tensor in alone.tensors) <= SPLIT or len(alone.tensors) == 1
        keys = {key for key in alone.fields if not key.startswith("GGUF.")}
        assert number == 0 or keys == set(split), "only the first part has the keys of the model"


def test_llama_cpp_computes_the_same(whole: Path, parts: tuple[Path, ...]) -> None:
    with Llama(whole, threads=1) as one, Llama(parts[0], threads=1) as many:
        ids = ids_for(one.n_vocab, 128).tolist()
        assert np.array_equal(one.logits(ids), many.logits(ids))
        assert one.generate(ids[:4], 16) == many.generate(ids[:4], 16)


def test_every_command_reads_them(
    folder: Path, whole: Path, parts: tuple[Path, ...], text: Path, tmp_path: Path
) -> None:
    eval_ = ("--eval", text, "--eval-tokens", 1024)
    compared = run("compare", folder, whole, parts[0], *eval_, "--json")
    assert compared.exit_code == 0, compared.stderr
    theirs = ("--engine", "llama.cpp", "--sample-tokens", 0, "--threads", 1)
    running = run("compare", whole, parts[0], *theirs, *eval_)
    assert running.exit_code == 0, running.stderr
    for command in (
        ["check", parts[0]],
        ["check", parts[0], "--baseline", folder],
        ["inspect", parts[0]],
        ["fit", parts[0], "--vram", "0", "--ram", "8G", "--ctx", "512"],
    ):
        done = run(*command)
        assert done.exit_code == 0, (command, done.output, done.stderr)


def test_parts_that_do_not_belong_together(copies: tuple[Path, ...], folder: Path) -> None:
    for command in (
        ["check"],
        ["inspect"],
        ["fit", "--vram", "0", "--ram", "8G", "--ctx", "512"],
        ["compare", folder],
    ):
        done = run(*command, copies[1])
        assert done.exit_code == 1 and f"give the first, {copies[0].name}" in done.stderr
        assert done.stderr.count("\n") == 1
    name = copies[0].with_name("other.gguf")
    copies[0].rename(name)
    assert "split.count is" in run("check", name).stderr
    name.rename(copies[0])
    copies[1].unlink()
    done = run("compare", folder, copies[0])
    assert done.exit_code == 1 and f"{copies[1].name}: no such file" in done.stderr


def test_a_part_of_another_conversion_is_named(
    folder: Path, text: Path, copies: tuple[Path, ...], tmp_path: Path
) -> None:
    """The same types, so that header and sizes are those that are expected; only the bytes are others."""
    other = tmp_path / "other" / "q.gguf"
    other.parent.mkdir()
    convert(folder, other, settings(text, "Q4_K_M", eval_tokens=0, split_size=str(SPLIT), calib_tokens=1024))
    theirs = part_names(other, len(copies))
    assert all(path.is_file() for path in theirs)
    shutil.copy(theirs[1], copies[1])
    done = run("check", copies[0])
    assert done.exit_code == 1 and "blk." in done.output + done.stderr


def test_what_is_said_before_is_what_is_written(folder: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    for changes in ({"type_": "Q8_0"}, {"type_": None, "size": "1.2M"}):
        asked = settings(text, **changes, eval_tokens=0, split_size="0.3M", overwrite=True)
        said = open_job(folder, asked).parts(out)
        report = convert(folder, out, asked)
        assert {path: path.stat().st_size for path in tmp_path.iterdir()} == said == report.parts
        assert len(said) > 3 and sum(said.values()) == report.file_bytes
        assert asked.size is None or 0.9 * 1_200_000 < report.file_bytes <= 1_200_000
        assert all(path.name in report.summary() for path in said)
    done = run("convert", folder, "-o", out, "--split-size", "0.3M", "--size", "1.2M", "--dry-run")
    assert done.exit_code == 0 and "m-00002-of-0000" in done.output


def test_one_part_is_a_plain_file(
    folder: Path, whole: Path, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "q.gguf"
    convert(folder, out, settings(text, "Q4_K_M", eval_tokens=0, split_size="40G"))
    assert out.read_bytes() == whole.read_bytes() and [path.name for path in tmp_path.iterdir()] == [out.name]
    assert "split" not in capfd.readouterr().err


def test_what_cannot_be_named_so(folder: Path, tmp_path: Path) -> None:
    for name in ("q-00001-of-00003.gguf", "q-00001-of-00001.gguf"):
        for split in ([], ["--split-size", "40G"]):
            done = run("convert", folder, "-o", tmp_path / name, *split)
            assert done.exit_code == 1 and "is the name of a part; give q.gguf" in done.stderr
    done = run("convert", folder, "-o", tmp_path / "q.gguf", "--split-size", "many")
    assert done.exit_code == 1 and "size 'many'" in done.stderr and not list(tmp_path.iterdir())
