"""An encoder and a decoder as one model of one list of layers.

Both read a row of tokens: the encoder its first half, the decoder the rest. The hidden states of a row are
those of all its tokens. A layer of the encoder passes on the states of the decoder's tokens as they are; one
of the decoder passes on those of the encoder's, and attends to them. So whoever runs layers one by one knows
of one list, and of rows that are scored in their second half, as all rows are.

Blocks, norms, masks and routers are transformers' own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moequant.families import Config


def is_joined(config: Config) -> bool:
    """Whether a config's model has an encoder and a decoder."""
    return bool(config.is_encoder_decoder)


def cut(length: int) -> int:
    """How many of the tokens of a row are the encoder's."""
    return length // 2


def halves(config: Config, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What encoder and decoder are fed of rows ids i64 [rows, n], n at least 2: the last token of the first
    half gives way to the end of a text, the first one of the second half to where decoders start."""
    source, target = ids[:, : cut(ids.shape[1])].clone(), ids[:, cut(ids.shape[1]) :].clone()
    source[:, -1], target[:, 0] = int(config.eos_token_id), starting(config)
    return source, target


def starting(config: Any) -> int:
    """The token that decoders start with; of a config that does not say, the padding."""
    told = getattr(config, "decoder_start_token_id", None)
    return int(config.pad_token_id if told is None else told)


def span(layer: nn.Module, length: int) -> slice:
    """The tokens of a row of that length that a layer computes with; it passes on the others."""
    return layer.span(length) if isinstance(layer, Half) else slice(0, length)


class Half(nn.Module):
    """A block of the encoder, or of the decoder, for rows of both; the encoder's `norm` behind its last."""

    def __init__(self, block: Any, norm: nn.Module | None) -> None:
        super().__init__()
        self.block, self.norm = block, norm

    def span(self, length: int) -> slice:
        """See `span`."""
        return slice(cut(length), length) if self.block.is_decoder else slice(0, cut(length))

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Hidden [rows, n, h]; the decoder's mask [rows, 1, m, m] of its m tokens."""
        source, target = hidden.tensor_split([cut(hidden.shape[1])], 1)
        if self.block.is_decoder:
            target = self.block(target, mask, encoder_hidden_states=source)[0]
        else:
            source = self.block(source)[0]
        if self.norm is not None:
            source = self.norm(source)
        return torch.cat([source, target], 1)


class Scaled(nn.Module):
    """What the head is fed, of what the last norm gives."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self._factor = config.d_model**-0.5 if config.tie_word_embeddings else 1.0

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden [rows, m, h], the same scaled."""
        return hidden * self._factor
