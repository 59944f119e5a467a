"""Runs in vLLM's own virtual environment: loads model folders one after another, generates, prints JSON.

    python vllm_generate.py PROMPTS.json FOLDER...        (PROMPTS: lists of token ids)

The last line of the output has {folder: {"generated": [[ids]], "logprobs": [[of each prompt token
but the first]]}} or {folder: {"unsupported": reason}} when this processor has no kernel for it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

NEW_TOKENS = 8
MISSING = ("WNA16 MoE backend", "has no attribute 'cpu_gemm_wna16'")
"""What vLLM says where this processor has no kernel: of experts, and, without AVX-512, of linears."""


def score(folder: str, prompts: list[list[int]]) -> dict[str, Any]:
    """Greedy continuations and the log-probability of every prompt token, or what has no kernel."""
    try:
        return generated(folder, prompts)
    except (NotImplementedError, ValueError, AttributeError) as error:
        if any(missing in str(error) for missing in MISSING):
            return {"unsupported": str(error)}
        raise


def generated(folder: str, prompts: list[list[int]]) -> dict[str, Any]:
    """The same of a model that has kernels."""
    import vllm  # after the environment: it reads it on import

    model = vllm.LLM(
        folder,
        dtype="bfloat16",
        max_model_len=512,
        enforce_eager=True,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )
    wanted = vllm.SamplingParams(temperature=0, max_tokens=NEW_TOKENS, prompt_logprobs=0, detokenize=False)
    outputs = model.generate([{"prompt_token_ids": ids} for ids in prompts], wanted, use_tqdm=False)
    return {
        "generated": [list(output.outputs[0].token_ids) for output in outputs],
        "logprobs": [
            [
                step[token].logprob
                for token, step in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
            ]
            for output in outputs
        ],
    }


if __name__ == "__main__":
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_INT4_W4A8="1",
        VLLM_LOGGING_LEVEL=os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        HF_HUB_OFFLINE="1",
    )
    token_ids = json.loads(Path(sys.argv[1]).read_text())
    scores = {folder: score(folder, token_ids) for folder in sys.argv[2:]}
    print("\n" + json.dumps(scores))  # vLLM writes to stdout too
