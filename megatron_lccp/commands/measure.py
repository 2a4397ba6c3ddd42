"""`lccp measure`: the monitors of a configuration on saved checkpoints, without training.

In: a configuration and checkpoints of any layout. Out: a run directory with one window per checkpoint, and its report.
What a killed measurement had finished is kept: the same command goes on with the rest, prefill by prefill.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_lccp.analysis.report.report import write_report
from megatron_lccp.commands.measured import Record, alarm, measure_one, small_pieces, stoppable
from megatron_lccp.config.load import changed_fields, changes_text, config_hash, dump_config, recorded_config
from megatron_lccp.config.tree import Config
from megatron_lccp.data.loader import text_of
from megatron_lccp.data.stages import stage_steps, trained_on
from megatron_lccp.data.tokenizers.base import Tokenizer
from megatron_lccp.files import error_text
from megatron_lccp.measuring.beforehand import planning_window
from megatron_lccp.measuring.flops import step_flops
from megatron_lccp.measuring.journal import FileJournal
from megatron_lccp.measuring.megatron_engine import MegatronEngine
from megatron_lccp.measuring.prefill_attention import why_not_exact
from megatron_lccp.measuring.window import EvalWindow
from megatron_lccp.model.build import build_chunks, in_precision, set_rope, transformer_config
from megatron_lccp.model.quantize import Quantization, quantized, require_modelopt, require_single_experts
from megatron_lccp.model.resolved import ResolvedModel
from megatron_lccp.parallel.gather import first_text
from megatron_lccp.parallel.groups import Groups, make_groups, start_ranks, stop_ranks
from megatron_lccp.planning.monitor_cost import window_cost
from megatron_lccp.records.store import RunStore
from megatron_lccp.training.progress import Progress, tell
from megatron_lccp.training.setup import about_model, check_everything, load_base, sole_user, with_precision
from megatron_lccp.training.watch import Watch
from megatron_lccp.weights.checkpoint import Position, checkpoints_in, load_checkpoint
from megatron_lccp.weights.sharded import read_about
from megatron_lccp.weights.whole import read_header


def measure(config: Config, source: str, checkpoints: Sequence[str], out: str | None) -> int:
    """Measure each checkpoint once; returns the exit code. Raises ConfigError, CheckpointError, ValueError, OSError."""
    directory = Path(out or Path(config.dir) / "measured")
    return stoppable(directory, lambda: _measure_all(config, source, checkpoints, directory, "--out" if out else "dir"))


def _measure_all(config: Config, source: str, checkpoints: Sequence[str], directory: Path, field: str) -> int:
    if not config.monitors:
        raise ValueError(f"{source}: monitors: is empty; name at least one")
    weights = [weights_at(path, config) for path in find_checkpoints(checkpoints or [f"{config.dir}/checkpoints"])]
    steps = [w.position.step for w in weights]
    if twice := [w for w in weights if steps.count(w.position.step) > 1]:
        names = " and ".join(str(w.path) for w in twice[:2])
        raise ValueError(f"--checkpoint: {names} are both of step {twice[0].position.step}; give an --out to each")
    if any(w.quantization for w in weights):
        require_modelopt()
        require_single_experts(config)
    device = start_ranks()
    config = with_precision(config)
    model, tokenizer = check_everything(config, source)
    groups = make_groups(config.parallel, device, config.seed)
    with sole_user(directory, groups.is_main, field), Watch(config.training, tell=alarm) as watch:
        record = _open_record(directory, config, weights, groups)
        left = [w for w in weights if str(w.position.step) not in record.done]
        wrapped = [in_precision(chunk.to(device)) for chunk in build_chunks(config, model, groups)]
        failures: list[str] = []
        cache: dict[Any, Any] = {}
        progress = Progress(groups.is_main, len(left), 0, 1, unit="checkpoint")
        try:
            for w in left:
                watch.mark(f"the weights {w.path}")
                window = _window(config, model, tokenizer, groups, wrapped, w, directory, cache, progress, watch)
                with quantized(window.chunks, w.quantization):
                    failures += measure_one(window, config.monitors, record, w.identity, progress)
                progress.more()
        finally:
            progress.close()
        if groups.is_main:
            _tell(directory, len(left), len(weights) - len(left), failures)
    stop_ranks()
    return 1 if failures else 0


def _tell(directory: Path, measured: int, kept: int, failures: Sequence[str]) -> None:
    report = write_report(directory) if any(directory.glob("rows/step-*.parquet")) else "none, for nothing was measured"
    tell(f"lccp: {measured} measured, {kept} were measured before; report: {report}")
    for failure in failures:
        print(f"lccp: {failure}; the same command tries again", file=sys.stderr)


@dataclass(frozen=True)
class Weights:
    """A checkpoint or a file of weights, and where its training stood."""

    path: Path
    position: Position
    stage: str
    """Stage whose RoPE base it is measured with: the one that would go on from here, or the last."""
    identity: str
    """Tells it from another of the same name."""
    quantization: Quantization | None = None
    """What tools/quantize_checkpoint.py made of them."""
    alone: bool = False
    """True if no training stands behind it: a file of weights, or the checkpoint of a conversion."""


def weights_at(path: Path, config: Config) -> Weights:
    """What these weights are. A file of weights of another run than the configuration's counts as the start of this.

    Raises CheckpointError or ValueError for what cannot be read.
    """
    names = list(config.stages)
    content = None if path.suffix == ".safetensors" else read_about(path)
    if content is None or "position" not in content:
        about, stat = read_header(path) if content is None else content["about"], path.stat()
        own = about.get("run") == config.name and about.get("stage") in names
        try:
            position = Position(step=int(about["step"]), tokens=int(about.get("tokens", 0))) if own else Position()
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: its header does not say after which step ({error!r}); export it again"
            ) from error
        identity = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
        return Weights(path, position, about["stage"] if own else names[0], _hash(identity.encode()), alone=True)
    position = Position(**content["position"])
    number = min(position.stage, len(names) - 1)
    if position.stage_step >= stage_steps(config.stages[names[number]]) and number + 1 < len(names):
        number += 1  # training measures the end of a stage as the start of the next
    identity = _hash((path / "checkpoint.json").read_bytes())
    return Weights(path, position, names[number], identity, _quantization_in(path, content["about"]))


def _quantization_in(path: Path, about: Mapping[str, Any]) -> Quantization | None:
    try:
        return Quantization.from_tree(about["quantization"]) if "quantization" in about else None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


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


def _open_record(directory: Path, config: Config, weights: Sequence[Weights], groups: Groups) -> Record:
    """The record of `--out`, the same on all ranks. Raises ValueError if other measurements are in there."""
    record, problem = Record(RunStore(directory), config_hash(config), {}), None
    if groups.is_main:
        try:
            record.done = _measured_before(record, config, weights)
            record.store.write_config(dump_config(config))
            record.store.write_metrics(config.monitors)
            record.save()
        except (OSError, ValueError) as error:
            problem = error_text(error)
    if problem := first_text(problem):
        raise ValueError(problem)
    everyone = [record.done]
    dist.broadcast_object_list(everyone)
    record.done = everyone[0]
    return record


def _measured_before(record: Record, config: Config, weights: Sequence[Weights]) -> dict[str, str]:
    """What the directory holds of these weights and this configuration. Raises ValueError if it holds something else."""
    directory = record.store.dir
    if (before := record.before()) is None:
        return {}
    done, hashed = before
    if hashed != record.config_hash and not _is_same(record.store.config_path, record.config_hash):
        changed = changes_text(changed_fields(record.store.config_path, config))
        raise ValueError(f"--out: {directory} was measured with another configuration ({changed}); name another")
    if other := [w for w in weights if done.get(str(w.position.step), w.identity) != w.identity]:
        raise ValueError(f"--out: {directory} holds step {other[0].position.step} of other weights; name another")
    return done


def _is_same(recorded: Path, wanted: str) -> bool:
    """True if only an earlier version recorded this configuration in other words, so that its hash was another one."""
    before = recorded_config(recorded)
    return before is not None and config_hash(before) == wanted


def load_weights(
    chunks: Sequence[torch.nn.Module], weights: Weights, config: Config, model: ResolvedModel, tokenizer: Tokenizer
) -> None:
    """Fill the chunks, and set the RoPE base; every rank calls it. Raises CheckpointError or ValueError."""
    if weights.alone:
        load_base(list(chunks), config, model, str(weights.path), tokenizer, weights.stage)
    else:
        load_checkpoint(weights.path, chunks, None, about_model(model, tokenizer))
    set_rope(chunks, config.stages[weights.stage])


def _window(
    config: Config, model: ResolvedModel, tokenizer: Tokenizer, groups: Groups, chunks: Sequence[torch.nn.Module],
    weights: Weights, directory: Path, cache: dict, progress: Progress, watch: Watch,
) -> EvalWindow:  # fmt: skip
    """Load the weights; the window is not open yet."""
    load_weights(chunks, weights, config, model, tokenizer)
    position, last_s = weights.position, [time.perf_counter()]

    def say(what: str) -> None:
        watch.mark(f"the window at step {position.step}, {what}")
        watch.step_took(time.perf_counter() - last_s[0])
        last_s[0] = time.perf_counter()
        progress.window(f"step {position.step}", what)

    run = f"{config.name}-{weights.quantization.recipe}" if weights.quantization else config.name
    return EvalWindow(
        engine=MegatronEngine(chunks, groups, model.vocabulary, config.training.measure_in == "fp8"), run=run,
        tokenizer=tokenizer, config_hash=config_hash(config), stage=weights.stage,
        step=position.step, tokens=position.tokens, corpora=trained_on(config), cache=cache,
        text=lambda name, at_least: text_of(config, tokenizer, name, at_least),
        say=say, pieces=small_pieces(groups.device),
        journal=FileJournal(directory / ".journal" / f"{weights.identity}-{config_hash(config)}"),
    )  # fmt: skip


def print_plan(config: Config, source: str) -> None:
    """What a window of each monitor runs on one replica, alone and shared, and its share of a training step."""
    model, tokenizer = check_everything(config, source, launched=False)
    vocab = model.vocabulary
    text = partial(text_of, config, tokenizer)
    window = planning_window(config, model.shape, vocab, tokenizer, text)
    measured = transformer_config(with_precision(config), model)
    measured.fp8 = measured.fp8 if config.training.measure_in == "fp8" else None
    reason = why_not_exact(measured)
    steps = {
        name: step_flops(model.shape, stage.context_tok, stage.global_batch_tok, vocab)
        for name, stage in config.stages.items()
    }
    head = f"{'monitor':<18}{'cells':>6}{'samples':>9}{'prefills':>10}{'tokens alone':>15}{'tokens run':>14}{'gain':>7}"
    print(head + f"{'FLOPs':>10}" + "".join(f"{'of a step of ' + name:>{17 + len(name)}}" for name in steps))
    for monitor in config.monitors:
        cost = window_cost(monitor, window, model.shape, reason is None, vocab)
        if cost is None:
            print(f"{monitor.name:<18}{'does not say':>27}")
            continue
        print(
            f"{cost.monitor:<18}{cost.cells:>6}{cost.samples:>9}{cost.prefills:>10}{cost.tokens_alone:>15,}"
            f"{cost.tokens:>14,}{cost.tokens_alone / cost.tokens:>6.1f}x{cost.flops:>10.2e}"
            + "".join(f"{cost.flops / step:>{17 + len(name)}.3%}" for name, step in steps.items())
        )
    if reason:
        print(f"Prefills are not shared: {reason}.")
