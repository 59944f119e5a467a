"""What a check ran on: recorded with its figures."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

import torch

from moequant import __version__


def versions(device: str) -> dict[str, str]:
    """What ran: libraries, processor, and the GPU with its driver where one was used."""
    told = {"moequant": __version__, "python": platform.python_version(), "machine": platform.machine()}
    for name in ("torch", "transformers", "gguf", "triton", "compressed-tensors"):
        try:
            told[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            told[name] = "not installed"
    if device == "cuda":
        told["gpu"] = torch.cuda.get_device_name()
        told["cuda"] = str(torch.version.cuda)
        told["driver"] = _driver()
    return told


def _driver() -> str:
    """The NVIDIA driver's version as the kernel module tells it."""
    file = Path("/proc/driver/nvidia/version")
    try:
        line = file.read_text(encoding="utf-8").splitlines()[0]
    except (OSError, IndexError):
        return "unknown"
    return next((word for word in line.split() if word[:1].isdigit() and "." in word), line)
