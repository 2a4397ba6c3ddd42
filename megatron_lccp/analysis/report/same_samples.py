"""Two checkpoints on the same samples, in numbers that people know: perplexities, answers won and lost, heads kept.

In: the rows of two runs at a checkpoint each. Out: lines, each a number before and after. Answers, sequences and heads
count on the samples that both measured, so every difference is paired, with its 95 % interval over samples in brackets.
No verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd

from megatron_lccp.analysis.frames import RETRIEVAL_THRESHOLD, TOP_HEADS
from megatron_lccp.analysis.measured.corpora import corpus_ppl
from megatron_lccp.analysis.measured.heads import head_scores
from megatron_lccp.analysis.measured.panels import title_of
from megatron_lccp.analysis.measured.registry import unclaimed
from megatron_lccp.analysis.run import make_run
from megatron_lccp.analysis.statistics.paired import CLUSTER, head_samples
from megatron_lccp.analysis.statistics.rankings import replaced_by_noise
from megatron_lccp.analysis.statistics.stats import interval, paired_difference
from megatron_lccp.records.store import steps_frame
from megatron_lccp.schema import COORDINATES, KEY_COLUMNS, Metric
from megatron_lccp.text import count_text


@dataclass(frozen=True)
class Change:
    """One line."""

    label: str
    """What was measured."""
    before: str
    after: str
    note: str
    """Over what, and how the pairs differ."""


def changes_of(one: pd.DataFrame, two: pd.DataFrame, declared: Mapping[tuple[str, str], Metric]) -> list[Change]:
    """Lines for answer PPL, NIAH, corpora and heads, those that both measured: from `one` to `two`, rows of a checkpoint
    each."""
    return [*_answers(one, two), *_corpora(one, two), *_heads(one, two), *_others(one, two, declared)]


def as_text(changes: list[Change], names: tuple[str, str]) -> str:
    """A table for a terminal; `names` are of the two."""
    lines = [("", *names, ""), *((c.label, c.before, c.after, c.note) for c in changes)]
    widths = [max(map(len, column)) for column in zip(*lines)][:3]
    return "\n".join(
        f"{label:<{widths[0]}}  {a:>{widths[1]}}  {b:>{widths[2]}}  {note}".rstrip() for label, a, b, note in lines
    )


def _pairs(one: pd.DataFrame, two: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Columns value_x, value_y for rows of a metric at the same coordinates, sample set included; each once."""
    own = [name for name in one if name not in (*KEY_COLUMNS, "value", "unit", "n", *COORDINATES) and name in two]
    keys = ["monitor", *COORDINATES, *own]
    return pd.merge(*(rows[rows["metric"] == metric].drop_duplicates(keys) for rows in (one, two)), on=keys)


def _change(pairs: pd.DataFrame, text: Callable[[float], str]) -> str:
    """Mean change of these pairs and its interval over samples, a needle with all its cells being one: +0.12 nat
    [+0.05, +0.20]."""
    found = paired_difference(pairs["value_x"], pairs["value_y"], pairs.groupby(CLUSTER, dropna=False).ngroup())
    change = text((pairs["value_y"] - pairs["value_x"]).mean())
    if found.n < 2:
        return f"{change} (one sample: no interval)"
    low, high = (text(end).split()[0] for end in (found.low, found.high))
    return f"{change} [{low}, {high}]"


def _nat(nll: float) -> str:
    return f"{nll:+.4f} nat"


def _answers(one: pd.DataFrame, two: pd.DataFrame) -> Iterator[Change]:
    nll, exact = (_pairs(one, two, metric) for metric in ("answer_nll", "exact"))
    for monitor in (name for name in ("NeedleGrid", "InterferenceGrid") if (nll["monitor"] == name).any()):
        pairs = nll[nll["monitor"] == monitor]
        x, y = pairs[["value_x", "value_y"]].to_numpy().T
        note = f"exp of mean NLL over {len(x)} samples; NLL {_change(pairs, _nat)}, {np.mean(y > x):.0%} have more"
        yield Change(f"answer PPL, {monitor}", f"{np.exp(x.mean()):.4g}", f"{np.exp(y.mean()):.4g}", note)
        pairs = exact[exact["monitor"] == monitor]
        x, y = pairs[["value_x", "value_y"]].to_numpy().T
        if len(x):
            change = _change(pairs, lambda share: f"{100 * share:+.1f} points")
            note = f"{np.sum(y < x)} of {len(x)} samples lost, {np.sum(y > x)} won; {change}"
            yield Change(f"NIAH exact, {monitor}", f"{x.mean():.1%}", f"{y.mean():.1%}", note)


def _corpora(one: pd.DataFrame, two: pd.DataFrame) -> Iterator[Change]:
    both = pd.merge(corpus_ppl(one), corpus_ppl(two), on=["label", "corpus", "length_tok", "n"])
    sequences = _pairs(one, two, "sequence_nll")
    for line in both.itertuples():
        pairs = sequences[(sequences["corpus"] == line.corpus) & (sequences["length_tok"] == line.length_tok)]
        averages = f"{_nat(line.nll_y - line.nll_x)} (averages alone: no interval)"
        note = f"over {line.n:,} held-out tokens; NLL {_change(pairs, _nat) if len(pairs) else averages}"
        yield Change(f"corpus PPL, {line.label}", f"{line.ppl_x:.4g}", f"{line.ppl_y:.4g}", note)


def _others(one: pd.DataFrame, two: pd.DataFrame, declared: Mapping[tuple[str, str], Metric]) -> Iterator[Change]:
    """What has no file in `measured`: the mean over all that both measured."""
    for measure in unclaimed(make_run(one, steps_frame([]), metrics=declared)):
        mine_one, mine_two = (
            rows[(rows["monitor"] == measure.monitor) & (rows["metric"] == measure.metric.name)] for rows in (one, two)
        )
        pairs = _pairs(mine_one, mine_two, measure.metric.name)
        if len(pairs):
            change = _change(pairs, partial(_with_unit, measure.metric.unit))
            note = f"mean over {len(pairs)} rows; {change}"
            x, y = pairs["value_x"].mean(), pairs["value_y"].mean()
            yield Change(title_of(measure), f"{x:.4g}", f"{y:.4g}", note)


def _with_unit(unit: str, value: float) -> str:
    return f"{value:+.4g} {unit}"


def _heads(one: pd.DataFrame, two: pd.DataFrame) -> Iterator[Change]:
    sets = [frozenset(rows.loc[rows["metric"] == "retrieval_score", "sample_set"].dropna()) for rows in (one, two)]
    runs = (make_run(rows, steps_frame([])) for rows in (one, two))
    both = pd.merge(*map(head_scores, runs), on=["layer", "head", "n"])
    if both.empty or sets[0] != sets[1]:
        return
    x, y = both["score_x"], both["score_y"]
    counts = [int((score > RETRIEVAL_THRESHOLD).sum()) for score in (x, y)]
    moved = f"of {len(both)}, score > {RETRIEVAL_THRESHOLD:g}; a score changes by at most {(y - x).abs().max():.3f}"
    samples = head_samples(pd.concat([one.assign(run="before"), two.assign(run="after")]))
    if measured := len(samples) == 2 and len(samples.clusters) > 1:
        before_sh, after_sh = samples.value_kcs[0].T, samples.value_kcs[1].T
        low_h, high_h = interval(after_sh - before_sh)
        beyond = int(((low_h > 0) | (high_h < 0)).sum())
        moved += f"; {count_text(beyond, 'head')} beyond noise (95 % each)"
    yield Change("retrieval heads", str(counts[0]), str(counts[1]), moved)
    yield Change("best retrieval score", f"{x.max():.3f}", f"{y.max():.3f}", f"mean over {both['n'].iloc[0]} samples")
    if top := min(TOP_HEADS, counts[0]):
        kept = len(set(x.nlargest(top).index) & set(y.nlargest(top).index))
        note = f"of the {top} best before, among the {top} best after"
        if measured:
            note += f"; noise alone replaces {replaced_by_noise(before_sh, after_sh, top):.1f}"
        yield Change("best heads kept", str(top), str(kept), note)
