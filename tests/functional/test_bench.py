"""tools/bench_monitors.py runs and its ways agree, at sizes that say nothing about time."""

from __future__ import annotations

import re

import pytest

from tests.distributed.ranks import tool

SIZES = (
    "--layers 2 --hidden 32 --heads 4 --groups 2 --width 16 --experts 4 --ffn 32 --vocab 200 --repeats 1 --threads 1"
)


def bench(*arguments: str) -> str:
    done = tool("bench_monitors.py", *arguments, *SIZES.split())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "DISAGREE" not in done.stdout and "megatron-core" in done.stdout
    return done.stdout


def test_eager_agrees_and_says_where_it_cannot_run() -> None:
    pytest.importorskip("transformers.models.hunyuan_v1_moe")
    out = bench("eager", *"--lengths 192 1024 --aim-lengths 192 --depths 3 --memory-gb 0.02 --prefill-tok 64".split())
    assert out.count("| 192 |") == 2 and out.count("100.00%") == 2  # one sample, and three depths
    assert re.search(r"\| 1024 \|.*out of memory.*needs", out)


def test_sharing_agrees() -> None:
    out = bench("sharing", *"--longest 1280 --count-longest 65536".split())
    ratios = [float(ratio) for ratio in re.findall(r"branches from one shared prefix \| [\d,]+ \| \*\*([\d.]+)", out)]
    assert len(ratios) == 2 and min(ratios) > 10  # of tokens, at 64K
    assert out.count("prefills") == 2


def test_heads_leave_the_forward_alone() -> None:
    assert bench("heads", "--length", "300").count("0.0e+00") >= 2
