"""Head ablation: what the answer costs without some heads.

In: rows of HeadAblation. Out: a frame by set of heads, a figure and a table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import pandas as pd

from megatron_lccp.analysis.charts.chart import Chart, Curves, NothingToDraw
from megatron_lccp.analysis.charts.parts import (
    Runs,
    lines_of_runs,
    n_text,
    over_tokens,
    whole,
)
from megatron_lccp.analysis.frames import (
    CHECKPOINT,
    at_checkpoint,
    checkpoints,
    means,
)
from megatron_lccp.analysis.measured.columns import (
    WHERE,
    Column,
    count_cell,
    number_cell,
    table,
)
from megatron_lccp.analysis.measured.shown import Figure, Shown
from megatron_lccp.analysis.run import Run
from megatron_lccp.analysis.statistics.paired import CLUSTER
from megatron_lccp.analysis.statistics.stats import interval

MONITOR = "HeadAblation"


def ablations(rows: pd.DataFrame) -> pd.DataFrame:
    """What the answer costs without some heads: ablated, ablated_nll and nll_change in nat (means over samples; the
    change is to the whole model, on the same samples), low and high (its 95 % interval over samples, NaN of one),
    heads (how many were set to zero), n samples."""
    by = [*CHECKPOINT, "ablated"]
    rows = rows[(rows["monitor"] == MONITOR) & rows["ablated"].notna()]
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


def ablation_curves(runs: Runs) -> Chart:
    """What the answer costs without the best heads, and without random ones."""
    missing = "head ablation (HeadAblation)"
    frame = whole((run.frame(ablations) for run in runs), missing)
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


def ablation_tables(run: Run) -> Iterator[str]:
    columns = (
        *WHERE,
        Column("set to zero", "ablated", css="text"),
        Column("heads", "heads", count_cell),
        Column("answer nll (nat)", "ablated_nll", number_cell),
        Column("change (nat)", "nll_change", number_cell),
        Column("from", "low", number_cell),
        Column("to (95 %)", "high", number_cell),
        Column("samples", "n", count_cell),
    )
    yield table("t-ablation", "Head ablation", run.frame(ablations), columns)


def ablation_scalars(run: Run) -> dict[str, float]:
    """Change of the answer's NLL without each set of heads at the last checkpoint."""
    found = run.frame(ablations).dropna(subset=["nll_change"])
    last = at_checkpoint(found, checkpoints(found).iloc[-1]) if len(found) else found
    return {f"ablation/{line.ablated}_nll_change": line.nll_change for line in last.itertuples()}


SHOWN = Shown(
    place=60,
    claims=lambda measure: measure.monitor == MONITOR,
    figures=(Figure("ablation", "What the best heads carry", "mechanistic", ablation_curves),),
    tables=(ablation_tables,),
    scalars=ablation_scalars,
)
