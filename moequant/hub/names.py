"""What people call a model of the Hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from moequant.escape import shown

_NAME = re.compile(
    r"(?P<repository>\w[\w.-]{0,95}/\w[\w.-]{0,95})(@(?P<revision>\w[\w./-]{0,199}))?(:(?P<file>.{1,400}\.gguf))?",
    re.ASCII,
)

_FILES = (".gguf", ".safetensors", ".json", ".bin", ".git")
"""What files are called, and models are not."""


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model of the Hub, or one GGUF file of it.

    `revision` is a branch, a tag or a commit, None the newest; `cache` the folder that keeps downloads,
    None the one of huggingface_hub.
    """

    repository: str
    revision: str | None = None
    file: str | None = None
    cache: Path | None = None

    @classmethod
    def parse(cls, text: str, cache: Path | None = None) -> HubModel | None:
        """OWNER/NAME[@REVISION][:FILE.gguf]; None for what no model of the Hub is called. A file that is
        not there, models/x.gguf, is not asked for."""
        found = _NAME.fullmatch(text)
        if found is None or ".." in text or "--" in found["repository"]:
            return None
        if found["repository"].endswith(_FILES):
            return None
        return cls(found["repository"], found["revision"], found["file"], cache)

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repository}{revision}{f':{self.file}' if self.file else ''}"


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A GGUF file as the weights of a model whose config.json and tokenizer are in `config`, a folder or a
    model of the Hub; None: beside the file."""

    path: Path
    config: Path | HubModel | None = None

    def __str__(self) -> str:
        return str(self.path)


Model = str | Path | HubModel
"""What commands take for a model: a folder or file, or a name of the Hub."""

Source = Model | GgufModel
"""What commands take that read a model's weights."""


def located(model: Model, cache: Path | None = None) -> Path | HubModel:
    """What a person means: a path if there is one of that name, else a model of the Hub that may have it.

    A `Path` is always a path. What can be neither is a path that is not there.
    """
    if not isinstance(model, str) or Path(model).exists():
        return Path(model) if isinstance(model, str) else model
    return HubModel.parse(model, cache) or Path(model)


def named(model: Model) -> str:
    """What reports and pages call a model that was given: not where it lies on this machine."""
    place = located(model)
    return str(place) if isinstance(place, HubModel) else shown(place)
