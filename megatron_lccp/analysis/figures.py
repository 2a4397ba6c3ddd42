"""The figures of the paper, and of what it does not measure, each as a Chart of one or several runs.

In: RunFrames. Out: Charts. A figure whose rows no run has raises NothingToDraw, whose text says what is missing and
what would provide it. With one run, colours tell measures apart; with several, line styles tell the runs apart, and
colours too where there is one measure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from megatron_lccp.analysis import context, frames, measures
from megatron_lccp.analysis.charts.chart import Chart, Curves, Maps, NothingToDraw, Panel
from megatron_lccp.analysis.charts.parts import (
    Runs,
    checkpoints_text,
    is_wide,
    lines_of_checkpoints,
    lines_of_runs,
    n_text,
    over_tokens,
    starts_of,
    whole,
)
from megatron_lccp.analysis.text import length_text
from megatron_lccp.analysis.training_figures import health_curves, training_curves

CURVES_SHOWN = 6
PAPER = "arXiv 2604.02650"
MEAN_PPL = "mean_ppl, the mean over samples of exp(mean NLL of the answer tokens)"


@dataclass(frozen=True)
class Figure:
    """A figure of the report: where it belongs, and how it is made."""

    key: str
    title: str
    level: str
    """behavioural, probabilistic, mechanistic (the paper's three), or training."""
    chart: Callable[[Runs], Chart]


def probe_benchmarks(runs: Runs) -> Chart:
    """Figure 1: scores of SFT probes, or of any benchmark given as a CSV, over training tokens."""
    frame = whole(runs, "benchmarks", "No benchmark scores (Figure 1): no rows of SFT probes; give --scores FILE.csv.")
    names = frame["benchmark"].unique()
    lines = []
    for color, name in enumerate(names):
        lines += lines_of_runs(runs, frame[frame["benchmark"] == name], "score", name, color)
    caption = (
        f"Figure 1 of {PAPER}. Score of each benchmark after a light fine-tuning of the checkpoint, over the training "
        f"tokens of the checkpoint; {checkpoints_text(frame)}. Scores of a --scores file are shown as they are given."
    )
    return Curves("", "", caption, frame, (over_tokens(runs, lines, "benchmark score"),))


def needle_maps(runs: Runs) -> Chart:
    """Figure 2: answer PPL by context length and depth."""
    missing = "No needle heat maps (Figure 2): no rows of answer_nll; add the NeedleGrid monitor."
    frame = whole(runs, "cells", missing)
    caption = (
        f"Figure 2 of {PAPER}. A cell is {MEAN_PPL}, at one context length and needle depth; n = "
        f"{n_text(frame)} samples a "
        f"cell, the same at every checkpoint. One logarithmic colour scale for all {checkpoints_text(frame)}. Dark is "
        "certain of the answer (1 is the least there is)."
    )
    return Maps(
        "", "", caption, frame, "length_tok", "depth_cell", "mean_ppl", "context length (tokens)", "needle depth",
        "answer PPL", "length", "share", log=True, starts=starts_of(runs),
    )  # fmt: skip


def needle_curves(runs: Runs) -> Chart:
    """Figure 3: NIAH score and answer PPL over training tokens."""
    missing = "No needle averages (Figure 3): no rows of answer_nll; add the NeedleGrid monitor."
    frame = whole(runs, "averages", missing)
    exact = lines_of_runs(runs, frame, "exact_share", "", 0)
    ppl = [
        *lines_of_runs(runs, frame, "mean_ppl", "mean_ppl", 1),
        *lines_of_runs(runs, frame, "exp_mean_nll", "exp_mean_nll", 3),
    ]
    caption = (
        f"Figure 3 of {PAPER}. Averages over {n_text(frame, 'cells')} cells ({n_text(frame)} samples), every "
        "cell weighing "
        "the same. NIAH exact: every answer token is the most likely one, which greedy decoding would reproduce. "
        "mean_ppl averages exp(NLL) of samples, as the paper does; exp_mean_nll is exp of the average NLL, in which a "
        "single bad sample weighs less. A flat first panel over a falling second one is deceptive saturation."
    )
    left = over_tokens(runs, exact, "NIAH exact (share of samples)", y_scale="share")
    return Curves("", "", caption, frame, (left, over_tokens(runs, ppl, "answer PPL")))


def head_maps(runs: Runs) -> Chart:
    """Figure 4: retrieval score of every head."""
    missing = "No retrieval scores (Figure 4): no rows of retrieval_score; add the RetrievalHeads monitor."
    frame = whole(runs, "scores", missing)
    caption = (
        f"Figure 4 of {PAPER}. The score of a head is the share of answer tokens for which the attention row that "
        "predicts the token has its maximum inside the needle, on a position that holds the same token (appendix A.1); "
        f"mean over n = {n_text(frame)} samples, no success gate. Dotted: retrieval heads, score above "
        f"{runs[0].threshold:g}. One colour scale for all {checkpoints_text(frame)}."
    )
    return Maps(
        "", "", caption, frame, "head", "layer", "score", "head", "layer", "retrieval score",
        threshold=runs[0].threshold, starts=starts_of(runs),
    )  # fmt: skip


def head_curves(runs: Runs) -> Chart:
    """Figure 5: number of retrieval heads, and mean score of the initial ones."""
    missing = "No retrieval-head curves (Figure 5): no rows of retrieval_score; add the RetrievalHeads monitor."
    frame = whole(runs, "heads", missing)
    part = {name: frame[frame["quantity"] == name] for name in frame["quantity"].unique()}
    count = lines_of_runs(runs, part["retrieval_heads"], "value", "", 0)
    scores = []
    for color, (name, text) in enumerate(
        [("initial_mean_score", "initial heads (n = {})"), ("top_mean_score", "top heads (n = {})")]
    ):
        if name in part:
            scores += lines_of_runs(runs, part[name], "value", text.format(n_text(part[name])), 1 + 2 * color)
    caption = (
        f"Figure 5 of {PAPER}. Left: heads with a score above {runs[0].threshold:g}, of "
        f"{n_text(part['retrieval_heads'])}. Right: mean score of the initial retrieval heads, those above "
        "the threshold "
        "in the model that the LCCP started from (no line if there were none), and of the top heads of each checkpoint."
    )
    left = over_tokens(runs, count, f"heads with score > {runs[0].threshold:g}", zero=True)
    panels = [left]
    if scores:  # of heads whose scores are all not numbers there is no mean
        panels.append(over_tokens(runs, scores, "mean retrieval score", zero=True))
    return Curves("", "", caption, frame, tuple(panels))


def corpus_curves(runs: Runs) -> Chart:
    """Figure 6: corpus PPL over tokens, on a linear axis and on a logarithmic one with A ln N + B."""
    missing = "No corpus perplexity (Figure 6): no rows of nll with a corpus; add the CorpusPPL monitor."
    frame = whole(runs, "corpora", missing)
    origin = dict(starts_of(runs))
    law = measures.log_law(frame, origin)
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


def depth_curves(runs: Runs) -> Chart:
    """Figure 7: answer PPL by depth, per length band."""
    missing = "No depth curves (Figure 7): no rows of answer_nll; add the NeedleGrid monitor."
    cells = whole(runs, "cells", missing)
    parts, panels = [], []
    for run in runs:
        if not len(run.cells):
            continue
        shown = frames.pick_checkpoints(run.cells, run.lccp_from, CURVES_SHOWN)
        curves = measures.depth_curves(run.cells).merge(shown, on=frames.CHECKPOINT)
        parts.append(curves)
        for (low, high), part in curves.groupby(["band_from_tok", "band_to_tok"]):
            title = length_text(low) if low == high else f"{length_text(low)} to {length_text(high)}"
            title = f"{run.name}: {title}" if len(runs) > 1 else f"{title} tokens"
            lines = lines_of_checkpoints(part, "mean_ppl")
            log = is_wide(part["mean_ppl"])
            panels.append(Panel("depth_cell", "needle depth", "answer PPL", lines, title, "share", log_y=log))
    caption = (
        f"Figure 7 of {PAPER}. Answer PPL is {MEAN_PPL}, averaged over the lengths of a band; "
        f"n = {n_text(cells)} samples a cell. A hump in the middle is what is lost in the middle. At most "
        f"{CURVES_SHOWN} "
        "checkpoints, from the start of the LCCP (light) to the last (dark)."
    )
    return Curves("", "", caption, pd.concat(parts, ignore_index=True), tuple(panels))


def difference_maps(runs: Runs) -> Chart:
    """What the LCCP changed in every cell of the needle grid, with which of it is beyond noise."""
    parts = []
    for run in runs:
        points = frames.pick_checkpoints(run.cells, run.lccp_from)
        rows = run.rows[run.rows["metric"] == "answer_nll"]  # once, not for every pair
        for _, point in points.iloc[1:].iterrows():
            part = context.difference_map(rows, points.iloc[0], point)
            parts.append(part.assign(**point[frames.CHECKPOINT]))
    if not sum(map(len, parts)):
        raise NothingToDraw("No difference maps: fewer than two checkpoints with the same samples in NeedleGrid.")
    frame = pd.concat(parts, ignore_index=True)
    caption = (
        "Mean answer NLL of a cell less that of the model that the LCCP started from, on the same n = "
        f"{n_text(frame)} samples: negative (purple) is better. Dotted: the 95 % interval over samples leaves out 0; "
        "where there is no dot, the change is within noise."
    )
    return Maps(
        "", "", caption, frame, "length_tok", "depth_cell", "difference", "context length (tokens)", "needle depth",
        "change of NLL (nat)", "length", "share", diverging=True,
    )  # fmt: skip


def interference_maps(runs: Runs) -> Chart:
    """Figure 8: answer PPL by absolute distance and interference."""
    missing = "No interference maps (Figure 8): no such rows of answer_nll; add the InterferenceGrid monitor."
    frame = whole(runs, "interference", missing)
    caption = (
        f"Figure 8 of {PAPER}. A cell is {MEAN_PPL}, n = {n_text(frame)} samples. Across: tokens between needle and "
        "question (absolute distance). Down: tokens of text before the needle (interference). One logarithmic colour "
        f"scale for all {checkpoints_text(frame)}."
    )
    return Maps(
        "", "", caption, frame, "after_tok", "before_tok", "mean_ppl", "tokens after the needle",
        "tokens before the needle", "answer PPL", "length", "length", log=True, starts=starts_of(runs),
    )  # fmt: skip


def interference_curves(runs: Runs) -> Chart:
    """Figure 9: answer PPL over interference at one distance."""
    missing = "No interference curves (Figure 9): no such rows of answer_nll; add the InterferenceGrid monitor."
    measured = whole(runs, "interference", missing)
    distances = np.sort(measured["after_tok"].unique().astype(int))
    distance = 16384 if 16384 in distances else int(distances[len(distances) // 2])
    parts, panels = [], []
    for run in runs:
        cells = run.interference[run.interference["after_tok"] == distance]
        if len(cells):
            part = cells.merge(frames.pick_checkpoints(cells, run.lccp_from, CURVES_SHOWN), on=frames.CHECKPOINT)
            parts.append(part)
            title, log = (run.name if len(runs) > 1 else ""), is_wide(part["mean_ppl"])
            lines = lines_of_checkpoints(part, "mean_ppl")
            panels.append(
                Panel("before_tok", "tokens before the needle", "answer PPL", lines, title, "length", log_y=log)
            )
    caption = (
        f"Figure 9 of {PAPER}. Answer PPL is {MEAN_PPL}, n = {n_text(measured)} samples, with the question always "
        f"{length_text(distance)} tokens behind the needle and more and more text before it: a flat line is a model "
        f"that is not distracted. At most {CURVES_SHOWN} checkpoints, from the start of the LCCP (light) to the last."
    )
    return Curves("", "", caption, pd.concat(parts, ignore_index=True), tuple(panels))


def position_curves(runs: Runs) -> Chart:
    """Perplexity of held-out text by position in it."""
    missing = "No perplexity by position: no rows of position_nll; add the CorpusPPL monitor."
    measured = whole(runs, "positions", missing)
    parts, panels = [], []
    for run in runs:
        if not len(run.positions):
            continue
        shown = frames.pick_checkpoints(run.positions, run.lccp_from, CURVES_SHOWN)
        positions = run.positions.merge(shown, on=frames.CHECKPOINT)
        parts.append(positions)
        for corpus, part in positions.groupby("corpus", sort=False):
            title = f"{run.name}: {corpus}" if len(runs) > 1 else str(corpus)
            lines = lines_of_checkpoints(part, "ppl")
            panels.append(
                Panel("to_tok", "position in the text, up to (tokens)", "PPL", lines, title, "length", log_x=True)
            )
    caption = (
        "exp(mean NLL) of held-out text over the tokens of each stretch of positions; a point stands at the end of "
        f"its stretch, over {n_text(measured)} tokens. A model that uses its context gets better further on. At most "
        f"{CURVES_SHOWN} checkpoints, from the start of the LCCP (light) to the last."
    )
    return Curves("", "", caption, pd.concat(parts, ignore_index=True), tuple(panels))


def ablation_curves(runs: Runs) -> Chart:
    """What the answer costs without the best heads, and without random ones."""
    missing = "No head ablation: no rows of nll_change; add the HeadAblation monitor."
    frame = whole(runs, "ablations", missing)
    frame = frame[frame["nll_change"].notna()]
    if not len(frame):
        raise NothingToDraw(missing)
    names = list(frame["ablated"].unique())
    lines = [
        line
        for k, name in enumerate(names)
        for line in lines_of_runs(
            runs, frame[frame["ablated"] == name], "nll_change", _ablated_text(name, names), k, low="low", high="high"
        )
    ]
    caption = (
        "What the NLL of the answer gains when the output of some heads is set to zero, mean over n = "
        f"{n_text(frame)} samples, with its 95 % interval over them (one sample has none): the best retrieval heads "
        "against as many others drawn at random. If the best "
        "retrieval heads carried the answer, their line would stand above that of the random ones; heads of early "
        "layers, which all later layers read, can cost more."
    )
    return Curves("", "", caption, frame, (over_tokens(runs, lines, "change of answer NLL (nat)"),))


def _ablated_text(name: str, names: Sequence[str]) -> str:
    """A set of heads, as HeadAblation names it, in words: "2 random heads (draw 0)" if there are several draws."""
    found = re.fullmatch(r"(top|random)(\d+)(?:\.(\d+))?", name)
    if found is None:
        return f"{name} heads"
    kind, count, draw = found.groups()
    heads = "head" if count == "1" else "heads"
    if kind == "top":
        return f"{count} best retrieval {heads}"
    several = sum(each.startswith(f"random{count}.") for each in names) > 1
    return f"{count} random {heads}" + (f" (draw {draw})" if several else "")


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


def make_charts(runs: Runs, keys: Container[str] | None = None) -> Iterator[tuple[Figure, Chart | NothingToDraw]]:
    """Every figure, or those of some keys, with its chart or with what is missing for it."""
    for figure in FIGURES:
        if keys is not None and figure.key not in keys:
            continue
        try:
            yield figure, replace(figure.chart(runs), key=figure.key, title=figure.title)
        except NothingToDraw as nothing:
            yield figure, nothing
