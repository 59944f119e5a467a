"""A tiny random checkpoint of Switch Transformers, with a tokenizer as T5's: unigrams, no start, an end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from tests.models import TEXT

VOCAB = 160

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 64,
    "d_kv": 24,
    "d_ff": 96,
    "num_heads": 4,
    "num_layers": 4,
    "num_decoder_layers": 3,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 1,
    "num_experts": 5,
    "expert_capacity": 12,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
    "n_positions": 64,
}
"""Layers 1 and 3 of the encoder are sparse, and layer 1 of the decoder, 5 of both together."""


def tokenizer() -> Tokenizer:
    """Unigrams trained on a few lines, with the padding, which starts decoders, and the end of T5."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCAB, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(TEXT, trainer)
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return made


def build(folder: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """Save a random model in `folder` and return it; `changes` override its config."""
    torch.manual_seed(0)
    model = SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**SHAPE | changes))
    with torch.no_grad():
        for name, values in model.named_parameters():
            values.normal_(0, 1.0 if "relative" in name or "shared" in name else 0.12)
            values.add_(float("norm" in name)).mul_(3.0 if "router" in name else 1.0)
    model.to(dtype).save_pretrained(folder)
    tokenizer().save(str(folder / "tokenizer.json"))
    told = {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return folder


def reference(folder: Path) -> SwitchTransformersForConditionalGeneration:
    """The model as transformers loads it, float32."""
    return SwitchTransformersForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
