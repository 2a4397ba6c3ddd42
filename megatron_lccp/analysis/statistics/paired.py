"""Rows of samples -> one array that holds the same samples in the same cells at every checkpoint.

In: rows of one metric. Out: Paired. Everything that compares checkpoints sample by sample is made from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from megatron_lccp.analysis.frames import CHECKPOINT

CLUSTER = ["family", "sample"]
"""What is independent of the rest: a fact with its haystack, which it takes through all cells."""


@dataclass(frozen=True)
class Paired:
    """Checkpoints k x cells c x clusters s, without gaps."""

    checkpoints: pd.DataFrame
    """One line per checkpoint: CHECKPOINT."""
    cells: pd.DataFrame
    """One line per cell, with its coordinates."""
    clusters: pd.DataFrame
    """One line per cluster: family, sample."""
    value_kcs: np.ndarray

    def __len__(self) -> int:
        return len(self.checkpoints) if self.value_kcs.size else 0

    def number(self, checkpoint: pd.Series) -> int | None:
        """Which k a line of `frames.checkpoints` is; None if that one did not measure these samples."""
        if not len(self):
            return None
        same_k = (self.checkpoints[CHECKPOINT] == checkpoint[CHECKPOINT]).all(axis=1).to_numpy()
        return int(same_k.argmax()) if same_k.any() else None


def paired(rows: pd.DataFrame, cell: Sequence[str]) -> Paired:
    """The rows of one metric as Paired; `cell` names the coordinates of a cell, and what else differs is averaged.

    Only the sample set that the last checkpoint measured most is taken, of it the clusters that it has in all cells,
    and only the checkpoints that have all of these.
    """
    cell, order = list(cell), ["tokens", "step"]
    rows = rows[[*CHECKPOINT, *cell, *CLUSTER, "sample_set", "value"]]
    rows = rows.dropna(subset=cell).sort_values(order, kind="stable")
    if len(rows):
        last = rows[(rows[order] == rows[order].iloc[-1]).all(axis=1)]
        sets = last["sample_set"].value_counts()
        rows = rows[rows["sample_set"] == sets.index[0]] if len(sets) else rows
    k, checkpoints = _numbered(rows, CHECKPOINT)
    c, cells = _numbered(rows, cell, ordered=True)
    s, clusters = _numbered(rows, CLUSTER)
    shape = (len(checkpoints), len(cells), len(clusters))
    at = np.ravel_multi_index((k, c, s), shape) if len(rows) else np.zeros(0, dtype=int)
    size = int(np.prod(shape))
    count_kcs = np.bincount(at, minlength=size).reshape(shape)
    with np.errstate(invalid="ignore"):
        value_kcs = np.bincount(at, rows["value"].to_numpy(float), size).reshape(shape) / count_kcs
    if len(rows):
        whole_s = (count_kcs[-1] > 0).all(axis=0)
        whole_k = (count_kcs[:, :, whole_s] > 0).all(axis=(1, 2))
        value_kcs = value_kcs[whole_k][:, :, whole_s]
        checkpoints, clusters = checkpoints[whole_k].reset_index(drop=True), clusters[whole_s].reset_index(drop=True)
    return Paired(checkpoints, cells, clusters, value_kcs)


def _numbered(rows: pd.DataFrame, columns: list[str], ordered: bool = False) -> tuple[np.ndarray, pd.DataFrame]:
    """The number of each row's group, and the groups: by first appearance, or by value."""
    groups = rows.groupby(columns, sort=ordered, dropna=False)
    names = groups.size().reset_index()[columns]
    return groups.ngroup().to_numpy(), names


def needle_grid(rows: pd.DataFrame, metric: str = "answer_nll") -> Paired:
    """The needle grid by cell: length_tok, depth_cell."""
    return paired(rows[(rows["monitor"] == "NeedleGrid") & (rows["metric"] == metric)], ["length_tok", "depth_cell"])


def head_samples(rows: pd.DataFrame) -> Paired:
    """Retrieval scores of all heads by cell: layer, head; of RetrievalHeads, or of a grid where that did not run."""
    of_head = rows["layer"].notna() & rows["head"].notna() & rows["ablated"].isna()
    wanted = of_head & (rows["metric"] == "retrieval_score")
    if (own := wanted & (rows["monitor"] == "RetrievalHeads")).any():
        wanted = own
    return paired(rows.loc[wanted, [*CHECKPOINT, "layer", "head", *CLUSTER, "sample_set", "value"]], ["layer", "head"])
