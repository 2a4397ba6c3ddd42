"""Heads and contexts of planted runs: what was planted is found, with its noise floor, and nothing else."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from megatron_lccp.analysis import frames
from megatron_lccp.analysis.measured.needles import difference_map, effective_length, middle_index, needle_cells
from megatron_lccp.analysis.measured.registry import run_signals
from megatron_lccp.analysis.run import load_run, make_run
from megatron_lccp.analysis.statistics import rankings
from megatron_lccp.analysis.statistics.paired import head_samples
from megatron_lccp.analysis.verdict.judge import judge
from megatron_lccp.records.store import RunStore, steps_frame
from tests.analysis.planted import head_rows, needle_rows, table

STEADY, APPEARING, FADING, GROWING, BLIND = range(5)


@pytest.fixture(scope="module")
def planted() -> pd.DataFrame:
    """Ten layers of ten heads, 12 samples, four checkpoints; layer 0 holds one head of each kind, layers 1 to 3 twenty
    that retrieve, the rest none."""
    rng, rows = np.random.default_rng(1), []
    base = np.zeros((10, 10))
    base[1:4] = rng.uniform(0.15, 0.9, size=(3, 10)) * (np.arange(30).reshape(3, 10) < 20)
    for number in range(4):
        score = base.copy()
        score[0, STEADY] = 0.5
        score[0, APPEARING] = 0.02 + 0.1 * number
        score[0, FADING] = 0.38 - 0.12 * number
        score[0, GROWING] = 0.3 + 0.1 * number
        noisy = score[..., None] + rng.normal(scale=0.02, size=(10, 10, 12))
        rows += head_rows(noisy.clip(0, 1), tokens=number * 1000)
    return table(rows)


def test_trajectories_name_what_was_planted(planted: pd.DataFrame) -> None:
    found = rankings.trajectories(planted).set_index(["layer", "head"]).sort_index()
    of_first = found.loc[0]
    assert of_first["kind"].to_dict() == {
        STEADY: "steady", APPEARING: "appeared", FADING: "faded", GROWING: "strengthened"
    }  # fmt: skip
    assert len(found) == 24 and of_first.loc[APPEARING, "appeared_tokens"] == 1000
    assert of_first["best_score"].to_dict() == pytest.approx(
        {STEADY: 0.5, APPEARING: 0.32, FADING: 0.38, GROWING: 0.6}, abs=0.02
    )
    assert of_first.loc[GROWING, "low"] < 0.3 < of_first.loc[GROWING, "high"]
    assert (found.loc[1:3, "kind"] == "steady").mean() >= 0.8  # a 95 % interval each


def test_trajectories_and_the_frozen_heads_begin_with_the_lccp(planted: pd.DataFrame) -> None:
    """From 2000 on the appearing head is one of those that retrieved; the score follows those of the start alone."""
    found = rankings.trajectories(planted, tokens_from=2000).set_index(["layer", "head"])
    assert found.loc[(0, APPEARING), "kind"] == "strengthened" and found.loc[(0, APPEARING), "appeared_tokens"] == 2000
    run = make_run(planted, steps_frame([]))
    score_kh = head_samples(planted).value_kcs.mean(axis=2)
    (signal,) = (each for each in run_signals(run) if each.name == "retrieval_score")
    np.testing.assert_allclose(signal.value_k, score_kh[:, score_kh[0] > 0.1].mean(axis=1))


def test_scores_of_heads_are_those_of_their_own_monitor_in_the_whole_model(planted: pd.DataFrame) -> None:
    """A grid may score heads too, and an ablation of some."""
    others = [planted.assign(monitor="NeedleGrid", value=9.0), planted.assign(ablated="top10", value=9.0)]
    found = head_samples(pd.concat([*others, planted], ignore_index=True))
    np.testing.assert_array_equal(found.value_kcs, head_samples(planted).value_kcs)
    assert (head_samples(others[0]).value_kcs == 9).all()  # where that monitor did not run


def test_the_noise_floor_is_two_redraws_of_the_samples(planted: pd.DataFrame) -> None:
    score_sh = head_samples(planted).value_kcs[0].T
    score_sh = score_sh + np.random.default_rng(8).normal(scale=0.3, size=score_sh.shape)
    rng, overlap, of_all, of_top = np.random.default_rng(9), [], [], []
    for _ in range(300):
        one, other = (score_sh[rng.integers(12, size=12)].mean(axis=0) for _ in range(2))
        tops = [set(np.argsort(-scores)[:20]) for scores in (one, other)]
        overlap.append(len(tops[0] & tops[1]))
        of_all.append(scipy_stats.spearmanr(one, other).statistic)
        either = list(tops[0] | tops[1])
        of_top.append(scipy_stats.spearmanr(one[either], other[either]).statistic)
    found = rankings.noise_floor(score_sh, 20)
    assert found["overlap_floor"] == pytest.approx(np.mean(overlap), abs=0.15)
    assert found["spearman_floor"] == pytest.approx(np.mean(of_all), abs=0.02)
    assert found["spearman_top_floor"] == pytest.approx(np.mean(of_top), abs=0.02)
    assert found["overlap_floor_low"] <= found["overlap_floor"] <= found["overlap_floor_high"]


def test_an_unchanged_model_is_not_called_changed_and_a_changed_one_is() -> None:
    rng = np.random.default_rng(5)
    strength = np.sort(rng.uniform(0, 1, size=100))[::-1]
    moved = np.roll(strength, 10)  # ten of the top 25 are others now
    runs = [strength, strength, moved]
    rows = []
    for number, scores in enumerate(runs):
        noisy = (scores.reshape(10, 10, 1) + rng.normal(scale=0.05, size=(10, 10, 30))).clip(0, 1)
        rows += head_rows(noisy, tokens=number * 10)
    found = rankings.overlaps(table(rows))
    assert found["top_k"].tolist() == [25, 25] and found["changed"].tolist() == [False, True]
    unchanged, changed = found.iloc[0], found.iloc[1]
    assert unchanged["overlap_floor_low"] <= unchanged["overlap"] < unchanged["overlap_floor_high"]
    assert changed["overlap"] < changed["overlap_floor_low"]
    assert found["spearman_low"].iloc[1] < found["spearman"].iloc[1] < found["spearman_floor"].iloc[1]
    of_later = [rankings.noise_floor(score_hs.T, 25) for score_hs in head_samples(table(rows)).value_kcs[1:]]
    for name in ("overlap_floor", "spearman_floor", "spearman_top_floor"):
        assert found[name].tolist() == [floor[name] for floor in of_later]


def turning_run(directory, scores_of, count: int, noise: float = 0.0, samples: int = 12):
    """A run of head scores by checkpoint number, on samples whose difficulty for a head is the same at every one, and
    `noise` that is not."""
    rng, store = np.random.default_rng(7), RunStore(directory)
    of_sample = rng.normal(scale=0.2, size=(10, 10, samples))
    for number in range(count + 1):
        score = scores_of(number).reshape(10, 10, 1) + of_sample + rng.normal(scale=noise, size=of_sample.shape)
        store.write_window(head_rows(score, tokens=number * 1000), number * 1000)
    return load_run(directory)


def turnover(run) -> dict[int, float]:
    signal = next(each for each in run_signals(run) if each.name == "head_overlap")
    return dict(zip(signal.tokens_k // 1000, signal.value_k, strict=True))


def test_turnover_is_how_many_top_heads_a_quarter_more_tokens_replaced(tmp_path) -> None:
    """Ten checkpoints of 100 heads, top 25, another ranking from the sixth on. Four of five tokens before the sixth and
    the seventh is the one before; before the eighth it is not. Nothing else is replaced, however the samples differ."""
    strength = np.sort(np.random.default_rng(7).uniform(0, 1, size=100))[::-1]

    def scores_of(number: int) -> np.ndarray:
        return np.roll(strength, 10 * (number >= 6))

    run = turning_run(tmp_path / "same", scores_of, 10)
    score_kh = head_samples(run.rows).value_kcs.mean(axis=2)
    replaced = len(set(np.argsort(-score_kh[5])[:25]) - set(np.argsort(-score_kh[6])[:25]))
    assert replaced >= 5
    assert turnover(run) == {number: replaced if number in (6, 7) else 0 for number in range(1, 11)}
    value = turnover(turning_run(tmp_path / "noisy", scores_of, 10, noise=0.2))
    still = [value[number] for number in (1, 2, 3, 4, 5, 8, 9, 10)]
    assert min(value[6], value[7]) > 3 and abs(np.mean(still)) < 1
    one = turning_run(tmp_path / "one", scores_of, 2, samples=1)  # of one sample, noise is not known
    assert "head_overlap" not in [signal.name for signal in run_signals(one)]


def test_a_run_whose_top_heads_turn_over_is_not_called_saturated_and_one_at_rest_is(tmp_path) -> None:
    """The ranking turns by a head every 5 % tokens: some four of 25 are replaced over +25 %."""
    strength = np.sort(np.random.default_rng(3).uniform(0, 1, size=100))[::-1]

    def turning(number: int) -> np.ndarray:
        return np.roll(strength, int(np.log(max(number, 1)) / np.log(1.05)))

    found = {}
    for name, scores_of, noise in (
        ("turning", turning, 0.0), ("turning, noise", turning, 0.05),
        ("at rest", lambda number: strength, 0.0), ("at rest, noise", lambda number: strength, 0.05),
    ):  # fmt: skip
        signals = judge(turning_run(tmp_path / name, scores_of, 16, noise)).signals
        found[name] = next(each for each in signals if each.signal == "head_overlap")
    assert found["turning"].state == "improving" and 2 < found["turning"].gain_per_25pct < 7
    assert found["turning, noise"].state != "saturated" and found["turning, noise"].gain_per_25pct > 1
    assert found["at rest"].state == "saturated" and found["at rest"].gain_per_25pct == 0
    assert found["at rest, noise"].state != "improving" and found["at rest, noise"].gain_per_25pct < 1


def test_noise_replaces_as_many_as_between_two_measurements_of_one_model() -> None:
    """Against fresh pairs of checkpoints; what all samples share of a change is no noise."""
    rng, replaced, expected = np.random.default_rng(2), [], []
    strength, of_sample = rng.uniform(0, 1, size=100), rng.normal(scale=0.3, size=(12, 100))
    move = rng.normal(scale=0.3, size=100)
    for _ in range(60):
        one, other = (strength + of_sample + rng.normal(scale=0.1, size=(12, 100)) for _ in range(2))
        tops = [set(np.argsort(-score.mean(axis=0))[:25]) for score in (one, other)]
        replaced.append(len(tops[0] - tops[1]))
        expected.append(rankings.replaced_by_noise(one, other, 25))
    assert np.mean(expected) == pytest.approx(np.mean(replaced), abs=0.4) and np.mean(replaced) > 1.5
    assert rankings.replaced_by_noise(strength + of_sample, strength + of_sample + move, 25) == 0


def test_one_sample_has_no_floor() -> None:
    score = np.random.default_rng(5).uniform(size=(2, 4, 1))
    found = rankings.overlaps(table(head_rows(score, tokens=0) + head_rows(score, tokens=10)))
    assert found["overlap_floor"].isna().all() and not found["changed"].any() and found["overlap"].tolist() == [2]


@pytest.fixture(scope="module")
def needles() -> pd.DataFrame:
    """Two checkpoints, lengths 1K to 8K, depths 0 to 1, 6 samples; the second is 0.5 nat better in the middle."""
    rng, rows = np.random.default_rng(6), []
    hard = rng.normal(scale=0.3, size=6)
    for number in range(2):
        for length in (1024, 2048, 4096, 8192):
            for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
                lost = (1.0 - 0.5 * number) * (depth == 0.5) + 0.3 * np.log2(length / 1024)
                nll = 1 + lost + hard + rng.normal(scale=0.01, size=6)
                rows += needle_rows(nll, tokens=100 * number, length_tok=length, depth_cell=depth)
    return table(rows)


def test_the_middle_is_lost_by_what_was_planted(needles: pd.DataFrame) -> None:
    found = middle_index(needles)
    assert found["index"].tolist() == pytest.approx([1.0, 0.5], abs=0.02)
    assert (found["low"] < found["index"]).all() and (found["index"] < found["high"]).all()
    assert found["n"].tolist() == [6, 6]
    for depths in ([0.5], [0.0, 0.25, 1.0]):
        assert middle_index(needles[needles["depth_cell"].isin(depths)]).empty


def test_effective_length_is_where_perplexity_leaves_the_factor(needles: pd.DataFrame) -> None:
    """NLL grows by 0.3 nat an octave: a factor of 1.5 is 0.41 nat, 2 is 0.69."""
    assert effective_length(needles)["length_tok"].tolist() == [2048, 2048]
    assert effective_length(needles, factor=2)["length_tok"].tolist() == [4096, 4096]
    assert effective_length(needles, factor=10)["length_tok"].tolist() == [8192, 8192]
    found = effective_length(needles, factor=np.exp(0.3))  # at the edge: the interval knows both lengths
    assert (found["low"] == 1024).all() and (found["high"] == 2048).all()
    with pytest.raises(ValueError, match="at least 1"):
        effective_length(needles, factor=0.5)


def test_a_length_past_a_failing_one_is_not_effective() -> None:
    rows = []
    for length, nll in ((1024, 1.0), (2048, 3.0), (4096, 1.0)):
        rows += needle_rows(np.full(3, nll), tokens=0, length_tok=length, depth_cell=0.5)
    assert effective_length(table(rows))["length_tok"].tolist() == [1024]


def test_the_difference_map_is_the_mean_paired_change(needles: pd.DataFrame) -> None:
    points = frames.checkpoints(needle_cells(needles))
    found = difference_map(needles, points.iloc[0], points.iloc[1])
    key = ["length_tok", "depth_cell", "sample"]
    before, after = (needles[needles["tokens"] == tokens].set_index(key)["value"] for tokens in (0, 100))
    naive = (after - before).groupby(["length_tok", "depth_cell"]).mean()
    assert found.set_index(["length_tok", "depth_cell"])["difference"].to_dict() == pytest.approx(naive.to_dict())
    middle = found["depth_cell"] == 0.5
    assert (found["high"][middle] < -0.4).all() and (found["high"] - found["low"]).max() < 0.1


def test_other_samples_are_not_compared(needles: pd.DataFrame) -> None:
    changed = needles.assign(sample_set=np.where(needles["tokens"] == 0, "old", "new"))
    points = frames.checkpoints(needle_cells(changed))
    assert difference_map(changed, points.iloc[0], points.iloc[1]).empty
    assert middle_index(changed)["tokens"].tolist() == [100]


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_nothing_measured_is_an_empty_frame() -> None:
    nothing = table(needle_rows(np.ones(2), tokens=0, length_tok=64, depth_cell=0.5)).iloc[:0]
    for make in (rankings.overlaps, rankings.trajectories, middle_index, effective_length):
        found = make(nothing)
        assert found.empty


def test_of_equal_scores_the_first_heads_are_in_the_top():
    """Against a stable sort, on few and many equal scores and on scores that are not numbers."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        score = rng.integers(0, rng.integers(2, 9), size=(3, rng.integers(1, 40))) / 4
        score[rng.random(score.shape) < 0.1] = np.nan
        top_k = int(rng.integers(1, score.shape[1] + 1))
        ranks = np.argsort(np.argsort(-score, axis=1, kind="stable"), axis=1)
        assert (rankings._in_top(score, top_k) == (ranks < top_k)).all()
