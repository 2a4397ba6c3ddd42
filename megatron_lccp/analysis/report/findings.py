"""What the statistics say of a run: as frames, and as blocks of the page, the verdict first.

In: RunFrames, judged by `verdict`, `heads`, `context` and `signals`. Out: frames by name, and HTML made from them.
Nothing is computed here but the text of a cell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape

import pandas as pd

from megatron_lccp.analysis import context, frames
from megatron_lccp.analysis.measures import BENCHMARK_MONITORS
from megatron_lccp.analysis.report import page
from megatron_lccp.analysis.report.page import Column
from megatron_lccp.analysis.run import RunFrames
from megatron_lccp.analysis.signals import run_signals, signal_table
from megatron_lccp.analysis.statistics import correlations, rankings
from megatron_lccp.analysis.text import length_text, tokens_text
from megatron_lccp.analysis.verdict.judge import Verdict, judge
from megatron_lccp.analysis.verdict.text import when_text

STATES = {
    "saturated": "Saturated", "improving": "Still improving", "undecided": "Undecided",
    "deceptive": "Deceptive saturation",
}  # fmt: skip
TABLES = ("verdict", "correlations", "overlaps", "trajectories", "middle_index", "effective_length")
"""Frames of a run; correlations are tables 3, 4, 6 and 7 of the paper, overlaps table 5."""


@dataclass(frozen=True)
class Findings:
    """What is known of a run beyond its measures."""

    run: RunFrames
    verdict: Verdict
    tables: Mapping[str, pd.DataFrame] = field(repr=False)
    """Of TABLES, those that something was measured for. Each is described where it is made."""

    def table(self, name: str) -> pd.DataFrame:
        """One of `tables`, empty if it is not there."""
        return self.tables.get(name, pd.DataFrame())


def find(run: RunFrames, margins: Mapping[str, float] | None = None) -> Findings:
    """Judge a run; `margins` as in `verdict.judge`."""
    verdict = judge(run, margins or {})
    lines = [
        {name: value for name, value in asdict(signal).items() if name != "forecasts"}
        | {"forecast_tokens": signal.forecast_tokens, "forecast_low": signal.forecast_low,
           "forecast_high": signal.forecast_high}
        for signal in verdict.signals
    ]  # fmt: skip
    tables = {"verdict": pd.DataFrame(lines), "correlations": _correlations(run)}
    if len(run.scores):
        tables["overlaps"] = rankings.overlaps(run.rows)
        tables["trajectories"] = rankings.trajectories(run.rows, run.threshold, run.lccp_from)
    if len(run.cells):
        tables["middle_index"] = context.middle_index(run.rows)
        tables["effective_length"] = context.effective_length(run.rows)
    assert tables.keys() <= set(TABLES)
    return Findings(run, verdict, tables)


def _correlations(run: RunFrames) -> pd.DataFrame:
    """Pearson's r of signals with benchmarks over checkpoints: level, signal, benchmark, r, p, low, high, n, floor."""
    if not len(run.benchmarks):
        return pd.DataFrame()
    signals = [signal for signal in run_signals(run) if signal.name.partition(".")[0] not in BENCHMARK_MONITORS]
    right = run.benchmarks.rename(columns={"benchmark": "signal", "score": "value"})[["signal", "tokens", "value"]]
    right = right.groupby(["signal", "tokens"], sort=False, as_index=False).mean()  # a checkpoint counts once
    found = correlations.correlations(signal_table(signals), right)
    level = {signal.name: signal.level for signal in signals}
    found.insert(0, "level", found["left"].map(level))
    return found.rename(columns={"left": "signal", "right": "benchmark"})


# --- the verdict ---------------------------------------------------------------------------------------------------


def verdict_block(found: Findings, number: int, named: bool) -> str:
    """The verdict in a sentence, its warnings, and a line for every signal."""
    verdict = found.verdict
    tone = "deceptive" if verdict.deceptive else verdict.state
    label = f"{found.run.name}: {STATES[tone]}" if named else STATES[tone]
    alerts = "".join(f'<li class="alert">{escape(alert.text)}</li>' for alert in verdict.alerts)
    lines = found.table("verdict")
    if len(lines):
        lines = _with_interval(lines, digits=2).assign(
            margin=[f"{margin:.3g} {unit}" for margin, unit in zip(lines["margin"], lines["unit"], strict=True)],
            samples=["–" if not samples else f"{samples}" for samples in lines["samples"]],
            forecast=[
                "" if pd.isna(at) else when_text(at, now)
                for at, now in zip(lines["forecast_tokens"], lines["tokens_to"], strict=True)
            ],
            settled=["not yet" if pd.isna(at) else tokens_text(at) for at in lines["settled_at_tokens"]],
        )
    columns = (
        Column("signal", "signal", css="text name"), Column("state", "state", css="tone"),
        Column("gain per +25 %", "gain_per_25pct", lambda v: f"{v:+.2g}"), Column("interval", "interval"),
        Column("margin", "margin"), Column("level", "level", css="text"), Column("checkpoints", "checkpoints"),
        Column("samples", "samples"), Column("forecast, tokens", "forecast"), Column("settled at", "settled"),
    )  # fmt: skip
    note = (
        "Gain: what 25 % more of the LCCP's tokens bring to a signal at the end (positive is better), with its "
        "interval over samples and checkpoints (no number of samples: over checkpoints alone), corrected for repeated "
        "looks. Saturated: the whole interval is under the margin set beforehand; improving: all of it is above. "
        "Forecast: where the better of two laws passes the margin."
    )
    table = page.table(f"t-verdict-{number}", "Signal by signal", lines, columns, note=note, open=len(lines) <= 16)
    return (
        f'<section class="verdict {tone}" aria-label="Verdict"><div class="state">{escape(label)}</div>'
        f'<p class="sentence">{escape(verdict.sentence)}</p>{f"<ul>{alerts}</ul>" if alerts else ""}{table}</section>'
    )


# --- tables of a level ---------------------------------------------------------------------------------------------


def level_blocks(level: str, found: Sequence[Findings]) -> list[str]:
    """The tables that belong to one level of the paper, of every run."""
    makers = {
        "behavioural": (_niah_correlations, _head_correlations), "probabilistic": (_middle, _effective),
        "mechanistic": (_overlaps, _trajectories),
    }  # fmt: skip
    blocks = []
    for make in makers.get(level, ()):
        for number, each in enumerate(found):
            key, title, frame, columns, note = make(each)
            title = f"{each.run.name}: {title}" if len(found) > 1 else title
            blocks.append(page.shown_table(f"{key}-{number}", title, frame, columns, note))
    return [block for block in blocks if block]


def _niah_correlations(found: Findings):
    return _correlation_block(found, "t-correlations", "Needle and corpus against benchmarks (tables 3 and 6)", False)


def _head_correlations(found: Findings):
    return _correlation_block(found, "t-head-correlations", "Retrieval heads against benchmarks (tables 4 and 7)", True)


def _correlation_block(found: Findings, key: str, title: str, mechanistic: bool):
    frame, columns = found.table("correlations"), [Column("signal", "signal", css="text")]
    if len(frame):
        frame = frame[(frame["level"] == "mechanistic") == mechanistic]
        benchmarks = list(dict.fromkeys(frame["benchmark"]))
        columns += [Column(benchmark, benchmark) for benchmark in benchmarks]
        columns.append(Column("checkpoints", "n"))
        texts = frame.assign(text=[_r_text(line) for line in frame.itertuples()])
        counts = frame.groupby("signal", sort=False)["n"].agg(lambda n: ", ".join(map(str, sorted(set(n)))))
        wide = texts.pivot(index="signal", columns="benchmark", values="text").assign(n=counts)
        frame = wide.loc[list(dict.fromkeys(frame["signal"]))].reset_index()
    note = (
        "Pearson's r over checkpoints with its 95 % interval (Fisher's z), its two-sided p (n - 2 degrees of freedom, "
        "as in the paper) and its noise floor: the |r| that 95 % of unrelated series with the same trends and the same "
        "smoothness stay under. Whatever falls over the same tokens correlates, and p does not know of it: only an r "
        "over its floor says that the two go together from checkpoint to checkpoint. The p values are not corrected "
        "for their number."
    )
    return key, title, frame, columns, note


def _r_text(line) -> str:
    if pd.isna(line.r):
        return "–"
    interval = f" [{line.low:+.2f}, {line.high:+.2f}]" if pd.notna(line.low) else ""
    floor = f", floor {line.floor:.3f}" if pd.notna(line.floor) else ", too few for a floor"
    return f"{line.r:+.3f}{interval}, p = {line.p:.4f}{floor}"


def _middle(found: Findings):
    columns = (*_AT, Column("index (nat)", "index", lambda v: f"{v:+.3f}"), _INTERVAL, _whole("samples", "n"))
    note = (
        "Mean answer NLL with the needle at depths strictly between a quarter and three quarters, minus the mean at "
        "the other depths; 0: nothing is lost in the middle."
    )
    frame = _picked(found, "middle_index")
    return "t-middle", "Lost-in-the-middle index", _with_interval(frame), columns, note


def _effective(found: Findings):
    frame = _picked(found, "effective_length")
    factor = frame["factor"].iloc[0] if len(frame) else 1.5
    columns = (*_AT, Column("length", "length_tok", length_text), Column("from", "low", length_text),
               Column("to", "high", length_text), _whole("samples", "n"))  # fmt: skip
    note = (
        f"The longest length up to which answer PPL (exp_mean_nll) stays within {factor:g} times that of the shortest "
        "length; from and to: its 95 % interval over samples."
    )
    return "t-effective", "Effective context length", frame, columns, note


def _overlaps(found: Findings):
    frame = found.table("overlaps")
    if len(frame):
        pairs = zip(frame["tokens_from"], frame["tokens_to"], strict=True)
        floors = zip(frame["overlap_floor"], frame["overlap_floor_low"], frame["overlap_floor_high"], strict=True)
        frame = frame.assign(
            between=[f"{tokens_text(a)} → {tokens_text(b)}" for a, b in pairs],
            share=[f"{overlap:.0f}/{k:.0f}" for overlap, k in zip(frame["overlap"], frame["top_k"], strict=True)],
            floor=[f"{floor:.1f} [{low:.0f}, {high:.0f}]" for floor, low, high in floors],
            moved=frame["changed"].map({True: "yes", False: "within noise"}),
        ).tail(30)
    columns = (
        Column("checkpoints", "between", css="text"), Column("overlap", "share"),
        Column("same model, other samples", "floor"), Column("changed?", "moved", css="text"),
        Column("Spearman, all heads", "spearman", _three), Column("its floor", "spearman_floor", _three),
        Column("Spearman, top heads", "spearman_top", _three), Column("its floor", "spearman_top_floor", _three),
        _whole("samples", "samples"),
    )  # fmt: skip
    note = (
        "Heads that are among the top ones at both of two consecutive checkpoints, beside the noise floor: how far one "
        "unchanged model overlaps with itself when its samples are drawn anew (mean, 5 % to 95 %). The ranking is "
        "known no better, and an overlap within that range is not called a change; head_overlap in the verdict "
        "compares the same samples, and sees smaller changes. Spearman: over all heads, and over those in either top."
    )
    return "t-overlap", "Top heads from checkpoint to checkpoint (table 5)", frame, columns, note


def _trajectories(found: Findings):
    frame = found.table("trajectories")
    if len(frame):
        frame = frame.sort_values("last_score", ascending=False, kind="stable").head(frames.TOP_HEADS)
    columns = (
        _whole("layer", "layer"), _whole("head", "head"), Column("what became of it", "kind", css="text"),
        Column("first score", "first_score", _three), Column("last score", "last_score", _three),
        Column("change", "change", lambda v: f"{v:+.3f}"), _INTERVAL, Column("best score", "best_score", _three),
        Column("first above at", "appeared_tokens", tokens_text),
    )  # fmt: skip
    note = (
        f"Heads that were ever above {found.run.threshold:g}, at most the best {frames.TOP_HEADS} at the end, from the "
        "start of the LCCP. The change is paired over samples."
    )
    return "t-trajectories", "What became of the retrieval heads", _with_interval(frame), columns, note


def _whole(heading: str, name: str) -> Column:
    return Column(heading, name, lambda value: f"{int(value):,}")


def _three(value: float) -> str:
    return f"{value:.3f}"


_AT = (Column("tokens", "tokens", tokens_text), _whole("step", "step"))
_INTERVAL = Column("95 % interval", "interval")


def _picked(found: Findings, name: str) -> pd.DataFrame:
    """The lines of the checkpoints that figures show."""
    frame = found.table(name)
    if not len(frame):
        return frame
    return frame.merge(frames.pick_checkpoints(frame, found.run.lccp_from), on=frames.CHECKPOINT)


def _with_interval(frame: pd.DataFrame, digits: int = 3) -> pd.DataFrame:
    """`interval` as text, from the columns low and high."""
    if not len(frame):
        return frame
    pairs = zip(frame["low"], frame["high"], strict=True)
    known = [(low, high) if pd.notna(low) and pd.notna(high) else None for low, high in pairs]
    return frame.assign(interval=["–" if k is None else f"[{k[0]:.{digits}g}, {k[1]:.{digits}g}]" for k in known])
