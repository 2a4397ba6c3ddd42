"""The verdict on planted runs: laws whose gain is known, needles that are found, heads that fall back.

In: series drawn here, and run directories of planted rows. Out: states, intervals, forecasts and exit codes.
"""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize
from scipy import stats as scipy_stats

from megatron_lccp.analysis.measured.corpora import corpus_ppl
from megatron_lccp.analysis.measured.registry import run_signals
from megatron_lccp.analysis.measured.signal import Signal, after_start
from megatron_lccp.analysis.run import load_run
from megatron_lccp.analysis.statistics import laws, trend
from megatron_lccp.analysis.verdict.advice import advise
from megatron_lccp.analysis.verdict.judge import (
    EXIT_CODES,
    Verdict,
    _needs_text,
    _Open,
    _Series,
    _series,
    _top_share,
    judge,
    parse_margins,
)
from megatron_lccp.analysis.verdict.text import forecast_text, verdict_text
from megatron_lccp.cli import main
from megatron_lccp.records.store import RunStore
from megatron_lccp.schema import Metric
from tests.analysis.planted import declare, head_rows, needle_rows, row

BENCH = Path(__file__).resolve().parents[3] / "tools/bench_verdict.py"
STEP = 1_000_000
COUNT = 24
TOKENS = STEP * np.arange(1, COUNT + 1)


# --- the rule ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocorrelation", [0.0, 0.6])
def test_a_belief_is_generalised_least_squares(autocorrelation: float) -> None:
    """Against the textbook's formula, on uneven checkpoints."""
    rng = np.random.default_rng(0)
    tokens = np.array([1.0, 2, 3, 4, 6, 7, 8.5, 10])
    assert trend.window(tokens, 3) == slice(1, 8)
    kept, y = tokens[1:], 2 + 0.3 * np.log(tokens[1:]) + rng.normal(scale=0.1, size=7)
    spacing = np.median(np.diff(kept))
    covariance = np.array([[autocorrelation ** (abs(a - b) / spacing) for b in kept] for a in kept])
    design, inverse = np.stack([np.ones(7), np.log(kept)], axis=1), np.linalg.inv(covariance)
    contrast = np.array([0, math.log(1.25)])
    found = trend.believe(design, contrast, y[None], trend.shapes_of([covariance]))
    of_beta = np.linalg.inv(design.T @ inverse @ design)
    beta = of_beta @ design.T @ inverse @ y
    residual = y - design @ beta
    error = math.sqrt(residual @ inverse @ residual / 5 * of_beta[1, 1])
    assert found.value_r[0] == pytest.approx(beta[1] * math.log(1.25))
    for share in (0.01, 0.5, 0.95):
        expected = (beta[1] + error * scipy_stats.t.ppf(share, 5)) * math.log(1.25)
        assert found.quantile(share) == pytest.approx(expected)
        assert found.below(expected)[0] == pytest.approx(share) and found.above(expected)[0] == pytest.approx(1 - share)


def test_many_runs_are_believed_as_each_alone(monkeypatch) -> None:
    rng, tokens = np.random.default_rng(3), TOKENS[:8].astype(float)
    sample_rks = np.log(tokens)[:, None] + rng.normal(size=(7, 8, 5))
    for samples in (None, trend.samples_of(sample_rks)):
        monkeypatch.setattr(trend, "RUNS_AT_ONCE", 3)
        found = trend.gain_belief(tokens, sample_rks.mean(axis=2), samples=samples)
        for r in range(7):
            own = None if samples is None else trend.samples_of(sample_rks[r : r + 1])
            alone = trend.gain_belief(tokens, sample_rks[r : r + 1].mean(axis=2), samples=own)
            assert alone.above(0.1)[0] == pytest.approx(found.above(0.1)[r])


def test_samples_that_disagree_widen_the_belief() -> None:
    """Twelve samples with gains of their own and no noise: the interval is Student's t over samples."""
    rng = np.random.default_rng(1)
    gain_s = rng.normal(loc=1.0, scale=0.5, size=12)
    sample_ks = gain_s * np.log(TOKENS)[:, None] / math.log(1.25) + rng.normal(size=12)
    alone = trend.gain_belief(TOKENS.astype(float), sample_ks.mean(axis=1)[None])
    samples = trend.samples_of(sample_ks[None])
    found = trend.gain_belief(TOKENS.astype(float), sample_ks.mean(axis=1)[None], samples=samples, margin=0.01)
    expected = scipy_stats.ttest_1samp(gain_s, 0).confidence_interval(0.9)
    assert alone.quantile(0.95) - alone.quantile(0.05) < 1e-6
    assert (found.quantile(0.05), found.quantile(0.95)) == pytest.approx((expected.low, expected.high), abs=0.01)
    assert found.of_samples_r[0] > 0.9 * found.scale_r[0] ** 2


def test_noise_of_samples_counts_once() -> None:
    """The belief of 40 runs whose samples have noise of their own at each checkpoint: few miss, and it is not wide."""
    rng, tokens = np.random.default_rng(6), TOKENS.astype(float)
    sample_rks = rng.normal(size=(40, 1, 20)) + rng.normal(size=(40, COUNT, 20))
    found = trend.gain_belief(tokens, sample_rks.mean(axis=2), samples=trend.samples_of(sample_rks), margin=0.1)
    log_w = np.log(tokens[trend.window(tokens)])
    true_error = math.log(1.25) / math.sqrt(20) / math.sqrt(((log_w - log_w.mean()) ** 2).sum())
    assert (found.above(0.0) < 0.05).sum() <= scipy_stats.binom.ppf(0.99, 40, 0.05)
    assert 0.8 < np.mean(found.scale_r) / true_error < 1.5


def test_common_noise_is_learnt_from_many_checkpoints() -> None:
    rng, tokens = np.random.default_rng(7), TOKENS.astype(float)
    own_rks = rng.normal(size=(20, COUNT, 16))
    none, much = (
        np.median(
            trend.gain_belief(
                tokens, own_rks.mean(axis=2) + size * rng.normal(size=(20, COUNT)), samples=trend.samples_of(own_rks)
            ).common_r
        )
        for size in (0.0, 3.0)
    )
    assert none < 0.6 and 1.5 < much < 6


@pytest.mark.parametrize(
    "about",
    [("log", "AR(1) 0.9", 0.5, "even 10"), ("log", "random walk", 0.5, "paper", "50 samples"),
     ("broken, any", "random walk", 0.5, "even 20"), ("double plateau", "white", 0.5, "even 10"),
     ("late drop", "AR(1) 0.9", 0.5, "paper", "50 samples")],
)  # fmt: skip
def test_the_share_of_false_saturation_stays_under_its_bound(about: tuple) -> None:
    """Settings of tools/bench_verdict.py: 5 %, and what 400 runs leave to chance."""
    bench = runpy.run_path(str(BENCH))
    found = bench["outcome"](bench["Setting"](*about), 400, seed=1)
    assert found.false <= scipy_stats.binom.ppf(0.99, 400, 0.05)


def test_a_plateau_is_found_with_the_papers_six_checkpoints() -> None:
    """Half of them, at common noise of a tenth of the margin, and what 400 runs leave to chance."""
    bench = runpy.run_path(str(BENCH))
    setting = bench["Setting"]("flat from 40 %", "white", 0.1, "paper", "50 samples")
    assert bench["outcome"](setting, 400, seed=1).found[0] >= scipy_stats.binom.ppf(0.01, 400, 0.5)


def test_the_quick_simulation_holds_and_fails_over_its_bound(monkeypatch, capsys) -> None:
    """What CI asks of it."""
    bench = runpy.run_path(str(BENCH))
    for arguments, code in (([], 0), (["--runs=8", "--parts", "power", "--bound=-0.1"], 1)):
        monkeypatch.setattr("sys.argv", ["bench_verdict.py", "--quick", "--processes=1", *arguments])
        assert bench["main"]() == code
        out = capsys.readouterr().out
        assert "highest lower bounds of false answers" in out
    assert "Deceptive" not in out


def test_samples_are_drawn_as_they_are_distributed() -> None:
    """The mean and the covariance that the simulation draws, against samples drawn one by one."""
    bench, rng = runpy.run_path(str(BENCH)), np.random.default_rng(2)
    tokens_k, kind = bench["TOKENS"] * bench["CHECKPOINTS"]["even 10"], bench["Sampled"](noise=1.8, memory=0.7, apart=2)
    mean_rk, drawn = kind.draw(rng, tokens_k, 4000)
    own_rsk = 1.8 * np.sqrt(50) * bench["ar"](rng, (4000, 50, 10), 0.7)
    own_rsk += 2 * rng.standard_normal((4000, 50, 1)) * np.log(tokens_k / tokens_k[-1]) / trend.LN_QUARTER
    samples = trend.samples_of(own_rsk.transpose(0, 2, 1))
    np.testing.assert_allclose(np.cov(mean_rk.T), np.cov(own_rsk.mean(axis=1).T), atol=0.5)
    for of_runs in (np.mean, np.std):
        expected = of_runs(samples.covariance_rkk, axis=0)
        np.testing.assert_allclose(of_runs(drawn.covariance_rkk, axis=0), expected, atol=0.25)


def test_a_bound_is_clopper_and_pearsons_for_many_settings() -> None:
    """scipy's beta distribution against the definition: the share at which so many or more have that chance."""
    bound = runpy.run_path(str(BENCH))["lower_bound"](140, 2000, 100)
    assert scipy_stats.binom.sf(139, 2000, bound) == pytest.approx(0.05 / 100)
    assert 0.05 < bound < 0.07


def test_saturated_stays_said_while_it_is_likely() -> None:
    belief = trend.gain_belief(TOKENS.astype(float), np.ones((1, COUNT)))

    def look(chance: float, under: bool) -> trend.Interim:
        return trend.Interim(np.array([chance]), np.array([under]), np.array([False]), 0.01, belief, slice(12, COUNT))

    said = [bool(trend.decide(look(*each), before)[0][0]) for *each, before in
            ((0.001, True, False), (0.05, False, False), (0.05, False, True), (0.2, False, True))]  # fmt: skip
    assert said == [True, False, True, False]


def test_saturated_never_contradicts_the_last_doubling() -> None:
    """Of runs that gather pace, where two doublings still see the slow part."""
    bench, rng = runpy.run_path(str(BENCH)), np.random.default_rng(3)
    tokens = 1e10 * np.arange(1, 21)
    curve = bench["broken_power_law"](rng, 1000, (0.01, 0.9), (1.5, 6))(tokens)
    gain = -curve - 0.5 * bench["NOISES"]["AR(1) 0.5"](rng, 1000, 20)
    for count in range(10, 21):
        under = trend.interim(tokens[:count], gain[:, :count], 1.0).under_r
        assert (trend.gain_belief(tokens[:count], gain[:, :count]).value_r[under] < 1).all()


def test_patience_would_stop_runs_that_never_saturate() -> None:
    """What the rule is for: three checkpoints without a new best stop most of the same runs, and this rule few."""
    bench = runpy.run_path(str(BENCH))
    rng = np.random.default_rng(2)
    tokens = 5e9 * np.arange(1, 41)
    value = bench["log_law"](rng, 300, 2.0)(tokens) + 2.0 * bench["NOISES"]["white"](rng, 300, 40)
    best = np.minimum.accumulate(value, axis=1)
    stale = np.array([[(line[k] == line[k - 3]) for k in range(3, 40)] for line in best]).any(axis=1)
    saturated, *_ = trend.follow(tokens, -value, 1.0)
    assert stale.mean() > 0.9 and saturated.any(axis=1).mean() < 0.04


def test_a_fall_is_found_where_it_was_planted() -> None:
    rng = np.random.default_rng(3)
    gain = np.log(TOKENS) + rng.normal(scale=0.02, size=COUNT)
    assert not trend.falls(TOKENS.astype(float), gain[None], 0.1).any()
    gain[15:] -= 0.5
    assert np.flatnonzero(trend.falls(TOKENS.astype(float), gain[None], 0.1)[0]).tolist() == [15]
    assert not trend.falls(TOKENS.astype(float), gain[None], 0.6).any()  # less than the margin


def test_the_risk_is_spent_over_the_looks_of_a_run() -> None:
    tokens = TOKENS.astype(float)
    for spending in (trend.EARLY, trend.LATE):
        spent = np.array([trend.risk(tokens[:count], spending) for count in range(1, COUNT + 1)])
        assert not spent[:4].any() and spent[4] == spending.first and (np.diff(spent[4:]) < 0).all()
        assert spending.first + spending.later < 0.05 and spent.sum() < 0.05
    doubled = np.append(tokens[:5], tokens[4] * 2)  # one look in a doubling may take what three near ones take together
    assert trend.risk(doubled, trend.EARLY) == pytest.approx(trend.EARLY.later / 2**1.5)


@pytest.mark.parametrize("sampled", [False, True])
def test_a_fall_since_the_start_or_the_best_is_told_from_noise(sampled: bool) -> None:
    rng, tokens = np.random.default_rng(4), np.arange(0.0, 13)
    own_rks = rng.normal(scale=0.2, size=(3, 13, 16)) if sampled else np.zeros((3, 13, 16))
    value_rk = rng.normal(scale=0.01, size=(3, 13)) + own_rks.mean(axis=2)
    value_rk[1, 1:] -= 2  # since the start
    value_rk[2, 2:5] += 2  # was better for a while
    samples = trend.samples_of(own_rks) if sampled else None
    found = trend.fell(tokens, value_rk, 0.5, samples=samples)
    assert found.start_r.tolist() == [False, True, False] and found.best_r.tolist() == [False, True, True]
    assert 2 <= found.best_at_r[2] < 5
    assert not trend.fell(tokens, value_rk, 3.0, samples=samples).start_r.any()  # less than the margin
    assert trend.fell(tokens[:5], value_rk[:, :5], 0.5) is None


def test_what_would_decide_does_decide() -> None:
    """Of a gain that noise hides: with the samples it asks for, the interval leaves out the margin, and not with half."""
    rng, tokens, level = np.random.default_rng(5), np.array([20.0, 50, 100, 150, 200]), trend.EARLY.first
    own_rks = rng.normal(size=(1, 5, 40))
    value_rk, few = own_rks.mean(axis=2), trend.samples_of(own_rks)
    value_rk -= np.polyval(np.polyfit(np.log(tokens), value_rk[0], 1), np.log(tokens))  # no gain, as measured
    needed = trend.needed_samples(tokens, value_rk, few, 0.05, level, margin=0.05)
    assert (
        trend.gain_belief(tokens, value_rk, 2, samples=few, margin=0.05).above(0.05)[0] > level and 40 < needed < 4000
    )
    for count, enough in ((needed, True), (needed // 2, False)):
        more = trend.Samples(few.covariance_rkk * 40 / count, count)
        then = trend.gain_belief(tokens, value_rk * math.sqrt(40 / count), 2, samples=more, margin=0.05)
        assert (then.above(0.05)[0] <= level) == enough
    assert trend.needed_samples(tokens, value_rk, few, 0.0005, level, margin=0.05) is None  # common noise alone is more
    off_rk = value_rk + np.array([0.0, 1, -1, 1, -1])  # which the samples do not explain
    assert trend.needed_samples(tokens, off_rk, few, 0.05, level, margin=0.05) is None

    alone = trend.gain_belief(TOKENS[:6].astype(float), rng.normal(size=(1, 6)))
    assert trend.needed_checkpoints(TOKENS[2:6].astype(float), alone, 1e-4, 0.01) is None
    counts = [trend.needed_checkpoints(TOKENS[2:6].astype(float), alone, apart, 0.01) for apart in (30.0, 8.0)]
    assert counts[0] == trend.NEEDED[0] and (counts[1] is None or counts[1] >= counts[0])


# --- laws ----------------------------------------------------------------------------------------------------------


def test_the_right_law_predicts_better_and_forecasts_the_tokens() -> None:
    rng, tokens = np.random.default_rng(4), TOKENS / STEP
    gain = -(2 + 3 * tokens**-0.8) + rng.normal(scale=1e-4, size=COUNT)
    first, second = laws.forecasts(tokens, gain, margin=0.02, tokens_from=100)
    # 3 N^-0.8 (1 - 1.25^-0.8) = 0.02
    expected = 100 + (3 * (1 - 1.25**-0.8) / 0.02) ** (1 / 0.8)
    assert (first.law, second.law) == ("plateau", "log") and first.error < second.error / 10
    assert first.tokens == pytest.approx(expected, rel=0.05) and first.low <= first.tokens <= first.high
    assert first.low > 100 + tokens[-1]


def test_the_log_law_never_reaches_a_margin_under_its_gain() -> None:
    rng, tokens = np.random.default_rng(5), TOKENS / STEP
    gain = 0.1 * np.log(tokens) + rng.normal(scale=1e-3, size=COUNT)
    by_law = {forecast.law: forecast for forecast in laws.forecasts(tokens, gain, margin=0.01, tokens_from=0)}
    assert by_law["log"].tokens == by_law["log"].low == by_law["log"].high == math.inf
    assert laws.forecasts(tokens, gain, margin=0.03, tokens_from=0)[0].tokens == tokens[-1]  # under it already
    assert laws.forecasts(tokens[:4], gain[:4], margin=0.01, tokens_from=0) == ()


@pytest.mark.parametrize("alpha", [0.06, 0.3, 0.8, 2.7])
def test_the_plateau_law_is_fitted_between_the_powers_that_are_tried(alpha: float) -> None:
    """Found again to four digits without noise, and as scipy finds it with some."""
    rng, scaled = np.random.default_rng(6), np.arange(1, 25) / 24
    value_jk = np.stack([scaled**-alpha * 0.7 + 2, scaled**-alpha * -3 + 5])
    found = laws.fit("plateau", scaled, value_jk)
    assert np.stack([found.alpha_j, found.slope_j, found.offset_j]) == pytest.approx(
        np.array([[alpha, alpha], [0.7, -3], [2, 5]]), rel=1e-4
    )
    value_jk += rng.normal(scale=0.01, size=value_jk.shape)
    found = laws.fit("plateau", scaled, value_jk)
    for j, value_k in enumerate(value_jk):
        theirs, _ = optimize.curve_fit(
            lambda n, c, a, power: c + a * n**-power, scaled, value_k, (found.offset_j[j], found.slope_j[j], alpha)
        )
        ours = found.at(scaled)[j]
        best = theirs[0] + theirs[1] * scaled ** -theirs[2]
        assert ((ours - value_k) ** 2).sum() <= ((best - value_k) ** 2).sum() * (1 + 1e-4)


@pytest.mark.parametrize(("count", "sigma"), [(8, 0.01), (24, 0.002)])
def test_the_interval_of_a_forecast_holds_the_truth(count: int, sigma: float) -> None:
    """95 % of them should; a grid of powers alone would leave it out of all."""
    rng, tokens, held = np.random.default_rng(9), np.arange(1.0, count + 1), 0
    expected = (3 * (1 - 1.25**-0.8) / 0.02) ** (1 / 0.8)
    for _ in range(60):
        gain = -(2 + 3 * tokens**-0.8) + rng.normal(scale=sigma, size=count)
        of_plateau = next(f for f in laws.forecasts(tokens, gain, margin=0.02, tokens_from=0) if f.law == "plateau")
        held += of_plateau.low <= expected <= of_plateau.high
    assert held >= scipy_stats.binom.ppf(0.01, 60, 0.92)


def test_samples_that_disagree_widen_a_forecast() -> None:
    rng, tokens = np.random.default_rng(2), np.arange(1.0, 25)
    sample_ks = -(2 + rng.uniform(1, 5, size=6) * tokens[:, None] ** -0.8) + rng.normal(scale=1e-3, size=(24, 6))
    widths = []
    for samples in (None, sample_ks):
        found = laws.forecasts(tokens, sample_ks.mean(axis=1), 0.02, 0, samples)
        of_plateau = next(each for each in found if each.law == "plateau")
        widths.append(of_plateau.high - of_plateau.low)
    assert widths[1] > 5 * widths[0]


# --- whole runs ----------------------------------------------------------------------------------------------------


def planted_run(directory: Path, *, nll, exact, corpus, heads=None, count: int = COUNT, seed: int = 0) -> Path:
    """A run of `count` checkpoints after the first; the curves are functions of tokens / STEP from 0 on."""
    rng, store = np.random.default_rng(seed), RunStore(directory)
    hard_s = rng.normal(scale=0.3, size=8)
    for number in range(count + 1):
        tokens, rows = STEP * number, []
        for length in (1024, 4096):
            cell = dict(tokens=tokens, length_tok=length, depth_cell=0.5)
            rows += needle_rows(nll(number) + hard_s + rng.normal(scale=0.01, size=8), **cell)
            rows += needle_rows(rng.random(8) < exact(number), metric="exact", **cell)
        value = corpus(number) + rng.normal(scale=1e-3)
        rows.append(row("CorpusPPL", "nll", value, "nat", tokens=tokens, corpus="code", length_tok=4096, n=65536))
        if heads is not None:
            score = np.zeros((4, 8, 8))
            score[1, :4] = heads(number) + rng.normal(scale=0.01, size=(4, 8))
            rows += head_rows(score.clip(0, 1), tokens=tokens)
        store.write_window(rows, step=tokens)
    return directory


def log_law(number: float) -> float:
    return 3 - 0.3 * math.log(max(number, 0.5))


def flat_from(number: float, bend: float = 6) -> float:
    return log_law(min(number, bend))


def test_a_corpus_has_its_sequences_as_samples_where_all_checkpoints_kept_them(tmp_path: Path) -> None:
    value_ks = np.random.default_rng(1).normal(3, 0.2, size=(5, 8))
    for name, kept in (("sequences", 5), ("means", 4)):
        store = RunStore(tmp_path / name)
        for k, value_s in enumerate(value_ks):
            where = dict(tokens=k * STEP, corpus="code", length_tok=4096)
            rows = [row("CorpusPPL", "nll", value_s.mean(), "nat", n=8 * 4095, **where)]
            if k < kept:
                rows += [
                    row("CorpusPPL", "sequence_nll", value, "nat", n=4095, sample=s, sample_set="c0de", **where)
                    for s, value in enumerate(value_s)
                ]
            store.write_window(rows, step=k * STEP)
        (signal,) = run_signals(load_run(tmp_path / name))
        assert signal.name == "corpus_nll[code]"
        np.testing.assert_allclose(signal.value_k, value_ks.mean(axis=1), rtol=1e-12)
        assert signal.samples == (8 if name == "sequences" else 0)
        if name == "sequences":
            np.testing.assert_allclose(signal.sample_ks, value_ks, rtol=1e-12)


@pytest.mark.parametrize("kept", ["sequences", "means"])
def test_of_a_corpus_whose_text_was_changed_the_checkpoints_of_the_last_text_count(tmp_path: Path, kept: str) -> None:
    """A training resumed with other held-out sequences: the jump between two texts is no gain."""
    store = RunStore(tmp_path)
    for k in range(10):
        text, count = ("old", 8) if k < 4 else ("new", 8 if kept == "sequences" else 16)
        where = dict(tokens=k * STEP, corpus="code", length_tok=4096)
        rows = [row("CorpusPPL", "nll", 5.0 if k < 4 else 2.0, "nat", n=count * 4095, **where)]
        if kept == "sequences" and k != 5:  # one window kept no sequences
            rows += [row("CorpusPPL", "sequence_nll", 2.0, "nat", sample=s, sample_set=text, **where) for s in range(8)]
        store.write_window(rows, step=k * STEP)
    (signal,) = run_signals(load_run(tmp_path))
    assert signal.tokens_k.tolist() == [k * STEP for k in range(4, 10)] and (signal.value_k == 2).all()


@pytest.fixture(scope="module")
def deceptive(tmp_path_factory) -> Path:
    """Needles are all found from the fourth checkpoint on; their NLL falls on, the corpus has stopped, heads grow."""
    return planted_run(
        tmp_path_factory.mktemp("run") / "deceptive", nll=log_law, exact=lambda n: n / 4, corpus=flat_from,
        heads=lambda n: 0.2 + 0.02 * n,
    )  # fmt: skip


@pytest.fixture(scope="module")
def verdict(deceptive: Path) -> Verdict:
    return judge(load_run(deceptive))


def test_deceptive_saturation_is_named(verdict: Verdict) -> None:
    states = {signal.signal: signal.state for signal in verdict.signals}
    assert (verdict.state, verdict.deceptive, verdict.exit_code) == ("improving", True, 12)
    assert states == {
        "niah_exact": "saturated", "answer_nll": "improving", "answer_nll[1K]": "improving",
        "answer_nll[4K]": "improving", "corpus_nll[code]": "saturated", "retrieval_score": "improving",
        "retrieval_heads": "saturated", "head_overlap": "saturated",
    }  # fmt: skip
    assert verdict.alerts == () and verdict.sentence == (
        "Still improving: 3 of 4 probabilistic signals, retrieval_score. Saturated: niah_exact, corpus_nll[code], 2 of "
        "3 mechanistic signals. Deceptive saturation: niah_exact has been flat since 4M tokens while others improve."
    )


def test_what_a_state_rests_on(verdict: Verdict, deceptive: Path) -> None:
    found = {signal.signal: signal for signal in verdict.signals}
    nll = found["answer_nll"]
    assert nll.low < 0.3 * math.log(1.25) < nll.high and nll.low > nll.margin == 0.01
    assert (nll.samples, nll.tokens_from, nll.tokens_to) == (8, 12 * STEP, 24 * STEP) and nll.checkpoints == 13
    assert nll.law == "log" and nll.forecast_tokens == math.inf and nll.settled_at_tokens is None
    assert found["niah_exact"].gain_per_25pct == 0 and found["niah_exact"].high == 0  # nothing left to gain
    assert found["corpus_nll[code]"].high < found["corpus_nll[code]"].margin
    assert found["retrieval_score"].gain_per_25pct > found["retrieval_score"].margin
    alone = [name for name, signal in found.items() if signal.samples == 0]  # a count is no mean over samples
    assert alone == ["corpus_nll[code]", "retrieval_heads", "head_overlap"]
    assert verdict_text(verdict, advise(load_run(deceptive), verdict)).count("noise of checkpoints alone") == len(alone)


def test_lead_time_is_how_much_earlier_a_signal_settled(verdict: Verdict, deceptive: Path) -> None:
    """The corpus bends at 6 STEP; it settles once it is within a margin of 0.005 nat. What still moves counts as 24."""
    found = {signal.signal: signal for signal in verdict.signals}
    corpus, niah = found["corpus_nll[code]"], found["niah_exact"]
    assert corpus.settled_at_tokens == 6 * STEP and corpus.lead_tokens == 18 * STEP
    assert niah.settled_at_tokens <= 4 * STEP and niah.lead_tokens == 24 * STEP - niah.settled_at_tokens
    assert found["answer_nll"].lead_tokens is None
    wide = judge(load_run(deceptive), {"corpus_nll": 0.1}).signals  # 0.3 ln(6 / 5) is within 0.1, 0.3 ln(6 / 4) is not
    assert next(s for s in wide if s.signal == "corpus_nll[code]").settled_at_tokens == 5 * STEP


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> Path:
    """The same without heads, for what does not depend on them."""
    return planted_run(
        tmp_path_factory.mktemp("run") / "short", nll=log_law, exact=lambda n: 1, corpus=log_law, count=8
    )


def test_what_drifts_has_not_settled_though_it_is_undecided(short: Path) -> None:
    """It gains the margin exactly, so that it stays within a margin of its end for less than +25 % tokens."""
    found = {signal.signal: signal for signal in judge(load_run(short), {"answer_nll": 0.3 * math.log(1.25)}).signals}
    assert (found["answer_nll"].state, found["answer_nll"].settled_at_tokens) == ("undecided", None)


def test_a_run_at_rest_is_saturated_and_a_margin_can_say_otherwise(tmp_path: Path) -> None:
    directory = planted_run(tmp_path, nll=flat_from, exact=lambda n: 1, corpus=flat_from)
    found = judge(load_run(directory))
    assert (found.state, found.deceptive, found.exit_code) == ("saturated", False, 0)
    strict = judge(load_run(directory), {"corpus_nll": 1e-6, "answer_nll[4K]": 1e-6})
    states = {signal.signal: signal.state for signal in strict.signals}
    assert strict.state == "undecided" and strict.exit_code == 11
    assert states["corpus_nll[code]"] == states["answer_nll[4K]"] == "undecided" and states["answer_nll"] == "saturated"


def test_few_checkpoints_leave_it_undecided(tmp_path: Path) -> None:
    run = load_run(planted_run(tmp_path, nll=flat_from, exact=lambda n: 0.5, corpus=flat_from, count=3))
    found = judge(run)
    assert found.state == "undecided" and {signal.state for signal in found.signals} == {"undecided"}
    assert all("it takes 5 to say more" in signal.why and signal.low is None for signal in found.signals)
    assert {(signal.reason, signal.needs_checkpoints) for signal in found.signals} == {("few checkpoints", 5)}


def test_a_score_that_never_moved_is_not_saturated(tmp_path: Path) -> None:
    found = judge(load_run(planted_run(tmp_path, nll=log_law, exact=lambda n: -1, corpus=log_law)))
    niah = found.signals[0]
    assert (niah.signal, niah.state) == ("niah_exact", "undecided") and "not begun" in niah.why
    assert (found.state, found.deceptive, found.exit_code) == (
        "improving",
        False,
        10,
    ) and niah.settled_at_tokens is None


def test_nothing_left_to_gain_takes_two_checkpoints(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    for number in range(1, 9):
        cell = dict(tokens=number * STEP, length_tok=1024, depth_cell=0.5, metric="exact")
        store.write_window(needle_rows(np.full(4, 0.1 * number if number < 8 else 1.0), **cell), number * STEP)
    assert judge(load_run(tmp_path)).signals[0].state != "saturated"


def test_answers_are_signals_by_octave_of_lengths_and_not_without_heads(tmp_path: Path) -> None:
    rows = [each for length in (512, 768, 1024, 1536)
            for each in needle_rows([length / 1e3], tokens=STEP, length_tok=length, depth_cell=0.5)]  # fmt: skip
    rows += [row("HeadAblation", "nll", 9.0, "nat", tokens=STEP, ablated="top10", sample=0)]
    rows += [row("Ruler", "nll", 1.0, "nat", tokens=STEP, sample=0)]
    rows += [row("Undeclared", "nll", 1.0, "nat", tokens=STEP, sample=0)]
    declare(
        RunStore(tmp_path), "Ruler", Metric(name="nll", unit="nat", about="", level="probabilistic", better="lower")
    )
    RunStore(tmp_path).write_window(rows, STEP)
    found = {signal.name: signal.value_k[0] for signal in run_signals(load_run(tmp_path))}
    assert found == pytest.approx(
        {"answer_nll": 0.96, "answer_nll[512]": 0.512, "answer_nll[768-1K]": 0.896, "answer_nll[1536]": 1.536,
         "Ruler.nll": 1.0}
    )  # fmt: skip


def test_a_share_of_few_samples_knows_no_smaller_steps() -> None:
    """Twelve times the same share of 8 samples: the noise may be as large as its rounding."""
    tokens = TOKENS[:12].astype(float)
    blind, honest = (trend.gain_belief(tokens, np.full((1, 12), 0.5), noise_floor=floor) for floor in (0.0, 0.036))
    assert blind.quantile(0.95) < 1e-6 < 0.01 < honest.quantile(0.95)
    found = Signal("niah_exact", "behavioural", "share", 1, tokens, tokens, np.full(12, 0.5), resolution=1 / 8)
    assert _series(found, 0, 0.01).noise_floor == pytest.approx(1 / 8 / math.sqrt(12))


def test_heads_that_fall_back_are_an_early_warning(tmp_path: Path) -> None:
    fallen = planted_run(
        tmp_path, nll=log_law, exact=lambda n: 1, corpus=log_law, heads=lambda n: 0.3 + 0.01 * n - 0.2 * (n >= 18)
    )
    found = judge(load_run(fallen))
    assert [(alert.signal, alert.tokens) for alert in found.alerts] == [("retrieval_score", 18 * STEP)]
    (alert,) = found.alerts
    assert (
        "fell back at 18M tokens" in alert.text
        and f"{100 * alert.low:+.2g} to {100 * alert.high:+.2g} over " in alert.text
    )
    assert alert.low < alert.change < alert.high < -0.1 and alert.change == pytest.approx(-0.19, abs=0.03)
    assert json.loads(found.to_json())["alerts"][0]["low"] == pytest.approx(alert.low)


def test_only_checkpoints_of_the_same_samples_are_compared(deceptive: Path) -> None:
    run = load_run(deceptive)
    run.rows.loc[(run.rows["monitor"] == "NeedleGrid") & (run.rows["tokens"] <= 10 * STEP), "sample_set"] = "other"
    found = {signal.signal: signal for signal in judge(run).signals}
    assert found["answer_nll"].tokens_from == 12 * STEP and found["niah_exact"].settled_at_tokens == 11 * STEP


def test_a_number_that_is_not_finite_is_an_alert_and_no_checkpoint(deceptive: Path) -> None:
    run = load_run(deceptive)
    run.frame(corpus_ppl).loc[run.frame(corpus_ppl)["tokens"] == 20 * STEP, "nll"] = math.inf
    found = judge(run)
    assert [alert.text for alert in found.alerts] == ["corpus_nll[code] is inf at 20M tokens"]
    assert {signal.signal: signal for signal in found.signals}["corpus_nll[code]"].state == "saturated"


def test_a_token_count_has_one_place_on_the_axis() -> None:
    """Where a stage ends and the next begins, the later measurement counts; the start of the LCCP has no place."""
    tokens = np.array([0, 50, 100, 100, 150])
    values = np.array([9.0, 5, 4, 3, 2])
    signal = Signal("a", "probabilistic", "nat", -1, tokens, tokens, values, np.stack([values, values], axis=1))
    found = after_start(signal, 0)
    assert found.tokens_k.tolist() == [50, 100, 150] and found.value_k.tolist() == [5, 3, 2]
    assert found.sample_ks.tolist() == [[5, 5], [3, 3], [2, 2]] and after_start(signal, 100).tokens_k.tolist() == [150]


def test_no_signal_is_said_in_one_sentence(tmp_path: Path) -> None:
    RunStore(tmp_path).write_window([row("Mine", "entropy", 1.0, "nat", tokens=0)], step=0)
    found = judge(load_run(tmp_path))
    assert (found.state, found.signals) == ("undecided", ()) and "no rows of a signal" in found.sentence


def test_a_noisy_score_is_not_called_flat(tmp_path: Path) -> None:
    """Its estimate is no gain, but its interval holds the margin."""
    store, rng = RunStore(tmp_path), np.random.default_rng(8)
    for number in range(1, 17):
        cell = dict(tokens=number * STEP, length_tok=1024, depth_cell=0.5)
        rows = needle_rows(np.full(6, 0.3 + 0.06 * (-1) ** number), metric="exact", **cell)
        store.write_window(rows + needle_rows(log_law(number) + rng.normal(scale=0.01, size=6), **cell), number * STEP)
    niah, *_ = (found := judge(load_run(tmp_path))).signals
    assert (niah.state, found.state, found.deceptive) == ("undecided", "improving", False)
    assert niah.gain_per_25pct == pytest.approx(0, abs=0.005) and niah.high > niah.margin
    assert niah.reason == "noise" and niah.needs_samples is niah.needs_checkpoints is None
    assert "take a wider margin" in niah.why


@pytest.mark.parametrize("back", [False, True])
def test_what_fell_is_worse_and_stands_beside_the_rest(tmp_path: Path, back: bool) -> None:
    """A corpus that lost 0.3 nat at once, for good, or is on its way back; needles gain."""
    lost = lambda n: 2 + 0.3 * (n > 0) - 0.08 * back * math.log(max(n, 1))  # noqa: E731
    found = judge(load_run(planted_run(tmp_path, nll=log_law, exact=lambda n: 1, corpus=lost)))
    corpus = next(signal for signal in found.signals if signal.signal == "corpus_nll[code]")
    (fall,) = found.worse
    assert (fall.signal, fall.since, fall.tokens_from, fall.tokens_to) == ("corpus_nll[code]", "start", 0, 24 * STEP)
    assert fall.low < fall.change < fall.high < 0 and fall.change == pytest.approx(2 - lost(24), abs=0.02)
    assert corpus.fall == fall and fall.recovering == back and "worse than at the start" in fall.text
    states = ("improving", "improving", 12) if back else ("worse", "worse", 13)
    assert (corpus.state, found.state, found.exit_code) == states and found.rest == "improving"
    assert json.loads(found.to_json())["worse"][0]["high"] == pytest.approx(fall.high)


def test_a_gain_that_one_sample_holds_is_told(tmp_path: Path) -> None:
    store, rng = RunStore(tmp_path), np.random.default_rng(9)
    for number in range(1, 13):
        gain = math.log(number) * np.array([1.0] + [0.0] * 19)
        rows = needle_rows(
            2 - gain + rng.normal(scale=0.01, size=20), tokens=number * STEP, length_tok=64, depth_cell=0
        )
        store.write_window(rows, number * STEP)
    (nll,) = judge(load_run(tmp_path)).signals
    assert nll.top_share == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("gains", "share"), [([1.0, 1.0, 2.0], 0.5), ([4.0, -1.0, -1.0], 2.0), ([1.0, -2.0, -2.0], None), ([0.1, 0.1, 0.1], None)]
)  # fmt: skip
def test_the_share_of_one_sample_needs_a_gain(gains: list[float], share: float | None) -> None:
    """Of a loss, or of less than the margin of 0.5, there is no share."""
    sample_ks = np.array([[0.0] * 3, gains, gains])
    nothing = np.zeros(3)
    series = _Series(np.arange(1.0, 4), sample_ks.mean(axis=1), nothing + 9, nothing > 0, sample_ks, 0.0, False)
    assert _top_share(series, 0.5) == (None if share is None else pytest.approx(share))


def test_what_it_would_take_reads_well() -> None:
    said = [
        _needs_text(_Open("few samples", checkpoints, samples))
        for checkpoints, samples in ((None, 137), (12, 137), (None, 9913), (12, 9913))
    ]
    assert said == [
        " (it would take about 140 samples)",
        " (it would take about 12 checkpoints in a doubling of tokens, or about 140 samples)",
        " (it would take more samples than is practical, about 10,000)",
        " (it would take about 12 checkpoints in a doubling of tokens)",
    ]


@pytest.mark.parametrize("judged", [True, False])
def test_a_benchmark_is_a_signal_and_judged_if_it_says_so(tmp_path: Path, judged: bool) -> None:
    store, rng = RunStore(tmp_path), np.random.default_rng(7)
    task = dict(about="A task.", level="behavioural", better="higher", benchmark=True, judged=judged)
    declare(store, "Ruler", Metric(name="score", unit="share", **task))
    for number in range(13):
        rows = [
            row("Ruler", "score", 0.4 + 0.02 * number + rng.normal(scale=0.01), "share", tokens=number * STEP, sample=s)
            for s in range(10)
        ]
        store.write_window(rows, step=number * STEP)
    found = [(s.signal, s.level, s.state, s.samples) for s in judge(load_run(tmp_path)).signals]
    assert found == [("Ruler.score", "behavioural", "improving", 10)] * judged
    assert [signal.name for signal in run_signals(load_run(tmp_path))] == ["Ruler.score"]


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command_prints_json_for_schedulers(deceptive: Path, capsys) -> None:
    assert main(["verdict", str(deceptive), "--json", "--margin", "answer_nll=0.02"]) == 12
    found = json.loads(capsys.readouterr().out)
    assert (found["state"], found["deceptive"]) == ("improving", True)
    nll = next(signal for signal in found["signals"] if signal["signal"] == "answer_nll")
    assert nll["margin"] == 0.02 and nll["forecasts"][0]["tokens"] == "never"


@pytest.mark.each_python
def test_the_help_names_every_exit_code(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["verdict", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert EXIT_CODES == {"saturated": 0, "improving": 10, "undecided": 11, "deceptive": 12, "worse": 13}
    for text in (
        "0 all are saturated",
        "10 at least one is improving",
        "11 undecided",
        "12 improving while",
        "13 at least one got worse",
        "2 not a",
    ):
        assert text in said


def test_the_command_says_it_in_words(deceptive: Path, capsys) -> None:
    assert main(["verdict", str(deceptive)]) == 12
    out = capsys.readouterr().out
    assert out.startswith("planted: Go on: +25 % tokens (6M) still bring more than a margin to ")
    assert "\nStill improving: 3 of 4 probabilistic signals, retrieval_score. Saturated: " in out
    assert "the last 13 of 24 checkpoints, 12M to 24M tokens, 8 samples" in out


@pytest.mark.each_python
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--margin", "answer_nll"], "expected SIGNAL=GAIN"),
        (["--margin", "answer_nll=much"], "expected SIGNAL=GAIN"),
        (["--margin", "answer=0.1"], "no such signal; there are niah_exact"),
        (["--margin", "answer_nll=-1"], "expected a number over 0"),
        (["--margin", "answer_nll=nan"], "expected a number over 0"),
        (["--stop"], "does not know --stop"),
    ],
)
def test_a_bad_request_is_one_line(short: Path, capsys, arguments: list[str], message: str) -> None:
    assert main(["verdict", str(short), *arguments]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and not said.out


def test_margins_of_one_corpus() -> None:
    assert parse_margins(["corpus_nll[a=b]=0.5"]) == {"corpus_nll[a=b]": 0.5}


@pytest.mark.parametrize(
    ("tokens", "low", "high", "text"),
    [(90, 90, 90, "already"), (500, 90, 1000, "at 500 (now to 1K)"),
     (1001, 500, math.inf, "beyond 10x the run (500 to never)"), (2000, 1500, 3000, "beyond 10x the run")],
)  # fmt: skip
def test_a_forecast_far_beyond_the_run_is_given_as_no_number(tokens, low, high, text) -> None:
    assert forecast_text(laws.Forecast("log", tokens, low, high, 0.1), now=100) == f"{text}, log law"
