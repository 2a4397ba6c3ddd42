"""Perplexity of held-out text, whole and by position (section 7.1 of the paper).

In: rows of CorpusPPL. Out: frames by corpus, Figure 6, the log law, tables, highlights and signals.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
from scipy import stats

from megatron_lccp.analysis.charts.chart import Chart, Curves, Panel
from megatron_lccp.analysis.charts.parts import (
    PAPER,
    SHOWN_CURVES,
    Runs,
    checkpoints_text,
    lines_of_checkpoints,
    lines_of_runs,
    n_text,
    over_tokens,
    panels_of_runs,
    picked,
    starts_of,
    whole,
)
from megatron_lccp.analysis.frames import CHECKPOINT, at_checkpoint, checkpoints
from megatron_lccp.analysis.measured.columns import LENGTH, WHERE, Column, count_cell, number_cell, table
from megatron_lccp.analysis.measured.highlight import Highlight, change_highlight, nat_text, on_samples, start_and_end
from megatron_lccp.analysis.measured.shown import Figure, Shown
from megatron_lccp.analysis.measured.signal import Signal, of_means, of_samples
from megatron_lccp.analysis.run import Run
from megatron_lccp.analysis.statistics.paired import paired
from megatron_lccp.text import length_text, path_text

MONITOR = "CorpusPPL"


def corpus_ppl(rows: pd.DataFrame) -> pd.DataFrame:
    """Perplexity of each held-out corpus by checkpoint (section 7.1, Figure 6): nll in nat per token, ppl, n tokens.

    length_tok is the tokens of a sequence; `label` tells the series apart, the corpus and, if there are several, the
    length.
    """
    rows = rows[(rows["monitor"] == MONITOR) & (rows["metric"] == "nll")]
    rows = rows.sort_values(["run", "tokens", "step"], kind="stable").reset_index(drop=True)
    label = rows["corpus"]
    if rows["length_tok"].nunique(dropna=False) > 1:
        label = label + " (" + rows["length_tok"].astype("string").fillna("?") + " tok)"
    with np.errstate(over="ignore"):
        rows = rows.assign(nll=rows["value"], ppl=np.exp(rows["value"]), label=label)
    return rows[[*CHECKPOINT, "corpus", "length_tok", "label", "nll", "ppl", "n"]]


def position_ppl(rows: pd.DataFrame) -> pd.DataFrame:
    """Perplexity of held-out text by position in it: corpus, from_tok, to_tok, nll in nat, ppl, n tokens."""
    rows = rows[(rows["monitor"] == MONITOR) & (rows["metric"] == "position_nll")]
    rows = rows.sort_values(["run", "tokens", "step"], kind="stable")
    rows = rows.assign(nll=rows["value"], ppl=np.exp(rows["value"]))
    return rows[[*CHECKPOINT, "corpus", "from_tok", "to_tok", "nll", "ppl", "n"]].reset_index(drop=True)


def log_law(corpora: pd.DataFrame, tokens_from: dict[str, int]) -> pd.DataFrame:
    """PPL = A ln N + B (section 7.1) by run and label: a, b, r2, n checkpoints; N counts the tokens of the LCCP.

    `tokens_from` is where it begins in each run. N = 0 has no logarithm; less than 3 checkpoints give no line.
    """
    lines = []
    for (run, label), part in corpora.groupby(["run", "label"], sort=False):
        seen = part["tokens"].to_numpy(float) - tokens_from[run]
        ppl = part["ppl"].to_numpy(float)
        kept = (seen > 0) & np.isfinite(ppl)
        if len(np.unique(seen[kept])) >= 3:
            fit = stats.linregress(np.log(seen[kept]), ppl[kept])
            lines.append((run, label, fit.slope, fit.intercept, fit.rvalue**2, int(kept.sum())))
    return pd.DataFrame(lines, columns=["run", "label", "a", "b", "r2", "n"])


def corpus_signals(run: Run) -> Iterator[Signal]:
    """NLL of each held-out corpus, by sequence; where a checkpoint kept the means alone, of those. Checkpoints that
    measured another text than the last one (another number of tokens, other sequences) are left out."""
    sequences = run.rows[(run.rows["monitor"] == MONITOR) & (run.rows["metric"] == "sequence_nll")]
    for label, part in run.frame(corpus_ppl).groupby("label", sort=False):
        part, where = part.drop_duplicates(["tokens", "step"], keep="last"), ["corpus", "length_tok"]
        own = sequences[(sequences[where] == part[where].iloc[-1]).all(axis=1)]
        found = paired(own, where)
        at, same, kept = (pd.MultiIndex.from_frame(each[["tokens", "step"]]) for each in (part, found.checkpoints, own))
        part = part[(part["n"] == part["n"].iloc[-1]) & (at.isin(same) | ~at.isin(kept))]
        name, metric = f"corpus_nll[{label}]", run.metric(MONITOR, "nll")
        means_k = part.rename(columns={"nll": "value"})
        yield of_samples(name, metric, found) if len(found) == len(part) else of_means(name, metric, means_k)


def corpus_curves(runs: Runs) -> Chart:
    """Figure 6: corpus PPL over tokens, on a linear axis and on a logarithmic one with A ln N + B."""
    missing = "corpus perplexity (Figure 6; CorpusPPL)"
    frame = whole((run.frame(corpus_ppl) for run in runs), missing)
    origin = dict(starts_of(runs))
    law = log_law(frame, origin)
    seen = frame["tokens"] - frame["run"].map(origin)
    frame = frame.assign(lccp_tokens=seen).merge(law.drop(columns="n"), on=["run", "label"], how="left")
    with np.errstate(divide="ignore", invalid="ignore"):
        fit = frame["a"] * np.log(frame["lccp_tokens"].where(frame["lccp_tokens"] > 0).astype(float)) + frame["b"]
    frame = frame.assign(fit=fit)
    labels = frame["label"].unique()
    plain, logged = [], []
    for k, label in enumerate(labels):
        part = frame[frame["label"] == label]
        later = part[part["lccp_tokens"] > 0]
        plain += lines_of_runs(runs, part, "ppl", label, k)
        if len(later):
            logged += lines_of_runs(runs, later, "ppl", label, k, joined=False)
            logged += lines_of_runs(runs, later[later["fit"].notna()], "fit", f"{label}: fit", k, marks=False)
    fits = "; ".join(
        f"{f'{line.run}, ' if len(runs) > 1 else ''}{line.label}: PPL = {line.a:.3g} ln N {line.b:+.3g} "
        f"(r² = {line.r2:.2f}, n = {line.n})"
        for line in law.itertuples()
    )
    caption = (
        f"Figure 6 of {PAPER}: exp(mean NLL) of held-out text by corpus, over {n_text(frame)} tokens of it; "
        f"{checkpoints_text(frame)}. Right: over the LCCP's own tokens N on a logarithmic axis, where PPL = A ln N + B "
        f"(least squares, N > 0) is a straight line. {fits or 'Too few checkpoints for a fit'}."
    )
    panels = [over_tokens(runs, plain, "corpus PPL")]
    if logged:
        panels.append(Panel("lccp_tokens", "LCCP tokens N, log scale", "corpus PPL", tuple(logged), log_x=True))
    return Curves("", "", caption, frame, tuple(panels))


def position_curves(runs: Runs) -> Chart:
    """Perplexity of held-out text by position in it."""
    missing = "perplexity by position (CorpusPPL)"
    measured = whole((run.frame(position_ppl) for run in runs), missing)

    def panels_of(run: Run, positions: pd.DataFrame) -> Iterator[Panel]:
        for corpus, part in positions.groupby("corpus", sort=False):
            lines, x_label = lines_of_checkpoints(part, "ppl"), "position in the text, up to (tokens)"
            yield Panel("to_tok", x_label, "PPL", lines, str(corpus), "length", log_x=True)

    frame, panels = panels_of_runs(runs, lambda run: run.frame(position_ppl), panels_of)
    caption = (
        "exp(mean NLL) of held-out text over the tokens of each stretch of positions; a point stands at the end of "
        f"its stretch, over {n_text(measured)} tokens. A model that uses its context gets better further on. "
        f"{SHOWN_CURVES}"
    )
    return Curves("", "", caption, frame, panels)


def corpus_tables(run: Run) -> Iterator[str]:
    corpus, tokens = Column("corpus", "corpus", css="text"), Column("tokens measured", "n", count_cell)
    values = (Column("ppl", "ppl", number_cell), Column("nll (nat)", "nll", number_cell))
    yield table(
        "t-corpus", "Corpus perplexity (Figure 6)", run.frame(corpus_ppl), (*WHERE, corpus, LENGTH, *values, tokens)
    )
    law = log_law(run.frame(corpus_ppl), {run.name: run.lccp_from})
    columns = (
        Column("corpus", "label", css="text"),
        Column("A", "a", number_cell),
        Column("B", "b", number_cell),
        Column("r²", "r2", number_cell),
        Column("checkpoints", "n", count_cell),
    )
    note = "Least squares over the LCCP's own tokens N > 0, natural logarithm."
    yield table("t-law", "PPL = A ln N + B (section 7.1)", law, columns, note=note)
    shown = picked(run, run.frame(position_ppl))
    at = (Column("from", "from_tok", length_text), Column("to", "to_tok", length_text))
    title = "Perplexity by position, of the checkpoints shown"
    yield table("t-positions", title, shown, (*WHERE, corpus, *at, *values, tokens))


def corpus_highlights(run: Run) -> Iterator[Highlight]:
    sequences = run.rows[(run.rows["monitor"] == MONITOR) & (run.rows["metric"] == "sequence_nll")]
    for label, part in run.frame(corpus_ppl).groupby("label", sort=False):
        first, last = start_and_end(part, run)
        where = ["corpus", "length_tok"]
        found = paired(sequences[(sequences[where] == last[where].iloc[0]).all(axis=1)], where)
        note, change = f"over {int(last['n'].iloc[0]):,} held-out tokens", on_samples(found, first, last, nat_text)
        yield change_highlight(f"Corpus PPL, {label}", first, last, "ppl", note, change)


def corpus_scalars(run: Run) -> dict[str, float]:
    """PPL of each corpus at the last checkpoint."""
    corpora = run.frame(corpus_ppl)
    last = at_checkpoint(corpora, checkpoints(corpora).iloc[-1]) if len(corpora) else corpora
    return {f"ppl/{path_text(line.label)}": line.ppl for line in last.itertuples()}


SHOWN = Shown(
    place=40,
    claims=lambda measure: measure.monitor == MONITOR,
    figures=(
        Figure("corpus", "Corpus perplexity", "probabilistic", corpus_curves),
        Figure("positions", "Perplexity by position in the text", "probabilistic", position_curves),
    ),
    tables=(corpus_tables,),
    highlights=(corpus_highlights,),
    signals=(corpus_signals,),
    scalars=corpus_scalars,
)
