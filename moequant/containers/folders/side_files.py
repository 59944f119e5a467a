"""What lies beside the weights and belongs to the model: tokenizer, templates, settings, license.

A list of what is copied, not of what is left out: whatever else lies in a model folder, such as
code, pickles or keys, is not published with the quantized one.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from moequant.checkpoint.folder import belongs

COPIED = (
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json",
    "merges.txt", "preprocessor_config.json", "processor_config.json", "special_tokens_map.json",
    "tokenizer*.json", "tokenizer*.jinja", "tokenizer*.txt", "*.model", "*.tiktoken",
    "vocab.json", "vocab.txt", "LICENSE", "LICENSE.md", "LICENSE.txt", "LICENSE-*.txt", "LICENSE-*.md",
    "NOTICE", "NOTICE.md", "NOTICE.txt", "additional_chat_templates/*.jinja",
)  # fmt: skip
"""Patterns of names. config.json, README.md and the weights are written anew."""


def copy(source: Path, folder: Path) -> None:
    """Copy the side files of the model folder `source` into `folder`."""
    for file in side_files(source):
        target = folder / file.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)


def side_files(source: Path) -> Iterator[Path]:
    """The files of the model folder `source` that are copied, each once."""
    found = {file for pattern in COPIED for file in source.glob(pattern)}
    return (file for file in sorted(found) if belongs(file, source))


def digest(source: Path) -> str:
    """What tells the side files of the model folder `source`, and its README.md, from others."""
    found = hashlib.sha256()
    for file in (*side_files(source), source / "README.md"):
        if file.is_file():
            found.update(f"{file.relative_to(source)} {file.stat().st_size} ".encode())
            found.update(file.read_bytes())
    return found.hexdigest()
