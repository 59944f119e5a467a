"""The loops in C against torch, and where they come from."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moequant import formats, native
from moequant.formats import FORMATS
from moequant.rounding.columns import walk, walk_by_torch
from moequant.rounding.descent import move, move_by_torch, move_steps, move_steps_by_torch
from moequant.rounding.lattice import Fields, Lattice, lattice_of
from tests.forks import python

STEPS = ["Q2_K", "Q4_K", "Q6_K", "Q8_0", "Q4_1", "IQ4_XS", "TQ1_0", "MXFP4", "NVFP4", "IQ3_S", "IQ1_M"]
"""Scales that move and those that do not, with and without minima and d; a grid's."""

SCALAR = ["Q2_K", "Q4_K", "Q8_0", "IQ4_NL", "MXFP4", "TQ1_0"]
"""Levels that count up, those of tables, few and many."""


def problem(columns: int, rows: int = 101, experts: int = 2) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A unit triangular matrix for each expert, and weights, what is wanted, steps and their inverses; some
    steps are 0, and rows are no multiple of what a vector holds."""
    g = torch.Generator().manual_seed(columns)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    matrix = (0.1 * numbers(experts, columns, columns)).triu(1) + torch.eye(columns)
    weights = 5 * numbers(experts, columns, rows)
    step = 0.2 + numbers(experts, columns, rows).abs()
    step[:, :, 3] = 0
    inverse = torch.where(step > 0, 1 / step, 0.0)
    return matrix, (weights, weights + numbers(experts, columns, rows), step, inverse)


def test_there_are_loops_for_the_cpu_alone() -> None:
    assert native.loops(torch.device("cpu")) is not None, "the tests need a C compiler"
    assert native.loops(torch.device("meta")) is None


@pytest.mark.parametrize("name", SCALAR)
@pytest.mark.parametrize("columns", [32, 21, 256])
def test_walk(name: str, columns: int) -> None:
    lattice = lattice_of(FORMATS[name])
    matrix, given = problem(columns)
    found, known = ([torch.full_like(given[0], torch.nan) for _ in range(2)] for _ in range(2))
    walk(lattice, matrix, given, *found)
    walk_by_torch(lattice, matrix, (given[0], given[1].clone(), *given[2:]), *known)
    assert rows_alike(found, known) > 0.98


@pytest.mark.parametrize("name", SCALAR)
@pytest.mark.parametrize("columns", [32, 21, 256])
def test_move(name: str, columns: int) -> None:
    lattice = lattice_of(FORMATS[name])
    matrix, (weights, pull, step, by) = problem(columns)
    hessian = matrix @ matrix.mT
    levels = [lattice.snap(weights.clone()) for _ in range(2)]
    moved = [torch.full_like(weights, torch.nan) for _ in range(2)]
    move(lattice, hessian, (pull, step, 0.3 * by), levels[0], moved[0])
    move_by_torch(lattice, hessian, (pull.clone(), step, 0.3 * by), levels[1], moved[1])
    assert rows_alike((levels[0], moved[0]), (levels[1], moved[1])) > 0.98


def block(lattice: Lattice, rows: int = 101, experts: int = 2) -> tuple[Fields, Tensor, Tensor]:
    """A block of plainly rounded weights, some rows of zeros, some tiny; a Hessian of inputs that are
    correlated; and the gradient, where twice the weights are wanted: scales have somewhere to go."""
    g = torch.Generator().manual_seed(1)
    n = lattice.block
    weights = 0.02 * torch.randn(experts, rows, n, generator=g)
    weights[:, 5], weights[:, 6] = 0, weights[:, 6] * 1e-6
    fields = lattice.read(formats.quantize(lattice.fmt, weights.flatten(0, 1)).view(experts, rows, -1))
    mixed = torch.eye(n) + torch.randn(n, n, generator=g) / n**0.5
    inputs = torch.randn(experts, 4 * n, n, generator=g) @ mixed
    hessian = inputs.mT @ inputs
    return fields, hessian, hessian @ (2 * weights.mT - lattice.value(fields))


@pytest.mark.parametrize("name", STEPS)
def test_move_steps(name: str) -> None:
    lattice = lattice_of(FORMATS[name])
    before, hessian, gradient = block(lattice)
    found, known, gradients = before.copy(), before.copy(), [gradient.clone() for _ in range(2)]
    assert lattice.native_steps is not None
    move_steps(lattice, found, hessian, gradients[0])
    move_steps_by_torch(lattice, known, hessian, gradients[1])
    pairs = list(zip(found.all(), known.all(), strict=True))
    same = torch.stack([(one == other).all(1) for one, other in pairs]).all(0)
    assert float(same.float().mean()) > 0.98  # sums in another order may choose another code
    off = (gradients[0] - gradients[1]).abs().amax(1) / gradients[1].abs().amax(1).clamp_min(1e-20)
    assert float(off[same].max()) < 1e-4
    assert any((one != other).any() for one, other in zip(known.all(), before.all(), strict=True))


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K"])
def test_steps_of_a_part_of_a_matrix(name: str) -> None:
    lattice = lattice_of(FORMATS[name])
    before, hessian, gradient = block(lattice)
    larger = torch.full((2, 600, 600), torch.nan)
    larger[:, 300:556, 300:556] = hessian
    each = [(before.copy(), gradient.clone()) for _ in range(3)]
    move_steps(lattice, each[0][0], hessian, each[0][1])
    move_steps(lattice, each[1][0], larger[:, 300:556, 300:556], each[1][1])
    move_steps(lattice, each[2][0], hessian.mT.contiguous().mT, each[2][1])
    for fields, followed in each[1:]:
        assert torch.equal(followed, each[0][1])
        assert all(torch.equal(one, other) for one, other in zip(fields.all(), each[0][0].all(), strict=True))


def rows_alike(found: list[Tensor] | tuple[Tensor, ...], known: list[Tensor] | tuple[Tensor, ...]) -> float:
    """How many rows have the same levels, and nearly the same errors. Sums in another order may turn one
    level, and all behind it in its row."""
    levels = (found[0] == known[0]).all(1)
    errors = ((found[1] - known[1]).abs() < 1e-3).all(1)
    return float((levels & errors).float().mean())


def test_a_part_of_a_matrix_is_read_with_its_stride() -> None:
    lattice = lattice_of(FORMATS["Q4_K"])
    matrix, given = problem(64)
    part = slice(16, 48)
    inner = tuple(each[:, part] for each in given)
    found, known = ([torch.empty(2, 32, 101) for _ in range(2)] for _ in range(2))
    walk(lattice, matrix[:, part, part], inner, *found)
    walk(lattice, matrix[:, part, part].contiguous(), tuple(each.contiguous() for each in inner), *known)
    assert torch.equal(found[0], known[0]) and torch.equal(found[1], known[1])


@pytest.mark.parametrize("columns", [1, 32])
def test_a_matrix_may_lie_turned(columns: int) -> None:
    lattice = lattice_of(FORMATS["Q4_K"])
    matrix, given = problem(columns)
    turned = matrix.mT.contiguous().mT
    found, known = ([torch.empty_like(given[0]) for _ in range(2)] for _ in range(2))
    walk(lattice, turned, given, *found)
    walk(lattice, matrix, given, *known)
    assert torch.equal(found[0], known[0]) and torch.equal(found[1], known[1])
    hessian, (pull, step, by) = matrix @ matrix.mT + 0.1 * matrix, given[1:]
    levels = [torch.zeros_like(step) for _ in range(2)]
    move(lattice, hessian.mT.contiguous().mT, (pull, step, by), levels[0], found[1])
    move(lattice, hessian, (pull, step, by), levels[1], known[1])
    assert torch.equal(levels[0], levels[1]) and torch.equal(found[1], known[1])


def test_what_columns_have_in_common_may_be_given_once() -> None:
    lattice = lattice_of(FORMATS["Q8_0"])
    matrix, (weights, wanted, step, inverse) = problem(32)
    once = step[:, :1], inverse[:, :1]
    spread = tuple(each.expand(-1, 32, -1) for each in once)
    found, known = ([torch.empty_like(weights) for _ in range(2)] for _ in range(2))
    walk(lattice, matrix, (weights, wanted, *spread), *found)
    walk(lattice, matrix, (weights, wanted, *(each.contiguous() for each in spread)), *known)
    assert torch.equal(found[0], known[0]) and torch.equal(found[1], known[1])


def test_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with native.folder() as kept:
        first = native.built(kept)
        made = first.stat().st_mtime_ns
        assert native.built(kept) == first and first.stat().st_mtime_ns == made
    assert kept == tmp_path / "moequant" / "native"
    assert [each.name for each in kept.iterdir()] == [first.name]


@pytest.mark.parametrize("cache", ["/dev/null", "/proc/no/such/place"])
def test_a_cache_that_cannot_be_written_is_done_without(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    with native.folder() as kept:
        assert native.built(kept).stat().st_size
    assert not kept.exists()


def test_a_cache_that_others_can_write_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with native.folder() as kept:
        assert kept.is_relative_to(tmp_path)
    kept.chmod(0o777)
    with native.folder() as other:
        assert not other.is_relative_to(tmp_path)


def test_a_library_that_was_cut_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with native.folder() as kept:
        native.built(kept).write_bytes(b"half")
    script = "import torch; from moequant.native import loops; assert loops(torch.device('cpu'))"
    done = python("-c", script)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_compiler_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'cc: no such header' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(OSError, match="no such header"):
        native.built(tmp_path)
    assert list(tmp_path.iterdir()) == [compiler]


ROUND = """
import torch
from moequant.rounding.feedback import round_to_hessian
torch.manual_seed(1)
x = torch.randn(2, 400, 256)
data = round_to_hessian("IQ3_S", 0.1 * torch.randn(2, 16, 256), x.mT @ x).data
torch.save(data, "{}")
"""


def test_without_a_compiler_torch_computes_the_same(tmp_path: Path) -> None:
    found = []
    for number, path in enumerate((os.environ["PATH"], str(tmp_path))):
        out = tmp_path / f"{number}.pt"
        variables = os.environ | {"PATH": path, "XDG_CACHE_HOME": str(tmp_path), "CC": "cc"}
        done = python("-c", ROUND.format(out), env=variables)
        assert done.returncode == 0, done.stderr
        assert ("quantizing cannot be compiled here" in done.stderr) == (number == 1)
        found.append(torch.load(out))
    assert (found[0] == found[1]).float().mean() > 0.98


MADE = """
import torch
from moequant.formats import FORMATS, quantize
torch.manual_seed(1)
x, seen = 0.02 * torch.randn(3, 256), torch.rand(256) + 0.1
{}
made = [quantize(each, x, seen, "fast") for each in FORMATS.values() if each.loops]
torch.set_default_device("cpu")
torch.save(made, "{}")
"""


def test_what_torch_makes_untold_does_not_matter(tmp_path: Path) -> None:
    """A loop would write its 32 bits to numbers of 16, and behind them."""
    found = []
    defaults = "", "torch.set_default_dtype(torch.bfloat16)", "torch.set_default_device('meta')"
    for number, default in enumerate(defaults):
        out = tmp_path / f"{number}.pt"
        done = python("-c", MADE.format(default, out))
        assert done.returncode == 0, done.stderr
        found.append(torch.load(out))
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


@pytest.mark.parametrize(
    "script, said",
    [("exit 0", "made no library; is it a C compiler"), ("printf 'n\\351' >&2; exit 1", "n\ufffd")],
)
def test_what_is_no_compiler_is_said(
    script: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(OSError, match=said):
        native.built(tmp_path)
