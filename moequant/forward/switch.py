"""Switch Transformers as one list of layers, see `joined`.

This file alone needs a class of transformers' models to be imported, which takes seconds. So it is imported
when such a model is made.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.switch_transformers import modeling_switch_transformers as switch

from moequant.forward.joined import Half, Scaled, halves


class Joined(switch.SwitchTransformersPreTrainedModel):  # type: ignore[misc]  # Any to mypy
    """Encoder and decoder of Switch Transformers, without the head."""

    config_class = switch.SwitchTransformersConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        encoder, decoder = (self._stack(config, decodes) for decodes in (False, True))
        norms = [*[None] * (len(encoder.block) - 1), encoder.final_layer_norm, *[None] * len(decoder.block)]
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(map(Half, [*encoder.block, *decoder.block], norms))
        self.norm, self.scaled = decoder.final_layer_norm, Scaled(config)
        for block in (*encoder.block, *decoder.block):
            # The first block of a stack has the table of positions, and hands what it makes of it to the
            # others: here each has the table, and needs no other in memory.
            attention = block.layer[0].SelfAttention
            attention.has_relative_attention_bias = True
            attention.relative_attention_bias = nn.Embedding(
                config.relative_attention_num_buckets, config.num_heads
            )
        self.post_init()

    @staticmethod
    def _stack(config: Any, decodes: bool) -> Any:
        own = copy.deepcopy(config)
        own.is_decoder = decodes
        return switch.SwitchTransformersStack(own)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> BaseModelOutput:
        """Rows i64 [rows, n] -> hidden states [rows, n, h]: nothing at the encoder's tokens, which predict
        none."""
        source, target = halves(self.config, input_ids)
        hidden = self.embed_tokens(torch.cat([source, target], 1))
        mask = self._mask(hidden[:, source.shape[1] :])
        for layer in self.layers:
            hidden = layer(hidden, mask)
        said = self.scaled(self.norm(hidden[:, source.shape[1] :]))
        silent = torch.zeros_like(hidden[:, : source.shape[1]])
        return BaseModelOutput(last_hidden_state=torch.cat([silent, said], 1))

    def _mask(self, target: Tensor) -> Tensor:
        ones = torch.ones(target.shape[:2], device=target.device)
        mask: Tensor = create_causal_mask(
            config=self.config, inputs_embeds=target, attention_mask=ones, cache=None
        )
        return mask
