"""The plainest loops over the Rows of the synthetic run, which frames are held against.

In: Rows as written. Out: values by checkpoint and coordinates.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import pandas as pd
from matplotlib.figure import Figure

from megatron_lccp.schema import Row


def groups(rows: Iterable[Row], monitor: str, metric: str, *names: str) -> dict[tuple, list[float]]:
    """Values of a metric by step, stage and coordinates."""
    found = defaultdict(list)
    for row in rows:
        if (row.monitor, row.metric) == (monitor, metric):
            found[(row.step, row.stage, *(getattr(row, name) for name in names))].append(row.value)
    return found


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def keyed(frame: pd.DataFrame, *names: str) -> dict[tuple, dict]:
    """Lines of a frame by the same."""
    return {(line["step"], line["stage"], *(line[name] for name in names)): line for line in frame.to_dict("records")}


def panels(figure: Figure) -> list:
    """The axes of a drawn figure, without the scale of colours."""
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
