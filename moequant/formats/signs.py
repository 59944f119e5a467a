"""Signs that are stored apart from sizes: a bit for each weight, eight a byte, or seven and their parity."""

from __future__ import annotations

import torch
from torch import Tensor


def sign_values(packed: Tensor) -> Tensor:
    """uint8 [n, k] -> f32 [n, 8 k]: bit 0 first, 1 or -1."""
    bits = packed[:, :, None] >> torch.arange(8, device=packed.device).to(torch.uint8) & 1
    return 1 - 2 * bits.to(torch.float32).flatten(1)


def join_signs(value: Tensor) -> Tensor:
    """f32 [n, 8 k] -> uint8 [n, k]: the inverse of `sign_values`."""
    place = torch.arange(8, dtype=torch.uint8, device=value.device)
    bits = (value < 0).view(len(value), value.shape[1] // 8, 8).to(torch.uint8) << place
    return bits.sum(-1, dtype=torch.uint8)


def fill_parity(signs: Tensor) -> Tensor:
    """int [...] of 7 sign bits -> uint8, with the eighth that makes their number even."""
    parity = signs ^ signs >> 4
    parity = parity ^ parity >> 2
    return (signs | (parity ^ parity >> 1) << 7 & 128).to(torch.uint8)


def join_signs_and_scales(signs: Tensor, scale: Tensor) -> Tensor:
    """uint8 signs [n, 32], l [n, 8] -> uint8 [n, 32]: for each 32 weights a u32, 4 x 7 signs and l above."""
    seven = torch.arange(0, 28, 7, device=signs.device)
    field = ((signs.view(-1, 8, 4).to(torch.int64) & 127) << seven).sum(-1) | scale.to(torch.int64) << 28
    return (field[..., None] >> torch.arange(0, 32, 8, device=field.device) & 255).to(torch.uint8).flatten(1)


def split_signs_and_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `join_signs_and_scales`, the eighth sign filled in."""
    byte = packed.reshape(-1, 8, 4).to(torch.int64)
    field = (byte << torch.arange(0, 32, 8, device=packed.device)).sum(-1, keepdim=True)
    signs = field >> torch.arange(0, 28, 7, device=packed.device) & 127
    return fill_parity(signs).flatten(1), (field[..., 0] >> 28 & 15).to(torch.uint8)
