"""A killed run goes on where it stopped and ends with the same bytes."""

from __future__ import annotations

import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moequant.checkpoint import open_checkpoint
from moequant.errors import OutputError
from moequant.forward.resources import Resources
from moequant.forward.stream import Reader
from moequant.statistics import store
from moequant.statistics.calibrate import calibrate
from moequant.statistics.journal import Journal
from moequant.text.corpus import Rows
from tests import models
from tests.forks import python

SMALL = Resources(threads=1, batch_tokens=128)

KILLED = textwrap.dedent(
    """
    # Every run is a process of its own, forked before torch has started a thread. A hook on
    # all modules counts their calls and kills the process at a chosen one.
    import os, signal, sys
    from pathlib import Path
    import torch
    from moequant.checkpoint import open_checkpoint
    from moequant.text.corpus import Rows
    from moequant.statistics import store
    from moequant.statistics.calibrate import calibrate
    from moequant.statistics.journal import Journal
    from moequant.forward.model import empty_model
    from moequant.forward.resources import Resources

    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    checkpoint = open_checkpoint(folder)
    empty_model(checkpoint)  # what transformers loads for it takes every fork seconds
    ids = torch.arange(7 * 64).view(7, 64) * 37 % checkpoint.shape.vocab
    rows = Rows(ids, ("a", "b") * 3 + ("a",), "ids", ids.numel())
    calls = 0

    def run(name, kill_at):
        def hook(module, args):
            global calls
            calls += 1
            if calls == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        torch.nn.modules.module.register_module_forward_pre_hook(hook)
        journal = Journal(out / f"{name}.state", checkpoint, rows)
        found = calibrate(checkpoint, rows, Resources(threads=1, batch_tokens=128), journal=journal)
        store.save(out / f"{name}.safetensors", store.stored(checkpoint, found))
        journal.remove()
        (out / f"{name}.calls").write_text(str(calls))

    def forked(name, kill_at=None):
        child = os.fork()
        if not child:
            run(name, kill_at)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert forked("plain") == 0
    total = int((out / "plain.calls").read_text())
    for name, share in (("early", 0.02), ("middle", 0.4), ("late", 0.75), ("end", 0.999)):
        assert forked(name, int(total * share)) == -signal.SIGKILL, name
        left = sorted(path.name for path in (out / f"{name}.state").glob("layer-*"))
        assert forked(name) == 0, name
        assert not (out / f"{name}.state").exists(), name
        print(name, len(left), int((out / f"{name}.calls").read_text()) < total)
    """
)


def rows(seed: int = 0, length: int = 64) -> Rows:
    ids = torch.randint(0, models.VOCAB, (4, length), generator=torch.Generator().manual_seed(seed))
    return Rows(ids, ("a",) * 4, "random ids", ids.numel())


def test_killed_anywhere_it_resumes_with_the_same_bytes(tiny, tmp_path: Path) -> None:
    done = python("-c", KILLED, tiny("qwen3_moe"), tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in found] == ["early", "middle", "late", "end"]
    # Killed before the first layer was done, inside the second, and after the last: what was done stays.
    assert [int(line[1]) for line in found] == [0, 0, 1, 2]
    assert [line[2] for line in found][2:] == ["True", "True"], "finished layers are not computed again"
    plain = (tmp_path / "plain.safetensors").read_bytes()
    for name, *_ in found:
        assert (tmp_path / f"{name}.safetensors").read_bytes() == plain, name


def test_a_journal_changes_no_byte(tiny, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny("mixtral"))
    for name, journal in (("without", None), ("with", Journal(tmp_path / "run", checkpoint, rows()))):
        found = calibrate(checkpoint, rows(), SMALL, journal=journal)
        store.save(tmp_path / f"{name}.safetensors", store.stored(checkpoint, found))
    assert (tmp_path / "with.safetensors").read_bytes() == (tmp_path / "without.safetensors").read_bytes()


def test_a_finished_journal_reads_no_weight(tiny, tmp_path: Path) -> None:
    checkpoint, reader = open_checkpoint(tiny("mixtral")), Reader()
    first = calibrate(checkpoint, rows(), SMALL, journal=Journal(tmp_path / "run", checkpoint, rows()))
    again = calibrate(checkpoint, rows(), SMALL, reader, Journal(tmp_path / "run", checkpoint, rows()))
    assert not reader.reads
    assert again.inputs.keys() == first.inputs.keys()


def test_hidden_states_of_finished_layers_are_gone(tiny, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny("mixtral"))
    calibrate(checkpoint, rows(), SMALL, journal=Journal(tmp_path / "run", checkpoint, rows()))
    assert [path.name for path in (tmp_path / "run").glob("hidden-*")] == ["hidden-0002.f32"]


def test_a_journal_of_another_run_is_refused(tiny, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny("mixtral"))
    Journal(tmp_path / "run", checkpoint, rows())
    others = [
        (checkpoint, rows(seed=1)),
        (checkpoint, rows(length=32)),
        (checkpoint, replace(rows(), domains=("a", "a", "a", "b"))),
        (open_checkpoint(tiny("qwen3_moe")), rows()),
    ]
    for model, text in others:
        with pytest.raises(OutputError, match="another model, text or version") as error:
            Journal(tmp_path / "run", model, text)
        assert "\n" not in str(error.value)
    Journal(tmp_path / "run", checkpoint, rows())


def test_a_damaged_journal_is_one_line(tiny, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny("mixtral"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(OutputError, match="or damaged; delete the folder"):
        Journal(tmp_path / "run", checkpoint, rows())
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is not of a journal"):
        Journal(tmp_path / "file", checkpoint, rows())


def test_hidden_states_that_are_missing_or_short_are_one_line(tiny, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny("mixtral"))
    journal = Journal(tmp_path / "run", checkpoint, rows())
    calibrate(checkpoint, rows(), SMALL, journal=journal)
    (tmp_path / "run" / "layer-0002.safetensors").unlink()  # as if the end had not been reached
    hidden = tmp_path / "run" / "hidden-0002.f32"
    hidden.write_bytes(hidden.read_bytes()[:-4])
    with pytest.raises(OutputError, match="hidden states are damaged; delete"):
        calibrate(checkpoint, rows(), SMALL, journal=journal)
    hidden.unlink()
    with pytest.raises(OutputError, match="hidden states cannot be read"):
        calibrate(checkpoint, rows(), SMALL, journal=journal)


def test_hidden_states_with_a_flipped_bit_are_refused(tiny, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny("mixtral"))
    journal = Journal(tmp_path / "run", checkpoint, rows())
    calibrate(checkpoint, rows(), SMALL, journal=journal)
    (tmp_path / "run" / "layer-0002.safetensors").unlink()
    hidden = tmp_path / "run" / "hidden-0002.f32"
    data = bytearray(hidden.read_bytes())
    data[len(data) // 2] ^= 1
    hidden.write_bytes(data)
    with pytest.raises(OutputError, match="hidden states are damaged; delete"):
        calibrate(checkpoint, rows(), SMALL, journal=journal)


def test_the_statistics_of_another_layer_or_run_are_refused(tiny, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny("mixtral"))
    journals = [Journal(tmp_path / str(seed), checkpoint, rows(seed=seed)) for seed in (0, 1)]
    for seed, journal in enumerate(journals):
        calibrate(checkpoint, rows(seed=seed), SMALL, journal=journal)
    first, second = (tmp_path / "0" / f"layer-000{n}.safetensors" for n in (0, 1))
    kept = second.read_bytes()
    for false in (first.read_bytes(), (tmp_path / "1" / second.name).read_bytes()):
        second.write_bytes(false)
        with pytest.raises(OutputError, match="another layer or another run"):
            journals[0].finished()
    second.write_bytes(kept)
    assert len(journals[0].finished()) == 3
    second.write_bytes(kept[:-1])
    with pytest.raises(OutputError, match=r"route again; or delete .* to begin again|cannot be read"):
        journals[0].finished()
