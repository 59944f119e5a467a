"""What a model's own card says of it: the front matter of its README.md, in words that may be published."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gguf import Metadata

from moequant.checkpoint import Checkpoint
from moequant.checkpoint.folder import belongs
from moequant.escape import plain

Words = str | list[str]

MOST = 1 << 20
"""Bytes of a README.md that is read; the Hub's are far smaller."""

LISTS = ("base_model", "datasets", "language", "license", "tags")
"""Keys that may hold several words."""


def front_matter(folder: Path) -> dict[str, Words]:
    """The front matter of a model folder's README.md: texts, and lists of them where the Hub has lists.

    Empty where there is none. What is no text, or cannot be read, is left out: it is a stranger's file, and
    nothing depends on it.
    """
    card = folder / "README.md"
    if not belongs(card, folder) or card.stat().st_size > MOST:
        return {}
    try:
        found = Metadata.load_model_card(folder)
    except Exception:  # PyYAML raises what it likes
        return {}
    return {key: words for key, value in found.items() if (words := _words(key, value))}


def licenses(checkpoint: Checkpoint) -> dict[str, str]:
    """The license by the Hub's keys, from the model's card or else from its config."""
    card = front_matter(checkpoint.path)
    told: Mapping[str, object] = card if "license" in card else {"license": checkpoint.raw.get("license")}
    keys = ("license", "license_name", "license_link")
    return {key: plain(value) for key in keys if isinstance(value := told.get(key), str) and value}


def metadata(checkpoint: Checkpoint, parameters: int) -> Metadata:
    """Name, organization, size label, license, base models and tags by the rules of gguf-py, which are those
    of llama.cpp's converter; of a folder in Hugging Face's cache under the repository's name."""
    told = Metadata()
    repository, card = checkpoint.repository, front_matter(checkpoint.path)
    found = Metadata.apply_metadata_heuristic(
        told, card, {"_name_or_path": plain(repository)}, None, parameters
    )
    found.name = found.name or plain(checkpoint.name)
    return found


def _words(key: object, value: object) -> Words | None:
    """The value as the Hub means it, None where it is something else."""
    if isinstance(value, str):
        return plain(value)
    if key in LISTS and isinstance(value, list):
        return [plain(each) for each in value if isinstance(each, str)]
    return None
