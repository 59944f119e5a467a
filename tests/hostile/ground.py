"""What attempts start from: tiny models of one layer, files made of them, and a bait outside of them."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from tests import models

MARK = b"hostile--bait--!"
"""Sixteen bytes, four finite floats, that no output may hold."""

SHAPES = {
    "qwen3_moe": {"head_dim": 32, "num_experts": 4, "moe_intermediate_size": 64},
    "mixtral": {"num_local_experts": 4, "intermediate_size": 64},
    "deepseek_v3": {
        "first_k_dense_replace": 0,
        "moe_intermediate_size": 32,
        "n_shared_experts": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
    },
    "gpt_oss": {"head_dim": 32, "intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2},
}
"""The models: what they have beside one layer of 64 columns."""

OTHERS = (
    "deepseek_v2", "qwen3_next", "jamba", "nemotron_h", "lfm2_moe", "dbrx", "llama4", "gemma4",
    "qwen3_vl_moe", "step3p7", "granitemoehybrid", "minimax_m3",
)  # fmt: skip
"""Models of other kinds, as the tests have them: latent attention, recurrent layers, flat experts, towers."""

SMALL = {"num_hidden_layers": 1, "hidden_size": 64, "max_position_embeddings": 512}


@dataclass(frozen=True, slots=True)
class Ground:
    """`models` and `others` by family; `files` made of qwen3_moe, by what they are; nobody may touch
    `bait`."""

    models: dict[str, Path]
    others: dict[str, Path]
    files: dict[str, Path]
    bait: Path

    def copy(self, family: str, folder: Path) -> Path:
        """A model folder of one's own to damage."""
        shutil.copytree({**self.models, **self.others}[family], folder)
        return folder

    def bait_state(self) -> dict[Path, str]:
        """The bait's files, each with what changes with its content and its kind."""
        found = {}
        for path in sorted(self.bait.rglob("*")):
            status = path.lstat()
            content = hashlib.sha256(path.read_bytes() if path.is_file() else b"").hexdigest()
            found[path] = f"{status.st_mode} {status.st_size} {status.st_mtime_ns} {content}"
        return found


def make(folder: Path) -> Ground:
    """Build everything under `folder`."""
    from typer.testing import CliRunner

    from moequant.cli import app

    torch.set_num_threads(1)
    built = {}
    for family, shape in SHAPES.items():
        sharded = {"max_shard_size": "100KB"} if family == "mixtral" else {}
        built[family] = models.build(folder / family, family, save=sharded, **(SMALL | shape))
    others = {family: models.build(folder / family, family) for family in OTHERS}
    bait = folder / "bait"
    bait.mkdir()
    shutil.copy(built["qwen3_moe"] / "config.json", bait)
    filled = np.frombuffer(MARK * (models.VOCAB * 64 // 4), np.float32).reshape(models.VOCAB, 64)
    save_file({"model.embed_tokens.weight": filled}, bait / "model.safetensors")
    (bait / "secret.txt").write_bytes(MARK * 64)
    (bait / "link").symlink_to("secret.txt")
    files = {
        "stats": folder / "stats.safetensors",
        "imatrix": folder / "imatrix.gguf",
        "plan": folder / "plan.json",
        "gguf": folder / "model.gguf",
        "text": folder / "text.txt",
    }
    files["text"].write_text("\n".join(models.TEXT) * 2, encoding="utf-8")
    model, text = str(built["qwen3_moe"]), ["--calib", str(files["text"]), "--calib-tokens", "1024"]
    for command in (
        ["route", model, "-o", str(files["stats"]), "--imatrix-out", str(files["imatrix"]), *text],
        ["inspect", model],  # what commands import when they are used, children have imported then
        ["fit", model, "--vram", "8G", "--ram", "8G", "--ctx", "256"],
        ["plan", model, "--bpw", "12", "--stats", str(files["stats"]), "--no-probes", "--effort", "fast",
         "-o", str(files["plan"])],
        ["convert", model, "-o", str(files["gguf"]), "--type", "Q4_0", "--stats", str(files["stats"]),
         "--effort", "fast", "--eval-tokens", "0", "--no-self-check"],
        ["check", str(files["gguf"]), "--sample", "1", "--device", "cpu"],
        ["compare", model, str(files["gguf"]), "--eval", str(files["text"]), "--eval-tokens", "1024"],
    ):  # fmt: skip
        ran = CliRunner().invoke(app, command)
        assert ran.exit_code == 0, f"{command}: {ran.output} {ran.exception!r}"
    return Ground(built, others, files, bait)
