"""Writes calib/manifest.json from calib/text, calib/eval and calib/prompts.

    python scripts/build_calib_manifest.py            write it
    python scripts/build_calib_manifest.py --check    fail when the one there is out of date

Refuses text that is not UTF-8, and any document or long line that both splits share: evaluation on
calibrated text flatters.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from moequant.text import bundled

ROOT = Path(__file__).parents[1] / "calib"
FOLDERS: dict[bundled.Split, str] = {"calibration": "text", "evaluation": "eval"}
# From the least to the most demanding; what is sampled and timed comes in this order.
PROMPTS = ("easy", "average", "long", "malformed")
# Shorter lines ("</table>", "    return None") are bound to come up twice.
LONG_LINE = 40


def domain(folder: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The manifest entry of one folder of files, and their texts."""
    files = sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))
    texts = tuple((folder / file).read_bytes().decode() for file in files)
    size, sha256 = bundled.digest(texts)
    if not size:
        sys.exit(f"{folder}: no text")
    return {"files": files, "bytes": size, "sha256": sha256}, texts


def describe(root: Path, split: bundled.Split) -> tuple[dict[str, Any], set[str]]:
    """The section of one split, and its documents and long lines."""
    folders = sorted(folder for folder in (root / FOLDERS[split]).iterdir() if folder.is_dir())
    parts = {folder.name: domain(folder) for folder in folders}
    texts = [text for _, found in parts.values() for text in found]
    lines = {line for text in texts for line in text.splitlines()}
    section = {"folder": FOLDERS[split], "domains": {name: entry for name, (entry, _) in parts.items()}}
    return section, {*texts, *(line for line in lines if len(line) > LONG_LINE)}


def prompts(folder: Path) -> dict[str, Any]:
    """Bytes and hash of every prompt."""
    if {file.stem for file in folder.iterdir()} != set(PROMPTS):
        sys.exit(f"{folder}: expected {', '.join(f'{name}.txt' for name in PROMPTS)}")
    found = {}
    for name in PROMPTS:
        size, sha256 = bundled.digest([(folder / f"{name}.txt").read_bytes().decode()])
        found[name] = {"bytes": size, "sha256": sha256}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Write calib/manifest.json.")
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    parser.add_argument(
        "--root",
        type=Path,
        default=ROOT,
        help="the folder that holds text/, eval/, prompts/ and manifest.json",
    )
    options = parser.parse_args()
    sections, content = zip(*(describe(options.root, split) for split in FOLDERS), strict=True)
    if shared := content[0] & content[1]:
        sys.exit(f"{options.root}: in both splits: {min(shared)!r} and {len(shared) - 1} more")
    made = {"splits": dict(zip(FOLDERS, sections, strict=True)), "prompts": prompts(options.root / "prompts")}
    text = json.dumps(made, indent=1) + "\n"
    file = options.root / "manifest.json"
    if not options.check:
        file.write_text(text, encoding="utf-8", newline="\n")
    elif not file.is_file() or file.read_text(encoding="utf-8") != text:
        sys.exit(f"{file} is out of date; run python {Path(__file__).name}")


if __name__ == "__main__":
    main()
