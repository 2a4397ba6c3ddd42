"""The report of a run: one HTML page that opens anywhere, without a network.

In: a run directory. Out: report.html with what the run shows, the paper's figures, the numbers behind them and the
events. The report reads records and nothing else; training does not know of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from megatron_lccp.analysis import figures, page
from megatron_lccp.analysis.facts import run_facts
from megatron_lccp.analysis.run import RunFrames, load_run
from megatron_lccp.analysis.style import figure_svg, tokens_text
from megatron_lccp.analysis.tables import event_table, run_tables
from megatron_lccp.records import write_whole


@dataclass(frozen=True)
class FigureSpec:
    """A figure of the report: how it is drawn from a run, and what its caption says."""

    key: str
    title: str
    caption: str
    draw: Callable[..., Figure]
    """Takes a RunFrames, and `columns` for a narrow screen."""


FIGURES = (
    FigureSpec(
        "training", "Training",
        "Loss (mean over the batch's tokens), gradient norm before clipping, learning rate and throughput over "
        "training tokens. Bands mark stages. Where there are more steps than room, the line is the mean of "
        "neighbouring steps and the shade runs from the lowest to the highest of them. A cross is a step that was "
        "skipped.",
        lambda run, **k: figures.training_curves(run.steps, run.spans, **k),
    ),
    FigureSpec(
        "needle-cells", "Answer PPL by context length and depth",
        "Figure 2 of arXiv 2604.02650. Each cell is mean_ppl: the mean over samples of exp(mean NLL of the answer "
        "tokens), at one context length and needle depth. One logarithmic colour scale for all panels; a panel's "
        "title is the training tokens and the stage. Panels run from the start of the LCCP to the last "
        "checkpoint.",
        lambda run, **k: figures.needle_heat_maps(run.cells, run.lccp_from, **k),
    ),
    FigureSpec(
        "needle-averages", "NIAH exact and answer PPL",
        "Figure 3 of arXiv 2604.02650. Averages over the cells of the grid, every cell weighing the same. Exact: "
        "every answer token is the argmax under teacher forcing, which is what greedy decoding would reproduce. "
        "mean_ppl averages exp(NLL) of samples, as the paper does; exp_mean_nll is exp of the average NLL.",
        lambda run, **k: figures.needle_curves(run.averages, run.spans, **k),
    ),
    FigureSpec(
        "head-cells", "Retrieval score of every head",
        "Figure 4 of arXiv 2604.02650. The score is the share of answer tokens for which the attention row that "
        "predicts the token has its maximum inside the needle, on a position holding that same token (appendix "
        "A.1); mean over samples, no success gate. Framed: retrieval heads, score above the threshold marked on "
        "the colour bar.",
        lambda run, **k: figures.head_heat_maps(run.scores, run.lccp_from, run.threshold, **k),
    ),
    FigureSpec(
        "head-curves", "Number and strength of retrieval heads",
        "Figure 5 of arXiv 2604.02650. First: heads above the threshold. Second: mean score of the initial "
        "retrieval heads, those above the threshold in the model that the LCCP started from (no such line if it "
        "had none), and of the top heads of each checkpoint.",
        lambda run, **k: figures.head_curves(run.heads, run.spans, run.threshold, **k),
    ),
    FigureSpec(
        "corpus", "Corpus perplexity",
        "Figure 6 of arXiv 2604.02650: exp(mean NLL) of held-out text by corpus, over training tokens on a linear "
        "and on a logarithmic axis (where PPL = A log N + B is a straight line). The axis counts all training "
        "tokens of this run, earlier stages included.",
        lambda run, **k: figures.corpus_curves(run.corpora, run.spans, **k),
    ),
)  # fmt: skip


def write_report(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of `run_dir` to `out` (report.html in the run directory) and return its path.

    Raises ValueError in one line if `run_dir` is not a run directory or has no rows, OSError if `out` cannot be
    written.
    """
    html = report_html(load_run(run_dir))
    out = Path(out) if out is not None else Path(run_dir) / "report.html"
    write_whole(out, lambda draft: draft.write_text(html, encoding="utf-8"))
    return out


def report_html(run: RunFrames) -> str:
    """The whole page for one run."""
    parts = [f"<h1>{escape(run.name)}</h1>", page.terms("head", _header(run))]
    if facts := run_facts(run):
        parts += [
            "<h2>What it shows</h2>",
            page.terms("facts", ((fact.label, fact.value, fact.note) for fact in facts)),
        ]
    parts += [f'<p class="note">{escape(text)}</p>' for text in _cautions(run)]
    parts += ["<h2>Figures</h2>", *(_figure(spec, run) for spec in FIGURES)]
    parts += ["<h2>Numbers</h2>", *run_tables(run)]
    parts += ["<h2>Events</h2>", event_table(run)]
    if run.config_text:
        parts += [
            "<h2>Configuration</h2>",
            page.details("config", "config.yaml", f"<pre>{escape(run.config_text)}</pre>"),
        ]
    return page.page(f"{run.name}: LCCP report", parts)


def _header(run: RunFrames) -> Iterator[tuple[str, str]]:
    yield "config", run.config_hash
    points = [
        frame[["step", "tokens"]]
        for frame in (run.steps, run.windows, run.corpora, run.averages, run.scores, run.others)
    ]
    last = pd.concat([frame for frame in points if len(frame)]).max()
    yield "steps", f"{int(last['step']):,}"
    yield "tokens", tokens_text(last["tokens"])
    spans = run.spans.itertuples()
    yield "stages", ", ".join(f"{s.stage} ({tokens_text(s.tokens_from)} to {tokens_text(s.tokens_to)})" for s in spans)


def _cautions(run: RunFrames) -> Iterator[str]:
    if run.changed_sets:
        yield (
            f"The samples of {', '.join(run.changed_sets)} are not the same at all checkpoints (their sets have "
            "different hashes): differences between those checkpoints are not paired."
        )
    if run.averages["cells"].nunique() > 1:
        yield "The needle grid does not have the same cells at all checkpoints: its averages are over different cells."


def _figure(spec: FigureSpec, run: RunFrames) -> str:
    try:
        wide, narrow = spec.draw(run), spec.draw(run, columns=1)
    except figures.NothingToDraw as nothing:
        return page.missing(spec.title, str(nothing))
    svgs = (figure_svg(drawing, f"{spec.key}-{size}", spec.title) for drawing, size in ((wide, "w"), (narrow, "n")))
    return page.figure(spec.key, spec.title, spec.caption, *svgs)
