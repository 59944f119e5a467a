"""What `tests.forks` imports before it forks: the commands, and what transformers loads for a model."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

import moequant.cli
import moequant.commands.convert
import moequant.commands.route  # noqa: F401
from tests import models

with torch.device("meta"):
    AutoModelForCausalLM.from_config(models.config("qwen3_moe", num_hidden_layers=1))
