"""How the model uses its context, by place and length, with intervals over samples.

In: rows of a run. Out: frames, one line per cell or checkpoint. NLL in nat, the additive scale of perplexity.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from megatron_lccp.analysis.frames import CHECKPOINT
from megatron_lccp.analysis.statistics.paired import needle_grid
from megatron_lccp.analysis.statistics.stats import ENDS, interval, sample_draws

MIDDLE = (0.25, 0.75)
"""Depths strictly between these are the middle."""
FACTOR = 1.5
"""Answer PPL that counts as kept, relative to that of the shortest length."""


def difference_map(rows: pd.DataFrame, before: pd.Series, after: pd.Series) -> pd.DataFrame:
    """What two checkpoints differ by in each cell of the needle grid: nat of answer NLL, negative is better.

    before, after: lines of `frames.checkpoints`. Lines: length_tok, depth_cell, difference, low, high, n (clusters);
    none if the two did not measure the same samples.
    """
    grid = needle_grid(rows)
    at = [grid.number(checkpoint) for checkpoint in (before, after)]
    if None in at:
        return pd.DataFrame(columns=["length_tok", "depth_cell", "difference", "low", "high", "n"])
    change_sc = (grid.value_kcs[at[1]] - grid.value_kcs[at[0]]).T
    low, high = interval(change_sc)
    return grid.cells.assign(difference=change_sc.mean(axis=0), low=low, high=high, n=len(change_sc))


def middle_index(rows: pd.DataFrame) -> pd.DataFrame:
    """Lost in the middle: answer NLL in the middle of the text less that towards its ends, nat, by checkpoint.

    0: the middle is as good as the rest; positive: it is lost. Mean over all lengths. Lines: CHECKPOINT, index, low,
    high, n (clusters); none where the grid has no depth in the middle, or none outside.
    """
    grid = needle_grid(rows)
    middle_c = grid.cells["depth_cell"].between(*MIDDLE, inclusive="neither").to_numpy(dtype=bool)
    if not len(grid) or middle_c.all() or not middle_c.any():
        return pd.DataFrame(columns=[*CHECKPOINT, "index", "low", "high", "n"])
    index_sk = (grid.value_kcs[:, middle_c].mean(axis=1) - grid.value_kcs[:, ~middle_c].mean(axis=1)).T
    low, high = interval(index_sk)
    return grid.checkpoints.assign(index=index_sk.mean(axis=0), low=low, high=high, n=len(index_sk))


def effective_length(rows: pd.DataFrame, factor: float = FACTOR) -> pd.DataFrame:
    """Effective context length by checkpoint: the longest measured length up to which the answer's PPL stays within
    `factor` times that at the shortest length, PPL being exp(mean NLL over samples and depths).

    A relative measure: a model that is equally unsure everywhere keeps all of its lengths. Lines: CHECKPOINT,
    length_tok, low, high (bootstrap quantiles, themselves lengths of the grid), factor, n (clusters).
    """
    if factor < 1:
        raise ValueError(f"factor: expected at least 1, got {factor}")
    grid = needle_grid(rows)
    columns = [*CHECKPOINT, "length_tok", "low", "high", "factor", "n"]
    if not len(grid):
        return pd.DataFrame(columns=columns)
    length_c = grid.cells["length_tok"].to_numpy(dtype=int)
    lengths = np.unique(length_c)
    nll_lks = np.stack([grid.value_kcs[:, length_c == length].mean(axis=1) for length in lengths])
    kept_k = _longest(nll_lks.mean(axis=2), lengths, factor)
    low, high = kept_k.astype(float) * np.nan, kept_k.astype(float) * np.nan
    if (samples := nll_lks.shape[2]) > 1:
        drawn_lkj = nll_lks.mean(axis=2)[:, :, None] + nll_lks @ sample_draws(samples).T
        low, high = np.quantile(_longest(drawn_lkj, lengths, factor), ENDS, axis=-1, method="nearest")
    return grid.checkpoints.assign(length_tok=kept_k, low=low, high=high, factor=factor, n=samples)[columns]


def _longest(nll_l: np.ndarray, lengths: np.ndarray, factor: float) -> np.ndarray:
    """The longest length (first axis) before the first that exceeds the factor."""
    kept = (nll_l - nll_l[0] <= np.log(factor)).cumprod(axis=0).sum(axis=0)
    return lengths[kept - 1]
