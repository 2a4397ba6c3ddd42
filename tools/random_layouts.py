"""Train the same small model on layouts that are drawn, and say where one is not equal to one rank.

    python tools/random_layouts.py --seed 0 --count 60 --ranks 2 4 8 --record layouts.jsonl

In: a seed, and how many layouts. Of all layouts that the rules accept, draw: uneven pipelines, chunks, experts with
tensor parallelism of their own, context parallelism, replicas, and what goes with them (losses in chunks, dispatcher,
recomputation, overlapped reduction). Out: a line for each layout, which trains two steps and measures every monitor: losses,
gradient norms, training health and all rows are compared with one rank's, at the tolerances of
tests/distributed/test_layouts.py. The record keeps a line for each layout; the same command goes on with those that it
does not have, and the last line counts all that it has. Exit codes: 0 all equal, 1 a difference or a failure, 130
stopped. It needs no GPU; eight ranks take a minute or two on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]  # the ranks and the monitors are those of the tests

from megatron_lccp.config.arguments import OneLineParser, a_count  # noqa: E402

STEPS, SEQUENCES, CONTEXT_TOK = 2, 8, 128
FAMILIES: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "tiny_moe": ((4, 6), ("moe_shared_expert_intermediate_size", "moe_ffn_hidden_size", "num_moe_experts")),
    "tiny_glm45": ((4,), ("moe_shared_expert_intermediate_size", "moe_ffn_hidden_size", "num_moe_experts")),
    "tiny_qwen3_moe": ((6,), ("moe_ffn_hidden_size", "num_moe_experts")),
    "tiny_qwen3": ((6,), ()),
}
"""Family -> how many layers (few models, for each needs a run on one rank), and the fields of size that it takes
besides those that all have. Norm after RoPE and a shared expert; unequal layers and biases; plain; dense."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """One layout of one small model."""

    ranks: int
    model: tuple[str, ...]
    """Overrides that decide what is computed; one rank takes them too."""
    laid_out: tuple[str, ...]
    """Overrides that should change nothing."""
    text: str
    """All of it, for people."""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    from megatron_lccp.parallel import compat, cpu

    compat.quiet()
    cpu.install()  # before the rules import Megatron-Core
    try:
        before = read_record(args.record)
        done = {(one["seed"], one["number"], tuple(one["ranks_from"]), one["megatron_core"]) for one in before}
        with tempfile.TemporaryDirectory() as scratch:
            path = tiny_yaml(Path(scratch))
            run = _Runner(path)
            for number in range(args.count):
                if (args.seed, number, tuple(args.ranks), compat.MEGATRON_VERSION) in done:
                    continue
                layout, start = draw(path, args.seed, number, args.ranks), time.monotonic()
                why = run(layout)
                line = {
                    "seed": args.seed, "number": number, "ranks_from": args.ranks, "megatron_core": compat.MEGATRON_VERSION,
                    "ranks": layout.ranks, "model": layout.model, "laid_out": layout.laid_out, "why": why,
                }  # fmt: skip
                before.append(line)
                if args.record:
                    with args.record.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")
                said = "equal" if why is None else f"DIFFERS: {' '.join(why.split())[:300]}"
                print(f"{number}: {layout.text}: {said}, {time.monotonic() - start:.0f} s", flush=True)
    except (OSError, ValueError) as error:
        print(f"random_layouts: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("random_layouts: stopped; the same command goes on with the record", file=sys.stderr)
        return 130
    wrong = sum(one["why"] is not None for one in before)
    versions = ", ".join(sorted({one["megatron_core"] for one in before}))
    print(f"{len(before)} layouts, Megatron-Core {versions}: {len(before) - wrong} equal one rank, {wrong} do not")
    return 1 if wrong else 0


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="random_layouts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (%(default)s)")
    parser.add_argument("--count", type=a_count, default=60, help="layouts in all (%(default)s)")
    parser.add_argument("--ranks", type=a_count, nargs="+", default=[2, 4, 8], metavar="N", help="to draw from (2 4 8)")
    parser.add_argument("--record", type=Path, help="file of JSON lines to keep and to go on from")
    return parser


def read_record(path: Path | None) -> list[dict[str, Any]]:
    """The layouts of earlier calls. ValueError for a file that is no record."""
    if path is None or not path.exists():
        return []
    try:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert all({"seed", "number", "ranks_from", "megatron_core", "why"} <= one.keys() for one in found)
    except (ValueError, AttributeError, AssertionError) as error:
        raise ValueError(f"--record: {path} is no record of this tool; name another file") from error
    return found


def draw(path: Path, seed: int, number: int, ranks: Sequence[int]) -> Layout:
    """The layout of a number: the same one for a seed, whatever was run before."""
    rng = random.Random(f"{seed}/{number}")
    while True:
        layout = drawn(rng, rng.choice(list(ranks)))
        if not problems_of(path, layout):
            return layout


def tiny_yaml(directory: Path) -> Path:
    """The tests' tiny configuration with one stage of two sources; its updates are no signs of gradients, which would
    turn the last bit of a sum into a weight."""
    import yaml

    from tests.tiny import tiny_tree

    tree = tiny_tree(directory)
    stage = tree["stages"].pop("lccp") and tree["stages"]["base"]
    stage |= {"warmup_tokens": 0, "lr": 0.01, "context_tok": CONTEXT_TOK, "global_batch_tok": SEQUENCES * CONTEXT_TOK}
    stage["mixture"] = {"both": {"sources": {"code": 2.0, "people": 1.0}}}
    tree |= {"optimizer": {"eps": 0.01}, "model": {"family": "tiny_moe", "vocab_multiple": 64}}
    del tree["megatron"]
    path = directory / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def drawn(rng: random.Random, ranks: int) -> Layout:
    """A layout on so many ranks, which the rules may refuse."""
    family = rng.choices(list(FAMILIES), (4, 2, 2, 2))[0]
    layers, heads, groups = rng.choice(FAMILIES[family][0]), 8, 4
    sizes = {
        "num_layers": layers, "hidden_size": 64, "num_attention_heads": heads, "num_query_groups": groups,
        "kv_channels": 8, "ffn_hidden_size": 64, "init_method_std": 0.1,
    }  # fmt: skip
    sizes |= {name: 8 if name == "num_moe_experts" else 64 for name in FAMILIES[family][1]}
    micro_batch = rng.choice((1, 2, 2))
    parallel: dict[str, Any] = {"pipeline": rng.choice(divisors(ranks))}
    in_stage = ranks // parallel["pipeline"]
    parallel["tensor"] = rng.choice(divisors(in_stage))
    parallel["context"] = rng.choice(divisors(in_stage // parallel["tensor"]))
    if "num_moe_experts" in sizes:
        parallel["expert"] = rng.choice(divisors(in_stage))
        if rng.random() < 0.5:
            parallel["expert_tensor"] = rng.choice(divisors(in_stage // parallel["expert"]))
    if parallel["pipeline"] > 1 and rng.random() < 0.4:
        parallel["virtual_pipeline"] = rng.choice((2, 2, 3))
    beside: dict[str, Any] = {}
    if parallel["pipeline"] > 1:
        for which in ("first", "last"):
            if rng.random() < 0.4:
                beside[f"megatron.transformer.num_layers_in_{which}_pipeline_stage"] = rng.randint(
                    1, max(1, layers - 1)
                )
    if rng.random() < 0.25:
        beside["training.loss_chunk_tok"] = 12
    if rng.random() < 0.25 and "num_moe_experts" in sizes:
        beside["megatron.transformer.moe_token_dispatcher_type"] = "allgather"
    if rng.random() < 0.2:
        beside["megatron.transformer.recompute_granularity"] = "full"
        beside |= {"megatron.transformer.recompute_method": "uniform", "megatron.transformer.recompute_num_layers": 1}
    if rng.random() < 0.25:
        beside |= {"megatron.ddp.overlap_grad_reduce": "true", "megatron.ddp.overlap_param_gather": "true"}
        beside["megatron.optimizer.overlap_param_gather"] = "true"
    model = {"model.family": family, **{f"megatron.transformer.{name}": value for name, value in sizes.items()}}
    model["stages.base.micro_batch"] = micro_batch
    short = {"tensor": "TP", "pipeline": "PP", "context": "CP", "expert": "EP", "expert_tensor": "ETP",
             "virtual_pipeline": "VPP"}  # fmt: skip
    laid = " ".join(f"{short[name]}{size}" for name, size in parallel.items() if size > 1 or name == "expert_tensor")
    more = " ".join(f"{name.rpartition('.')[2]}={value}" for name, value in beside.items())
    experts = f", {sizes['num_moe_experts']} experts" if "num_moe_experts" in sizes else ""
    shape = (
        f"{family}, {layers} layers, {heads}/{sizes['num_query_groups']} heads{experts}, {micro_batch} a micro-batch"
    )
    return Layout(
        ranks, tuple(f"--{name}={value}" for name, value in model.items()),
        tuple(f"--{name}={value}" for name, value in ({f"parallel.{k}": v for k, v in parallel.items()} | beside).items()),
        " ".join(f"{ranks} ranks, {laid or 'DP'} {more} ({shape})".split()),
    )  # fmt: skip


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def problems_of(path: Path, layout: Layout) -> list[str]:
    """What the rules have against a layout, before anything starts."""
    from megatron_lccp.config.load import ConfigError, parse_config
    from megatron_lccp.config.rules import layout_problems
    from megatron_lccp.model.build import passthrough_problems, refused_by_megatron
    from megatron_lccp.model.resolved import resolve
    from megatron_lccp.parallel.compat import MEGATRON_VERSION

    try:
        config = parse_config(path, [*layout.model, *layout.laid_out])
    except ConfigError as error:
        return str(error).splitlines()
    model = resolve(config)
    found = layout_problems(config, layout.ranks, model.fields, MEGATRON_VERSION) + passthrough_problems(config, model)
    return found or refused_by_megatron(config, model)


class _Runner:
    """Runs layouts beside one rank, of which it keeps what a model gave."""

    def __init__(self, path: Path):
        self._path, self._scratch = path, path.parent
        self._one_rank = functools.cache(self._reference)

    def __call__(self, layout: Layout) -> str | None:
        """What differs, or how it failed; None if nothing does."""
        base, reference = self._one_rank(layout.model)
        try:
            overrides = [*layout.model, *layout.laid_out, base]
            for rank, found in enumerate(self._run(layout.ranks, "trained", overrides, share=True)):
                compare(found, reference, f"rank {rank}")
        except AssertionError as error:  # a rank failed, or a number is another
            return str(error) or "AssertionError"
        return None

    def _reference(self, model: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
        from megatron_lccp.config.load import parse_config
        from megatron_lccp.data.prepare import prepare

        prepare(parse_config(self._path), say=lambda text: None)  # the first time
        weights = self._scratch / f"base{len(list(self._scratch.glob('base*')))}.safetensors"
        base = f"--model.init_from={weights}"
        more = {"model": list(model), "base": str(weights)}
        return base, self._run(1, "reference", [*model, base], share=False, **more)[0]

    def _run(self, ranks: int, job: str, overrides: Sequence[str], share: bool, **more: Any) -> list[dict[str, Any]]:
        from tests.distributed.ranks import run_ranks
        from tests.suite import small_suite

        with tempfile.TemporaryDirectory(dir=self._scratch, prefix=job) as run:
            every = [*overrides, f"--training.steps={STEPS}", f"--dir={run}", small_suite(share)]
            return run_ranks(ranks, f"layout_jobs.{job}", 1800.0, path=self._path, overrides=every, **more)


def compare(found: Mapping[str, Any], reference: Mapping[str, Any], where: str) -> None:
    """AssertionError that names the first number that differs beyond the order of FP32 sums."""
    import pytest

    from tests.distributed.test_layouts import GRADIENT_TOLERANCE, VALUE_TOLERANCE, assert_rows_equal

    assert found["events"] == reference["events"] == [], f"{where}: {found['events']}"
    for name, tolerance in (("losses", VALUE_TOLERANCE), ("grad_norms", GRADIENT_TOLERANCE)):
        near = pytest.approx(reference[name], rel=tolerance)
        assert found[name] == near, f"{where}: {name} {found[name]}, on one rank {reference[name]}"
    for ours, theirs in _health_pairs(found["health"], reference["health"], where):
        near = pytest.approx(theirs["value"], rel=GRADIENT_TOLERANCE, abs=VALUE_TOLERANCE)
        assert ours["value"] == near, f"{where}: {ours}, on one rank {theirs['value']}"
    assert_rows_equal(found["rows"], reference["rows"], where)


def _health_pairs(
    found: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]], where: str
) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    # the largest logit is of a sequence of each replica, by its definition (megatron_lccp/training/health.py)
    found, reference = ([row for row in of if row["metric"] != "attention_logit_max"] for of in (found, reference))
    assert len(found) == len(reference), f"{where}: {len(found)} rows of training health, {len(reference)} on one rank"
    for ours, theirs in zip(found, reference):
        there = {**theirs, "config_hash": ours["config_hash"], "value": ours["value"]}
        assert ours == there, f"{where}: {ours}, on one rank {theirs}"
        yield ours, theirs


if __name__ == "__main__":
    sys.exit(main())
