"""The signals of a run: what may saturate, each as one number per checkpoint of the LCCP, with its samples.

In: RunFrames. Out: Signals. Behavioural: does the model answer right. Probabilistic: how sure is it. Mechanistic: what
do its heads do (sections 4 to 6 of the paper).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from megatron_lccp.analysis.run import RunFrames
from megatron_lccp.analysis.statistics.paired import Paired, head_samples, needle_grid, paired
from megatron_lccp.analysis.statistics.rankings import replaced_by_noise, top_of, top_overlap
from megatron_lccp.analysis.text import length_text

Level = Literal["behavioural", "probabilistic", "mechanistic"]
RISING = ("exact", "score", "accuracy", "f1", "contains", "rouge1_recall", "pass_at_1", "pass_at_3")
"""Metrics of benchmarks, per sample or whole, that are signals; higher is better."""
FALLING = ("answer_nll", "nll")
"""Metrics in nat, lower is better."""
MOST_RANKED = 100
"""Checkpoints whose rankings are redrawn for head_overlap: the last ones."""
MARGINS = {
    "niah_exact": 0.01, "answer_nll": 0.01, "corpus_nll": 0.005, "retrieval_score": 0.005, "retrieval_heads": 1.0,
    "head_overlap": 1.0, "share": 0.01, "nat": 0.01, "": 1.0,
}  # fmt: skip
"""Gain per +25 % tokens that is no longer worth them: by signal, by unit for the rest, and 1 for points or percent."""


@dataclass(frozen=True)
class Signal:
    """One number per checkpoint k, in order, and the values of samples s that it is the mean of."""

    name: str
    level: Level
    unit: str
    better: Literal[1, -1]
    """1: higher is better; -1: lower."""
    steps_k: np.ndarray
    tokens_k: np.ndarray
    """Training tokens, all stages."""
    value_k: np.ndarray
    sample_ks: np.ndarray | None = None
    """Values of independent clusters of samples, the same ones at all checkpoints; None: only the mean is known, or the
    value is none."""
    resolution: float = 0.0
    """Smallest step that the value can make."""
    bounds: tuple[float, float] | None = None
    """Worst and best value there can be."""
    turnover: bool = False
    """The value itself is what changed over +25 % tokens; it has no trend."""

    @property
    def samples(self) -> int:
        return 0 if self.sample_ks is None else self.sample_ks.shape[1]

    @property
    def default_margin(self) -> float:
        return MARGINS.get(self.name.split("[")[0], MARGINS.get(self.unit, MARGINS[""]))


def run_signals(run: RunFrames) -> tuple[Signal, ...]:
    """All signals that the run's rows support, behavioural first."""
    makers = (_needles, _benchmarks, _corpora, _heads)
    signals = [signal for make in makers for signal in make(run) if len(signal.tokens_k)]
    order = ("behavioural", "probabilistic", "mechanistic")
    return tuple(sorted(signals, key=lambda signal: order.index(signal.level)))


def signal_table(signals: Sequence[Signal]) -> pd.DataFrame:
    """Signals as lines, one per token count (the later checkpoint, as in `after_start`): signal, tokens, value."""
    columns = ["signal", "tokens", "value"]
    tables = [
        pd.DataFrame({"signal": signal.name, "tokens": signal.tokens_k, "value": signal.value_k}) for signal in signals
    ]
    found = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)
    return found.drop_duplicates(["signal", "tokens"], keep="last", ignore_index=True)


def _sampled(name: str, level: Level, unit: str, better, found: Paired, cells=slice(None), **more) -> Signal:
    """The mean over cells and clusters of what was measured per sample."""
    sample_ks = found.value_kcs[:, cells].mean(axis=1) if len(found) else np.zeros((0, 0))
    value_k = sample_ks.mean(axis=1) if len(found) else np.zeros(0)
    return _at(found.checkpoints.iloc[: len(value_k)], name, level, unit, better, value_k, sample_ks=sample_ks, **more)


def _at(checkpoints: pd.DataFrame, name: str, level: Level, unit: str, better, value_k: np.ndarray, **more) -> Signal:
    steps_k, tokens_k = (checkpoints[column].to_numpy(dtype=int) for column in ("step", "tokens"))
    return Signal(name, level, unit, better, steps_k, tokens_k, value_k, **more)


def _share(name: str, found: Paired) -> Signal:
    resolution = 1 / max(1, found.value_kcs[:1].size)
    return _sampled(name, "behavioural", "share", 1, found, resolution=resolution, bounds=(0.0, 1.0))


def _needles(run: RunFrames) -> Iterator[Signal]:
    """The needle grid: exact answers, and the answer's NLL whole and by octave of lengths."""
    yield _share("niah_exact", needle_grid(run.rows, "exact"))
    grid = needle_grid(run.rows)
    yield _sampled("answer_nll", "probabilistic", "nat", -1, grid)
    length_c = grid.cells["length_tok"].to_numpy(dtype=int)
    octave_c = np.ceil(np.log2(np.maximum(length_c, 1)))
    octaves = np.unique(octave_c)
    for octave in octaves if len(octaves) > 1 else []:
        cells_c = octave_c == octave
        ends = dict.fromkeys(length_text(length) for length in (length_c[cells_c].min(), length_c[cells_c].max()))
        yield _sampled(f"answer_nll[{'-'.join(ends)}]", "probabilistic", "nat", -1, grid, cells_c)


def _benchmarks(run: RunFrames) -> Iterator[Signal]:
    """Whatever else was measured sample by sample, or is a benchmark's one number, under a metric known here."""
    wanted = run.rows["metric"].isin(RISING + FALLING) & ~run.rows["monitor"].isin(["NeedleGrid", "CorpusPPL"])
    for name in ("ablated", "layer", "expert"):
        wanted &= run.rows[name].isna()
    rows = run.rows[wanted]
    for (monitor, metric), part in rows.groupby(["monitor", "metric"], sort=False):
        cell = ["before_tok", "after_tok"] if monitor == "InterferenceGrid" else ["corpus"]
        found, name = paired(part.assign(corpus=part["corpus"].fillna("")), cell), f"{monitor}.{metric}"
        unit = str(part["unit"].iloc[-1])
        if metric in FALLING:
            yield _sampled(name, "probabilistic", unit, -1, found)
        else:
            yield _share(name, found) if unit == "share" else _sampled(name, "behavioural", unit, 1, found)


def _corpora(run: RunFrames) -> Iterator[Signal]:
    """NLL of each held-out corpus, by sequence; where a checkpoint kept the means alone, of those. Checkpoints that
    measured another text than the last one (another number of tokens, other sequences) are left out."""
    sequences = run.rows[run.rows["metric"] == "sequence_nll"]
    for label, part in run.corpora.groupby("label", sort=False):
        part, where = part.drop_duplicates(["tokens", "step"], keep="last"), ["corpus", "length_tok"]
        own = sequences[(sequences[where] == part[where].iloc[-1]).all(axis=1)]
        found = paired(own, where)
        at, same, kept = (pd.MultiIndex.from_frame(each[["tokens", "step"]]) for each in (part, found.checkpoints, own))
        part = part[(part["n"] == part["n"].iloc[-1]) & (at.isin(same) | ~at.isin(kept))]
        about = (f"corpus_nll[{label}]", "probabilistic", "nat", -1)
        whole = len(found) == len(part)
        yield _sampled(*about, found) if whole else _at(part, *about, part["nll"].to_numpy(dtype=float))


def _heads(run: RunFrames) -> Iterator[Signal]:
    """Mean score of a frozen set of heads, how many retrieve, and how many of the top ones were replaced."""
    heads = head_samples(run.rows)
    if not len(heads):
        return
    score_kh = heads.value_kcs.mean(axis=2)
    tokens_k = heads.checkpoints["tokens"].to_numpy()
    start = max(0, int(np.searchsorted(tokens_k, run.lccp_from, side="right")) - 1)
    above_kh = score_kh > run.threshold
    if above_kh[start:].any():
        frozen_h = above_kh[start + above_kh[start:].any(axis=1).argmax()]
        more = dict(bounds=(0.0, 1.0))
        yield _sampled("retrieval_score", "mechanistic", "share", 1, heads, frozen_h, **more)
    count_k = above_kh.sum(axis=1).astype(float)  # no mean of samples: which heads pass is decided by all of them
    more = dict(resolution=1.0, bounds=(0.0, float(above_kh.shape[1])))
    yield _at(heads.checkpoints, "retrieval_heads", "mechanistic", "heads", 1, count_k, **more)
    yield _turnover(run, heads, score_kh)


def _turnover(run: RunFrames, heads: Paired, score_kh: np.ndarray) -> Signal:
    """Top heads replaced over the last +25 % tokens, beyond those that the noise of single samples replaces, the same
    samples at both ends; needs several clusters."""
    lccp_k = heads.checkpoints["tokens"].to_numpy() - run.lccp_from
    top_k, numbers, values = top_of(score_kh.shape[1]), [], []
    for k in range(max(0, len(heads) - MOST_RANKED), len(heads)) if len(heads.clusters) > 1 else []:
        before = int(np.searchsorted(lccp_k, lccp_k[k] / 1.25, side="right")) - 1
        if lccp_k[k] > 0 and before >= 0:
            replaced = top_k - top_overlap(score_kh[before], score_kh[k], top_k)
            values.append(replaced - replaced_by_noise(heads.value_kcs[before].T, heads.value_kcs[k].T, top_k))
            numbers.append(k)
    return _at(
        heads.checkpoints.iloc[numbers], "head_overlap", "mechanistic", "heads", 1, np.array(values), resolution=1.0,
        turnover=True,
    )  # fmt: skip


def after_start(signal: Signal, lccp_from: int) -> Signal:
    """The signal's checkpoints after the start of the LCCP, each token count once, of finite values alone: those that
    have a place on a log axis of tokens."""
    kept = (signal.tokens_k > lccp_from) & np.isfinite(signal.value_k)
    kept[:-1] &= signal.tokens_k[:-1] != signal.tokens_k[1:]
    samples = None if signal.sample_ks is None else signal.sample_ks[kept]
    return Signal(**(vars(signal) | dict(
        steps_k=signal.steps_k[kept], tokens_k=signal.tokens_k[kept], value_k=signal.value_k[kept], sample_ks=samples,
    )))  # fmt: skip
