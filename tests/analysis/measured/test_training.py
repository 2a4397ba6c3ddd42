"""Health of the training and what measuring cost, against the plainest loop over the same rows."""

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pytest

from megatron_lccp.analysis.measured.training import HEALTH_BINS, health, thinned_health, window_times
from megatron_lccp.records.store import RunStore


def test_health_is_thinned_and_keeps_its_extremes(run, loaded):
    rows = RunStore(run.dir).read_rows(where=pc.field("monitor") == "health")
    assert loaded.derived(thinned_health).groupby("metric").size().eq(HEALTH_BINS).all()
    entropy, found = (
        rows[rows["metric"] == "router_entropy"],
        loaded.derived(thinned_health).query("metric == 'router_entropy'"),
    )
    assert found["low"].min() == entropy["value"].min() and found["high"].max() == entropy["value"].max()
    assert found["value"].mean() == pytest.approx(entropy["value"].mean()) and found["n"].sum() == len(entropy)
    load = rows[rows["metric"] == "expert_load"].groupby("step")["value"].agg(["max", "mean"])
    worst = loaded.derived(thinned_health).query("metric == 'expert_load_max'").set_index("step")["value"]
    assert worst.to_dict() == pytest.approx((load["max"] / load["mean"]).to_dict())


def test_long_health_is_binned_over_steps():
    steps = np.arange(1, 1001)
    rows = pd.DataFrame({"run": "r", "step": steps, "tokens": steps, "stage": "s", "metric": "router_entropy",
                         "value": steps * 1.0, "low": steps - 0.5, "high": steps + 0.5, "n": 2})  # fmt: skip
    found = health(rows)
    assert len(found) == HEALTH_BINS and found["n"].sum() == 2000
    assert (found["low"].min(), found["high"].max(), found["step"].iloc[-1]) == (0.5, 1000.5, 1000)


def test_window_times(run, rows):
    times = window_times(rows)
    assert times["time_s"].sum() == pytest.approx(sum(row.value for row in run.rows if row.metric == "window_time"))


def test_skipped_steps_are_left_out_of_the_curves_and_counted(charts):
    frame = charts["training-curves"].frame
    assert (frame.query("quantity == 'skipped'")["tokens"] / 4_194_304).tolist() == [150, 151]
    assert "2 steps were skipped" in charts["training-curves"].caption
    assert 150 * 4_194_304 not in frame.query("quantity == 'loss'")["tokens"].tolist()
