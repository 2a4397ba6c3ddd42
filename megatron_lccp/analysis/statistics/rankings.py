"""What becomes of the retrieval heads: which appear, strengthen and fade, and whether the top ones stay the same.

In: rows of a run. Out: frames. No ranking of heads is shown without its noise floor: what one unchanged model agrees
with itself on, when the samples behind the ranking are drawn anew.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from megatron_lccp.analysis.frames import RETRIEVAL_THRESHOLD, TOP_HEADS
from megatron_lccp.analysis.statistics.paired import head_samples
from megatron_lccp.analysis.statistics.stats import interval, spearman

REDRAWS = 100


def overlaps(rows: pd.DataFrame) -> pd.DataFrame:
    """Agreement of consecutive checkpoints on the heads, one line per pair (Table 5), beside its noise floor.

    overlap: of the top_k heads of one, how many are in the top_k of the other (top_k: `top_of`).
    spearman: rank correlation of all heads' scores, with its interval; spearman_top: the same over the heads in either
    top. *_floor: mean of the same between two redraws of the samples of the later checkpoint, and for the overlap its
    5 % and 95 % quantiles. changed: the overlap is under the floor's 5 %. samples: clusters that were redrawn; with
    one, floors are NaN and changed is False.
    """
    heads = head_samples(rows)
    lines, score_kh = [], [value_cs.mean(axis=1) for value_cs in heads.value_kcs[: len(heads)]]
    top_k = top_of(len(heads.cells))
    for k in range(1, len(heads)):
        before, after = heads.checkpoints.iloc[k - 1], heads.checkpoints.iloc[k]
        floor = noise_floor(heads.value_kcs[k].T, top_k)
        all_heads = spearman(score_kh[k - 1], score_kh[k])
        top = _in_top(score_kh[k - 1], top_k) | _in_top(score_kh[k], top_k)
        overlap = top_overlap(score_kh[k - 1], score_kh[k], top_k)
        line = {f"{name}_from": before[name] for name in ("step", "tokens")}
        line |= {f"{name}_to": after[name] for name in ("step", "tokens")}
        line |= {"top_k": top_k, "overlap": overlap, "spearman": all_heads.r, "spearman_low": all_heads.low}
        line |= {"spearman_high": all_heads.high, "spearman_top": spearman(score_kh[k - 1][top], score_kh[k][top]).r}
        line |= floor | {"samples": len(heads.clusters), "changed": overlap < floor["overlap_floor_low"]}
        lines.append(line)
    columns = (
        "step_from tokens_from step_to tokens_to top_k overlap overlap_floor overlap_floor_low overlap_floor_high "
        "spearman spearman_low spearman_high spearman_floor spearman_top spearman_top_floor samples changed"
    )
    return pd.DataFrame(lines, columns=columns.split())


def top_of(heads: int) -> int:
    """How many heads are the top ones: of a small model, a quarter."""
    return max(1, min(TOP_HEADS, heads // 4))


def top_overlap(before_h: np.ndarray, after_h: np.ndarray, top_k: int) -> int:
    """Heads that are among the top_k by both scores; of equal scores the first heads count."""
    return int((_in_top(before_h, top_k) & _in_top(after_h, top_k)).sum())


def _in_top(score_h: np.ndarray, top_k: int) -> np.ndarray:
    """Which heads (last axis) are among the top_k; of equal scores the first heads."""
    score_h = np.where(np.isnan(score_h), -np.inf, score_h)
    last = -np.partition(-score_h, top_k - 1, axis=-1)[..., top_k - 1 : top_k]
    above_h, equal_h = score_h > last, score_h == last
    left = top_k - above_h.sum(axis=-1, keepdims=True)
    return above_h | (equal_h & (equal_h.cumsum(axis=-1) <= left))


def noise_floor(score_sh: np.ndarray, top_k: int) -> dict[str, float]:
    """What a model agrees with itself on when its samples are drawn anew, twice: see `overlaps` for the names."""
    names = ("overlap_floor", "overlap_floor_low", "overlap_floor_high", "spearman_floor", "spearman_top_floor")
    if len(score_sh) < 2:
        return dict.fromkeys(names, np.nan)
    one_jh, other_jh = _redrawn(score_sh)
    top_one_jh, top_other_jh = (_in_top(drawn_jh, top_k) for drawn_jh in (one_jh, other_jh))
    top_jh = top_one_jh | top_other_jh
    of_all = _mean_r(rankdata(one_jh, axis=1), rankdata(other_jh, axis=1), np.ones_like(top_jh))
    rank_jh, other_rank_jh = (rankdata(np.where(top_jh, drawn_jh, -np.inf), axis=1) for drawn_jh in (one_jh, other_jh))
    of_top = _mean_r(rank_jh, other_rank_jh, top_jh)  # the rest takes the lowest ranks, and is left out
    overlap_j = (top_one_jh & top_other_jh).sum(axis=1)
    low, high = np.quantile(overlap_j, [0.05, 0.95])
    return dict(zip(names, (float(overlap_j.mean()), float(low), float(high), of_all, of_top), strict=True))


def replaced_by_noise(before_sh: np.ndarray, after_sh: np.ndarray, top_k: int) -> float:
    """Top heads that are replaced on average between two checkpoints that differ in nothing but the noise of single
    samples, the same samples at both.

    What all samples share of a head's change is taken out; what is left of each sample is as likely to have gone the
    other way (a sign-flip test's null). Samples that agree on the change leave no noise: the choice of samples, which
    moves both checkpoints alike, is not counted, unlike in `noise_floor`.
    """
    samples = len(before_sh)
    own_sh = (after_sh - before_sh) - (after_sh - before_sh).mean(axis=0)
    sign_js = np.random.default_rng(samples).choice([-1.0, 1.0], size=(REDRAWS, samples))
    half_jh = sign_js @ own_sh / (2 * np.sqrt(samples * (samples - 1)))
    between_h = (before_sh + after_sh).mean(axis=0) / 2
    kept_jh = _in_top(between_h - half_jh, top_k) & _in_top(between_h + half_jh, top_k)
    return float(top_k - kept_jh.sum(axis=1).mean())


def _redrawn(score_sh: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the heads from samples drawn anew, twice: each [redraws, heads]."""
    samples = len(score_sh)
    rng = np.random.default_rng(samples)
    weight_js = rng.multinomial(samples, np.full(samples, 1 / samples), size=2 * REDRAWS) / samples
    one_jh, other_jh = np.split(weight_js @ score_sh, 2)
    return one_jh, other_jh


def _mean_r(one_jh: np.ndarray, other_jh: np.ndarray, chosen_jh: np.ndarray) -> float:
    """Mean over lines of the correlation of the chosen entries; NaN if none has one."""
    count_j = chosen_jh.sum(axis=1, keepdims=True)
    one_jh, other_jh = (
        np.where(chosen_jh, rank - (rank * chosen_jh).sum(axis=1, keepdims=True) / count_j, 0)
        for rank in (one_jh, other_jh)
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        r_j = (one_jh * other_jh).sum(axis=1) / np.sqrt((one_jh**2).sum(axis=1) * (other_jh**2).sum(axis=1))
    return float(np.nanmean(r_j)) if np.isfinite(r_j).any() else np.nan


def trajectories(rows: pd.DataFrame, threshold: float = RETRIEVAL_THRESHOLD, tokens_from: int = 0) -> pd.DataFrame:
    """What became of every head that was a retrieval head (score > threshold) at any checkpoint of the LCCP.

    The LCCP starts with the last checkpoint at or before `tokens_from`. kind: `appeared` and `faded` passed the
    threshold from there to the end, `strengthened` and `weakened` changed above it, each by more than noise (the
    interval of the change, over samples, leaves out 0); `steady` is the rest. Lines: layer, head, kind, first_score,
    last_score, change, low, high, best_score, appeared_tokens (first checkpoint above the threshold), n (clusters).
    """
    heads = head_samples(rows)
    columns = "layer head kind first_score last_score change low high best_score appeared_tokens n".split()
    if not len(heads):
        return pd.DataFrame(columns=columns)
    tokens_k = heads.checkpoints["tokens"].to_numpy()
    start = max(0, int(np.searchsorted(tokens_k, tokens_from, side="right")) - 1)
    value_khs = heads.value_kcs[start:]
    above_kh = value_khs.mean(axis=2) > threshold
    ever_h = above_kh.any(axis=0)
    first_h, last_h = value_khs[0].mean(axis=1), value_khs[-1].mean(axis=1)
    low_h, high_h = interval((value_khs[-1] - value_khs[0]).T)
    kind_h = np.full(len(ever_h), "steady", dtype=object)
    kind_h[(low_h > 0) & above_kh[-1]] = "strengthened"
    kind_h[(low_h > 0) & above_kh[-1] & ~above_kh[0]] = "appeared"
    kind_h[(high_h < 0) & above_kh[0]] = "weakened"
    kind_h[(high_h < 0) & above_kh[0] & ~above_kh[-1]] = "faded"
    found = heads.cells.assign(
        kind=kind_h, first_score=first_h, last_score=last_h, change=last_h - first_h, low=low_h, high=high_h,
        best_score=value_khs.mean(axis=2).max(axis=0), appeared_tokens=tokens_k[start + above_kh.argmax(axis=0)],
        n=len(heads.clusters),
    )  # fmt: skip
    found = found[ever_h].sort_values("last_score", ascending=False, kind="stable")
    return found[columns].reset_index(drop=True)
