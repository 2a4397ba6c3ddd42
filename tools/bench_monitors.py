"""What the monitors cost, against the naive ways to measure the same: tables of ratios, each taken within one run.

    python tools/bench_monitors.py eager      # scores and answer loss: full attention matrices, or rows
    python tools/bench_monitors.py sharing    # needle grids: a forward for each cell, or prefills that cells share
    python tools/bench_monitors.py heads      # head scores on top of a forward that has none

In: sizes (`--help`), nothing else: weights and token ids are drawn from a seed. Out: markdown on stdout, progress on
stderr; exit code 1 if two ways disagree on what they measure. A time is the best of several repeats. Extra memory is
how far resident memory rises over its level before the measurement, in a process of its own, after a warm-up at 128
tokens (VmHWM of /proc/self/status, reset through /proc/self/clear_refs): without model and interpreter.
Samples and models are in bench_models.py, what takes times and memory in bench_ways.py.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from bench_models import WARM_UP_TOK, Ours, flat, grid_cells
from bench_ways import best_of, point, say

from megatron_lccp.data.needles import Cell, NeedleSample
from megatron_lccp.measuring.prefills import Prefill, one_each, shared, tokens_of
from megatron_lccp.planning.bench_samples import NEEDLE_TOK, QUESTION_TOK, sample_of, samples_for

SCORES = ("retrieval_score", "content_score", "needle_mass")
NLL_TOLERANCE, SCORE_TOLERANCE, SHARING_TOLERANCE = 1e-3, 1e-3, 1e-4
CELLS_WITH_TIES = 0.05
"""Share of cells that may differ by more than the tolerance: rounding sends a token whose second and third expert tie
either way, and every cell that holds the token sees it. With --topk equal to --experts there is nothing to tie."""
PRELOADED = (
    "megatron_lccp.model.build", "megatron_lccp.model.families", "megatron_lccp.measuring.head_scores",
    "transformers.models.hunyuan_v1_moe.modeling_hunyuan_v1_moe",
)  # fmt: skip
"""Imported once for all measurements of `eager`."""
TIE = 1e-3
"""Two positions are one tie if their attention differs by less than this share of it."""


def main() -> int:
    """Run one benchmark."""
    o = options().parse_args()
    os.environ["OMP_NUM_THREADS"] = str(o.threads)  # before torch is imported
    print(f"## {o.benchmark}\n\n{environment(o)}\n", flush=True)
    return {"eager": eager, "sharing": sharing, "heads": heads}[o.benchmark](o)


def options() -> argparse.ArgumentParser:
    """The command line."""
    common = argparse.ArgumentParser(add_help=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    sizes = common.add_argument_group("model (Hunyuan's mixture of experts with one shared expert)")
    for name, default, text in [
        ("layers", 4, "layers"), ("hidden", 256, "hidden size"), ("heads", 8, "query heads"),
        ("groups", 2, "key/value heads"), ("width", 64, "width of a head"), ("experts", 8, "experts"),
        ("topk", 2, "experts for a token"), ("ffn", 256, "inner size of an expert and of the shared one"),
        ("vocab", 4096, "vocabulary"),
    ]:  # fmt: skip
        sizes.add_argument(f"--{name}", type=int, default=default, help=text)
    more = common.add_argument_group("measuring")
    more.add_argument("--seed", type=int, default=1234, help="seed of weights and tokens")
    more.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of torch")
    more.add_argument("--repeats", type=int, default=3, help="repeats, of which the fastest counts")
    more.add_argument("--seconds", type=float, default=60.0, help="no further repeat of one thing after so long")
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog="Each benchmark has its own --help.", allow_abbrev=False
    )
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)

    def benchmark(name: str, text: str) -> argparse.ArgumentParser:
        return benchmarks.add_parser(
            name, help=text, description=text, parents=[common], allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )  # fmt: skip

    sub = benchmark("eager", "Head scores and answer loss of one sample, against transformers' eager attention.")
    lengths = [1024, 2048, 4096, 8192, 16384, 32768, 65536]
    sub.add_argument("--lengths", type=int, nargs="+", default=lengths, help="tokens of the sample")
    sub.add_argument("--memory-gb", type=float, default=16.0, help="eager attention is not run if it needs more")
    sub.add_argument("--aim-lengths", type=int, nargs="*", default=[4096, 8192], help="lengths the aim is for")
    sub.add_argument("--depths", type=int, default=11, help="depths of the second table (1: no such table)")
    sub.add_argument("--prefill-tok", type=int, help="ours in prefills of so many tokens (None: of the longest sample)")
    sub = benchmark(
        "sharing", "Needle grids by a forward for each cell, one for each before, and from one shared prefix."
    )
    sub.add_argument("--longest", type=int, default=4096, help="longest sample; the lattice is 1/16 of it")
    sub.add_argument("--count-longest", type=int, default=65536, help="count tokens, without forwards, for this too")
    sub.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the model")
    sub.add_argument("--tolerance", type=float, default=SHARING_TOLERANCE, help="answer losses may differ by this, nat")
    sub = benchmark("heads", "Head scores of one sample, over the same forward without them.")
    sub.add_argument("--length", type=int, default=16384, help="tokens of the sample")
    sub.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the model")
    return parser


def environment(o: argparse.Namespace) -> str:
    """What the numbers were taken on."""
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "?")
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core"))
    load = os.getloadavg()[0]
    if load > 0.3:
        say(f"the load is {load:.1f}: other work takes CPU time from this, so times and their ratios will be off")
    return (
        f"{cpu}, {os.cpu_count()} CPUs, {ram:.0f} GiB; load {load:.1f} at the start; {o.threads} threads; "
        f"{getattr(o, 'dtype', 'fp32')}; {libraries}; best of {o.repeats} repeats, none begun after {o.seconds:g} s.\n"
        f"Model: {o.layers} layers of {o.hidden}, {o.heads} heads in {o.groups} groups of {o.width}, {o.experts} "
        f"experts of {o.ffn}, {o.topk} for a token, one shared; vocabulary {o.vocab}; weights drawn from seed {o.seed}."
    )


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A markdown table; numbers to the right."""
    print("| " + " | ".join(head) + " |")
    print("|" + "|".join("---" if k == 0 else "---:" for k in range(len(head))) + "|")
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |")
    print(flush=True)


def verdict(text: str, met: bool) -> None:
    """An aim and whether this run reached it."""
    print(f"- {text}: {'reached' if met else 'NOT REACHED'}", flush=True)


# --- eager: a process for each measurement ---


def eager(o: argparse.Namespace) -> int:
    """Time and extra memory by length, both ways and the bare forward: of one sample, then of several depths."""
    limit = f"of at most {o.prefill_tok} tokens" if o.prefill_tok else "as long as the longest sample"
    print(
        f"Eager: transformers {version('transformers')}, eval mode, no gradients, no cache; one forward a sample "
        "with output_attentions=True and all logits;\nscores and answer loss are read off those. Ours: the same "
        f"weights and samples, rows scored beside the fused kernel, in prefills {limit}.\nForward: ours, without "
        "scores, in prefills as long as the longest sample.\n"
    )
    with tempfile.TemporaryDirectory() as scratch:
        o.weights = str(Path(scratch, "weights.safetensors"))
        ask(o, "weights")
        one = {"depths": 1, "scores": SCORES}
        problems = against(f"One sample: {', '.join(SCORES)}, answer NLL", o.lengths, o, scratch, **one)
        if o.depths > 1:
            print()
            name = f"The same and mass_minus_null (which needs a null question) at {o.depths} depths"
            lengths = [length for length in o.lengths if length in o.aim_lengths]
            problems += against(name, lengths, o, scratch, depths=o.depths, scores=(*SCORES, "mass_minus_null"))
    for problem in problems:
        print(f"\nDISAGREE: {problem}")
    return int(bool(problems))


def against(name: str, lengths: Sequence[int], o: argparse.Namespace, scratch: str, **what: Any) -> list[str]:
    """One table; returns what disagrees."""
    rows, times, extras, problems = [], {}, {}, []
    for length in lengths:
        found, needs = {}, eager_bytes(length, o) / 1e9
        for way in ("forward", "ours", "eager"):
            if way == "eager" and needs > o.memory_gb:
                continue
            files = {"out": str(Path(scratch, f"{way}.npz")), "ours": str(Path(scratch, "ours.npz"))}
            found[way] = ask(o, way, length=length, **files, **what)
            times[way, length], extras[way, length] = found[way]["seconds"], found[way]["bytes"] / 1e6
            say(f"{length} tokens, {way}: {times[way, length]:.3f} s, {extras[way, length]:.0f} MB")
        row = [f"{length}", f"{times['forward', length]:.2f}", f"{times['ours', length]:.2f}"]
        memory = [f"{extras['forward', length]:.0f}", f"{extras['ours', length]:.0f}"]
        if "eager" in found:
            differences = compare(Path(scratch))
            problems += [f"{length} tokens: {text}" for text in disagreements(differences)]
            row += [f"{times['eager', length]:.2f}", f"**{times['eager', length] / times['ours', length]:.1f}**"]
            row += [*memory, f"{extras['eager', length]:.0f}"]
            row += [f"**{extras['eager', length] / extras['ours', length]:.0f}**"]
            row += [f"{differences['nll']:.1e}", f"{differences['scores']:.1e}", f"{differences['positions']:.2%}"]
        else:
            row += ["out of memory", "", *memory, f"needs {needs * 1e3:.0f}", "", "", "", ""]
        rows.append(row)
    print(f"### {name}\n")
    table(
        ["tokens", "forward s", "ours s", "eager s", "eager / ours", "forward extra MB", "ours extra MB",
         "eager extra MB", "eager / ours", "answer NLL differs by", "scores differ by", "same position"],
        rows,
    )  # fmt: skip
    for length in (length for length in o.aim_lengths if ("eager", length) in times):
        by_time, by_memory = (x["eager", length] / x["ours", length] for x in (times, extras))
        verdict(f"{length} tokens, aim >= 10x less time: {by_time:.1f}x", by_time >= 10)
        verdict(f"{length} tokens, aim >= 20x less extra memory: {by_memory:.0f}x", by_memory >= 20)
    for a, b in zip(lengths, lengths[1:]):
        growth = [
            f"{way} {times[way, b] / times[way, a]:.2f}x time, {extras[way, b] / extras[way, a]:.2f}x extra memory"
            for way in ("forward", "ours", "eager") if (way, b) in times
        ]  # fmt: skip
        print(f"- {a} -> {b} tokens: {'; '.join(growth)}")
    return problems


def eager_bytes(length: int, o: argparse.Namespace) -> float:
    """What eager attention needs: the matrices of all layers, two more at work in one, logits; fp32."""
    return 4.0 * length * ((o.layers + 2) * o.heads * length + o.vocab)


def ask(o: argparse.Namespace, way: str, **more: Any) -> dict[str, Any]:
    """One measurement in a fresh process, forked from one that did nothing but import."""
    request = argparse.Namespace(**{**vars(o), "dtype": "fp32", "way": way, **more})
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", *PRELOADED])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(point, request).result()


def compare(scratch: Path) -> dict[str, float]:
    """Largest differences between both ways; `positions` is the share that is the same up to ties."""
    ours, eager_ = np.load(scratch / "ours.npz"), np.load(scratch / "eager.npz")
    scores = [name for name in ours.files if name not in ("nll", "position")]
    same = (ours["position"] == eager_["position"]) | (eager_["ratio"] > 1 - TIE)
    exactly = ours["position"] == eager_["position"]
    return {
        "nll": float(np.abs(ours["nll"] - eager_["nll"]).max()),
        # a tie that falls the other way moves a share by a whole token, and is not a difference
        "scores": max(float(np.abs(ours[s] - eager_[s])[exactly.all(-1)].max(initial=0)) for s in scores),
        "positions": float(same.mean()),
    }


def disagreements(differences: dict[str, float]) -> list[str]:
    """What is beyond its tolerance."""
    wrong = []
    if not differences["nll"] <= NLL_TOLERANCE:
        wrong.append(f"answer NLL differs by {differences['nll']:.2e} nat")
    if not differences["scores"] <= SCORE_TOLERANCE:
        wrong.append(f"scores differ by {differences['scores']:.2e}")
    if differences["positions"] < 1:
        wrong.append(f"heads look elsewhere in {1 - differences['positions']:.2%} of rows")
    return wrong


# --- sharing ---


def grids(longest: int) -> dict[str, list[Cell]]:
    """The two grids, on a lattice of 1/16 of the longest sample."""
    step = longest // 16
    pairs = [(b, a) for b in range(17) for a in range(17) if b + a <= 16]
    return {
        "16 lengths x 11 depths": grid_cells(
            tuple(step * k for k in range(1, 17)), tuple(k / 10 for k in range(11)), step
        ),
        "before x after": [Cell(before * step, after * step) for before, after in pairs],
    }


def plans(samples: Sequence[NeedleSample]) -> dict[str, list[tuple[list[int], list[Prefill]]]]:
    """Way -> calls, each with the samples it is for and its prefills."""
    everything = list(range(len(samples)))
    by_before: dict[int, list[int]] = {}
    for number, sample in enumerate(samples):
        by_before.setdefault(sample.before_tok, []).append(number)
    return {
        "a forward for each cell": [(everything, flat(one_each(samples)))],
        "a prefill for each before": [(ns, flat(shared([samples[n] for n in ns]))) for ns in by_before.values()],
        "branches from one shared prefix": [(everything, flat(shared(samples)))],
    }


AIMS = {"a prefill for each before": (5.7, 6.3), "branches from one shared prefix": (10.4, 10.7)}
"""Token ratios of the two grids at 64K."""


def sharing(o: argparse.Namespace) -> int:
    """Forward tokens and time of both grids, three ways."""
    print(f"Needle {NEEDLE_TOK}, question {QUESTION_TOK}, answer {NEEDLE_TOK} tokens; one haystack.\n")
    for number, (name, cells) in enumerate(grids(o.count_longest).items()):
        ways = plans(samples_for(cells, o))
        tokens = {way: sum(tokens_of(prefills) for _, prefills in calls) for way, calls in ways.items()}
        naive = next(iter(tokens.values()))
        print(f"### {name}, up to {o.count_longest} tokens, {len(cells)} cells: tokens alone\n")
        table(["way", "forward tokens", "ratio"], [(w, f"{t:,}", f"**{naive / t:.2f}**") for w, t in tokens.items()])
        for way, aims in AIMS.items():
            verdict(f"{way}, aim >= {aims[number]}x: {naive / tokens[way]:.2f}x", naive / tokens[way] >= aims[number])
        print()
    model, problems = Ours(o), []
    model.predict(one_each([sample_of(WARM_UP_TOK, o)])[0])
    for name, cells in grids(o.longest).items():
        problems += share(name, samples_for(cells, o), model, o)
    for problem in problems:
        print(f"\nDISAGREE: {problem}")
    return int(bool(problems))


def share(name: str, samples: Sequence[NeedleSample], model: Ours, o: argparse.Namespace) -> list[str]:
    """The table of one grid; returns what disagrees."""
    ways = plans(samples)
    tokens = {way: sum(tokens_of(prefills) for _, prefills in calls) for way, calls in ways.items()}

    def run(way: str) -> np.ndarray:
        nll, before, shown = np.zeros((len(samples), NEEDLE_TOK)), 0, [time.monotonic()]

        def done(here: int) -> None:
            if time.monotonic() - shown[0] > 10:
                say(f"{name}, {way}: {(before + here) / tokens[way]:.0%}")
                shown[0] = time.monotonic()

        for numbers, prefills in ways[way]:
            for k, found in model.predict(prefills, done=done).items():
                nll[numbers[k]] = found.nll_r
            before += tokens_of(prefills)
        return nll

    nlls, seconds = best_of({way: partial(run, way) for way in ways}, o)
    naive = next(iter(ways))
    differ = {way: np.abs(nll - nlls[naive]).max(-1) for way, nll in nlls.items()}
    beyond = {way: float((cells > o.tolerance).mean()) for way, cells in differ.items()}
    rows = []
    for way in ways:
        by_token, by_time = tokens[naive] / tokens[way], seconds[naive] / seconds[way]
        row = [way, sum(len(prefills) for _, prefills in ways[way]), f"{tokens[way]:,}", f"{seconds[way]:.2f}"]
        row += [f"**{by_token:.2f}**", f"**{by_time:.2f}**", f"{by_time / by_token:.0%}"]
        row += [f"{differ[way].max():.1e}", f"{np.median(differ[way]):.1e}", f"{beyond[way]:.1%}"]
        rows.append(row)
    print(f"### {name}, up to {o.longest} tokens, {len(samples)} cells\n")
    table(
        ["way", "prefills", "forward tokens", "s", "token ratio", "time ratio", "time / token ratio",
         "answer NLL differs by", "median cell", f"cells beyond {o.tolerance:g}"], rows,
    )  # fmt: skip
    for way in list(ways)[1:]:
        efficiency = seconds[naive] / seconds[way] / (tokens[naive] / tokens[way])
        verdict(f"{way}, aim >= 60 % of the token ratio in time: {efficiency:.0%}", efficiency >= 0.6)
    print()
    if max(beyond.values()) <= CELLS_WITH_TIES:
        return []
    return [f"{name}: {max(beyond.values()):.0%} of cells differ by more than {o.tolerance:g} nat in answer NLL"]


# --- heads ---


def heads(o: argparse.Namespace) -> int:
    """What scores cost on top of a forward."""
    from megatron_lccp.parallel import compat

    compat.quiet()
    from megatron_lccp.measuring.head_scores import head_scores

    sample, model = sample_of(o.length, o), Ours(o)
    model.predict(one_each([sample_of(WARM_UP_TOK, o)])[0], look=True)

    def run(scores: Sequence[str]):
        null = "mass_minus_null" in scores
        (tree,) = shared([sample], null) if null else one_each([sample])
        (found,) = model.predict(tree, look=bool(scores), questions=null).values()
        return found.nll_r, head_scores(sample, found, scores) if scores else {}

    with_null = (*SCORES, "mass_minus_null")
    names = {"forward": (), f"+ {', '.join(SCORES)}": SCORES, "+ these and mass_minus_null": with_null}
    results, seconds = best_of({name: partial(run, scores) for name, scores in names.items()}, o)
    bare = seconds["forward"]
    differ = {name: np.abs(results[name][0] - results["forward"][0]).max() for name in names}
    rows = [(n, f"{seconds[n]:.3f}", f"**{seconds[n] / bare - 1:+.2%}**", f"{differ[n]:.1e}") for n in names]
    print(f"### Scores of all {o.layers * o.heads} heads on one sample of {o.length} tokens\n")
    table(["what", "s", "over the forward", "answer NLL differs by"], rows)
    for name in list(names)[1:]:
        verdict(f"{name}, aim <= 3 %: {seconds[name] / bare - 1:+.2%}", seconds[name] / bare <= 1.03)
    tolerance = SHARING_TOLERANCE if o.dtype == "fp32" else 0.1  # BF16 rounds in another order
    if max(differ.values()) > tolerance:
        print(f"\nDISAGREE: answer NLL differs by {max(differ.values()):.2e} nat")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
