"""What transformers computes of the untouched folder: the reference of the self-check."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from typing import Any

import torch
import transformers
from torch import Tensor

from moequant.checkpoint import Checkpoint
from moequant.errors import VerifyError, few
from moequant.files.read import read_json
from moequant.forward.causal import logits, whole_class


def reference(checkpoint: Checkpoint, ids: Tensor, raw: dict[str, Any]) -> Tensor:
    """Logits [rows, n, vocab] of transformers' own loading of the folder, under the config.json `raw`."""
    with _quiet():
        config = transformers.AutoConfig.from_pretrained(
            checkpoint.path, trust_remote_code=False, local_files_only=True
        )
        if raw != read_json(checkpoint.path / "config.json"):
            config = type(config).from_dict(raw)
        _must_decode(checkpoint, config)
        # Ours to say, not the config's: it may ask for kernels of the Hub, which are code.
        config._attn_implementation = config._experts_implementation = None
        config.return_dict = config.get_text_config().return_dict = True
        without_kernels(config)
        model, told = whole_class(config).from_pretrained(
            checkpoint.path,
            config=config,
            dtype=torch.float32,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
        # What it does not find it makes up, with a warning: files may have names that it does not read.
        ours = {name for each in checkpoint.weights for name in (each.place.param, *each.names)}
        if made_up := sorted(ours & {*told["missing_keys"]}):
            raise VerifyError(f"it knows no file's names for {few(made_up, 2)}")
        for parameter in model.parameters():  # experts that it decoded stay in bfloat16, whatever was asked
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()
        return logits_of(model, ids)


def _must_decode(checkpoint: Checkpoint, config: transformers.PretrainedConfig) -> None:
    """VerifyError for quantized weights that transformers would take for plain ones: where it knows of no
    method, it loads codes as numbers."""
    if all(stored.parts.keys() == {""} for weight in checkpoint.weights for stored in weight.origin.stored):
        return
    from transformers.quantizers import AutoHfQuantizer  # seconds: all that transformers knows of models

    told = getattr(config, "quantization_config", None)
    if told is None:
        raise VerifyError("it reads no other quantization_config than that of config.json")
    if isinstance(told, dict) and not AutoHfQuantizer.supports_quant_method(told):
        raise VerifyError(f"it does not decode weights of the quant_method {told['quant_method']}")


_NO_KERNELS: dict[Any, dict[str, bool]] = {
    "mxfp4": {"dequantize": True},
    "fp8": {"dequantize": True},
    "compressed-tensors": {"use_optimized_inference": False},
}
"""What keeps transformers from fetching kernels of the Hub, which are code, for each `quant_method` that
would: it does so where the package `kernels` is installed, for MXFP4 without being asked."""


def without_kernels(config: transformers.PretrainedConfig) -> None:
    """Have a quantized model computed with decoded weights."""
    asked = getattr(config, "quantization_config", None)
    if isinstance(asked, dict):
        config.quantization_config = asked | _NO_KERNELS.get(asked.get("quant_method"), {})


def logits_of(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """Logits f32 [rows, n, vocab] of a model that nobody needs any more: its weights are forgotten."""
    with torch.inference_mode():
        found = logits(model, ids).float()
    # A model holds cycles and goes when it pleases Python; the next one needs the room of its weights now.
    for held in (*model.parameters(), *model.buffers()):
        held.data = torch.empty(0, dtype=held.dtype)
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Bars and warnings of transformers, and of the packages it loads with, are not about the conversion."""
    logger = logging.getLogger("transformers")
    before, bars = logger.level, transformers.utils.logging.is_progress_bar_enabled()
    logger.setLevel(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    try:
        with redirect_stderr(StringIO()), warnings.catch_warnings():  # compressed-tensors asks nobody
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
        if bars:
            transformers.utils.logging.enable_progress_bar()
