"""Needles in a haystack: the grid of lengths and depths (sections 5 and 7 of the paper).

In: rows `answer_nll` and `exact`, and of names and values `content_nll` and `content_exact`. Out: frames by cell,
Figures 2, 3 and 7, tables, highlights and signals: cells of a checkpoint, their averages, what the LCCP changed in
each, the lost-in-the-middle index, the effective context length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from megatron_lccp.analysis import frames
from megatron_lccp.analysis.charts.chart import Chart, Curves, Maps, NothingToDraw, Panel
from megatron_lccp.analysis.charts.parts import (
    PAPER,
    SHOWN_CURVES,
    Runs,
    checkpoints_text,
    is_wide,
    lines_of_checkpoints,
    lines_of_runs,
    n_text,
    over_tokens,
    panels_of_runs,
    picked,
    starts_of,
    whole,
)
from megatron_lccp.analysis.frames import CHECKPOINT, means
from megatron_lccp.analysis.measured.columns import (
    AT,
    DEPTH,
    INTERVAL,
    LENGTH,
    VALUES,
    WHERE,
    Column,
    count_cell,
    table,
    whole_column,
    with_interval,
)
from megatron_lccp.analysis.measured.highlight import Highlight, change_highlight, nat_text, on_samples, start_and_end
from megatron_lccp.analysis.measured.shown import Block, Figure, Shown
from megatron_lccp.analysis.measured.signal import Signal, of_samples
from megatron_lccp.analysis.run import Run
from megatron_lccp.analysis.statistics.paired import needle_grid
from megatron_lccp.analysis.statistics.stats import ENDS, interval, sample_draws
from megatron_lccp.text import length_text

MONITOR = "NeedleGrid"
MIDDLE = (0.25, 0.75)
"""Depths strictly between these are the middle."""
FACTOR = 1.5
"""Answer PPL that counts as kept, relative to that of the shortest length."""
ANSWERS = ("answer_nll", "exact", "content_nll", "content_exact")
"""Metrics of what a grid of needles asks: of the whole sentence, and of its name and value."""
AVERAGED = ("mean_ppl", "exp_mean_nll", "exact_share", "content_ppl", "content_share")
"""Columns of cells that are averaged."""
MEAN_PPL = "mean_ppl, the mean over samples of exp(mean NLL of the answer tokens)"


def needle_cells(rows: pd.DataFrame) -> pd.DataFrame:
    """Cells of the needle grid (section 5.1, Figure 2) by checkpoint, length_tok and depth_cell.

    mean_ppl: mean over samples of exp(answer NLL), as in the paper. exp_mean_nll: exp of the mean answer NLL; a
    single bad sample weighs less in it. exact_share: share of samples whose every answer token is the argmax.
    content_ppl and content_share: exp of the mean NLL, and the same share, over name and value tokens alone. The last
    three are NaN where they were not measured. n: samples.
    """
    return answer_cells(rows[rows["monitor"] == MONITOR], ["length_tok", "depth_cell"])


def answer_cells(rows: pd.DataFrame, axes: list[str]) -> pd.DataFrame:
    """Rows of ANSWERS of one monitor as cells over two coordinates; columns as in `needle_cells`."""
    by, where = [*CHECKPOINT, *axes], rows[axes].notna().all(axis=1)
    nll = rows.loc[where & (rows["metric"] == "answer_nll"), [*by, "value"]]
    with np.errstate(over="ignore"):
        cells = means(nll.assign(mean_ppl=np.exp(nll["value"]), mean_nll=nll["value"]), by, ["mean_ppl", "mean_nll"])
        cells["exp_mean_nll"] = np.exp(cells.pop("mean_nll"))
    of_cells = {"exact": "exact_share", "content_nll": "content_ppl", "content_exact": "content_share"}
    for metric, column in of_cells.items():
        found = rows.loc[where & (rows["metric"] == metric), [*by, "value"]].rename(columns={"value": column})
        cells = cells.merge(means(found, by, [column]).drop(columns="n"), on=by, how="left")
    with np.errstate(over="ignore"):
        cells["content_ppl"] = np.exp(cells["content_ppl"].astype(float))
    return cells[[*by, *AVERAGED, "n"]]


def needle_averages(cells: pd.DataFrame, by: Sequence[str] = ()) -> pd.DataFrame:
    """Averages of `needle_cells`, each cell weighing the same, per checkpoint (section 5.2, Figure 3).

    `by=["length_tok"]` gives one line per length, `by=["depth_cell"]` the depth curve of section 7.2. exp_mean_nll and
    content_ppl are exp of the mean NLL. cells: how many were averaged; n: their samples.
    """
    by, logs = [*CHECKPOINT, *by], ["exp_mean_nll", "content_ppl"]
    with np.errstate(divide="ignore"):
        cells = cells.assign(**{name: np.log(cells[name].astype(float)) for name in logs})
    averages = means(cells, by, list(AVERAGED)).rename(columns={"n": "cells"})
    averages[logs] = np.exp(averages[logs])
    samples = cells.groupby(by, sort=False, as_index=False)["n"].sum()
    averages = averages.merge(samples, on=by, how="left")
    return averages[[*by, *AVERAGED, "cells", "n"]]


def grid_averages(run: Run) -> pd.DataFrame:
    """`needle_averages` of the whole grid, one line per checkpoint."""
    return needle_averages(run.frame(needle_cells))


def length_bands(lengths_tok: pd.Series) -> pd.Series:
    """The band of each length, as the pair (shortest, longest) in it: up to a quarter of the longest length, up to a
    half, and above: 16K, 32K and 64K for the paper's grid. Bands without lengths do not exist."""
    longest = lengths_tok.max()
    number = (lengths_tok > longest / 4).astype(int) + (lengths_tok > longest / 2)
    ends = lengths_tok.groupby(number).agg(["min", "max"])
    return number.map({number: (int(low), int(high)) for number, low, high in ends.itertuples()})


def depth_averages(cells: pd.DataFrame) -> pd.DataFrame:
    """Answer PPL by depth (section 7.2, Figure 7) in each band of lengths: band_from_tok, band_to_tok, depth_cell and
    the columns of needle_averages; every cell weighs the same."""
    if not len(cells):
        return needle_averages(cells.assign(band_from_tok=[], band_to_tok=[]), ["band_from_tok", "depth_cell"])
    bands = length_bands(cells["length_tok"])
    cells = cells.assign(band_from_tok=bands.str[0], band_to_tok=bands.str[1])
    return needle_averages(cells, ["band_from_tok", "band_to_tok", "depth_cell"])


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


def needle_signals(run: Run) -> Iterator[Signal]:
    """The needle grid: exact answers, and the answer's NLL whole and by octave of lengths; both of names and values."""
    exact, grid = needle_grid(run.rows, "exact"), needle_grid(run.rows)
    if len(exact):
        yield of_samples("niah_exact", run.metric(MONITOR, "exact"), exact)
    for name in ("content_exact", "content_nll"):
        if (MONITOR, name) in run.metrics and len(found := needle_grid(run.rows, name)):
            yield of_samples(name, run.metric(MONITOR, name), found)
    if not len(grid):
        return
    metric = run.metric(MONITOR, "answer_nll")
    yield of_samples("answer_nll", metric, grid)
    length_c = grid.cells["length_tok"].to_numpy(dtype=int)
    octave_c = np.ceil(np.log2(np.maximum(length_c, 1)))
    octaves = np.unique(octave_c)
    for octave in octaves if len(octaves) > 1 else []:
        cells_c = octave_c == octave
        ends = dict.fromkeys(length_text(length) for length in (length_c[cells_c].min(), length_c[cells_c].max()))
        yield of_samples(f"answer_nll[{'-'.join(ends)}]", metric, grid, cells_c)


def needle_maps(runs: Runs) -> Chart:
    """Figure 2: answer PPL by context length and depth."""
    missing = "needle heat maps (Figure 2; NeedleGrid)"
    frame = whole((run.frame(needle_cells) for run in runs), missing)
    caption = (
        f"Figure 2 of {PAPER}. A cell is {MEAN_PPL}, at one context length and needle depth; n = "
        f"{n_text(frame)} samples a "
        f"cell, the same at every checkpoint. One logarithmic colour scale for {checkpoints_text(frame, 'all ')}. Dark is "
        "certain of the answer (1 is the least there is)."
    )
    return Maps(
        "", "", caption, frame, "length_tok", "depth_cell", "mean_ppl", "context length (tokens)", "needle depth",
        "answer PPL", "length", "share", log=True, starts=starts_of(runs),
    )  # fmt: skip


def needle_curves(runs: Runs) -> Chart:
    """Figure 3: NIAH score and answer PPL over training tokens."""
    missing = "needle averages (Figure 3; NeedleGrid)"
    frame = whole((run.derived(grid_averages) for run in runs), missing)
    content = frame.dropna(subset=["content_ppl"])
    exact = lines_of_runs(runs, frame, "exact_share", "", 0)
    ppl = [
        *lines_of_runs(runs, frame, "mean_ppl", "mean_ppl", 1),
        *lines_of_runs(runs, frame, "exp_mean_nll", "exp_mean_nll", 3),
        *lines_of_runs(runs, content, "content_ppl", "content_ppl", 4),
    ]
    caption = (
        f"Figure 3 of {PAPER}. Averages over {n_text(frame, 'cells')} cells ({n_text(frame)} samples), every "
        "cell weighing "
        "the same. NIAH exact: every answer token is the most likely one, which greedy decoding would reproduce. "
        "mean_ppl averages exp(NLL) of samples, as the paper does; exp_mean_nll is exp of the average NLL, in which a "
        "single bad sample weighs less. content_ppl and the last panel: the same over name and value tokens alone, which "
        "a model can get right that would choose other words. A flat first panel over a falling second one is deceptive saturation."
    )
    panels = [over_tokens(runs, exact, "NIAH exact (share of samples)", y_scale="share")]
    panels.append(over_tokens(runs, ppl, "answer PPL"))
    if found := lines_of_runs(runs, content, "content_share", "", 0):
        panels.append(over_tokens(runs, found, "name, value exact (share)", y_scale="share"))
    return Curves("", "", caption, frame, tuple(panels))


def depth_curves(runs: Runs) -> Chart:
    """Figure 7: answer PPL by depth, per length band."""
    missing = "depth curves (Figure 7; NeedleGrid)"
    cells = whole((run.frame(needle_cells) for run in runs), missing)

    def panels_of(run: Run, curves: pd.DataFrame) -> Iterator[Panel]:
        for (low, high), part in curves.groupby(["band_from_tok", "band_to_tok"]):
            band = " to ".join(dict.fromkeys(map(length_text, (low, high))))
            lines, log = lines_of_checkpoints(part, "mean_ppl"), is_wide(part["mean_ppl"])
            yield Panel("depth_cell", "needle depth", "answer PPL", lines, f"{band} tokens", "share", log_y=log)

    frame, panels = panels_of_runs(runs, lambda run: depth_averages(run.frame(needle_cells)), panels_of)
    caption = (
        f"Figure 7 of {PAPER}. Answer PPL is {MEAN_PPL}, averaged over the lengths of a band; "
        f"n = {n_text(cells)} samples a cell. A hump in the middle is what is lost in the middle. {SHOWN_CURVES}"
    )
    return Curves("", "", caption, frame, panels)


def difference_maps(runs: Runs) -> Chart:
    """What the LCCP changed in every cell of the needle grid, with which of it is beyond noise."""
    parts = []
    for run in runs:
        points = frames.pick_checkpoints(run.frame(needle_cells), run.lccp_from)
        rows = run.rows[(run.rows["monitor"] == MONITOR) & (run.rows["metric"] == "answer_nll")]  # once for all pairs
        for _, point in points.iloc[1:].iterrows():
            part = difference_map(rows, points.iloc[0], point)
            parts.append(part.assign(**point[frames.CHECKPOINT]))
    if not sum(map(len, parts)):
        raise NothingToDraw("difference maps (two checkpoints with the same samples in NeedleGrid)")
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


def needle_tables(run: Run) -> Iterator[str]:
    cells, samples = Column("cells", "cells", count_cell), Column("samples", "n", count_cell)
    yield table(
        "t-needle",
        "Needle averages over the grid (Figure 3)",
        run.derived(grid_averages),
        (*WHERE, *VALUES, cells, samples),
    )
    by_length = needle_averages(run.frame(needle_cells), ["length_tok"])
    yield table("t-lengths", "Needle averages by context length", by_length, (*WHERE, LENGTH, *VALUES, cells, samples))
    shown = picked(run, run.frame(needle_cells))
    title = "Needle cells of the checkpoints shown (Figure 2)"
    yield table("t-cells", title, shown, (*WHERE, LENGTH, DEPTH, *VALUES, samples))


def longest_needle_highlight(run: Run) -> Iterator[Highlight]:
    by_length = needle_averages(run.frame(needle_cells), ["length_tok"])
    if not len(by_length):
        return
    start, end = start_and_end(by_length, run)
    both = set(start["length_tok"]) & set(end["length_tok"])
    longest = max(both or set(end["length_tok"]))
    first, last = (part[part["length_tok"] == longest] for part in (start, end))
    note = f"mean over samples and {int(last['cells'].iloc[0])} depths"
    change = on_samples(needle_grid(run.rows[run.rows["length_tok"] == longest]), first, last, nat_text)
    yield change_highlight(f"Answer PPL at {length_text(longest)} tokens", first, last, "mean_ppl", note, change)


def exact_highlight(run: Run) -> Iterator[Highlight]:
    averages = run.derived(grid_averages).dropna(subset=["exact_share"])
    if not len(averages):
        return
    first, last = start_and_end(averages, run)
    note = f"share of needles whose every answer token is the argmax, mean over {int(last['cells'].iloc[0])} cells"
    change = on_samples(
        needle_grid(run.rows, "exact"), first, last, lambda share: f"{100 * share:+.1f} points", most=1.0
    )
    text = lambda share: f"{100 * share:.1f} %"  # noqa: E731
    yield change_highlight("NIAH exact", first, last, "exact_share", note, change, text, ratio=False)


def content_highlight(run: Run) -> Iterator[Highlight]:
    averages = run.derived(grid_averages).dropna(subset=["content_share"])
    if not len(averages):
        return
    first, last = start_and_end(averages, run)
    note = "share of needles whose every name and value token is the argmax, given the sentence before it"
    change = on_samples(
        needle_grid(run.rows, "content_exact"), first, last, lambda share: f"{100 * share:+.1f} points", most=1.0
    )
    text = lambda share: f"{100 * share:.1f} %"  # noqa: E731
    yield change_highlight("NIAH name and value", first, last, "content_share", note, change, text, ratio=False)


def middle_table(run: Run):
    columns = (*AT, Column("index (nat)", "index", lambda v: f"{v:+.3f}"), INTERVAL, whole_column("samples", "n"))
    note = (
        "Mean answer NLL with the needle at depths strictly between a quarter and three quarters, minus the mean at "
        "the other depths; 0: nothing is lost in the middle."
    )
    frame = picked(run, run.frame(middle_index))
    return "Lost-in-the-middle index", with_interval(frame), columns, note


def effective_table(run: Run):
    frame = picked(run, run.frame(effective_length))
    factor = frame["factor"].iloc[0] if len(frame) else 1.5
    columns = (*AT, Column("length", "length_tok", length_text), Column("from", "low", length_text),
               Column("to", "high", length_text), whole_column("samples", "n"))  # fmt: skip
    note = (
        f"The longest length up to which answer PPL (exp_mean_nll) stays within {factor:g} times that of the shortest "
        "length; from and to: its 95 % interval over samples."
    )
    return "Effective context length", frame, columns, note


def needle_scalars(run: Run) -> dict[str, float]:
    """Averages over the grid at the last checkpoint."""
    averages = run.derived(grid_averages)
    if not len(averages):
        return {}
    return {f"niah/{name}": averages[name].iloc[-1] for name in AVERAGED}


def needle_cautions(run: Run) -> Iterator[str]:
    if run.derived(grid_averages)["cells"].nunique() > 1:
        yield "The needle grid does not have the same cells at all checkpoints: its averages are over different cells."


SHOWN = Shown(
    place=20,
    claims=lambda measure: measure.monitor == MONITOR and measure.metric.name in ANSWERS,
    figures=(
        Figure("needle-averages", "NIAH exact and answer PPL", "behavioural", needle_curves),
        Figure("needle-cells", "Answer PPL by context length and depth", "probabilistic", needle_maps, of_window=True),
        Figure("difference-cells", "What the LCCP changed, cell by cell", "probabilistic", difference_maps),
        Figure("depth-curves", "Lost in the middle: answer PPL by depth", "probabilistic", depth_curves),
    ),
    tables=(needle_tables,),
    highlights=(longest_needle_highlight, exact_highlight, content_highlight),
    signals=(needle_signals,),
    blocks=(
        Block("t-middle", "probabilistic", middle_table),
        Block("t-effective", "probabilistic", effective_table),
    ),
    frames={
        "middle_index": lambda run: run.frame(middle_index), "effective_length": lambda run: run.frame(effective_length)
    },
    scalars=needle_scalars,
    cautions=needle_cautions,
)  # fmt: skip
