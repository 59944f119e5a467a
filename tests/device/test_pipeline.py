"""The whole line on a device that refuses to mix with the CPU gives what the CPU gives.

Models are tiny and nothing is compiled: what is tested is that every tensor is where it should be.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moequant.commands.compare import CompareSettings
from moequant.commands.compare import run as compare
from moequant.commands.convert import Settings, convert
from moequant.forward.stream import Resources
from tests.device.pretend import Pretend, register

DEVICE = register()

CASES = {
    "default": ("qwen3_moe", {"type": "Q4_K_M"}),
    "plain search": ("mixtral", {"type": "Q3_K_M", "effort": "fast"}),
    "Fishers": ("mixtral", {"type": "Q4_K_M", "effort": "best"}),
    "small codebooks": ("mixtral", {"type": "IQ2_XS"}),
    "latent attention": ("deepseek_v3", {"type": "Q4_K_M"}),
    "biases and sinks": ("gpt_oss", {"type": "Q4_K_M"}),
    "a recurrence": ("qwen3_next", {"type": "Q4_K_M"}),
    "folder": ("qwen3_moe", {"format": "safetensors", "group_size": 32}),
    "less memory": ("qwen3_moe", {"type": "Q4_K_M", "ram": 1_000_000}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_conversion_gives_the_bytes_of_the_cpu(tiny, tmp_path: Path, text: Path, case: str) -> None:
    family, changes = CASES[case]
    folder = tiny(family)
    made = []
    for device in ("cpu", DEVICE):
        out = tmp_path / device
        out = out if "format" in changes else out.with_suffix(".gguf")
        settings = Settings(
            calib=text,
            calib_tokens=2048,
            eval=text,
            eval_tokens=1024,
            device=device,
            self_check=False,
            **changes,
        )
        report = convert(folder, out, settings)
        files = sorted(out.glob("*.safetensors")) if out.is_dir() else [out]
        assert report.comparison is not None
        made.append(([file.read_bytes() for file in files], report.comparison.kl_mean.value))
    assert made[0] == made[1]


def test_a_comparison_gives_the_figures_of_the_cpu(tiny, tmp_path: Path, text: Path) -> None:
    folder, out = tiny("qwen3_moe"), tmp_path / "q.gguf"
    convert(folder, out, Settings("Q4_0", calib=text, effort="fast", eval_tokens=0, self_check=False))
    found = []
    for device in ("cpu", DEVICE):
        settings = CompareSettings(eval=text, eval_tokens=1024, resources=Resources(device=device))
        (one,) = compare(folder, [out], settings).measured
        found.append(one)
    assert torch.equal(found[0].scores.kl, found[1].scores.kl)
    assert not isinstance(found[1].scores.kl, Pretend)
