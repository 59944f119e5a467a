"""The file under check, whatever its container: packed bytes for the kernels, and an independent decoder."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from moequant import formats
from moequant.checkpoint import Checkpoint
from moequant.checkpoint.open import method_of
from moequant.containers.folders.layouts import LAYOUTS
from moequant.containers.folders.read import FolderWeights
from moequant.containers.folders.storage import GptqIntegers, PackedIntegers, Storage
from moequant.containers.gguf import checksums
from moequant.containers.gguf.export import export
from moequant.containers.gguf.header import TensorInfo
from moequant.containers.gguf.read import GgufFile, decode
from moequant.containers.gguf.weights import GgufWeights
from moequant.errors import PlanError, VerifyError
from moequant.files import RECORD
from moequant.formats import groups
from moequant.kernels import Matrix
from moequant.values import Weight

ALTERED = "bytes are not those that were written"


@dataclass(frozen=True, slots=True)
class Entry:
    """A quantized tensor: format as `formats.get` knows it, shape (E, out, in), E = 1 when dense; `stacked`
    when it has experts."""

    name: str
    format: str
    shape: tuple[int, int, int]
    stacked: bool


class Source(Protocol):
    """What `check` needs of a file.

    `model` is the baseline cut into weights as the file has them, None without one; `weights` are those, by
    the names of entries.
    """

    path: Path
    entries: tuple[Entry, ...]

    @property
    def model(self) -> Checkpoint | None:
        """See the class."""

    @property
    def weights(self) -> Mapping[str, Weight]:
        """See the class."""

    def matrix(self, entry: Entry) -> Matrix:
        """All experts of a tensor, packed."""

    def decode(self, entry: Entry, matrix: Matrix) -> Tensor:
        """All experts f32 [E, out, in], by moequant's decoder."""

    def reference(self, entry: Entry, matrix: Matrix) -> Tensor:
        """The same by somebody else's decoder."""

    def load(self, weight: Weight) -> Tensor:
        """Decoded values of a weight of `model`: a `forward.model.Provider`."""

    def altered(self, entry: Entry, matrix: Matrix) -> tuple[int, ...] | None:
        """Experts whose bytes are not those that were written; None when no checksum was recorded."""

    def altered_rest(self) -> tuple[tuple[str, str], ...]:
        """(name, what) of tensors that are not quantized and not as they were written."""

    def label(self, entry: Entry, expert: int) -> str:
        """How the file calls one expert of a tensor."""


def open_source(path: Path, baseline: Checkpoint | None) -> Source:
    """A GGUF file, or a quantized folder (which needs the baseline to know what its tensors are)."""
    if not path.is_dir():
        return GgufSource(path, baseline)
    if baseline is None:
        raise VerifyError(f"{path}: a folder is checked against the model it was made from; add --baseline")
    return FolderSource(path, baseline)


class GgufSource:
    """A GGUF file; gguf-py is the other decoder."""

    def __init__(self, path: Path, baseline: Checkpoint | None) -> None:
        self.path = path
        self._file = GgufFile(path)
        exported = None if baseline is None else export(baseline)
        self.model = None if exported is None else exported.checkpoint
        self.weights: dict[str, Weight] = {}
        if exported is not None:
            self.weights = {exported.names[weight.name]: weight for weight in exported.weights}
            self._decoded = GgufWeights(path, exported, self._file)
        if not self._file.tensors:
            raise VerifyError(f"{path}: no tensors in it; give the file of a whole model")
        self._checksums = checksums.recorded(self._file)
        self.entries = tuple(
            Entry(tensor.name, tensor.type, _three(tensor.shape), _stacked(tensor.shape))
            for tensor in self._file.header.tensors
            if _is_quantized(path, tensor)
        )

    def matrix(self, entry: Entry) -> Matrix:
        """See `Source`."""
        data = torch.from_numpy(self._file.data(entry.name)).view(*entry.shape[:2], -1)
        return Matrix(entry.format, entry.shape, data)

    def decode(self, entry: Entry, matrix: Matrix) -> Tensor:
        """See `Source`."""
        return matrix.decode()

    def reference(self, entry: Entry, matrix: Matrix) -> Tensor:
        """See `Source`."""
        return torch.from_numpy(decode(matrix.data.numpy(), entry.format, entry.name))

    def load(self, weight: Weight) -> Tensor:
        """See `Source`."""
        return self._decoded.as_cut(weight)

    def altered(self, entry: Entry, matrix: Matrix) -> tuple[int, ...] | None:
        """See `Source`."""
        if self._checksums is None:
            return None
        wanted = self._checksums[entry.name]
        found = checksums.of_slices(matrix.data.numpy(), len(wanted))
        return tuple(i for i, (a, b) in enumerate(zip(wanted, found, strict=True)) if a != b)

    def altered_rest(self) -> tuple[tuple[str, str], ...]:
        """See `Source`."""
        quantized = {entry.name for entry in self.entries}
        return tuple(
            (name, ALTERED)
            for name, wanted in (self._checksums or {}).items()
            if name not in quantized and checksums.of_slices(self._file.data(name), len(wanted)) != wanted
        )

    def label(self, entry: Entry, expert: int) -> str:
        """Tensor and expert."""
        return f"{entry.name} expert {expert}" if entry.stacked else entry.name


class FolderSource:
    """A folder of any scheme; `compressed-tensors` (or GPTQ's rule) is the other decoder."""

    def __init__(self, path: Path, baseline: Checkpoint) -> None:
        self.path, self.model = path, baseline
        self._folder: FolderWeights = LAYOUTS[_layout_of(path)].open(path)
        self._checksums = _recorded(path, self._folder.quantization)
        found = [weight for weight in baseline.weights if len(weight.shape) > 1]
        self.weights: dict[str, Weight] = {
            weight.name: weight
            for weight in found
            if not weight.role.keeps_precision and self._folder.is_quantized(weight)
        }
        if not self.weights:
            raise VerifyError(
                f"{path}: holds no quantized weight of {baseline.path}; is it the right baseline?"
            )
        self._storage = {name: _storage(self._folder, weight) for name, weight in self.weights.items()}
        self.entries = tuple(
            Entry(
                weight.name,
                self._storage[weight.name].block_format(weight.n_in),
                _three(weight.shape),
                len(weight.shape) == 3,
            )
            for weight in self.weights.values()
        )

    def matrix(self, entry: Entry) -> Matrix:
        """Every expert in the bytes of its block format; int4 and int8 as kernels take them."""
        weight, storage = self.weights[entry.name], self._storage[entry.name]
        stored = [self._folder.stored(weight, expert) for expert in range(entry.shape[0])]
        if not isinstance(storage, PackedIntegers | GptqIntegers) or storage.fmt.bits not in (4, 8):
            return Matrix(
                entry.format, entry.shape, torch.stack([storage.packed(s, weight.n_in) for s in stored])
            )
        parts = []
        for each in stored:
            codes, scales = storage.integers(each, weight.n_in)
            packed = groups.pack(codes, storage.fmt.bits)
            parts.append((packed.contiguous().view(torch.uint8), scales.contiguous()))
        data, scales = (torch.stack(column) for column in zip(*parts, strict=True))
        return Matrix(f"INT{storage.fmt.bits}", entry.shape, data, scales)

    def decode(self, entry: Entry, matrix: Matrix) -> Tensor:
        """In the scale's own precision, as loaders compute it."""
        storage = self._storage[entry.name]
        if matrix.scales is None:
            return matrix.decode() + 0.0  # -0, which codes of 0 and FP4's second 0 may be, is no other number
        assert isinstance(storage, PackedIntegers | GptqIntegers)
        codes = groups.unpack(matrix.data.view(torch.int32), storage.fmt.bits, entry.shape[2])
        return groups.decode(storage.fmt, codes, matrix.scales).float() + 0.0

    def reference(self, entry: Entry, matrix: Matrix) -> Tensor:
        """See `Source`."""
        weight = self.weights[entry.name]
        return torch.stack([self._folder.decode(weight, e).float() + 0.0 for e in range(entry.shape[0])])

    def load(self, weight: Weight) -> Tensor:
        """See `Source`."""
        return self._folder.load(weight)

    def altered(self, entry: Entry, matrix: Matrix) -> tuple[int, ...] | None:
        """See `Source`."""
        if self._checksums is None:
            return None
        parts = self._folder.parts(self.weights[entry.name])
        names = {name for each in parts for name in each}
        changed = {name for name in names if _crc(self._folder.tensor(name)) != self._checksums.get(name)}
        return tuple(expert for expert, each in enumerate(parts) if changed & {*each})

    def altered_rest(self) -> tuple[tuple[str, str], ...]:
        """See `Source`; also tensors that are new."""
        if self._checksums is None:
            return ()
        quantized = {
            name for weight in self.weights.values() for each in self._folder.parts(weight) for name in each
        }
        kept = self._checksums.keys() - quantized
        changed = [name for name in sorted(kept) if _crc(self._folder.tensor(name)) != self._checksums[name]]
        new = sorted(set(self._folder.tensors) - self._checksums.keys())
        return (
            *((name, ALTERED) for name in changed),
            *((name, "was not written by moequant") for name in new),
        )

    def label(self, entry: Entry, expert: int) -> str:
        """Tensor, expert, and the module's own name."""
        module = self._folder.label(self.weights[entry.name], expert)
        return f"{entry.name} expert {expert} ({module})" if entry.stacked else f"{entry.name} ({module})"


def _three(shape: tuple[int, ...]) -> tuple[int, int, int]:
    rows, n_in = shape[-2:]
    return (shape[0] if len(shape) == 3 else 1, rows, n_in)


def _stacked(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3


def _is_quantized(path: Path, tensor: TensorInfo) -> bool:
    """Whether a tensor is packed in blocks. VerifyError for what nobody here decodes."""
    if len(tensor.shape) < 2:
        return False
    if tensor.type not in formats.FORMATS:
        raise VerifyError(f"{path}: {tensor.name} is {tensor.type}, which moequant cannot decode")
    quantized = formats.get(tensor.type).block > 1
    if quantized and len(tensor.shape) > 3:
        raise VerifyError(f"{path}: {tensor.name} is {tensor.shape}, expected a matrix or a stack of them")
    return quantized


def _layout_of(path: Path) -> str:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VerifyError(f"{path}: config.json cannot be read ({error})") from error
    method = method_of(path, config)
    if method is None:
        raise VerifyError(f"{path}: is not quantized; expected one of {', '.join(LAYOUTS)}")
    if method not in LAYOUTS:
        raise VerifyError(
            f"{path}: is {method}; folders of {', '.join(LAYOUTS)} are checked, and moequant compare scores "
            "every one"
        )
    return method


def _storage(opened: FolderWeights, weight: Weight) -> Storage:
    """How a weight is stored by the folder's own config, its scales' type by those that are there."""
    module, config = opened.label(weight, 0), opened.quantization
    stored = opened.stored(weight)
    scales = stored.get("weight_scale", stored.get("scales"))
    dtype = torch.bfloat16 if scales is None else scales.dtype
    try:
        return LAYOUTS[config["quant_method"]].storage(config, module, dtype)
    except PlanError as error:
        raise VerifyError(f"{opened.path}: {module}: {error}") from error


def _crc(values: Tensor) -> int:
    raw = values.contiguous().view(-1).view(torch.uint8).numpy()
    return zlib.crc32(raw.data)


def _recorded(path: Path, now: Mapping[str, Any]) -> dict[str, int] | None:
    """{stored tensor: CRC-32} from `moequant.json` beside the weights, None when it is not there.

    VerifyError when config.json reads the codes otherwise than they were written.
    """
    file = path / RECORD
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        found: dict[str, int] = record["crc32"]
        written: Mapping[str, Any] = record["quantization_config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VerifyError(f"{file}: cannot be read ({error})") from error
    was, says = (dict(_leaves("", config)) for config in (written, now))
    for name in (*was, *says):
        if was.get(name) != says.get(name):
            raise VerifyError(
                f"{path}: config.json says {name.removeprefix('.')} is {says.get(name)}, its weights were "
                f"written with {was.get(name)}; restore config.json"
            )
    return found


def _leaves(name: str, value: object) -> Iterator[tuple[str, object]]:
    """(dotted name, value) of everything in a JSON value."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(f"{name}.{key}", inner)
    else:
        yield name, value
