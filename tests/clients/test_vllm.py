"""vLLM itself loads the folders and generates, near what transformers computes from the same files.

It runs in a virtual environment of its own that `tests/clients/vllm_env.sh` makes; without it, and on
processors that vLLM has no int4 kernel for mixtures of experts for, the tests skip and say so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import models
from tests.clients import transformers_folder
from tests.clients.environments import VLLM
from tests.containers.folders.cases import quantized

SCRIPT = Path(__file__).with_name("vllm_generate.py")

FAMILIES = ["mixtral", "qwen3_moe", "olmoe"]
LAYOUTS = ["compressed-tensors", "gptq", "awq"]
DENSE = "llama"
"""Without experts: vLLM's CPU build computes AWQ's linears with AVX-512, its experts with AMX alone."""

PROMPTS = torch.randint(1, models.VOCAB, (3, 96), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    root = tmp_path_factory.mktemp("vllm")
    made = {(family, layout): root / f"{family}-{layout}" for family in FAMILIES for layout in LAYOUTS}
    for (family, layout), out in made.items():
        quantized(tiny(family), out, layout=layout)
    for layout in ("compressed-tensors", "awq"):
        made[DENSE, layout] = root / f"{DENSE}-{layout}"
        quantized(tiny(DENSE), made[DENSE, layout], layout=layout, group_size=64, quantize_attention=True)
    return made


@pytest.fixture(scope="module")
def scores(folders: dict[tuple[str, str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What vLLM says of every folder, loaded one after another by one process."""
    VLLM.required()
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.json"
    prompts.write_text(json.dumps(PROMPTS))
    # Without a kernel a linear fails as it computes, after which nothing else can be loaded: the dense model
    # is the last.
    asked = [out for made, out in folders.items() if made != (DENSE, "compressed-tensors")]
    found: dict[str, Any] = VLLM.told(SCRIPT, prompts, *asked)
    return found


def score(scores: dict[str, Any], folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = scores[str(folder)]
    if "unsupported" in found:
        pytest.skip(f"this processor: {found['unsupported']}")
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_computes_what_transformers_does(
    folders: dict[tuple[str, str], Path], scores: dict[str, Any], family: str
) -> None:
    """Its CPU kernels round activations to 8 bits, and routers near a tie choose another expert.

    In bf16, without any quantization, vLLM's log-probabilities of a tiny random Mixtral are 0.02 off
    transformers' on average; of these folders 0.04 to 0.05. Gate and up of two experts of one layer
    swapped make it 0.56 and more.
    """
    folder = folders[family, "compressed-tensors"]
    found = score(scores, folder)
    reference = transformers_folder.log_probabilities(transformers_folder.load(folder), PROMPTS)
    off = (torch.tensor(found["logprobs"]) - torch.stack(reference)).abs()
    assert off.mean() < 0.1 and off.median() < 0.05
    assert all(len(ids) == 8 and max(ids) < models.VOCAB for ids in found["generated"])


@pytest.mark.parametrize("family", FAMILIES)
def test_gptq_is_the_same_model(
    folders: dict[tuple[str, str], Path], scores: dict[str, Any], family: str
) -> None:
    one, other = (score(scores, folders[family, layout]) for layout in ("compressed-tensors", "gptq"))
    assert (torch.tensor(one["logprobs"]) - torch.tensor(other["logprobs"])).abs().max() < 1e-3
    assert one["generated"] == other["generated"]


@pytest.mark.parametrize("family", [DENSE, *FAMILIES])
def test_awq_is_the_same_model(
    folders: dict[tuple[str, str], Path], scores: dict[str, Any], family: str
) -> None:
    """As transformers computes it from the same codes in the other layout, within what
    `test_vllm_computes_what_transformers_does` allows its kernels."""
    found = score(scores, folders[family, "awq"])
    model = transformers_folder.load(folders[family, "compressed-tensors"])
    reference = torch.stack(transformers_folder.log_probabilities(model, PROMPTS))
    off = (torch.tensor(found["logprobs"]) - reference).abs()
    assert off.mean() < 0.1 and off.median() < 0.05
    assert all(len(ids) == 8 and max(ids) < models.VOCAB for ids in found["generated"])
