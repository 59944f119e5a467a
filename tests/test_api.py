"""The library: what `import moequant` offers, as the README shows it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import moequant


def test_the_names_are_what_they_say() -> None:
    assert moequant.__all__ == ["MoequantError", "Settings", "convert"]
    for _ in range(2):
        assert callable(moequant.convert) and moequant.Settings(type="Q2_K").type == "Q2_K"


def test_importing_is_light() -> None:
    code = "import sys, moequant; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_convert_from_python(tiny, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    settings = moequant.Settings("Q8_0", calib_tokens=2048, eval_tokens=1024, effort="fast")
    report = moequant.convert(str(tiny("olmoe")), str(out), settings)
    assert report.comparison is not None and report.comparison.kl_mean.value < 0.01
    assert report.out == out and report.file_bytes == out.stat().st_size
    assert "perplexity" in report.summary()
