"""Builds wheel and sdist, looks into both, and runs the demo from each in an environment of its own.

    python scripts/check_distributions.py              as a person installs it: everything is fetched
    python scripts/check_distributions.py --borrow     moequant alone, beside the packages of this Python

Fails with what the first tool says that finds something.
"""

import argparse
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOOLS = ("build", "hatchling", "twine", "check-wheel-contents")
DEMO = ("demo", "--effort", "fast")
LIMIT = 1800


def run(*words: str | Path, cwd: Path = ROOT) -> str:
    """What a command prints; the script ends where it fails."""
    print("$", *words, flush=True)
    done = subprocess.run(list(map(str, words)), cwd=cwd, text=True, capture_output=True, timeout=LIMIT)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}\n{words[0]} ended with {done.returncode}")
    return done.stdout


def environment(folder: Path) -> Path:
    """A new virtual environment; its Python."""
    run(sys.executable, "-m", "venv", folder)
    return folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"


def built(folder: Path) -> list[Path]:
    """Wheel and sdist, as the tools of packaging find them good. The wheel is built from the sdist."""
    python = environment(folder / "tools")
    run(python, "-m", "pip", "install", "-q", *TOOLS)
    run(python, "-m", "build", "--outdir", folder / "dist")
    made = sorted((folder / "dist").iterdir())
    run(python, "-m", "twine", "check", "--strict", *made)
    run(python, "-m", "check_wheel_contents", *(file for file in made if file.suffix == ".whl"))
    return made


def tried(made: Path, folder: Path, borrow: bool, torch_index: str | None) -> None:
    """Install one of them and run the demo, away from the checkout."""
    python = environment(folder)
    if borrow:
        inside = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        (Path(inside) / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        run(python, "-m", "pip", "install", "-q", "--no-deps", made)
    else:
        if torch_index:
            run(python, "-m", "pip", "install", "-q", "torch", "--index-url", torch_index)
        run(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", made)
    where = run(python, "-c", "import moequant; print(moequant.__file__)", cwd=folder)
    if not Path(where.strip()).is_relative_to(folder):
        sys.exit(f"moequant came from {where}")
    printed = run(python, "-m", "moequant", *DEMO, cwd=folder)
    if "same top token" not in printed:
        sys.exit(f"the demo of {made.name} printed no comparison:\n{printed}")
    print(
        *[line for line in printed.splitlines() if "perplexity" in line or "KL divergence, mean" in line],
        sep="\n",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--borrow", action="store_true", help="install moequant alone")
    parser.add_argument("--torch-index", help="where PyTorch comes from, such as its CPU builds")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made).resolve()
        files = built(folder)
        for file in files:
            tried(file, folder / f"try-{file.suffix[1:]}", given.borrow, given.torch_index)
    print("both install and run the demo:", *(file.name for file in files))


if __name__ == "__main__":
    main()
