"""What rotary frequencies are divided by, as transformers' own function has it."""

from __future__ import annotations

import pytest
import torch
from transformers import MixtralConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moequant.containers.gguf.families.keys import rope_factors

LLAMA_4 = {"factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0}
"""As Llama 4 Scout has it: what turns less than once in the context is slowed down, all else is not."""


@pytest.mark.parametrize(
    "scaling", [{"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, LLAMA_4]
)
def test_llama_3s_factors_are_those_of_transformers(scaling: dict[str, float]) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "original_max_position_embeddings": 8192, **scaling}
    config = MixtralConfig(hidden_size=512, num_attention_heads=4, rope_parameters=rope)
    (found,) = rope_factors(config)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / 5e5 ** (torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    assert found.values[0] == 1.0 and found.values[-1] == scaling["factor"]
    assert torch.allclose(torch.tensor(found.values, dtype=torch.float64), plain / scaled.double())
