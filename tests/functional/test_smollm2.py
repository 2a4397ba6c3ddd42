"""A model that people know, SmolLM2-135M-Instruct: both engines against eager transformers, and a copy that went through
conversion, training and export."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import yaml

from tests.distributed.ranks import lccp, run_ranks, tool
from tests.smollm2 import smollm2

pytestmark = pytest.mark.once  # it takes a minute; both Megatron-Cores are compared on small models
pytest.importorskip("transformers")
pytest.importorskip("gguf")
pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The model converted, trained for two steps and exported; and what each way of running it says."""
    folder, work = smollm2(), tmp_path_factory.mktemp("smollm2")
    converted = tool("convert_checkpoint.py", "to-megatron", str(folder), str(work / "base.safetensors"))
    assert converted.returncode == 0, converted.stderr
    tree = yaml.safe_load(converted.stdout)
    source = {"class_path": "megatron_lccp.data.sources.PythonStdlib", "init_args": {"max_bytes": 60_000}}
    tree["data"] |= {"dir": str(work / "tokens"), "sources": {"code": source}, "heldout_share": 0.1}
    stage = {"tokens": 256, "context_tok": 64, "global_batch_tok": 128, "rope_base": 1e5, "lr": 1e-5}
    tree |= {
        "name": "smollm2", "dir": str(work / "run"), "training": {"precision": "fp32", "health_every": 0},
        "stages": {"lccp": {**stage, "mixture": {"all": {"sources": {"code": 1.0}}}}}, "wandb": {"mode": "disabled"},
        "monitors": [],
    }  # fmt: skip
    (config := work / "smollm2.yaml").write_text(yaml.safe_dump(tree))
    for command in ("prepare", "train"):
        done = lccp(command, str(config))
        assert done.returncode == 0, done.stderr
    (checkpoint,) = (work / "run/checkpoints").glob("step-*")
    done = tool("convert_checkpoint.py", "to-hf", str(checkpoint), str(work / "exported"), "--tokenizer", str(folder))
    assert done.returncode == 0, done.stderr
    (found,) = run_ranks(
        1,
        "smollm2_jobs.compare",
        timeout_s=500,
        folder=str(folder),
        config=str(config),
        exported=str(work / "exported"),
    )
    return found


@pytest.mark.parametrize("engine", ["hf", "megatron"])
def test_both_engines_say_what_eager_attention_says(compared: dict[str, Any], engine: str) -> None:
    """Losses, best tokens, and of all 270 heads where they look and how much of it lies on the needle."""
    looked = 0
    for number, (sample, eager) in enumerate(zip(compared["samples"], compared["eager"], strict=True)):
        one = compared[engine][number]
        np.testing.assert_allclose(one.nll_r, eager["nll_r"], atol=2e-5)
        assert np.array_equal(one.best_r, eager["best_r"])
        np.testing.assert_allclose(one.look.answer_mass_LN, eager["answer_mass_LN"], atol=2e-5)
        np.testing.assert_allclose(one.look.question_mass_LN, eager["question_mass_LN"], atol=2e-5)
        np.testing.assert_allclose(one.null_mass_LN, eager["null_mass_LN"], atol=2e-5)
        weight_LNrt, position_LNr = eager["answer_LNrt"], one.look.position_LNr
        assert position_LNr.shape == (30, 9, len(sample.content))
        here = np.take_along_axis(weight_LNrt, position_LNr[..., None].astype(int), axis=-1)[..., 0]
        assert (here >= weight_LNrt.max(-1) - 1e-5).all(), "another position only where the two weigh alike"
        looked += ((position_LNr >= sample.needle[0]) & (position_LNr < sample.needle[1])).sum()
    assert looked > 100, "a real model looks at the needle"


def test_it_finds_the_needle(compared: dict[str, Any]) -> None:
    for number, sample in enumerate(compared["samples"]):
        assert compared["hf"][number].nll_r[sample.content].mean() < 0.5


def test_a_copy_that_was_trained_and_exported_is_the_same_model_but_for_two_steps(compared: dict[str, Any]) -> None:
    assert (compared["moved"] > 0).mean() > 0.9 and compared["moved"].max() < 1e-4
    for number in range(len(compared["samples"])):
        whole, trained = compared["hf"][number].nll_r, compared["trained"][number].nll_r
        assert 0 < np.abs(whole - trained).max() and abs(whole.mean() - trained.mean()) < 0.1
