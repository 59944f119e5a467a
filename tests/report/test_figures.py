"""What the pictures of pages share."""

from __future__ import annotations

import re

import pytest
from matplotlib.figure import Figure

from moequant.report.figures import by_decades


@pytest.mark.parametrize(("low", "high"), [(0.0003, 2.0), (0.004, 0.09), (0.02, 0.03)])
def test_a_logarithmic_axis_has_plain_numbers(low: float, high: float) -> None:
    axes = Figure().add_subplot()
    axes.plot([0, 1], [low, high])
    by_decades(axes)
    axes.figure.draw_without_rendering()
    told = [tick.label1.get_text() for tick in (*axes.yaxis.get_major_ticks(), *axes.yaxis.get_minor_ticks())]
    assert sum(map(bool, told)) >= 2 and not [text for text in told if re.search("[^0-9.]", text)]
