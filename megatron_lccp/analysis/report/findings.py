"""What the statistics say of a run: as frames, and as blocks of the page, the verdict first.

In: a Run, judged. Out: frames by name, and HTML made from them.
Nothing is computed here but the text of a cell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from html import escape

import pandas as pd

from megatron_lccp.analysis.measured.benchmarks import benchmark_scores
from megatron_lccp.analysis.measured.columns import Column, shown_table, table
from megatron_lccp.analysis.measured.registry import blocks_of, run_frames, run_signals, signal_table
from megatron_lccp.analysis.measured.shown import Block
from megatron_lccp.analysis.run import Run
from megatron_lccp.analysis.statistics import correlations
from megatron_lccp.analysis.verdict.advice import Advice, advise
from megatron_lccp.analysis.verdict.judge import Verdict, judge
from megatron_lccp.analysis.verdict.text import forecast_text, interval_text, margin_text, reading_text
from megatron_lccp.text import hours_text, tokens_text

STATES = {
    "saturated": "Saturated", "improving": "Still improving", "undecided": "Undecided",
    "deceptive": "Deceptive saturation", "worse": "Worse",
}  # fmt: skip


@dataclass(frozen=True)
class Findings:
    """What is known of a run beyond its measures."""

    run: Run
    verdict: Verdict
    advice: Advice
    tables: Mapping[str, pd.DataFrame] = field(repr=False)
    """The verdict and the correlations (tables 3, 4, 6 and 7 of the paper), and what files of `measured` give by name
    (`overlaps` is table 5). Each is described where it is made."""

    def table(self, name: str) -> pd.DataFrame:
        """One of `tables`, empty if it is not there."""
        return self.tables.get(name, pd.DataFrame())


def find(run: Run, margins: Mapping[str, float] | None = None) -> Findings:
    """Judge a run; `margins` as in `verdict.judge`."""
    verdict = judge(run, margins or {})
    advice = advise(run, verdict)
    lines = [
        {name: value for name, value in asdict(signal).items() if name not in ("forecasts", "fall")}
        | {"forecast_tokens": signal.forecast_tokens, "forecast_low": signal.forecast_low,
           "forecast_high": signal.forecast_high}
        for signal in verdict.signals
    ]  # fmt: skip
    correlated = _correlations(run)
    tables = {"verdict": pd.DataFrame(lines)} | ({"correlations": correlated} if len(correlated) else {})
    return Findings(run, verdict, advice, tables | run_frames(run))


def _correlations(run: Run) -> pd.DataFrame:
    """Pearson's r of signals with benchmarks over checkpoints: level, signal, benchmark, r, p, low, high, n, floor."""
    if not len(run.derived(benchmark_scores)):
        return pd.DataFrame()
    signals = [signal for signal in run_signals(run) if not signal.benchmark]
    right = run.derived(benchmark_scores).rename(columns={"benchmark": "signal", "score": "value"})[
        ["signal", "tokens", "value"]
    ]
    right = right.groupby(["signal", "tokens"], sort=False, as_index=False).mean()  # a checkpoint counts once
    found = correlations.correlations(signal_table(signals), right)
    level = {signal.name: signal.level for signal in signals}
    found.insert(0, "level", found["left"].map(level))
    return found.rename(columns={"left": "signal", "right": "benchmark"})


# --- the verdict ---------------------------------------------------------------------------------------------------


def verdict_block(found: Findings, number: int, named: bool) -> str:
    """What to do, the verdict in a sentence, its warnings, and a line for every signal."""
    verdict, advice = found.verdict, found.advice
    tone = "deceptive" if verdict.deceptive and verdict.state != "worse" else verdict.state
    label = f"{found.run.name}: {STATES[tone]}" if named else STATES[tone]
    warnings = [alert.text for alert in verdict.alerts] + [fall.text for fall in verdict.worse]
    items = [f'<li class="alert">{escape(text)}</li>' for text in warnings]
    items += [f"<li>{escape(each.text)}</li>" for each in advice.absent]
    hours = advice.quarter_gpu_hours
    lines = pd.DataFrame([
        {
            "signal": each.signal, "state": each.state, "gain": interval_text(each), "margin": margin_text(each),
            "hours": "–" if hours is None else hours_text(hours),
            "forecast": forecast_text(each.forecasts[0], each.tokens_to, advice) if each.forecasts else "",
            "settled": "not yet" if each.settled_at_tokens is None else tokens_text(each.settled_at_tokens),
            "checkpoints": f"{each.checkpoints} of {advice.checkpoints.get(each.signal, 0)}",
            "samples": "–" if not each.samples else f"{each.samples}",
        }
        for each in verdict.signals
    ])  # fmt: skip
    columns = (
        Column("signal", "signal", css="text name"), Column("state", "state", css="tone"),
        Column("+25 % tokens bring", "gain"), Column("margin", "margin"),
        *[Column("for GPU-hours", "hours")] * (hours is not None), Column("gain falls under the margin", "forecast", css="wrap"),
        Column("stands still since", "settled"), Column("checkpoints", "checkpoints"), Column("samples", "samples"),
    )  # fmt: skip
    note = (
        f"{reading_text(advice)} No number of samples: the interval has the noise of checkpoints alone. Saturated: the "
        "whole interval is under the margin set beforehand; improving: all of it is above."
    )
    lines = lines.head(0) if advice.alone else lines
    by_signal = table(f"t-verdict-{number}", "Signal by signal", lines, columns, note=note, open=len(lines) <= 16)
    return (
        f'<section class="verdict {tone}" aria-label="Verdict"><p class="advice">{escape(advice.sentence)}</p>'
        f'<div class="state">{escape(label)}</div><p class="sentence">{escape(verdict.sentence)}</p>'
        f"{f'<ul>{chr(10).join(items)}</ul>' if items else ''}{by_signal}</section>"
    )


# --- tables of a level ---------------------------------------------------------------------------------------------


_Table = tuple[str, pd.DataFrame, Sequence[Column], str]
"""Title, frame, columns and note."""


def _of_its_run(block: Block, found: Findings) -> _Table:
    return block.table(found.run)


def level_blocks(level: str, found: Sequence[Findings]) -> list[str]:
    """The tables that belong to one level of the paper, of every run."""
    makers: list[tuple[str, Callable[[Findings], _Table]]] = [
        (block.key, partial(_of_its_run, block)) for block in blocks_of(level)
    ]
    if level == "behavioural":
        makers += [("t-correlations", _niah_correlations), ("t-head-correlations", _head_correlations)]
    blocks = []
    for key, make in makers:
        for number, each in enumerate(found):
            title, frame, columns, note = make(each)
            title = f"{each.run.name}: {title}" if len(found) > 1 else title
            blocks.append(shown_table(f"{key}-{number}", title, frame, columns, note))
    return [block for block in blocks if block]


def _niah_correlations(found: Findings):
    return _correlation_block(found, "Behaviour and perplexity against benchmarks (tables 3 and 6)", False)


def _head_correlations(found: Findings):
    return _correlation_block(found, "Heads against benchmarks (tables 4 and 7)", True)


def _correlation_block(found: Findings, title: str, mechanistic: bool):
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
    return title, frame, columns, note


def _r_text(line) -> str:
    if pd.isna(line.r):
        return "–"
    interval = f" [{line.low:+.2f}, {line.high:+.2f}]" if pd.notna(line.low) else ""
    floor = f", floor {line.floor:.3f}" if pd.notna(line.floor) else ", too few for a floor"
    return f"{line.r:+.3f}{interval}, p = {line.p:.4f}{floor}"
