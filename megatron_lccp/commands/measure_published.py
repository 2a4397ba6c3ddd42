"""`lccp measure --hf`: a suite of monitors on published models, without a configuration, data or training.

In: folders, .gguf files or names of the hub; texts, or those that come with the package. Out: a run directory for each
model, and one page of them all. What it takes is said before it starts. What a stopped measurement had finished is
kept: the same command goes on with the rest.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import psutil
import torch
import torch.distributed as dist
import transformers
import yaml

import megatron_lccp
from megatron_lccp.analysis.report.report import write_report
from megatron_lccp.commands.measured import Record, measure_one, small_pieces, stoppable
from megatron_lccp.commands.published_suite import CORPORA, HAYSTACK, LENGTHS_TOK, published_suite, suite_text
from megatron_lccp.config.load import as_tree, load_monitors, read_yaml
from megatron_lccp.data.given_texts import ALL, GivenTexts
from megatron_lccp.data.tokenizers.base import Tokenizer
from megatron_lccp.data.tokenizers.load import load_tokenizer
from megatron_lccp.measuring.beforehand import monitor_problems
from megatron_lccp.measuring.engine import Asked, Engine, Sizes
from megatron_lccp.measuring.hf_engine import HFEngine
from megatron_lccp.measuring.journal import FileJournal
from megatron_lccp.measuring.prefills import plain
from megatron_lccp.measuring.window import EvalWindow
from megatron_lccp.monitors import HeadAblation, InterferenceGrid, NeedleGrid, RetrievalHeads
from megatron_lccp.parallel.gather import agreed
from megatron_lccp.parallel.groups import start_ranks, stop_ranks
from megatron_lccp.planning.published import Needs, PublishedSizes, needs_of, sizes_of
from megatron_lccp.records.store import RunStore
from megatron_lccp.schema import PUBLISHED, Monitor
from megatron_lccp.text import count_text, duration_text
from megatron_lccp.training.progress import Progress, tell
from megatron_lccp.training.setup import sole_user
from megatron_lccp.weights.published import Published, find_published

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
TIMED_TOK = 512
"""Tokens of the prefill that is timed beforehand, at most."""


@dataclass(frozen=True)
class Job:
    """One model, and what is known of it before it is loaded."""

    published: Published
    directory: Path
    config: Any
    """As transformers reads it."""
    sizes: PublishedSizes
    tokenizer: Tokenizer
    window: EvalWindow
    """Without a model: what monitors are asked before it is loaded."""
    record: Record
    identity: str
    """Tells its weights and its tokenizer from others."""

    @property
    def is_done(self) -> bool:
        return bool(self.record.done)

    def needs(self, wanted: Wanted, shared: bool = True) -> Needs:
        """What the monitors take on it; where prefills are not shared, each sample alone."""
        works = [work for monitor in wanted.monitors if (work := monitor.work(self.window)) is not None]
        trees = [(work.times, work.planned if shared else work.alone) for work in works]
        return needs_of(self.sizes, trees, wanted.dtype.itemsize)


@dataclass(frozen=True)
class Wanted:
    """What is measured, of each model alike."""

    monitors: Sequence[Monitor]
    texts: GivenTexts
    precision: str
    """fp32 or bf16."""
    tensor: int = 1
    """Ranks that share a model."""

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]

    @property
    def longest_tok(self) -> int:
        """Of the samples whose length a monitor says."""
        fields = ("lengths_tok", "length_tok", "longest_tok")
        given = (getattr(monitor, name, 0) for monitor in self.monitors for name in fields)
        return max((max(value, default=0) if isinstance(value, (tuple, list)) else value for value in given), default=0)

    @property
    def config_hash(self) -> str:
        """12 hex digits that are equal for models that were measured alike."""
        return hashlib.sha256(json.dumps(self.tree(), sort_keys=True).encode()).hexdigest()[:12]

    def tree(self) -> dict[str, Any]:
        """What decides what is measured, for a file."""
        return {
            "precision": self.precision, "texts": self.texts.sha256(),
            "monitors": [as_tree(monitor) for monitor in self.monitors],
        }  # fmt: skip


def measure_published(
    names: Sequence[str], texts: Sequence[str] = (), lengths_tok: Sequence[int] = (), out: str | None = None,
    suite: str | None = None, precision: str = "auto", tensor: int = 1, dry_run: bool = False,
) -> int:  # fmt: skip
    """Measure each model once and write the page; returns the exit code. Raises ValueError, OSError."""
    device = start_ranks()
    if precision == "auto":
        precision = "fp32" if device.type == "cpu" else "bf16"
    given = GivenTexts(texts)
    wanted = Wanted(wanted_monitors(given, lengths_tok, suite), given, precision, tensor)
    models = [find_published(name) for name in names]
    if twice := [m.name for k, m in enumerate(models) if m.name in [other.name for other in models[:k]]]:
        raise ValueError(f"--hf: two models are called {twice[0]}; rename the folder of one")
    directory = Path(out or f"runs/{'+'.join(model.name for model in models)}")
    each = [directory if len(models) == 1 else directory / model.name for model in models]

    if dry_run:
        _say_needs([_job(model, folder, wanted) for model, folder in zip(models, each)], wanted, device)
        stop_ranks()
        return 0

    def work() -> int:
        with sole_user(directory, is_main(), "--out"):
            with agreed():
                jobs = [_job(model, folder, wanted) for model, folder in zip(models, each)]
                if is_main():
                    for job in jobs:
                        _write_record(job, wanted)
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


def _job(published: Published, directory: Path, wanted: Wanted) -> Job:
    """What is known of a model from its files. Raises ValueError for what does not fit, or was measured otherwise."""
    config = read_config(published)
    sizes = sizes_of(config)
    tokenizer = read_tokenizer(published)
    if tokenizer.vocab_size > sizes.vocab:
        raise ValueError(
            f"--hf: {published.folder}: its tokenizer has {tokenizer.vocab_size:,} ids, the model {sizes.vocab:,} rows; "
            "they do not belong together"
        )
    shape = Sizes(sizes.layers, sizes.heads, max(sizes.context_tok, wanted.longest_tok), sizes.vocab)
    window = EvalWindow(
        engine=cast(Engine, SimpleNamespace(sizes=shape, why_not_shared=lambda: None)), run=published.name,
        tokenizer=tokenizer, config_hash=wanted.config_hash, stage=PUBLISHED, step=0, tokens=0, corpora=wanted.texts.names or CORPORA,
        text=lambda name, at_least: wanted.texts.tokens(tokenizer, name, at_least),
    )  # fmt: skip
    if problems := monitor_problems(wanted.monitors, window):
        raise ValueError("\n".join(f"{published.name}: {text}" for text in problems))
    identity = hashlib.sha256(f"{published.sha256()} {tokenizer.sha256}".encode()).hexdigest()[:16]
    record = _record(published, directory, wanted, identity)
    return Job(published, directory, config, sizes, tokenizer, window, record, identity)


def _record(published: Published, directory: Path, wanted: Wanted, identity: str) -> Record:
    """What the directory holds of this model. Raises ValueError if it holds another, or one that was measured otherwise."""
    record = Record(RunStore(directory), wanted.config_hash, {})
    if (before := record.before()) is not None:
        record.done, hashed = before
        if hashed != record.config_hash:
            raise ValueError(f"--out: {directory} was measured with other monitors, texts or precision; name another")
        about = read_yaml(record.store.config_path).get("model", {})
        if about.get("identity") != identity:
            raise ValueError(f"--out: {directory} holds another model ({about.get('folder')}); name another")
    return record


def _write_record(job: Job, wanted: Wanted) -> None:
    """Write down what is measured, and of what."""
    published = job.published
    about = {
        "name": published.name, "architecture": (job.config.architectures or [job.config.model_type])[0],
        "parameters": f"{job.sizes.parameters:,}", "precision": wanted.precision,
        "folder": str(published.folder.absolute()), "files": [path.name for path in published.weights],
        "weights_sha256": published.sha256(), "tokenizer_sha256": job.tokenizer.sha256, "identity": job.identity,
        "transformers": transformers.__version__, "torch": str(torch.__version__),
        "megatron_lccp": megatron_lccp.__version__,
    }  # fmt: skip
    text = yaml.safe_dump({"model": about, **wanted.tree()}, sort_keys=False, width=120)
    job.record.store.write_config(text)
    job.record.store.write_metrics(wanted.monitors)
    job.record.save()


def read_config(published: Published) -> Any:
    """A model's configuration, as transformers reads it. ValueError in one line for what it cannot."""
    try:
        return transformers.AutoConfig.from_pretrained(
            published.folder, gguf_file=published.gguf, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # of many kinds, by what is wrong in the file
        reason = " ".join(str(error).split())
        raise ValueError(f"--hf: {published.folder}: transformers cannot read its configuration: {reason}") from error


def read_tokenizer(published: Published) -> Tokenizer:
    """The model's own; that of a GGUF file as transformers writes it down."""
    if published.gguf is None:
        return load_tokenizer(published.folder)
    with tempfile.TemporaryDirectory() as folder:
        found = transformers.AutoTokenizer.from_pretrained(published.folder, gguf_file=published.gguf)
        found.save_pretrained(folder)
        return load_tokenizer(folder)


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
