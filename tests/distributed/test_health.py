"""Training health: the definitions by plain loops, the same numbers on every layout, and a training that never notices.

Tolerances: what differs between layouts is the order of FP32 sums.
"""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.ranks import run_ranks
from tests.distributed.test_layouts import LAYOUTS

EXPERTS, TOP_K, LAYERS = 4, 2, 2  # tests/tiny.py
FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@pytest.fixture(scope="module")
def batch() -> np.ndarray:
    """Four sequences, longer than the rows that are sampled."""
    return np.random.default_rng(0).integers(4, 700, size=(4, 161))


@pytest.fixture(scope="module")
def alone(tiny_yaml: Path, base: str, batch: np.ndarray) -> dict[str, dict]:
    """One rank: a step as it is, one whose activations are computed twice, one whose experts are full too early."""
    variants = {
        "plain": {},
        "recomputed": FULL_RECOMPUTE,
        "selective": {"recompute_granularity": "selective", "recompute_modules": "[core_attn,moe]"},
        "capacity": {"moe_expert_capacity_factor": 0.75},
        "padded": {"moe_expert_capacity_factor": 0.75, "moe_pad_expert_input_to_capacity": "true"},
    }
    overrides = {
        name: [base, *(f"--megatron.transformer.{key}={value}" for key, value in fields.items())]
        for name, fields in variants.items()
    }
    overrides["bf16"] = [base, "--training.precision=bf16"]
    jobs = [{"path": tiny_yaml, "overrides": one, "tokens": batch} for one in overrides.values()]
    return dict(zip(overrides, run_ranks(1, "health_jobs.several", jobs=jobs)[0]))


def values_of(found: dict) -> dict[tuple, float]:
    """(metric, layer, expert) -> value."""
    values = {(row["metric"], row["layer"], row["expert"]): row["value"] for row in found["rows"]}
    assert len(values) == len(found["rows"])
    return values


def naive_routing(logits: list[np.ndarray], capacity_factor: float | None) -> tuple[np.ndarray, float, int, int]:
    """(assignments of each expert, entropy summed over tokens, tokens, assignments dropped), token by token."""
    load, entropy, tokens, dropped = np.zeros(EXPERTS), 0.0, 0, 0
    for logit_te in logits:  # a micro-batch has its own capacity
        wanting = defaultdict(list)
        for logit_e in logit_te:
            p = [math.exp(x) for x in logit_e]
            p = [x / sum(p) for x in p]
            entropy -= sum(x * math.log(x) for x in p)
            tokens += 1
            chosen = sorted(range(EXPERTS), key=lambda e: -p[e])[:TOP_K]
            for e in chosen:
                load[e] += 1
                wanting[e].append(p[e] / sum(p[c] for c in chosen))
        if capacity_factor is not None:
            room = math.ceil(len(logit_te) * TOP_K / EXPERTS * capacity_factor)
            dropped += sum(max(0, len(w) - room) for w in wanting.values())
    return load, entropy, tokens, dropped


def naive_logit(query_snh: np.ndarray, key_sgh: np.ndarray) -> float:
    """The largest q.k / sqrt(width) of the sampled rows."""
    s, heads, width = query_snh.shape
    best = -math.inf
    for row in np.linspace(0, s - 1, 64).round().astype(int):
        for head in range(heads):
            keys = key_sgh[: row + 1, head * key_sgh.shape[1] // heads]
            best = max(best, float((keys @ query_snh[row, head]).max()) / math.sqrt(width))
    return best


@pytest.mark.parametrize(("name", "capacity"), [("plain", None), ("capacity", 0.75), ("padded", 0.75)])
def test_numbers_are_those_of_plain_loops(name: str, capacity: float | None, alone: dict) -> None:
    found = alone[name]
    values, scalars, expected = values_of(found), found["scalars"], defaultdict(list)
    for layer in range(LAYERS):
        load, entropy, tokens, dropped = naive_routing(found["router"][layer], capacity)
        assert tokens == 4 * 160 and (dropped > 0) == (capacity is not None)
        for expert in range(EXPERTS):
            assert values[("expert_load", layer, expert)] == load[expert] / (tokens * TOP_K)
        assert values[("router_entropy", layer, None)] == pytest.approx(entropy / tokens, rel=1e-6)
        assert values[("dropped_share", layer, None)] == dropped / (tokens * TOP_K)
        query_snh, key_sgh = found["attention"][layer][0]
        logit = naive_logit(query_snh, key_sgh)
        assert values[("attention_logit_max", layer, None)] == pytest.approx(logit, rel=1e-5)
        expected["entropy"].append(entropy / tokens)
        expected["load"].append(load.max() / load.mean())
        expected["dropped"].append(dropped / (tokens * TOP_K))
        expected["logit"].append(logit)
    assert scalars == pytest.approx({
        "router_entropy": np.mean(expected["entropy"]), "max_expert_load": max(expected["load"]),
        "dropped_share": np.mean(expected["dropped"]), "attention_logit_max": max(expected["logit"]),
    }, rel=1e-5)  # fmt: skip
    assert 0 < scalars["router_entropy"] < math.log(EXPERTS)


def test_gradient_norms_are_those_of_the_parameters(alone: dict) -> None:
    squares: dict[tuple, float] = defaultdict(float)
    for name, gradient in alone["plain"]["gradients"].items():
        layer = int(name.split(".")[2]) if name.startswith("decoder.layers.") else None
        if "layernorm" in name:
            part = "norms"
        elif layer is None:
            part = "embedding"
        elif "self_attention" in name:
            part = "attention"
        else:
            part = "router" if ".router." in name else "experts"
        squares[(f"grad_norm_{part}", layer, None)] += float((gradient**2).sum())
    values = {key: value for key, value in values_of(alone["plain"]).items() if key[0].startswith("grad_norm")}
    assert len(values) == 4 * LAYERS + 2
    assert values == pytest.approx({key: math.sqrt(square) for key, square in squares.items()}, rel=1e-5)


def test_gradient_norms_make_the_whole_in_bf16(alone: dict) -> None:
    """Where the optimizer holds FP32 copies of the parameters."""
    assert total_norm(values_of(alone["bf16"])) == pytest.approx(alone["bf16"]["grad_norm"], rel=1e-5)
    assert len(alone["bf16"]["rows"]) == len(alone["plain"]["rows"])


@pytest.mark.parametrize("name", ["recomputed", "selective"])
def test_recomputed_activations_count_once(name: str, alone: dict) -> None:
    assert values_of(alone[name]) == values_of(alone["plain"])
    assert [row["n"] for row in alone[name]["rows"]] == [row["n"] for row in alone["plain"]["rows"]]


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_rank(name: str, tiny_yaml: Path, base: str, batch: np.ndarray, alone: dict) -> None:
    ranks, sizes = LAYOUTS[name]
    overrides = [base, *(f"--parallel.{key}={value}" for key, value in sizes.items())]
    found = run_ranks(ranks, "health_jobs.one_step", path=tiny_yaml, overrides=overrides, tokens=batch)
    replicas = ranks // math.prod(sizes.get(key, 1) for key in ("tensor", "pipeline", "context"))
    assert_as_on_one_rank(found, alone["plain"], replicas)


def test_interleaved_pipeline_equals_one_rank(tiny_yaml: Path, batch: np.ndarray, tmp_path: Path) -> None:
    """PP2 with two chunks a rank: layers 0 and 2 here, 1 and 3 there."""
    base = str(tmp_path / "base.safetensors")
    overrides = ["--megatron.transformer.num_layers=4"]
    run_ranks(1, "save_base", path=tiny_yaml, overrides=overrides, base=base)
    step = {"path": tiny_yaml, "overrides": [*overrides, f"--model.init_from={base}"], "tokens": batch}
    (reference,) = run_ranks(1, "health_jobs.one_step", **step)
    step["overrides"] += ["--parallel.pipeline=2", "--parallel.virtual_pipeline=2"]
    assert_as_on_one_rank(run_ranks(2, "health_jobs.one_step", **step), reference)


def assert_as_on_one_rank(results: list[dict], reference: dict, replicas: int = 1) -> None:
    """All ranks have the same rows, and they are those of one rank; gradients of the parts make the whole."""
    expected = values_of(reference)
    for layer, pairs in reference["attention"].items():  # each replica looks into the first sequence it has
        found = max(naive_logit(*pair) for pair in pairs[:replicas])
        expected[("attention_logit_max", layer, None)] = found
    for found in results:
        assert found["rows"] == results[0]["rows"] and found["scalars"] == results[0]["scalars"]
        values = values_of(found)
        assert values.keys() == expected.keys()
        assert total_norm(values) == pytest.approx(found["grad_norm"], rel=1e-5)
        for key, value in values.items():
            assert value == pytest.approx(expected[key], rel=1e-4, abs=1e-7), key
        n = {(row["metric"], row["layer"]): row["n"] for row in found["rows"]}
        assert n[("expert_load", 0)] == 4 * 160 * TOP_K and n[("router_entropy", 1)] == 4 * 160
        assert n[("attention_logit_max", 1)] == 64 * replicas


def total_norm(values: dict[tuple, float]) -> float:
    return math.hypot(*(value for key, value in values.items() if key[0].startswith("grad_norm")))


@pytest.fixture(scope="module")
def runs(tiny_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """Whole runs on two ranks, as the command makes them."""
    directory, jobs = tmp_path_factory.mktemp("runs"), {}
    for name, more, other in (
        ("on", [], {"monitors": True}),
        ("off", ["--training.health_every=0"], {"monitors": False}),
        ("every third", ["--training.health_every=3"], {"monitors": False}),
        ("bad step", [], {"monitors": False, "break_step": 2}),
    ):
        overrides = ["--parallel.expert=2", f"--dir={directory / name}", *more]
        jobs[name] = ("train", {"path": tiny_yaml, "overrides": overrides, **other})
    ranks = run_ranks(2, "several", jobs=list(jobs.values()))
    return {name: [results[k] for results in ranks] for k, name in enumerate(jobs)}


def test_training_is_bitwise_that_without(runs: dict) -> None:
    for on, off in zip(runs["on"], runs["off"]):
        assert on["losses"] == off["losses"] and on["digest"] == off["digest"]
        assert [step["grad_norm"] for step in on["steps"]] == [step["grad_norm"] for step in off["steps"]]
        assert on["health"] and not off["health"] and "router_entropy" not in off["steps"][0]


def test_rows_are_of_each_step_that_is_due_and_windows_leave_no_trace(runs: dict) -> None:
    on, third = runs["on"][0], runs["every third"][0]
    assert sorted({row["step"] for row in on["health"]}) == list(range(1, 11))
    assert third["health"] == [row for row in on["health"] if row["step"] in (3, 6, 9)]  # with windows and without
    assert ["router_entropy" in step for step in third["steps"]] == [step % 3 == 0 for step in range(1, 11)]
    for step in on["steps"]:
        mine = [row for row in on["health"] if row["step"] == step["step"]]
        assert {(row["tokens"], row["stage"], row["monitor"]) for row in mine} == {
            (step["tokens"], step["stage"], "health")
        }
        load = [row["value"] for row in mine if row["metric"] == "expert_load"]
        assert sum(load) == pytest.approx(LAYERS) and step["max_expert_load"] == pytest.approx(max(load) * EXPERTS)
        assert {row["n"] for row in mine if row["metric"] == "router_entropy"} == {512}


def test_a_skipped_step_keeps_what_is_finite(runs: dict) -> None:
    for found in runs["bad step"]:
        assert found["skipped"][2] and not math.isfinite(found["steps"][2]["grad_norm"])
        bad, good = ([row for row in found["health"] if row["step"] == step] for step in (3, 2))
        lost = [row["metric"] for row in good if row not in bad and not _beside(row, bad)]
        assert len(lost) == 1 and lost[0].startswith("grad_norm")
        assert all(math.isfinite(row["value"]) for row in found["health"])
        assert all(math.isfinite(found["steps"][2][name]) for name in ("router_entropy", "attention_logit_max"))


def _beside(row: dict, others: list[dict]) -> bool:
    """True if one of the others measures the same."""
    keys = ("metric", "layer", "expert")
    return any(all(other[key] == row[key] for key in keys) for other in others)


def test_rows_are_held_back_and_flushed(tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a checkpoint, at a window, at the end, and when there are many."""
    from megatron_lccp.commands.sinks import RunSinks
    from megatron_lccp.config.load import parse_config
    from megatron_lccp.records.store import RunStore
    from megatron_lccp.schema import Row

    def rows(step: int) -> list[Row]:
        common = dict(run="r", config_hash="h", step=step, tokens=step, stage="s", unit="share", n=1)
        return [Row(**common, monitor="health", metric="expert_load", value=0.5, expert=e) for e in range(3)]

    def files() -> list[str]:
        return [path.name for path in RunStore(tmp_path).health_files().values()]

    monkeypatch.setattr(RunSinks, "ROWS_HELD", 8)
    sinks = RunSinks(parse_config(tiny_yaml, [f"--dir={tmp_path}"]), is_main=True)
    sinks.open(0, resumed=False)
    for step in (1, 2):
        sinks.on_step({"step": step}, rows(step))
    assert files() == []
    sinks.flush()
    assert files() == ["health-00000001-00000002.parquet"]
    for step in (3, 4, 5):
        sinks.on_step({"step": step}, rows(step))
    assert files()[1:] == ["health-00000003-00000005.parquet"]
    sinks.on_step({"step": 6}, rows(6))
    sinks.on_window([], 6)
    sinks.on_step({"step": 7}, rows(7))
    sinks.close()
    assert files()[2:] == ["health-00000006-00000006.parquet", "health-00000007-00000007.parquet"]
    assert RunStore(tmp_path).read_rows()["step"].tolist() == [step for step in range(1, 8) for _ in range(3)]
    assert sinks.failure is None


def test_a_negative_interval_is_refused(tiny_yaml: Path) -> None:
    from megatron_lccp.config.load import ConfigError, config_hash, parse_config

    with pytest.raises(ConfigError, match="training.health_every: should be at least 0"):
        parse_config(tiny_yaml, ["--training.health_every=-1"])
    hashes = {config_hash(parse_config(tiny_yaml, [f"--training.health_every={every}"])) for every in (0, 5)}
    assert len(hashes) == 1  # it is watched, not computed
