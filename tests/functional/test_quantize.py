"""tools/quantize_checkpoint.py: what is rounded, to what, and what `lccp measure` then finds, on one rank and two."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from tests.distributed.ranks import ROOT, run_ranks
from tests.distributed.test_layouts import assemble
from tests.functional.test_main_job import rows
from tests.tiny import MONITORS, tiny_tree

pytestmark = pytest.mark.skipif(find_spec("modelopt") is None, reason="needs nvidia-modelopt")

BASE = ROOT / "examples/tiny_moe/base.safetensors"  # a model that has learned something
SEQUENCES = 8
LINEARS = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny example's model and tokenizer on little data, and monitors of everything that a user would compare."""
    from megatron_lccp.config.load import parse_config
    from megatron_lccp.data.prepare import prepare

    directory = tmp_path_factory.mktemp("quantize")
    tree = tiny_tree(directory)
    needles = {"every": {"steps": 1}, "haystacks": ["people"], "depths": [0.25, 0.75]}
    grid = {**needles, "lengths_tok": [96, 192], "samples": 3, "lattice_tok": 16}
    heads = {**needles, "lengths_tok": [128], "samples": 2, "scores": ["retrieval_score", "needle_mass"]}
    parts = [
        ("CorpusPPL", {"every": {"steps": 1}, "length_tok": 256, "sequences": 2}),
        ("NeedleGrid", grid),
        ("NeedleGrid", grid | {"share": False, "scores": ["needle_mass"]}),  # the same samples, a forward for each
        ("RetrievalHeads", heads),
    ]
    tree |= {
        "model": {"family": "tiny_moe"},
        "megatron": {},
        "data": tree["data"] | {"tokenizer": {"path": str(ROOT / "examples/tiny_moe/tokenizer.model")}},
        "stages": {"lccp": tree["stages"]["lccp"] | {"context_tok": 256, "rope_base": 1e5}},
        "monitors": [{"class_path": f"{MONITORS}.{k}", "init_args": v} for k, v in parts],
    }
    path = directory / "example.yaml"
    path.write_text(yaml.safe_dump(tree))
    prepare(parse_config(path), say=lambda text: None)
    return path


@pytest.fixture(scope="module")
def one_rank(config: Path) -> dict:
    """Everything on one rank: quantized, measured before and after, then what must be refused."""
    here = config.parent
    quantize = ("quantize", str(config), f"--calibrate={SEQUENCES}")
    measure = ("measure", str(config))
    calls = {
        "quantize": (*quantize, f"--checkpoint={BASE}", f"--out={here / 'fp8'}"),
        "before": (*measure, f"--checkpoint={BASE}", f"--out={here / 'before'}"),
        "after": (*measure, f"--checkpoint={here / 'fp8'}", f"--out={here / 'after'}"),
        "out exists": (*quantize, f"--checkpoint={BASE}", f"--out={here / 'fp8'}"),
        "twice": (*quantize, f"--checkpoint={here / 'fp8'}", f"--out={here / 'x'}"),
        "no checkpoint": (*quantize, f"--out={here / 'x'}"),
        "no modelopt": ("quantize without modelopt", *quantize[1:], f"--checkpoint={BASE}", f"--out={here / 'x'}"),
        "no modelopt to measure": (
            "measure without modelopt", str(config), f"--checkpoint={here / 'fp8'}", f"--out={here / 'y'}"
        ),
    }  # fmt: skip
    then = {"path": config, "overrides": [], "before": BASE, "after": here / "fp8", "sequences": SEQUENCES}
    result = run_ranks(1, "quantize_jobs.commands", calls=list(calls.values()), then=then)[0]
    return {"said": dict(zip(calls, result["found"])), "here": here, **result["inside"]}


@pytest.fixture(scope="module")
def scales(one_rank: dict) -> dict:
    """What checkpoint.json says of the quantization."""
    (path,) = (one_rank["here"] / "fp8").glob("step-*/checkpoint.json")
    return json.loads(path.read_text())["about"]["quantization"]


def e4m3(x: np.ndarray) -> np.ndarray:
    """The nearest numbers of FP8 E4M3, ties to even: 3 bits of mantissa, exponents from -6, at most 448."""
    exponent = np.maximum(np.floor(np.log2(np.maximum(np.abs(x), 2.0**-40))), -6)
    step = 2.0 ** (exponent - 3)
    return np.clip(np.rint(x / step) * step, -448, 448)


def test_linears_and_experts_hold_fp8_and_the_rest_is_untouched(one_rank: dict, scales: dict) -> None:
    before, after = (assemble(one_rank[name]) for name in ("before", "after"))
    rounded = 0
    for key, tensor in before.items():
        if not any(f"{name}.weight" in key for name in LINEARS):
            np.testing.assert_array_equal(after[key], tensor, err_msg=key)
            continue
        name = key.removeprefix("decoder.layers.").removesuffix(".weight").replace("experts.experts", "experts")
        for place in np.ndindex(tensor.shape[:-2]):  # layer, and expert
            expert = name.replace("mlp.experts", f"mlp.experts.{place[1]}") if len(place) > 1 else name
            amax = scales["weight_amax"][f"decoder.layers.{place[0]}.{expert}"]
            weight, found = (w[key][place].astype(np.float64) for w in (before, after))
            assert amax == np.abs(weight).max()
            on_grid, nearest = (e4m3(w * 448 / amax) * amax / 448 for w in (found, weight))
            np.testing.assert_allclose(found, on_grid, rtol=1e-6, err_msg=key)
            # bf16 weights meet exact ties, on either side of which the scale's own rounding may put them
            assert (np.abs(found - weight) <= np.abs(nearest - weight) + 1e-6 * np.abs(weight)).all(), key
            assert len(np.unique(found)) <= 253 < len(np.unique(weight))
            rounded += 1
    assert rounded == len(scales["weight_amax"]) == 2 * (2 + 2 + 8 * 2)  # layers x (attention, shared expert, experts)
    kept = {key for key in before if not any(f"{name}.weight" in key for name in LINEARS)}
    assert {"embedding.word_embeddings.weight", "decoder.layers.mlp.router.weight"} <= kept
    assert sum("norm" in key for key in kept) == 5  # of attention, query, key, MLP; and the last one


def test_scales_and_results_are_those_of_modelopts_own_way(one_rank: dict, scales: dict) -> None:
    """mtq.quantize on the whole model, with quantized weights and inputs, against scales read back from JSON."""
    expert = re.compile(r"local_experts\.(\d+)\.")
    for name, amax in one_rank["amax"].items():
        linear, _, kind = name.rpartition(".")
        if kind == "weight_quantizer":
            assert scales["weight_amax"][expert.sub(r"\1.", linear)] == amax, name
        else:  # one scale for the experts of a layer
            assert kind == "input_quantizer" and scales["input_amax"][expert.sub("", linear)] == amax, name
    assert len(one_rank["amax"]) == 2 * len(scales["weight_amax"])
    np.testing.assert_allclose(one_rank["ours"], one_rank["theirs"], atol=1e-6)


def test_measuring_finds_another_model_but_not_a_very_different_one(one_rank: dict) -> None:
    said, here = one_rank["said"], one_rank["here"]
    assert [said[name][0] for name in ("quantize", "before", "after")] == [0, 0, 0], said
    before, after = rows(here / "before"), rows(here / "after")
    assert set(before.run) == {"tiny"} and set(after.run) == {"tiny-fp8"}
    same = ["monitor", "metric", "length_tok", "depth_cell", "layer", "head", "corpus", "sample", "sample_set"]
    pd.testing.assert_frame_equal(before[same], after[same])
    for metric, low, high in [("answer_nll", 1e-3, 0.5), ("nll", 1e-4, 0.1), ("needle_mass", 1e-4, 0.1)]:
        change = np.abs(after.value - before.value)[before.metric == metric]
        assert low < change.max() < high, (metric, change.max())


def test_shared_prefills_stay_exact(one_rank: dict) -> None:
    after = rows(one_rank["here"] / "after")
    both = after[(after.monitor == "NeedleGrid") & (after.metric == "answer_nll")]
    shared, alone = both[: len(both) // 2], both[len(both) // 2 :]
    assert (shared["sample"].to_numpy() == alone["sample"].to_numpy()).all() and len(shared) == 2 * 2 * 3
    before = rows(one_rank["here"] / "before")
    change = np.abs(shared.value - before.value[shared.index])
    assert np.abs(shared.value.to_numpy() - alone.value.to_numpy()).mean() < 0.02 * change.mean()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("out exists", "exists and is not empty; name another directory"),
        ("twice", "is quantized already"),
        ("no checkpoint", "/run/checkpoints is neither a checkpoint"),
        ("no modelopt", "needs nvidia-modelopt; pip install nvidia-modelopt"),
        ("no modelopt to measure", "needs nvidia-modelopt; pip install nvidia-modelopt"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(call: str, words: str, one_rank: dict) -> None:
    code, said = one_rank["said"][call]
    assert code == 2 and words in said and said.count("\n") == 1, said
    assert not {"x", "y"} & {path.name for path in one_rank["here"].iterdir()}


@pytest.mark.parametrize("sizes", [["tensor=2", "expert=2", "expert_tensor=1"], ["pipeline=2"]], ids=["TP2xEP2", "PP2"])
def test_two_ranks_equal_one(sizes: list[str], config: Path, one_rank: dict, scales: dict, tmp_path: Path) -> None:
    """Quantized and measured on two ranks; TP with EP is what ModelOpt's own quantized experts refuse."""
    here, layout = one_rank["here"], [f"--parallel.{size}" for size in sizes]
    quantize = ("quantize", str(config), f"--checkpoint={BASE}", *layout)
    calls = [
        (*quantize, f"--calibrate={SEQUENCES}", f"--out={tmp_path / 'fp8'}"),
        ("measure", str(config), f"--checkpoint={tmp_path / 'fp8'}", f"--out={tmp_path / 'after'}", *layout),
    ]
    calls += [(*quantize, "--calibrate=3", f"--out={tmp_path / 'x'}")] * (sizes == ["pipeline=2"])
    done = run_ranks(2, "quantize_jobs.commands", calls=calls)[0]["found"]
    assert [code for code, _ in done[:2]] == [0, 0], done
    assert all(code == 2 and "3 sequences do not divide over 2" in said for code, said in done[2:]), done
    (path,) = (tmp_path / "fp8").glob("step-*/checkpoint.json")
    there = json.loads(path.read_text())["about"]["quantization"]
    assert there["weight_amax"] == scales["weight_amax"]
    assert there["input_amax"] == pytest.approx(scales["input_amax"], rel=1e-5)
    found, (before, after) = rows(tmp_path / "after"), (rows(here / name) for name in ("before", "after"))
    change = np.abs(after.value - before.value).mean()
    assert np.abs(found.value - after.value).mean() < 0.05 * change


def test_comparison_says_what_the_rows_say(one_rank: dict) -> None:
    from megatron_lccp.analysis.report.compare import compare

    here = one_rank["here"]
    lines = {line.label: line for line in compare(here / "before", here / "after").changes}
    before, after = (rows(here / name) for name in ("before", "after"))
    for frame, value in (
        (before, lines["answer PPL, NeedleGrid"].before),
        (after, lines["answer PPL, NeedleGrid"].after),
    ):
        nll = frame[(frame.monitor == "NeedleGrid") & (frame.metric == "answer_nll")].value
        assert value == f"{np.exp(nll.mean()):.4g}"
    scores = [
        frame[frame.metric == "retrieval_score"].groupby(["layer", "head"]).value.mean() for frame in (before, after)
    ]
    assert lines["retrieval heads"].before == str((scores[0] > 0.1).sum())
    assert f"{(scores[1] - scores[0]).abs().max():.3f}" in lines["retrieval heads"].note
    with pytest.raises(ValueError, match="not a run directory"):
        compare(here / "before", here / "fp8")
