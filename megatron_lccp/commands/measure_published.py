"""`lccp measure --hf`: a suite of monitors on published models, without a configuration, data or training.

In: folders, .gguf files or names of the hub; texts, or those that come with the package. Out: a run directory for each
model, and one page of them all. What it takes is said before it starts. What a stopped measurement had finished is
kept: the same command goes on with the rest.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.distributed as dist
import transformers

from megatron_lccp.analysis.report.report import write_report
from megatron_lccp.commands.measured import measure_one, small_pieces, stoppable
from megatron_lccp.commands.published_job import Job, Wanted, make_job, write_record
from megatron_lccp.commands.published_suite import CORPORA, HAYSTACK, LENGTHS_TOK, published_suite, suite_text
from megatron_lccp.config.load import load_monitors
from megatron_lccp.data.given_texts import ALL, GivenTexts
from megatron_lccp.measuring.engine import Asked, Engine
from megatron_lccp.measuring.hf_engine import HFEngine
from megatron_lccp.measuring.journal import FileJournal
from megatron_lccp.measuring.prefills import plain
from megatron_lccp.measuring.window import EvalWindow
from megatron_lccp.monitors import HeadAblation, InterferenceGrid, NeedleGrid, RetrievalHeads
from megatron_lccp.parallel.gather import agreed
from megatron_lccp.parallel.groups import start_ranks, stop_ranks
from megatron_lccp.records.store import RunStore
from megatron_lccp.schema import Monitor
from megatron_lccp.text import count_text, duration_text
from megatron_lccp.training.progress import Progress, tell
from megatron_lccp.training.setup import sole_user
from megatron_lccp.weights.published import find_published

TIMED_TOK = 512
"""Tokens of the prefill that is timed beforehand, at most."""


def measure_published(
    names: Sequence[str], texts: Sequence[str] = (), lengths_tok: Sequence[int] = (), out: str | None = None,
    suite: str | None = None, precision: str = "auto", bos: str = "auto", tensor: int = 1, dry_run: bool = False,
) -> int:  # fmt: skip
    """Measure each model once and write the page; returns the exit code. Raises ValueError, OSError."""
    device = start_ranks()
    if precision == "auto":
        precision = "fp32" if device.type == "cpu" else "bf16"
    given = GivenTexts(texts)
    wanted = Wanted(wanted_monitors(given, lengths_tok, suite), given, precision, bos, tensor)
    models = [find_published(name) for name in names]
    if twice := [m.name for k, m in enumerate(models) if m.name in [other.name for other in models[:k]]]:
        raise ValueError(f"--hf: two models are called {twice[0]}; rename the folder of one")
    directory = Path(out or f"runs/{'+'.join(model.name for model in models)}")
    each = [directory if len(models) == 1 else directory / model.name for model in models]

    if dry_run:
        _say_needs([make_job(model, folder, wanted) for model, folder in zip(models, each)], wanted, device)
        stop_ranks()
        return 0

    def work() -> int:
        with sole_user(directory, is_main(), "--out"):
            with agreed():
                jobs = [make_job(model, folder, wanted) for model, folder in zip(models, each)]
                if is_main():
                    for job in jobs:
                        write_record(job, wanted)
            if is_main():
                _say_needs(jobs, wanted, device)
            failures = _measure_jobs(jobs, wanted)
            if is_main():
                _tell(jobs, directory, failures)
        return 1 if failures else 0

    code = stoppable(directory, work)
    stop_ranks()
    return code


def is_main() -> bool:
    """True on the one rank that writes files and talks to the user."""
    return dist.get_rank() == 0


def wanted_monitors(texts: GivenTexts, lengths_tok: Sequence[int], suite: str | None) -> list[Monitor]:
    """The monitors of a YAML file, or those for these lengths. ValueError for what cannot be."""
    if suite is not None:
        if lengths_tok:
            raise ValueError("--lengths: the file of --suite says them; leave one of the two out")
        return load_monitors(suite)
    if short := [length for length in lengths_tok if length < SHORTEST_TOK]:
        raise ValueError(f"--lengths: {short[0]} has no room for a needle and a question; give {SHORTEST_TOK} or more")
    haystack, corpora = (ALL, texts.names) if texts.names else (HAYSTACK, CORPORA)
    return published_suite(lengths_tok or LENGTHS_TOK, haystack, corpora)


def print_suite(texts: Sequence[str], lengths_tok: Sequence[int]) -> None:
    """The monitors for these texts and lengths as YAML, for --suite."""
    print(suite_text(wanted_monitors(GivenTexts(texts), lengths_tok, None)), end="")


SHORTEST_TOK = 256
"""Of a sample: needle, question and answer take some 80 tokens."""


def _say_needs(jobs: Sequence[Job], wanted: Wanted, device: torch.device) -> None:
    """What each model takes, before any is loaded."""
    for job in jobs:
        name, sizes = job.published.name, job.sizes
        tell(f"{name}: {sizes.parameters / 1e6:,.0f} M parameters in {wanted.precision}")
        if job.is_done:
            tell(f"{name}: was measured before")
            continue
        needs = job.needs(wanted)
        tell(f"{name}: {needs.text()}")
        if sizes.context_tok and wanted.longest_tok > sizes.context_tok:
            tell(f"{name}: was made for {sizes.context_tok:,} tokens, samples have up to {wanted.longest_tok:,}")
        if device.type == "cpu" and needs.bytes > psutil.virtual_memory().available:
            free = psutil.virtual_memory().available / 1e9
            tell(
                f"{name}: {free:.1f} GB of memory are free; fewer or shorter --lengths, or --precision bf16, take less"
            )


def load_engine(job: Job, wanted: Wanted) -> HFEngine:
    """The model with its weights. ValueError in one line for what transformers cannot load."""
    several = torch.cuda.device_count() > 1 and dist.get_world_size() == 1
    published = job.published
    source = published.folder / published.gguf if published.gguf else published.folder
    return HFEngine.load(source, dtype=wanted.dtype, device_map="auto" if several else None, tp=wanted.tensor)


def monitors_for(engine: HFEngine, monitors: Sequence[Monitor]) -> list[Monitor]:
    """Those that this model can be asked: without scores of heads where its heads cannot be followed."""
    if engine.why_not_followed is None:
        return list(monitors)
    without = [
        replace(monitor, scores=()) if isinstance(monitor, (NeedleGrid, InterferenceGrid)) and monitor.scores else monitor
        for monitor in monitors
    ]  # fmt: skip
    return [monitor for monitor in without if not isinstance(monitor, (RetrievalHeads, HeadAblation))]


def _measure_jobs(jobs: Sequence[Job], wanted: Wanted) -> list[str]:
    """Measure the models that were not before, one after another; what failed."""
    left = [job for job in jobs if not job.is_done]
    failures: list[str] = []
    progress = Progress(is_main(), len(left), 0, 1, unit="model")
    try:
        for number, job in enumerate(left):
            progress.say(f"{job.published.name}: loading")
            engine = load_engine(job, wanted)
            for note in engine.notes:
                progress.say(f"{job.published.name}: {note}")
            window = _window(job, engine, wanted, progress)
            progress.say(f"{job.published.name}: {_time_text(window, wanted, job, left[number + 1 :])}")
            monitors = monitors_for(engine, wanted.monitors)
            failures += measure_one(window, monitors, job.record, job.identity, progress)
            progress.more()
            del engine, window  # before the next model is loaded
    finally:
        progress.close()
    return failures


def _time_text(window: EvalWindow, wanted: Wanted, job: Job, later: Sequence[Job]) -> str:
    """How long the monitors will take, by a short prefill; the second one, for the first warms up."""
    tokens, seconds = np.arange(TIMED_TOK) % job.sizes.vocab, 0.0
    prefill = plain(tokens, 0, (TIMED_TOK - 1, TIMED_TOK))
    with window.opened():
        for _ in range(2):
            start = time.perf_counter()
            window.engine.predict([[prefill]] * window.groups.dp.size(), Asked(), lambda done: None, None)
            seconds = time.perf_counter() - start
    rate = job.sizes.flops([prefill]) / seconds * window.groups.dp.size()
    whole_s = job.needs(wanted, window.engine.why_not_shared() is None).flops / rate
    text = f"about {duration_text(whole_s)}, by a prefill of {TIMED_TOK} tokens in {duration_text(seconds)}"
    after = sum(other.needs(wanted).flops for other in later) / rate
    return text + (f"; then about {duration_text(after)} for {count_text(len(later), 'more model')}" if later else "")


def _window(job: Job, engine: Engine, wanted: Wanted, progress: Progress) -> EvalWindow:
    journal = job.directory / ".journal" / f"{job.identity}-{wanted.config_hash}-{transformers.__version__}"
    return replace(
        job.window, engine=engine, journal=FileJournal(journal), pieces=small_pieces(engine.groups.device),
        say=lambda what: progress.window(job.published.name, what),
    )  # fmt: skip


def _tell(jobs: Sequence[Job], directory: Path, failures: Sequence[str]) -> None:
    """Where the page is; what failed."""
    measured = [job.directory for job in jobs if RunStore(job.directory).windows()]
    page = write_report(measured, directory / "report.html") if measured else "none, for nothing was measured"
    tell(f"lccp: {count_text(len(measured), 'model')} measured; report: {page}")
    for failure in failures:
        print(f"lccp: {failure}; the same command tries again", file=sys.stderr)
