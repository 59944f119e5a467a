"""Maps of experts: what the picture shows and what the script reads are the values."""

from __future__ import annotations

import base64
import io
import math

import numpy as np
import torch
from matplotlib.image import imread

from moequant.evaluate import RoutingChange
from moequant.report import maps
from moequant.report.maps import MISSING, Map
from moequant.values import Role


def read(made: Map) -> np.ndarray:
    """The values as the page's script decodes them."""
    codes = np.frombuffer(base64.b64decode(made.codes), "<u2" if made.width == 16 else "<u4").astype(float)
    none = MISSING if made.width == 16 else 2**32 - 1
    values = np.exp(made.start + codes * made.step) if made.kind == "error" else codes * made.step
    return np.where(codes == none, math.nan, values).reshape(made.values.shape)


def pixels(made: Map) -> np.ndarray:
    return imread(io.BytesIO(base64.b64decode(made.picture.split(",")[1])))


def test_tokens_are_exact_and_rows_of_other_lengths_end() -> None:
    for most in (60_000, 3_000_000):
        made = maps.tokens({1: torch.tensor([0, 7, most]), 4: torch.tensor([5, 5])}, "tokens")
        assert made is not None and made.layers == (1, 4)
        np.testing.assert_array_equal(read(made), [[0, 7, most], [5, 5, math.nan]])
        shown = pixels(made)
        assert shown.shape == (2, 3, 4) and shown[1, 2, 3] == 0, "no expert, no colour"
        np.testing.assert_allclose(shown[0, 0, :3] * 255, maps.RED)
        assert (shown[1, 0] == shown[1, 1]).all() and (shown[0, 1] != shown[0, 2]).any()


def test_errors_share_a_scale_and_keep_three_digits() -> None:
    error = torch.tensor([1e-9, 2e-3, 0.5], dtype=torch.float64)
    found = maps.errors([(Role.UP, 0, error), (Role.DOWN, 0, 2 * error), (Role.ATTN_Q, 0, error[:1])])
    assert [made.title for made in found] == ["up", "down"]
    assert found[0].ends == found[1].ends == ("1e-07 %", "100 %")
    np.testing.assert_allclose(read(found[0])[0], error.numpy(), rtol=5e-4)
    assert (pixels(found[0])[0, 2] != pixels(found[1])[0, 2]).any(), "twice the error has another colour"


def test_shares_that_moved_and_experts_without_tokens() -> None:
    made = maps.moved([RoutingChange(3, 0.1, (), (0.25, None, 0.0))], "moved")
    assert made is not None and made.ends == ("0 %", "25 %")
    np.testing.assert_allclose(read(made), [[0.25, math.nan, 0.0]], atol=1e-5)
    assert maps.moved([RoutingChange(3, 0.1, ())], "moved") is None and maps.tokens({}, "tokens") is None
