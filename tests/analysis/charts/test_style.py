"""Long curves are thinned, and lines stand out from the page."""

import numpy as np
import pytest

from megatron_lccp.analysis.charts import style


def test_long_curves_are_thinned_but_keep_their_extremes():
    rng = np.random.default_rng(0)
    y = rng.normal(size=100_003)
    y[7777] = 50.0
    x_thin, y_thin, low, high = style.thin(np.arange(len(y)), y, bins=300)
    assert len(x_thin) == len(y_thin) == 300 and high.max() == 50.0 and low.min() == y.min()
    assert np.average(y_thin) == pytest.approx(y.mean(), abs=1e-2)
    assert style.thin(np.arange(5.0), np.array([1, np.nan, 3, 4, 5.0]))[2] is None


@pytest.mark.parametrize("paper", ["#ffffff", "#13171c"])  # --paper of report.css, light and dark
def test_lines_stand_out_from_the_page(paper: str) -> None:
    """By at least 3:1, which WCAG 2.2 (1.4.11) asks of graphics."""

    def luminance(color: str) -> float:
        rgb = np.array([int(color[at : at + 2], 16) for at in (1, 3, 5)]) / 255
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    for color in (*style.SERIES, *(style.line_color(place) for place in np.linspace(0, 1, 7))):
        dark, light = sorted([luminance(color), luminance(paper)])
        assert (light + 0.05) / (dark + 0.05) >= 3, color
