"""Loops that torch has no fast call for, in C: compiled once on a machine, kept in the user's cache.

Rounding goes from column to column, a few numbers of every row at a time, and torch takes longer to begin
such a call than to compute it. A search for scales tries many of them, and torch writes every try to memory.
`loops` gives these loops on a CPU; where there are none (on a GPU, without a C compiler) callers compute the
same with torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

log = logging.getLogger(__name__)

HEADER = Path(__file__).with_name("lanes.h")
PARTS = "affine", "columns", "grids", "levels", "steps", "symmetric"
SOURCES = tuple(HEADER.with_name(f"{part}.c") for part in PARTS)

FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-shared", "-fPIC")
NATIVE = "-march=native"

WIDE = 256
"""Columns that a call takes at most: what it has of a row stays in the first-level cache."""


class Levels(ctypes.Structure):
    """Levels that are integers: all from low to high, or those of `nearest`, a table by steps of a half."""

    _fields_ = (("low", c_float), ("high", c_float), ("nearest", c_void_p))


class Steps(ctypes.Structure):
    """How steps and offsets come about, see `rounding.lattice.Lattice`; `scales` is a table of f32."""

    _fields_ = (
        *((name, c_int32) for name in ("sub", "lowest", "highest", "minima", "moves_scales", "moves_d")),
        ("only", c_float),
        ("scales", c_void_p),
    )


class Affine(ctypes.Structure):
    """What `formats.affine` searches: tables f32 of lines [ends, 2] and of factors [pairs, 2, steps]."""

    _fields_ = (
        *((name, c_int32) for name in ("block", "sub", "top", "top_scale", "ends", "refits", "pairs")),
        *((name, c_int32) for name in ("steps", "sweeps")),
        *((name, c_void_p) for name in ("lines", "factors")),
    )


class Symmetric(ctypes.Structure):
    """What `formats.symmetric` searches: tables f32 of landings [places] and of factors [centers, steps]."""

    _fields_ = (
        *((name, c_int32) for name in ("block", "sub", "low", "high", "low_scale", "high_scale", "places")),
        *((name, c_int32) for name in ("refits", "centers", "steps", "sweeps")),
        *((name, c_void_p) for name in ("landings", "factors")),
    )


class Rungs(ctypes.Structure):
    """`formats.codebook.Ladder`."""

    _fields_ = tuple((name, c_float) for name in ("lowest", "highest", "step"))


class Grid(ctypes.Structure):
    """Rows of a grid, and lists of them, words i32 [listed, keys]; see `formats.grids`."""

    _fields_ = (
        *(
            (name, c_int32)
            for name in ("group", "bits", "highest", "even", "signed", "listed", "keys", "down")
        ),
        *((name, c_float) for name in ("low", "step", "extra", "delta")),
        ("words", c_void_p),
    )


@dataclass(frozen=True, slots=True)
class Loops:
    """The loops. Tensors are f32 on the CPU, [E, columns, R] unless said otherwise; results are written to
    the last ones, of which each expert's lies in one piece."""

    library: ctypes.CDLL

    def walk(
        self, levels: Levels, unit: Tensor, given: tuple[Tensor, ...], level: Tensor, error: Tensor
    ) -> None:
        """`rounding.columns.walk` of WIDE columns at most; unit [E, columns, columns]."""
        self._columns(self.library.walk, levels, unit, given, (level, error))

    def move(
        self, levels: Levels, hessian: Tensor, given: tuple[Tensor, ...], level: Tensor, moved: Tensor
    ) -> None:
        """`rounding.descent.move` of WIDE columns at most; hessian [E, columns, columns]."""
        self._columns(self.library.move, levels, hessian, given, (level, moved))

    @staticmethod
    def _columns(
        call: ctypes._NamedFuncPointer,
        levels: Levels,
        matrix: Tensor,
        given: tuple[Tensor, ...],
        found: tuple[Tensor, ...],
    ) -> None:
        experts, columns, rows = found[0].shape
        matrix = matrix if matrix.stride(2) == 1 else matrix.contiguous()
        for e in range(experts):
            tensors = [*(each[e].contiguous() for each in given), *(each[e] for each in found)]
            pointers = [pointer(each) for each in tensors]
            call(columns, rows, ctypes.byref(levels), matrix[e].data_ptr(), matrix.stride(1), *pointers)

    def move_steps(
        self, steps: Steps, hessian: Tensor, level: Tensor, gradient: Tensor, moved: tuple[Tensor, ...]
    ) -> None:
        """`rounding.descent.move_steps` of WIDE columns at most. hessian [E, columns, columns]; scale and
        minimum [E, sub-blocks, R], d and dmin [E, 1, R] are `moved`, and the gradient follows."""
        rows, columns = level.shape[2], level.shape[1]
        hessian = hessian if hessian.stride(2) == 1 else hessian.contiguous()
        for e in range(len(level)):
            matrix = hessian[e].data_ptr(), hessian.stride(1)
            pointers = [pointer(each[e]) for each in (level, gradient, *moved)]
            self.library.move_steps(columns, rows, ctypes.byref(steps), *matrix, *pointers)

    def search_affine(self, of: Affine, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        """`formats.affine.search` of x, w [n, block]: codes u8 [n, block], scale and minimum u8 [n,
        sub-blocks], d and dmin [n]."""
        n, subs = len(x), of.block // of.sub if of.top_scale else 0
        codes, scale, minimum = (room(n, k, dtype=torch.uint8) for k in (of.block, subs, subs))
        found = codes, scale, minimum, room(n), room(n)
        x, w = x.contiguous(), w.contiguous()
        pointers = [each.data_ptr() for each in found]
        self.library.search_affine(n, ctypes.byref(of), pointer(x), pointer(w), *pointers)
        return found

    def search_symmetric(self, of: Symmetric, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        """`formats.symmetric.search` of x, w [n, block]: codes i8 [n, block], scale i8 [n, sub-blocks], d
        [n]."""
        n, subs = len(x), of.block // of.sub if of.low_scale else 0
        codes, scale = (room(n, k, dtype=torch.int8) for k in (of.block, subs))
        found = codes, scale, room(n)
        x, w = x.contiguous(), w.contiguous()
        pointers = [each.data_ptr() for each in found]
        self.library.search_symmetric(n, ctypes.byref(of), pointer(x), pointer(w), *pointers)
        return found

    def nearest_points(
        self,
        grid: Grid,
        given: tuple[Tensor, Tensor, Tensor],
        settled: Tensor | None,
        found: tuple[Tensor, ...],
    ) -> None:
        """`rounding.vectors.nearest_points`: of x [E, 8, R], step [E, R] and corner [E, 8, 8]; settled
        [E, R]; to level [E, 8, R], row i32 [E, 8 / group, R] and error [E, R]."""
        for e in range(len(given[0])):
            before = [each[e].contiguous() for each in given]
            down = None if settled is None else settled[e].contiguous()
            pointers = [pointer(each) for each in before], [pointer(each[e]) for each in found]
            moved = None if down is None else pointer(down)
            rows = given[0].shape[2]
            self.library.nearest_points(rows, ctypes.byref(grid), *pointers[0], moved, *pointers[1])

    def closest(
        self, grid: Grid, given: tuple[Tensor, ...], shift: Tensor, found: tuple[Tensor, Tensor]
    ) -> None:
        """`formats.rows.closest` of x, w [group, parts, m] and the inverse [m], with shifts [m]. `found` are
        words i32 and errors [parts, m] so far, and become those of better rows."""
        parts, m = found[0].shape
        pointers = [pointer(each) for each in (*given, shift, *found)]
        self.library.closest(parts, m, ctypes.byref(grid), *pointers)

    def judge(self, grid: Grid, x: Tensor, w: Tensor, word: Tensor) -> tuple[Tensor, Tensor]:
        """The sums [m] of `formats.rows.judge` for x, w [group, parts, m] and rows i32 [parts, m]."""
        parts, m = word.shape
        found = room(m), room(m)
        self.library.judge(parts, m, ctypes.byref(grid), *(pointer(each) for each in (x, w, word, *found)))
        return found

    def fold_signs(self, x: Tensor, w: Tensor, even: bool) -> tuple[Tensor, Tensor]:
        """`formats.rows.fold_signs` of x, w [8, ...]: sizes like x, bits i32 [...]."""
        sizes, bits = room(*x.shape), room(*x.shape[1:], dtype=torch.int32)
        self.library.fold_signs(bits.numel(), even, *(pointer(each) for each in (x, w, sizes, bits)))
        return sizes, bits

    def fit_levels(self, levels: Levels, x: Tensor, w: Tensor, inverses: Tensor) -> tuple[Tensor, Tensor]:
        """`formats.iq4.fit` of x, w [k, m] and inverses [tried, m]: a and b [tried, m]."""
        found = room(*inverses.shape), room(*inverses.shape)
        pointers = [pointer(each) for each in (x, w, inverses, *found)]
        self.library.fit_levels(*x.shape, len(inverses), ctypes.byref(levels), *pointers)
        return found

    def code_levels(self, codes: Levels, x: Tensor, inverse: Tensor) -> Tensor:
        """`formats.iq4.codes` of x [k, m] and the inverse [m]: u8 [k, m], out of a table of codes."""
        found = room(*x.shape, dtype=torch.uint8)
        given = pointer(x), pointer(inverse), found.data_ptr()
        self.library.code_levels(*x.shape, ctypes.byref(codes), *given)
        return found

    def propose(self, rungs: Rungs, scale: Tensor, curvature: Tensor, reach: Tensor) -> Tensor:
        """`formats.codebook.propose` for scales and curvatures [s, n]: d [n]."""
        found = room(scale.shape[1])
        pointers = [pointer(each) for each in (scale, curvature, reach, found)]
        self.library.propose(*scale.shape, len(reach), ctypes.byref(rungs), *pointers)
        return found


_CALLS = {
    "walk": ((c_int64, c_int64, c_void_p, c_void_p, c_int64), 6),
    "move": ((c_int64, c_int64, c_void_p, c_void_p, c_int64), 5),
    "move_steps": ((c_int64, c_int64, c_void_p, c_void_p, c_int64), 6),
    "nearest_points": ((c_int64,), 8),
    "closest": ((c_int64, c_int64), 7),
    "judge": ((c_int64, c_int64), 6),
    "fold_signs": ((c_int64, c_int32), 4),
    "fit_levels": ((c_int64, c_int64, c_int64), 6),
    "code_levels": ((c_int64, c_int64), 4),
    "propose": ((c_int64, c_int64, c_int64), 5),
    "search_affine": ((c_int64,), 8),
    "search_symmetric": ((c_int64,), 6),
}
"""Numbers that come first, and how many pointers follow."""


def pointer(tensor: Tensor) -> int:
    """Where a tensor begins that lies in one piece."""
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    assert tensor.dtype in (torch.float32, torch.int32)
    return tensor.data_ptr()


def room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What a loop writes to: of its own type, on the CPU, whatever torch makes where it is not told."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def loops(device: torch.device) -> Loops | None:
    """The loops for tensors on that device, None: there are none."""
    if device.type != "cpu":
        return None
    with _lock:  # threads ask at once, and one compiles
        return compiled()


_lock = Lock()


@cache
def compiled() -> Loops | None:
    """The loops for this processor, None, with a warning, where they cannot be compiled."""
    try:
        library = _library()
    except OSError as error:
        log.warning("quantizing cannot be compiled here and runs slower: %s", error)
        return None
    for name, (numbers, pointers) in _CALLS.items():
        call = getattr(library, name)
        call.argtypes, call.restype = (*numbers, *(c_void_p,) * pointers), None
    return Loops(library)


def _library() -> ctypes.CDLL:
    with folder() as kept:
        path = built(kept)
        try:
            return ctypes.CDLL(str(path))  # once loaded, its file may go
        except OSError as error:  # a cut file, or nothing there may be run
            log.info("%s cannot be loaded (%s): it is compiled again for this process", path, error)
    with tempfile.TemporaryDirectory(prefix="moequant-native-") as name:
        return ctypes.CDLL(str(built(Path(name))))


@contextmanager
def folder() -> Iterator[Path]:
    """Where compiled libraries are kept: the user's cache, or, where that cannot be written or others can
    write it, a folder that is gone at the end of the block."""
    try:
        kept = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "moequant" / "native"
        kept.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = kept.stat()
        # What lies there is run: nobody else may have put it there.
        own = status.st_uid == os.getuid() and not status.st_mode & 0o022 and os.access(kept, os.W_OK)
    except (OSError, RuntimeError):  # no home at all is a RuntimeError
        own = False
    if own:
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix="moequant-native-") as name:
        yield Path(name)


def built(kept: Path) -> Path:
    """The compiled library, found in that folder or made there. OSError where it cannot be made."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "cc", "gcc", "clang"))), None)
    if compiler is None:
        raise OSError("there is no C compiler; install cc, gcc or clang")
    path = kept / f"loops-{_fingerprint(compiler)}.so"
    if not path.exists():
        _build(compiler, path)
    return path


def _fingerprint(compiler: str) -> str:
    """Of all that decides what is compiled: source, compiler, and what this processor can do."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    sources = b"".join(each.read_bytes() for each in (HEADER, *SOURCES))
    parts = [sources, " ".join(FLAGS).encode(), version, _processor().encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    abilities = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {abilities}"


def _build(compiler: str, path: Path) -> None:
    """Compile to `path`, which is there whole or not at all; without NATIVE where that is not known."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".making-") as name:
        made = Path(name) / path.name
        for flags in ((*FLAGS, NATIVE), FLAGS):
            command = [compiler, *flags, "-o", str(made), *map(str, SOURCES)]
            done = subprocess.run(command, capture_output=True, check=False)
            if done.returncode == 0 and made.exists():
                made.replace(path)
                return
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise OSError((said or [f"{compiler} made no library; is it a C compiler?"])[0])
