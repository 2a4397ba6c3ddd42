"""`lccp measure`: the monitors of a configuration on saved checkpoints, without training.

In: a configuration and checkpoints of any layout. Out: a run directory with one window per checkpoint, and its report.
What a killed measurement had finished is kept: the same command goes on with the rest, prefill by prefill.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from megatron.core.transformer.module import Float16Module

from megatron_lccp.analysis.report import write_report
from megatron_lccp.compose import about_model, check_everything, load_base, sole_user, with_precision
from megatron_lccp.config.load import changed_fields, config_hash, dump_config
from megatron_lccp.config.tree import Config
from megatron_lccp.data.loader import text_of, trained_on
from megatron_lccp.data.prefills import tokens_of
from megatron_lccp.data.tokenizer import Tokenizer
from megatron_lccp.model.build import build_chunks, set_rope_base, transformer_config, transformer_fields
from megatron_lccp.model.families import family_of
from megatron_lccp.model.flops import prefill_flops, step_flops
from megatron_lccp.model.prefill_attention import why_not_exact
from megatron_lccp.model.weights import read_header
from megatron_lccp.monitors.journal import FileJournal
from megatron_lccp.parallel.gather import any_rank, first_text
from megatron_lccp.parallel.groups import Groups, make_groups, start_ranks, stop_ranks
from megatron_lccp.records import RunStore
from megatron_lccp.training.checkpoint import Position, checkpoints_in, load_checkpoint, read_about
from megatron_lccp.training.progress import Progress
from megatron_lccp.training.window import EvalWindow


def measure(config: Config, source: str, checkpoints: Sequence[str], out: str | None) -> int:
    """Measure each checkpoint once; returns the exit code. Raises ConfigError, CheckpointError, ValueError."""
    if not config.monitors:
        raise ValueError(f"{source}: monitors: is empty; name at least one")
    paths = find_checkpoints(checkpoints or [f"{config.dir}/checkpoints"])
    steps = {path: position_of(path).step for path in paths}
    if twice := [path for path in paths if list(steps.values()).count(steps[path]) > 1]:
        names = " and ".join(map(str, twice[:2]))
        raise ValueError(f"--checkpoint: {names} are both of step {steps[twice[0]]}; measure them with an --out each")
    directory = Path(out or Path(config.dir) / "measured")
    device = start_ranks()
    config = with_precision(config)
    tokenizer = check_everything(config, source)
    groups = make_groups(config.parallel, device, config.seed)
    with sole_user(directory, groups.is_main):
        store = RunStore(directory)
        _same_monitors(store, config, groups.is_main)
        chunks = build_chunks(config, family_of(config.model.family), tokenizer.vocab_size, groups)
        for chunk in chunks:
            chunk.to(device)
        wrapped = [Float16Module(chunk.config, chunk) if chunk.config.bf16 else chunk for chunk in chunks]
        cache: dict = {}
        progress = Progress(groups.is_main, len(paths), 0, 1, unit="checkpoint")
        try:
            for path in paths:
                window = _window(config, tokenizer, groups, wrapped, path, directory, cache, progress)
                _measure_one(window, config, store, progress)
                progress.more()
        finally:
            progress.close()
        if groups.is_main:
            print(f"lccp: {len(paths)} measured; report: {write_report(directory)}")
    stop_ranks()
    return 0


def find_checkpoints(names: Sequence[str]) -> list[Path]:
    """Checkpoints and weight files, those of a directory in order. ValueError for a name that is none."""
    found: list[Path] = []
    for name in names:
        path = Path(name)
        if (path / "checkpoint.json").is_file() or (path.suffix == ".safetensors" and path.is_file()):
            found.append(path)
        elif inside := checkpoints_in(path):
            found += inside
        else:
            raise ValueError(
                f"--checkpoint: {name} is neither a checkpoint, nor a directory of checkpoints, nor a .safetensors file"
            )
    return found


def position_of(path: Path) -> Position:
    """Where the training of these weights stood; a file of weights says it in its header, or is taken for the start."""
    if path.suffix != ".safetensors":
        return Position(**read_about(path)["position"])
    about = read_header(path)
    return Position(step=int(about.get("step", 0)), tokens=int(about.get("tokens", 0)))


def _same_monitors(store: RunStore, config: Config, is_main: bool) -> None:
    """Rows of one directory come from the same monitors on the same model."""
    problem = None
    if is_main:
        changed = [name for name in changed_fields(store.config_path, config) if name in ("model", "monitors", "data")]
        if changed and store.exists():
            problem = f"--out: {store.dir} holds measurements with other values of {', '.join(changed)}; name another"
        else:
            store.write_config(dump_config(config))
    if problem := first_text(problem):
        raise ValueError(problem)


def _window(
    config: Config, tokenizer: Tokenizer, groups: Groups, chunks: Sequence[torch.nn.Module], path: Path,
    directory: Path, cache: dict, progress: Progress,
) -> EvalWindow:  # fmt: skip
    """Load a checkpoint and open nothing yet."""
    if path.suffix == ".safetensors":
        load_base(list(chunks), str(path), tokenizer)
    else:
        load_checkpoint(path, chunks, None, about_model(config, tokenizer))
    position = position_of(path)
    stages = list(config.stages.items())
    stage, plan = stages[min(position.stage, len(stages) - 1)]
    set_rope_base(chunks, plan.rope_base)
    family = family_of(config.model.family)
    return EvalWindow(
        chunks=chunks, groups=groups, run=config.name, tokenizer=tokenizer,
        vocab_size=family.vocab_size or tokenizer.vocab_size, config_hash=config_hash(config), stage=stage,
        step=position.step, tokens=position.tokens, corpora=trained_on(config), cache=cache,
        text=lambda name, at_least: text_of(config, tokenizer, name, at_least),
        say=lambda what: progress.window(position.step, what),
        journal=FileJournal(directory / ".journal" / f"{path.name}-{config_hash(config)}"),
    )  # fmt: skip


def _measure_one(window: EvalWindow, config: Config, store: RunStore, progress: Progress) -> None:
    is_main = window.groups.is_main
    recorded = store.read_rows(first=window.step, last=window.step, health=False) if is_main else None
    done = is_main and (recorded["stage"] == window.stage).any()
    if any_rank(bool(done), window.groups.device):
        return

    def record(kind: str, text: str) -> None:
        if is_main:
            store.append_event(kind, text, step=window.step)
            progress.say(f"step {window.step}: {kind}: {text}")

    with window.opened():
        rows = window.measure(config.monitors, record)
    problem = None
    if is_main:
        try:
            store.write_window(rows, window.step)
            window.journal.discard()
        except OSError as error:
            problem = str(error)
    if problem := first_text(problem):
        raise OSError(problem)


def print_plan(config: Config, source: str) -> None:
    """What a window of each monitor runs on one replica, alone and shared, and its share of a training step."""
    tokenizer = check_everything(config, source, ranks=None)
    family = family_of(config.model.family)
    fields = transformer_fields(config, family)
    vocab = family.vocab_size or tokenizer.vocab_size
    window = EvalWindow(
        chunks=(), groups=SimpleNamespace(), run=config.name, tokenizer=tokenizer, vocab_size=vocab, config_hash="",
        stage="", step=0, tokens=0, text=lambda name, at_least: text_of(config, tokenizer, name, at_least),
        corpora=trained_on(config),
    )  # fmt: skip
    reason = why_not_exact(transformer_config(with_precision(config), family))
    steps = {
        name: step_flops(fields, stage.context_tok, stage.global_batch_tok, vocab)
        for name, stage in config.stages.items()
    }
    head = f"{'monitor':<18}{'cells':>6}{'samples':>9}{'prefills':>10}{'tokens alone':>15}{'tokens run':>14}{'gain':>7}"
    print(head + f"{'FLOPs':>10}" + "".join(f"{'of a step of ' + name:>{17 + len(name)}}" for name in steps))
    for monitor in config.monitors:
        if not hasattr(monitor, "work"):
            print(f"{monitor.name:<18}{'does not say':>27}")
            continue
        work = monitor.work(window, 1)
        planned = work.alone if reason else work.planned
        prefills = [prefill for tree in planned for prefill in tree]
        alone, run = (work.times * sum(map(tokens_of, trees)) for trees in (work.alone, planned))
        flops = work.times * prefill_flops(fields, prefills, vocab)
        print(
            f"{monitor.name:<18}{work.cells:>6}{work.samples:>9}{work.times * len(prefills):>10}{alone:>15,}{run:>14,}"
            f"{alone / run:>6.1f}x{flops:>10.2e}"
            + "".join(f"{flops / step:>{17 + len(name)}.3%}" for name, step in steps.items())
        )
    if reason:
        print(f"Prefills are not shared: {reason}.")
