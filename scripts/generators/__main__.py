"""Writes the generated domains into calib/: python -m scripts.generators, then build_calib_manifest.py."""

from pathlib import Path

from scripts.generators import DOMAINS, SPLITS, generate


def write(root: Path) -> None:
    """Write every domain of both splits under `root`, a document a file, in place of what is there."""
    for split, (seed, size) in SPLITS.items():
        for domain in DOMAINS:
            folder = root / split / domain
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.iterdir():
                old.unlink()
            for number, text in enumerate(generate(domain, seed, size), 1):
                (folder / f"{number:02d}.txt").write_bytes(text.encode())


if __name__ == "__main__":
    write(Path(__file__).parents[2] / "calib")
