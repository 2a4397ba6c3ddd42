"""Rows -> frames of what is measured besides the needle grid, the heads and whole corpora.

In: frames as `RunStore.read_rows` returns them, the records of steps, a CSV of scores measured elsewhere. Out: tidy
frames by checkpoint, as in `frames`; empty ones with the right columns where nothing was measured. Pure functions, but
for the one that reads the CSV.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from megatron_lccp.analysis.frames import CHECKPOINT, answer_cells, means, needle_averages
from megatron_lccp.analysis.statistics.paired import CLUSTER
from megatron_lccp.analysis.statistics.stats import interval

BENCHMARK_MONITORS = ("SFTProbe", "Benchmarks")
HEALTH_BINS = 300


def interference_cells(rows: pd.DataFrame) -> pd.DataFrame:
    """Cells of the interference grid (section 7.3, Figure 8) by before_tok and after_tok; columns as needle_cells."""
    of_grid = rows["before_tok"].notna() & rows["after_tok"].notna() & rows["depth_cell"].isna()
    return answer_cells(rows, of_grid, ["before_tok", "after_tok"])


def length_bands(lengths_tok: pd.Series) -> pd.Series:
    """The band of each length, as the pair (shortest, longest) in it: up to a quarter of the longest length, up to a
    half, and above: 16K, 32K and 64K for the paper's grid. Bands without lengths do not exist."""
    longest = lengths_tok.max()
    number = (lengths_tok > longest / 4).astype(int) + (lengths_tok > longest / 2)
    ends = lengths_tok.groupby(number).agg(["min", "max"])
    return number.map({number: (int(low), int(high)) for number, low, high in ends.itertuples()})


def depth_curves(cells: pd.DataFrame) -> pd.DataFrame:
    """Answer PPL by depth (section 7.2, Figure 7) in each band of lengths: band_from_tok, band_to_tok, depth_cell and
    the columns of needle_averages; every cell weighs the same."""
    if not len(cells):
        return needle_averages(cells.assign(band_from_tok=[], band_to_tok=[]), ["band_from_tok", "depth_cell"])
    bands = length_bands(cells["length_tok"])
    cells = cells.assign(band_from_tok=bands.str[0], band_to_tok=bands.str[1])
    return needle_averages(cells, ["band_from_tok", "band_to_tok", "depth_cell"])


def position_ppl(rows: pd.DataFrame) -> pd.DataFrame:
    """Perplexity of held-out text by position in it: corpus, from_tok, to_tok, nll in nat, ppl, n tokens."""
    rows = rows[rows["metric"] == "position_nll"].sort_values(["run", "tokens", "step"], kind="stable")
    rows = rows.assign(nll=rows["value"], ppl=np.exp(rows["value"]))
    return rows[[*CHECKPOINT, "corpus", "from_tok", "to_tok", "nll", "ppl", "n"]].reset_index(drop=True)


def ablations(rows: pd.DataFrame) -> pd.DataFrame:
    """What the answer costs without some heads: ablated, ablated_nll and nll_change in nat (means over samples; the
    change is to the whole model, on the same samples), low and high (its 95 % interval over samples, NaN of one),
    heads (how many were set to zero), n samples."""
    by = [*CHECKPOINT, "ablated"]
    rows = rows[rows["ablated"].notna()]
    nll = means(rows[rows["metric"] == "ablated_nll"].rename(columns={"value": "ablated_nll"}), by, ["ablated_nll"])
    changed = rows[rows["metric"] == "nll_change"]
    change = means(changed.rename(columns={"value": "nll_change"}), by, ["nll_change"])
    of_cluster = changed.groupby([*by, *CLUSTER], dropna=False)["value"].mean().groupby(by)
    low, high = (of_cluster.agg(lambda value_s, end=end: interval(value_s.to_numpy())[end]) for end in (0, 1))
    ends = pd.DataFrame({"low": low, "high": high}).reset_index()
    heads = rows[rows["metric"] == "ablated_head"].groupby(by).size().rename("heads").reset_index()
    for more in (change.drop(columns="n"), ends, heads):
        nll = nll.merge(more, on=by, how="left")
    nll["heads"] = nll["heads"].fillna(0).astype(int)
    return nll[[*by, "heads", "ablated_nll", "nll_change", "low", "high", "n"]]


def health(rows: pd.DataFrame) -> pd.DataFrame:
    """Training health, thinned to HEALTH_BINS stretches of steps: metric, value, low, high, n.

    `rows` are averages by step, as `RunStore.read_means(by=[*CHECKPOINT, "metric"])` gives them. value: mean over
    layers and the steps of a stretch; low, high: the least and the largest; n: how many numbers. The load of experts
    becomes `expert_load_max`, the largest share of an expert divided by the mean share: 1 is balanced.
    """
    load = rows["metric"] == "expert_load"
    largest = rows[load].assign(metric="expert_load_max", value=lambda part: part["high"] / part["value"])
    largest = largest.assign(low=largest["value"], high=largest["value"])
    rows = pd.concat([rows[~load], largest], ignore_index=True)
    steps = np.sort(rows["step"].unique())
    bins = np.arange(len(steps)) * min(HEALTH_BINS, len(steps)) // max(len(steps), 1)
    rows = rows.assign(bin=rows["step"].map(dict(zip(steps, bins, strict=True))))
    groups = rows.groupby(["run", "metric", "bin"], sort=False)
    thin = groups.agg(step=("step", "last"), tokens=("tokens", "last"), stage=("stage", "last"),
                      value=("value", "mean"), low=("low", "min"), high=("high", "max"), n=("n", "sum"))  # fmt: skip
    return thin.reset_index()[[*CHECKPOINT, "metric", "value", "low", "high", "n"]]


def benchmarks(rows: pd.DataFrame) -> pd.DataFrame:
    """Scores of SFT probes (section 4, Figure 1), from rows of a monitor in BENCHMARK_MONITORS: benchmark, score, n.

    A benchmark is named by its metric, and by its corpus if it has parts.
    """
    rows = rows[rows["monitor"].isin(BENCHMARK_MONITORS) & (rows["metric"] != "window_time")]
    name = rows["metric"].astype(str)
    name = name.where(rows["corpus"].isna(), name + " (" + rows["corpus"].astype(str) + ")")
    rows = rows.assign(benchmark=name, score=rows["value"])
    return means(rows, [*CHECKPOINT, "benchmark"], ["score"])


def read_scores(path: str | Path, points: pd.DataFrame) -> pd.DataFrame:
    """Scores measured elsewhere, as `benchmarks`: a CSV with columns tokens, benchmark, score, and run where there are
    several. `points` are the checkpoints of the runs; a score belongs to the nearest one within 1 % of its tokens, if
    any, and of two at the same tokens to the later one.

    Raises ValueError in one line that names the file, and the column if one is wrong.
    """
    try:
        scores = pd.read_csv(path, dtype={"run": str, "benchmark": str})
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a CSV file ({str(error).splitlines()[0]})") from error
    for column in ("tokens", "benchmark", "score"):
        if column not in scores:
            raise ValueError(f"{path}: no column {column}; a file of scores has tokens, benchmark, score (and run)")
    for column in ("tokens", "score"):
        wrong = ~np.isfinite(pd.to_numeric(scores[column], errors="coerce"))
        if wrong.any():
            line = int(wrong.idxmax())
            raise ValueError(f"{path}:{line + 2}: {column} should be a number, is {scores[column][line]!r}")
    if "run" not in scores:
        if len(names := points["run"].unique()) > 1:
            raise ValueError(
                f"{path}: no column run, which says to which of {len(names)} runs a score belongs: {', '.join(names)}"
            )
        scores["run"] = points["run"].iloc[0] if len(points) else ""
    found = []
    for score in scores.to_dict("records"):
        own = points[points["run"] == score["run"]]
        away = (own["tokens"] - score["tokens"]).abs()
        near = own[(away == away.min()) & (away <= 0.01 * abs(score["tokens"]))]
        place = near.iloc[-1] if len(near) else {"step": -1, "tokens": int(score["tokens"]), "stage": ""}
        found.append({"run": score["run"]} | {name: place[name] for name in CHECKPOINT[1:]}
                     | {"benchmark": str(score["benchmark"]), "score": float(score["score"]), "n": 1})  # fmt: skip
    found = pd.DataFrame(found, columns=[*CHECKPOINT, "benchmark", "score", "n"])
    return found.sort_values(["run", "tokens"], kind="stable", ignore_index=True)


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
