"""Runs in a virtual environment with llm-compressor and AutoRound: one tool makes one folder of one scheme.

    python served_tool.py MODEL OUT TOOL SCHEME ROWS.json        (ROWS: lists of token ids, all of one length)

TOOL is rtn, gptq or autoround. Attention, routers and head stay as they are, all else of the tools is
their default.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

KEPT = ["lm_head", "re:.*self_attn.*", "re:.*gate$"]
AUTOROUND = {
    "W4A16_G32": ("W4A16", {"group_size": 32}),
    "W3A16": ("W3A16", {}),
    "W4A16": ("W4A16", {}),
    "NVFP4A16": ("NVFP4", {"act_bits": 16}),
    "FP8_BLOCK": ("FP8_BLOCK", {}),
}
"""What AutoRound calls a scheme, and what else it has to be told."""


def llm_compressor(model: str, out: str, tool: str, scheme: str, rows: list[list[int]]) -> None:
    """`oneshot` with the modifier of that name, every default of it."""
    from compressed_tensors.quantization import preset_name_to_scheme
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import load_quantizable_moe
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    preset, _, group = scheme.partition("_G")
    wanted = preset_name_to_scheme(preset, ["Linear"])
    if group:
        assert wanted.weights is not None
        wanted.weights.group_size = int(group)
    recipe = (GPTQModifier if tool == "gptq" else QuantizationModifier)(
        config_groups={"group_0": wanted}, ignore=KEPT
    )
    with load_quantizable_moe():
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(model)
    oneshot(
        model=loaded,
        tokenizer=tokenizer,
        recipe=recipe,
        dataset=loader(rows),
        num_calibration_samples=len(rows),
        max_seq_length=len(rows[0]),
        output_dir=out,
    )


def auto_round(model: str, out: str, scheme: str, rows: list[list[int]]) -> None:
    """AutoRound with 200 iterations, its default, in the layout of compressed-tensors."""
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    name, also = AUTOROUND[scheme]
    AutoRound(
        model,
        tokenizer=AutoTokenizer.from_pretrained(model),
        scheme=name,
        dataset=loader(rows),
        nsamples=len(rows),
        seqlen=len(rows[0]),
        ignore_layers="self_attn,lm_head",
        device_map="cpu",
        **also,
    ).quantize_and_save(out, format="llm_compressor")
    (made,) = Path(out).iterdir()  # a folder of a name of its own
    for file in made.iterdir():
        file.rename(Path(out) / file.name)
    made.rmdir()


def loader(rows: list[list[int]]) -> Any:
    """The rows one by one, as models take them."""
    import torch

    ids = [torch.tensor([row]) for row in rows]
    made = [{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in ids]
    return torch.utils.data.DataLoader(made, batch_size=None, shuffle=False)


def main(model: str, out: str, tool: str, scheme: str, rows: str) -> None:
    """See the module."""
    import torch

    torch.set_num_threads(1)
    ids = json.loads(Path(rows).read_text(encoding="utf-8"))
    if tool == "autoround":
        auto_round(model, out, scheme, ids)
    else:
        llm_compressor(model, out, tool, scheme, ids)


if __name__ == "__main__":
    main(*sys.argv[1:])
