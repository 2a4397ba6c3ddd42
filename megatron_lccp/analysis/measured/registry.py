"""Everything that a run can show: its figures, tables, facts and signals, from each file of `measured`.

In: a Run. Out: charts, HTML, Facts, Signals, in the order of the page.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from megatron_lccp.analysis.charts.chart import Chart, NothingToDraw
from megatron_lccp.analysis.charts.parts import (
    Runs,
)
from megatron_lccp.analysis.measured.benchmarks import benchmark_signals, benchmark_tables, probe_benchmarks
from megatron_lccp.analysis.measured.corpora import (
    corpus_curves,
    corpus_facts,
    corpus_signals,
    corpus_tables,
    position_curves,
)
from megatron_lccp.analysis.measured.fact import Fact
from megatron_lccp.analysis.measured.heads import (
    ablation_curves,
    ablation_tables,
    head_curves,
    head_maps,
    head_signals,
    head_tables,
    retrieval_heads_fact,
)
from megatron_lccp.analysis.measured.needles import (
    depth_curves,
    difference_maps,
    exact_fact,
    interference_curves,
    interference_maps,
    interference_tables,
    longest_needle_fact,
    needle_curves,
    needle_maps,
    needle_signals,
    needle_tables,
)
from megatron_lccp.analysis.measured.signal import Signal
from megatron_lccp.analysis.measured.training import (
    health_curves,
    loss_fact,
    monitor_tables,
    skipped_fact,
    stage_tables,
    throughput_fact,
    training_curves,
    window_share_fact,
)
from megatron_lccp.analysis.run import Run


def run_signals(run: Run) -> tuple[Signal, ...]:
    """All signals that the run's rows support, behavioural first."""
    makers = (needle_signals, benchmark_signals, corpus_signals, head_signals)
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


@dataclass(frozen=True)
class Figure:
    """A figure of the report: where it belongs, and how it is made."""

    key: str
    title: str
    level: str
    """behavioural, probabilistic, mechanistic (the paper's three), or training."""
    chart: Callable[[Runs], Chart]


def make_charts(runs: Runs, keys: Container[str] | None = None) -> Iterator[tuple[Figure, Chart | NothingToDraw]]:
    """Every figure, or those of some keys, with its chart or with what is missing for it."""
    for figure in FIGURES:
        if keys is not None and figure.key not in keys:
            continue
        try:
            yield figure, replace(figure.chart(runs), key=figure.key, title=figure.title)
        except NothingToDraw as nothing:
            yield figure, nothing


def run_tables(run: Run, prefix: str = "") -> list[str]:
    """Every table that the run has numbers for, in the order of the figures; `prefix` keeps ids of runs apart."""
    makers = (
        stage_tables,
        benchmark_tables,
        needle_tables,
        interference_tables,
        corpus_tables,
        head_tables,
        ablation_tables,
        monitor_tables,
    )
    return [html.replace('id="', f'id="{prefix}', 1) for make in makers for html in make(run) if html]


def run_facts(run: Run) -> list[Fact]:
    """All facts that the run's rows and steps support, the paper's measures first."""
    makers = (
        longest_needle_fact,
        exact_fact,
        retrieval_heads_fact,
        corpus_facts,
        loss_fact,
        throughput_fact,
        window_share_fact,
        skipped_fact,
    )
    return [fact for make in makers for fact in make(run)]


FIGURES = (
    Figure("probe-benchmarks", "Benchmarks after SFT probes", "behavioural", probe_benchmarks),
    Figure("needle-averages", "NIAH exact and answer PPL", "behavioural", needle_curves),
    Figure("needle-cells", "Answer PPL by context length and depth", "probabilistic", needle_maps),
    Figure("difference-cells", "What the LCCP changed, cell by cell", "probabilistic", difference_maps),
    Figure("depth-curves", "Lost in the middle: answer PPL by depth", "probabilistic", depth_curves),
    Figure("interference-cells", "Answer PPL by distance and interference", "probabilistic", interference_maps),
    Figure("interference-curves", "Robustness to interference", "probabilistic", interference_curves),
    Figure("corpus", "Corpus perplexity", "probabilistic", corpus_curves),
    Figure("positions", "Perplexity by position in the text", "probabilistic", position_curves),
    Figure("head-cells", "Retrieval score of every head", "mechanistic", head_maps),
    Figure("head-curves", "Number and strength of retrieval heads", "mechanistic", head_curves),
    Figure("ablation", "What the best heads carry", "mechanistic", ablation_curves),
    Figure("training-curves", "Loss, gradient, learning rate and speed", "training", training_curves),
    Figure("health", "Training health", "training", health_curves),
)
