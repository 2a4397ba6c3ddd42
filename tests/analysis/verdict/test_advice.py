"""What to do about a verdict, what it costs, what is still to come, and what monitors could not give.

In: verdicts made here, and runs of planted rows, steps, events and configurations. Out: sentences, GPU-hours, exit codes.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from megatron_lccp.analysis.absent import absent_rows
from megatron_lccp.analysis.ahead import ahead_of
from megatron_lccp.analysis.cost import NO_RANKS, Price, Unpriced, measured_price, planned_price
from megatron_lccp.analysis.report.report import write_report
from megatron_lccp.analysis.run import Run, load_run
from megatron_lccp.analysis.verdict.advice import advise
from megatron_lccp.analysis.verdict.judge import Fall, SignalVerdict, Verdict
from megatron_lccp.analysis.verdict.text import verdict_text
from megatron_lccp.cli import main
from megatron_lccp.records.store import RunStore, steps_frame
from tests.analysis.planted import needle_rows, row, run_of, table

NOW = 2_000_000
"""Tokens of the planted run, half of them of the LCCP."""


def signal(name: str, state: str, **more) -> SignalVerdict:
    found = dict(
        signal=name, level="probabilistic", state=state, unit="nat", margin=0.01, gain_per_25pct=0.03, low=0.02, high=0.05,
        checkpoints=5, samples=4, tokens_from=NOW // 2, tokens_to=NOW, law="none", forecasts=(), settled_at_tokens=None,
        lead_tokens=None, why="so it is",
    )  # fmt: skip
    return SignalVerdict(**(found | more))


def verdict(*signals: SignalVerdict, state: str, rest: str | None = None, deceptive: bool = False, worse=()) -> Verdict:
    return Verdict("planted", state, "In short.", deceptive, signals, (), rest=rest or state, worse=tuple(worse))


def planted(**more) -> Run:
    """Corpus rows at 1 M and 2 M tokens, and steps at 1,000 tokens/s on 4 ranks."""
    rows = [row("CorpusPPL", "nll", 1.0, "nat", tokens=tokens, corpus="en") for tokens in (NOW // 2, NOW)]
    steps = [
        dict(step=k, tokens=NOW * k // 4, stage="base" if k <= 2 else "lccp", loss=1.0, grad_norm=1.0, lr=1e-3,
             tokens_per_s=1000.0, time_s=500.0, skipped=False, ranks=4) for k in range(1, 5)
    ]  # fmt: skip
    found = run_of(table(rows))
    return replace(found, steps=steps_frame(steps), lccp_from=NOW // 2, **more)


def test_go_on_names_what_gains_most_and_what_it_costs() -> None:
    small, large = (
        signal("small", "improving"),
        signal("large", "improving", unit="share", low=0.05, gain_per_25pct=0.07, high=0.1),
    )
    advice = advise(planted(), verdict(small, large, signal("flat", "saturated"), state="improving", deceptive=True))
    # a quarter of the LCCP's million tokens at 1,000 tokens/s on 4 ranks
    assert (advice.do, advice.quarter_tokens) == ("go on", 250_000)
    assert advice.quarter_gpu_hours == pytest.approx(250 * 4 / 3600)
    assert advice.sentence == (
        "Go on: +25 % tokens (250K, 0.28 GPU-hours) still bring more than a margin to large (+7 points, +5 to +10) and "
        "small. The needle score stands still meanwhile: that is no convergence (deceptive saturation)."
    )
    assert advice.gpu_hours_to(NOW + 9e6) == pytest.approx(10.0) and advice.gpu_hours_to(math.inf) is None


def test_stopping_is_safe_says_what_is_not_seen() -> None:
    flat = verdict(signal("a", "saturated"), signal("b", "saturated", tokens_from=NOW // 4), state="saturated")
    said = "Safe to stop: all 2 signals are flat over these tokens (500K to 2M). What begins later is not seen."
    assert advise(planted(), flat).sentence == said
    stages = {"base": stage(1_000_000), "lccp": stage(1_000_000), "cool": stage(500_000, lr_schedule="linear")}
    advice = advise(planted(config_text=yaml.safe_dump({"stages": stages}, sort_keys=False)), flat)
    assert advice.do == "stop is safe" and advice.sentence == (
        f"{said} A decay of the learning rate is still to come (stage cool, 2M to 2.5M tokens) and will move them: judge "
        "again after it."
    )


def test_what_cannot_be_told_says_what_to_measure() -> None:
    signals = (
        signal("flat", "saturated"), signal("early", "undecided", reason="few checkpoints", needs_checkpoints=5, gain_per_25pct=None),
        signal("loud", "undecided", reason="few samples", needs_samples=200),
        signal("noisy", "undecided", reason="noise", needs_checkpoints=12),
        signal("asleep", "undecided", reason="not begun"), signal("close", "undecided", reason="near the margin"),
    )  # fmt: skip
    advice = advise(planted(), verdict(*signals, state="undecided"))
    assert advice.do == "cannot tell" and advice.sentence == (
        "Cannot tell yet: of 6 signals 1 is flat, 5 undecided. Measure this: 5 checkpoints after the start of the LCCP, for "
        "early; 200 samples at each checkpoint, for loud; 12 checkpoints within the last doubling of the tokens, for noisy. "
        "Not begun to move: asleep. No sensible number decides close: the gain is too near the margin; set another margin."
    )


def test_more_samples_than_is_practical_is_no_advice() -> None:
    """A number that nobody measures is rounded and said as that; checkpoints stand in its place where they would do."""
    signals = (
        signal("some", "undecided", reason="few samples", needs_samples=1204),
        signal("many", "undecided", reason="few samples", needs_samples=9913),
        signal("either", "undecided", reason="few samples", needs_samples=9913, needs_checkpoints=12),
        signal("loud", "undecided", reason="noise"),
    )
    assert advise(planted(), verdict(*signals, state="undecided")).sentence == (
        "Cannot tell yet: all 4 signals are undecided. Measure this: 1,300 samples at each checkpoint, for some; 12 "
        "checkpoints within the last doubling of the tokens, for either. Deciding many takes more samples than is practical "
        "(about 10,000): widen the margin. No number of checkpoints decides loud: they move too much; widen the margin."
    )


@pytest.mark.parametrize(
    ("share", "said"),
    [(None, None), (0.4, None), (0.93, "holds 93 % of the gain"), (1.3, "holds the whole gain, and the others together lost")],
)  # fmt: skip
def test_a_gain_that_one_sample_holds_reads_well(share: float | None, said: str | None) -> None:
    found = verdict(signal("answer_nll", "saturated", top_share=share), state="saturated")
    text = verdict_text(found, advise(planted(), found))
    assert ("the largest of 4 samples" in text) == (said is not None)
    assert said is None or said in text and "130 %" not in text


def test_what_got_worse_stands_beside_the_advice() -> None:
    fall = Fall(
        "short_nll", "probabilistic", "nat", "start", -0.04, -0.06, -0.02, 0.01, 8, NOW // 2, NOW, False, "It fell."
    )
    found = verdict(
        signal("a", "saturated"), signal("short_nll", "worse"), state="worse", rest="saturated", worse=[fall]
    )
    advice = advise(planted(), found)
    assert advice.do == "stop is safe" and found.exit_code == 13
    assert advice.sentence.startswith(
        "Safe to stop: the only signal that did not fall is flat over these tokens (1M to 2M)."
    )
    assert advice.sentence.endswith(
        "Weigh what got worse beyond noise: short_nll by 0.04 nat (0.02 to 0.06) since the start of the LCCP."
    )
    assert "WORSE It fell." in verdict_text(found, advice)


# --- costs ---------------------------------------------------------------------------------------------------------


def test_a_price_needs_times_and_ranks() -> None:
    run = planted()
    price = measured_price(run)
    assert isinstance(price, Price) and price.how == "measured: 1,000 tokens/s on 4 ranks, windows not counted"
    assert measured_price(replace(run, steps=run.steps.drop(columns="ranks"))) == Unpriced(NO_RANKS)
    assumed = measured_price(replace(run, steps=run.steps.drop(columns="ranks")), ranks=8)
    assert assumed.gpu_hours(1e6) == pytest.approx(2 * price.gpu_hours(1e6))
    # the ranks of now count, and their speed
    steps = run.steps.assign(ranks=[4, 4, 4, 8], tokens_per_s=[1000.0, 1000.0, 1000.0, 1600.0])
    assert measured_price(replace(run, steps=steps)).gpu_hours(3600 * 1600) == pytest.approx(8)
    assert isinstance(measured_price(replace(run, steps=steps_frame([]))), Unpriced)


def test_a_plan_gives_the_price_instead(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan = {"ranks": 256, "stages": {"base": {"tokens": 5}, "lccp": {"tokens": 200e9}},
            "gpus": {"H100": {"stages": {"base": {"gpu_hours": 1}, "lccp": {"gpu_hours": 1e5}}}}}  # fmt: skip
    path.write_text(json.dumps(plan))
    assert planned_price(path, "lccp") == Price(5e-7, "planned: stage lccp on 256 H100")
    assert planned_price(path, "a branch").how == "planned: stage lccp on 256 H100"
    path.write_text(json.dumps(plan | {"gpus": plan["gpus"] | {"H200": plan["gpus"]["H100"]}}))
    with pytest.raises(ValueError, match="holds 2 kinds of GPU; make it with lccp plan --gpu H100 --json"):
        planned_price(path, "lccp")
    for text in ("{", "[]", "{}", '{"gpus": {"H100": {}}, "ranks": 2, "stages": {}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"--plan: {path} is not what lccp plan --json prints"):
            planned_price(path, "lccp")
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        planned_price(tmp_path / "none", "lccp")


# --- what is still to come -----------------------------------------------------------------------------------------


def stage(tokens: int, **more) -> dict:
    return {"tokens": tokens, "global_batch_tok": 1000, "lr": 1e-3, "min_lr": 0.0, "lr_schedule": "constant"} | more


@pytest.mark.parametrize(
    ("stages", "cap", "decay", "left", "to_come"),
    [
        ({"lccp": stage(NOW)}, None, "", 0, ()),
        ({"lccp": stage(NOW + 500)}, None, "", 1000, ()),  # the last step is whole
        ({"lccp": stage(NOW * 2, lr_schedule="cosine")}, None, "stage lccp, 2M to 4M tokens", NOW, ()),
        ({"lccp": stage(NOW * 2, lr_schedule="cosine", min_lr=1e-3)}, None, "", NOW, ()),
        ({"lccp": stage(NOW, lr_schedule="cosine")}, None, "", 0, ()),  # it is over
        ({"lccp": stage(NOW), "more": stage(NOW)}, None, "", NOW, ("more",)),
        ({"lccp": stage(NOW), "low": stage(NOW, lr=1e-4)}, None, "stage low, 2M to 4M tokens", NOW, ("low",)),
        ({"lccp": stage(NOW), "low": stage(NOW, lr=1e-4)}, 2000, "", 0, ()),  # training.steps ends it before
    ],
)
def test_what_is_still_to_come(stages: dict, cap: int | None, decay: str, left: int, to_come: tuple) -> None:
    text = yaml.safe_dump({"stages": stages, "training": {"steps": cap}}, sort_keys=False)
    found = ahead_of(planted(config_text=text))
    assert (found.decay, found.tokens_left, found.stages) == (decay, left, to_come)


@pytest.mark.parametrize("text", ["", "name: x", "stages: 3", "stages: {a: {}}", "a: [", "stages: {a: null}"])
def test_a_configuration_that_says_nothing_of_stages(text: str) -> None:
    assert ahead_of(planted(config_text=text)) is None


# --- what monitors could not give ----------------------------------------------------------------------------------


@pytest.fixture
def gaps(tmp_path: Path) -> Path:
    """Three windows: heads fail at the first, no sample passes the gate of wu2024 at any, one monitor never measures."""
    store = RunStore(tmp_path / "gaps")
    for step in (0, 100, 200):
        rows = needle_rows([1.0, 1.2], tokens=step, length_tok=64, depth_cell=0.5)
        if step:
            rows += [row("RetrievalHeads", "needle_mass", 0.1, "share", tokens=step, layer=0, head=0, sample=0)]
        else:
            store.append_event("monitor_error", "RetrievalHeads: RuntimeError: out of memory", step=0)
        store.append_event("no_rows", "RetrievalHeads.wu2024: defined for none of 4 samples; so it goes", step=step)
        own = "Own: ValueError: heads cannot be scored: a sink"
        store.append_event("monitor_error", own if step else f"step 0: {own}", step=step)  # as 0.1 wrote it
        store.write_window(rows, step)
    store.append_event("monitor_error", "NeedleGrid: RuntimeError: killed, and measured again", step=100)
    return store.dir


def test_rows_that_are_not_there_are_said_with_the_reason(gaps: Path, capsys: pytest.CaptureFixture) -> None:
    said = [each.text for each in absent_rows(load_run(gaps))]
    assert said == [
        "RetrievalHeads gave no rows at 1 of 3 windows, not the last one: RuntimeError: out of memory",
        "RetrievalHeads.wu2024 gave no rows at all 3 windows: defined for none of 4 samples; so it goes",
        "Own gave no rows at all 3 windows: heads cannot be scored: a sink",
    ]
    assert main(["verdict", str(gaps)]) == 11
    printed = capsys.readouterr().out
    assert all(f"NOT MEASURED {text}." in printed for text in said)
    page = write_report(gaps).read_text()
    assert all(f"<li>{text}</li>" in page for text in said)


# --- one measurement, and scores alone -----------------------------------------------------------------------------


def test_one_measurement_has_figures_and_no_changes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    store = RunStore(tmp_path / "one")
    store.write_window(needle_rows([1.0, 1.2], tokens=300, length_tok=64, depth_cell=0.5), 300)
    assert main(["verdict", str(store.dir)]) == 11
    printed = capsys.readouterr().out
    assert printed.startswith("planted: One measurement, at 300 tokens: it says where the model stands. A change takes")
    assert "+25 % tokens bring" not in printed
    page = write_report(store.dir).read_text()
    assert 'id="t-verdict-0"' not in page and '<figure class="chart" id="needle-cells"' in page
    store.write_window(needle_rows([1.0, 1.2], tokens=400, length_tok=64, depth_cell=0.5), 400)
    assert 'id="t-verdict-0"' in write_report(store.dir).read_text()


def scores(tmp_path: Path, run: str = "") -> Path:
    """A benchmark that gains exactly 1 per +25 % tokens, and one that stays."""
    tokens = 1e9 * np.arange(1, 13)
    frames = [
        pd.DataFrame({"tokens": tokens, "benchmark": name, "score": values})
        for name, values in (("climbs", 50 + np.log(tokens) / np.log(1.25)), ("stays", np.full(12, 70.0)))
    ]
    path = tmp_path / "scores.csv"
    pd.concat(frames).to_csv(path, index=False)
    return path


def test_scores_are_judged_once_they_have_a_margin(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = str(scores(tmp_path))
    assert main(["verdict", "--scores", path, "--margin", "climbs=0.5", "--margin", "stays=0.5", "--json"]) == 10
    found = json.loads(capsys.readouterr().out)
    assert {s["signal"]: s["state"] for s in found["signals"]} == {"climbs": "improving", "stays": "saturated"}
    climbs = found["signals"][0]
    assert climbs["gain_per_25pct"] == pytest.approx(1.0) and climbs["margin"] == 0.5
    assert found["advice"]["do"] == "go on" and found["advice"]["quarter_tokens"] == 3e9
    assert main(["verdict", "--scores", path, "--margin", "stays=0.5"]) == 0
    assert capsys.readouterr().out.startswith("scores: Safe to stop: the only signal is flat over these tokens")
    assert main(["verdict", "--scores", path]) == 11
    assert "give benchmark scores with --scores and --margin" in capsys.readouterr().out


def test_scores_stand_beside_the_signals_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    store = RunStore(tmp_path / "run")
    for step in range(1, 13):
        tokens = step * 10**9
        rows = [row("CorpusPPL", "nll", 2.0, "nat", tokens=tokens, corpus="en")]
        store.write_window(rows, tokens)
    path = str(scores(tmp_path))
    for margins, names in ((["--margin", "climbs=0.5"], ["climbs", "corpus_nll[en]"]), ([], ["corpus_nll[en]"])):
        main(["verdict", str(store.dir), "--scores", path, *margins, "--json"])
        assert [s["signal"] for s in json.loads(capsys.readouterr().out)["signals"]] == names
    page = write_report(store.dir, scores=path, margins={"climbs": 0.5}).read_text()
    assert "still bring more than a margin to climbs (+1, " in page


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "verdict: name a run directory, or --scores with a CSV of benchmark scores"),
        (["--scores", "{scores}", "--margin", "climb=1"], "--margin climb: no such signal; there are climbs, stays"),
        (["--scores", "{scores}", "--margin", "climbs=1", "--plan", "none.json"], "--plan: none.json cannot be read"),
        (["--scores", "{scores}", "--margin", "climbs=1", "--ranks", "0"], "--ranks: should be at least 1, is 0"),
    ],
)
def test_a_bad_request_is_one_line(arguments: list[str], problem: str, tmp_path: Path, capsys) -> None:
    path = scores(tmp_path)
    assert main(["verdict", *(word.format(scores=path) for word in arguments)]) == 2
    said = capsys.readouterr()
    assert problem in said.err and said.err.count("\n") == 1 and not said.out


def test_scores_of_several_runs_are_no_run(tmp_path: Path, capsys) -> None:
    path = tmp_path / "scores.csv"
    path.write_text("run,tokens,benchmark,score\na,1,x,1\nb,1,x,2\n")
    assert main(["verdict", "--scores", str(path), "--margin", "x=1"]) == 2
    assert "scores.csv: holds 2 runs (a, b); keep the lines of one" in capsys.readouterr().err
