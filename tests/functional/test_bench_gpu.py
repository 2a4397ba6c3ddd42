"""tools/bench_gpu.py: its arithmetic, and that it runs, at sizes that say nothing about time."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

from tests.distributed.ranks import ROOT, tool

TINY = "--device cpu --family tiny_moe --experts 4 --lengths 128 256 --steps 1 --warm-up 0 --loss-chunk-tok 100".split()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("bench_gpu")


@pytest.fixture
def sizes() -> ModuleType:
    return importlib.import_module("megatron_lccp.planning.bench_sizes")


def test_it_runs_on_a_cpu(tmp_path: Path) -> None:
    done = tool("bench_gpu.py", *TINY, "--memory-gib", "1", "--json", str(tmp_path / "found.json"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    rows = found["rows"]
    assert [(r["way"], r["length"], r["routing"]) for r in rows] == [
        ("portable", length, routing) for length in (128, 256) for routing in ("natural", "balanced")
    ]
    assert found["options"]["layers"] == 2 and "2 of 2 layers, 4 of 8 experts" in done.stdout
    assert done.stdout.count("| portable |") == 4 and "causal pairs = length" in done.stdout
    for row in rows:
        assert row["step_s"] > 0 and row["tflops"] == pytest.approx(row["flops"] / row["step_s"] / 1e12)
        assert 1 <= row["max_expert_load"] <= 2  # of 4 experts, two for each token
        assert (row.get("heads_over_forward") is not None) == (row["length"] == 256 and row["routing"] == "natural")
    # 6 x active parameters x tokens, 12 x layers x width x pairs, 6 x hidden x vocabulary x tokens; 512 tokens
    h, kv, ffn = 128, 64, 128
    active = 2 * (h * (2 * h + 2 * kv) + 3 * h * (2 * ffn + 256) + 4 * h)
    for length, row in ((128, rows[0]), (256, rows[2])):
        pairs = 512 // length * sum(range(1, length + 1))
        assert row["flops"] == 6 * active * 512 + 12 * 2 * h * pairs + 6 * h * 2048 * 512


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["no GPU is here", "--device cpu"]),
        (["--device", "cpu", "--ways", "te-delayed"], ["te-delayed", "needs a GPU"]),
        (["--device", "cpu", "--family", "tiny_mo"], ["tiny_mo", "tiny_moe"]),
        (["--device", "cpu", "--lengths", "300", "512"], ["300", "--batch-tok 1024"]),
        (["--device", "cpu", "--experts", "4"], ["4 is less than the 8"]),
        (["--device", "cpu", "--family", "tiny_moe", "--experts", "9"], ["9 is more than the 8 of tiny_moe"]),
        (["--device", "cpu", "--memory-gib", "2"], ["not one layer fits", "--experts"]),
    ],
)
def test_what_it_refuses(bench: ModuleType, arguments: list[str], words: list[str], capsys) -> None:
    import torch

    if torch.cuda.is_available() and not arguments:
        pytest.skip("a GPU is here")
    assert bench.main(arguments) == 2
    said = capsys.readouterr()
    assert not said.out and len(said.err.splitlines()) == 1, said.err
    assert all(word in said.err for word in words), said.err


def test_as_many_layers_as_fit(bench: ModuleType, sizes: ModuleType) -> None:
    """More memory or fewer experts give more layers, one layer more would not fit, and 64K is what limits."""

    def fit(memory_gib: float, experts: int, lengths: list[int]) -> int:
        options = bench.options().parse_args(["--experts", str(experts)])
        options.memory_gib, options.lengths, options.ways = memory_gib, lengths, list(sizes.WAYS)
        options.batch_tok = 2 * max(lengths)
        options.layers = sizes.fit_layers(options)
        found = options.layers
        for layers, fits in ((found, True), (found + 1, False)):
            options.layers = layers
            most = max(sizes.estimate_bytes(way, max(lengths), options) for way in options.ways)
            assert (most <= sizes.SPARE * memory_gib * sizes.GIB) is fits or layers == 0
        return found

    assert fit(79, 64, [65536]) == 0 and fit(139, 64, [65536]) >= 1
    assert fit(79, 8, [65536]) >= 2 and fit(79, 8, [8192]) > fit(79, 8, [65536]) >= fit(79, 16, [65536]) >= 1


def test_fp8_copies_are_counted_once(bench: ModuleType, sizes: ModuleType) -> None:
    """A byte a value and one for its transpose, of all matrices of the layers but the router."""
    options = bench.options().parse_args(["--family", "tiny_moe", "--device", "cpu", "--lengths", "256"])
    assert bench.refusal(options) is None and options.experts == 8
    options.layers = 2
    more = sizes.estimate_bytes("te-tensorwise", 256, options) - sizes.estimate_bytes("te", 256, options)
    h, kv, ffn = 128, 64, 128
    assert more == 2 * 2 * (h * (2 * h + 2 * kv) + 3 * h * (8 * ffn + 256))


def test_ratios_and_verdicts_are_within_a_length_and_a_routing(bench: ModuleType) -> None:
    def row(way: str, routing: str, length: int, step_s: float, **more) -> dict:
        about = {"tokens_per_s": 1.0, "tflops": 400 / step_s, "mfu": 0.5 / step_s, "peak_bytes": 2**30}
        return {
            "way": way, "routing": routing, "length": length, "step_s": step_s, **about, "estimate_bytes": 2.0**30,
            "max_expert_load": None, **more,
        }  # fmt: skip

    rows = [
        row("portable", "natural", 65536, 2.0), row("te", "natural", 65536, 1.0, heads_over_forward=0.02),
        row("te", "balanced", 65536, 0.8), row("te-blockwise", "natural", 65536, 0.8),
        row("te-blockwise", "balanced", 65536, 0.75),
        {"way": "te-delayed", "routing": "natural", "length": 65536, "failed": "out of memory"},
    ]  # fmt: skip
    options = bench.options().parse_args([])
    text = bench.table(rows, options)
    assert [r.get("over_portable") for r in rows[:3]] == [1.0, 2.0, None]
    assert rows[3]["over_te"] == pytest.approx(1.25) and rows[4]["over_te"] == pytest.approx(0.8 / 0.75)
    assert "met: te-blockwise, natural, 65,536 tokens: 1.25x BF16" in text
    assert "MISSED: te-blockwise, balanced, 65,536 tokens: 1.07x BF16" in text
    assert "met: te, natural, 65,536 tokens: MFU 50.0%" in text and "MISSED: te, natural" in text and "+2.00%" in text
    assert "| te-delayed | natural | 65536 | out of memory |" in text
