"""The data that travels with moequant: the calibration set (`calib/`) and the demo model (`demo/`).

In a checkout both folders lie beside the package; in an installed wheel they lie inside it, under
`_bundled/`, where the build puts them. `calib/manifest.json` describes the text: for either split
and each domain its files, a document each, their bytes and the SHA-256 of all of them in order;
and of every prompt in `calib/prompts/` the same.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from moequant.errors import CorpusError

Split = Literal["calibration", "evaluation"]

LABELS: dict[Split, str] = {"calibration": "bundled calibration set", "evaluation": "bundled evaluation set"}
"""What reports call the text of a split."""


def path(name: Literal["calib", "demo"], package: Path = Path(__file__).parents[1]) -> Path:
    """The folder of bundled data called `name`, in an installed wheel or in a checkout.

    `package` is the folder of the package itself. Raises CorpusError when neither has the folder.
    """
    checkout = package.parent
    if (installed := package / "_bundled" / name).is_dir():
        return installed
    # The neighbour of an installed package is somebody else's; only a project has a pyproject.toml.
    if (checkout / "pyproject.toml").is_file() and (checkout / name).is_dir():
        return checkout / name
    raise CorpusError(f"{installed}: the bundled {name} data is missing; reinstall moequant")


def digest(texts: Iterable[str]) -> tuple[int, str]:
    """Bytes and SHA-256 of the texts in order, as UTF-8."""
    data = "".join(texts).encode()
    return len(data), hashlib.sha256(data).hexdigest()


def manifest(root: Path) -> dict[str, Any]:
    """`manifest.json` of the calibration folder `root`. Raises CorpusError when it cannot be read."""
    file = root / "manifest.json"
    try:
        found: dict[str, Any] = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CorpusError(
            f"{file}: the manifest of the bundled text is unreadable ({error}); reinstall"
        ) from None
    return found


def texts(split: Split, root: Path | None = None) -> dict[str, tuple[str, ...]]:
    """Domain → its documents, for one split of the calibration folder `root` (the bundled one when None).

    Raises CorpusError when a file is missing or a domain is not, byte for byte, what the manifest
    says: calibration that differs from machine to machine would give different models.
    """
    root = root or path("calib")
    section = manifest(root)["splits"][split]
    found: dict[str, tuple[str, ...]] = {}
    for domain, entry in section["domains"].items():
        found[domain] = _read(root / section["folder"] / domain, entry["files"])
        size, sha256 = digest(found[domain])
        if (size, sha256) != (entry["bytes"], entry["sha256"]):
            raise CorpusError(
                f"{root}: {split} domain {domain} is {size} bytes with SHA-256 {sha256[:12]}…, expected "
                f"{entry['bytes']} with {entry['sha256'][:12]}…; reinstall, or rebuild the manifest"
            )
    return found


def prompts(root: Path | None = None) -> dict[str, str]:
    """Name → text of the prompts that models are made to continue, in the order of the manifest.

    Raises CorpusError as `texts` does: samples of other prompts cannot be laid beside these.
    """
    root = root or path("calib")
    found = {}
    for name, entry in manifest(root)["prompts"].items():
        (found[name],) = _read(root / "prompts", [f"{name}.txt"])
        if digest([found[name]]) != (entry["bytes"], entry["sha256"]):
            raise CorpusError(f"{root}: prompt {name} is not what the manifest says; reinstall moequant")
    return found


def _read(folder: Path, files: Iterable[str]) -> tuple[str, ...]:
    """The documents in `files` of `folder`, in that order."""
    try:
        return tuple((folder / file).read_bytes().decode() for file in files)
    except (OSError, ValueError) as error:
        raise CorpusError(f"{folder}: bundled text is unreadable ({error}); reinstall moequant") from None
