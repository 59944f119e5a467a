"""GGUF as a container."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, partial
from pathlib import Path

from moequant import __version__
from moequant.checkpoint import Checkpoint
from moequant.containers.base import Written
from moequant.containers.gguf import write as file
from moequant.containers.gguf.export import Exported, export
from moequant.containers.gguf.sizes import data_bytes
from moequant.containers.gguf.tokenizer.spec import read_tokenizer
from moequant.containers.gguf.verify import verify
from moequant.containers.gguf.weights import GgufWeights
from moequant.values import Calibration, Packed, Plan


def provenance(checkpoint: Checkpoint) -> dict[str, str]:
    """Keys of a file about how it was made, and of which commit of which model of the Hub."""
    made = {"general.quantized_by": f"moequant {__version__}"}
    if checkpoint.revision is not None:
        made["general.source.huggingface.repository"] = checkpoint.repository
        made["moequant.source.revision"] = checkpoint.revision
    return made


class GgufContainer:
    """A GGUF file of one model; see `containers.base.Container`."""

    is_folder = False

    def __init__(self, checkpoint: Checkpoint, split: int | None = None) -> None:
        """FamilyError when llama.cpp cannot run the model, TokenizerError for its tokenizer. `split` cuts the
        file into parts of at most so many bytes of weights."""
        self.split = split
        self.exported: Exported = export(checkpoint)
        self.tokenizer = read_tokenizer(checkpoint.path)
        self.checkpoint = self.exported.checkpoint
        self._content = file.Content(self.exported, self.tokenizer, provenance(checkpoint))
        # Asked a dozen times in a run; a header is laid out with all of a vocabulary.
        self._parts = cache(partial(file.part_bytes, self._content, split=split))
        self.notes = (*self.tokenizer.notes, *self.exported.warnings)

    def size(self, plan: Plan) -> int:
        """See `Container`."""
        return sum(self.parts(plan))

    def parts(self, plan: Plan) -> tuple[int, ...]:
        """See `Container`."""
        return self._parts(plan)

    def overhead(self, plan: Plan) -> int:
        """Bytes of the file that are not weights, of one in parts at most: the same for every plan."""
        types = {choice.weight: choice.format for choice in plan.choices}
        (whole,) = file.part_bytes(self._content, plan)
        return whole + file.PART_HEADER * self._most_parts() - data_bytes(self.checkpoint.weights, types)

    def _most_parts(self) -> int:
        """More parts than any plan gives: two that follow each other hold more than `split` together."""
        if self.split is None:
            return 0
        largest = 4 * sum(weight.numel for weight in self.checkpoint.weights)
        return min(len(self.checkpoint.weights), 1 + 2 * largest // self.split)

    def check_target(self, path: Path, plan: Plan) -> None:
        """See `Container`."""
        file.check_target(path)

    def formats(self, plan: Plan) -> dict[str, str]:
        """See `Container`: a file holds every weight in a format of its own."""
        return {choice.weight: choice.format for choice in plan.choices}

    def write(
        self, path: Path, plan: Plan, packed: Iterable[Packed], calibration: Calibration | None = None
    ) -> Written:
        """See `Container`."""
        return file.write(path, self._content, plan, packed, self.split)

    def outline(self, path: Path, plan: Plan) -> None:
        """The header of the file, and a hole for its weights: what llama.cpp can be asked about."""
        file.outline(path, self._content, plan)

    def verify(self, written: Written, plan: Plan) -> None:
        """See `Container`."""
        verify(written, plan, self.exported)

    def open(self, path: Path) -> GgufWeights:
        """See `Container`."""
        return GgufWeights(path, self.exported)
