"""`lccp branch`: another stage from a checkpoint that a run kept, as a run of its own.

In: a run directory, the step of a checkpoint, a YAML file with `stages:`. Out: a run directory with that checkpoint
(weights, optimizer, position), what the run recorded up to there, and the configuration that trains on; whole, or not
there. `lccp train` on its config.yaml goes on; tokens and steps go on counting.
The run itself is only read. Files of the checkpoint are hard links to its own where the file system allows: nobody
writes into them, and they stay until both have dropped them.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from megatron_lccp.config.load import ConfigError, as_tree, dump_config, parse_config, read_yaml
from megatron_lccp.config.tree import Config
from megatron_lccp.config.unknown import unknown_fields
from megatron_lccp.data.stages import stage_steps
from megatron_lccp.records.store import RunStore
from megatron_lccp.weights.checkpoint import Position, checkpoints_in
from megatron_lccp.weights.sharded import read_about

SAME_SAMPLES = ("mixture", "context_tok", "global_batch_tok")
"""Fields that must be as they were for the order of samples to go on."""


@dataclass(frozen=True)
class Branch:
    """What was made."""

    directory: Path
    config: Config
    position: Position
    notes: tuple[str, ...]
    """What a reader should know of the first step, a line each."""


def branch(
    run_dir: str | Path, step: int, stage_file: str | Path, out: str | Path | None = None, name: str | None = None,
    say: Callable[[str], None] = print,
) -> Branch:  # fmt: skip
    """Make the run directory `out` (by default the run's with the name of the stage behind it) and say what it is.

    Raises ValueError (ConfigError for the stage file) in one line each, OSError if it cannot be written.
    """
    store = RunStore(run_dir)
    if not store.config_path.is_file():
        raise ValueError(f"{run_dir}: has no config.yaml; a branch starts from a run directory of lccp train")
    parent = parse_config(store.config_path)
    checkpoint = _checkpoint(Path(run_dir), step)
    position = Position(**read_about(checkpoint)["position"])
    given = _given_stages(stage_file)
    out = Path(out) if out is not None else Path(f"{str(run_dir).rstrip('/')}-{next(iter(given))}")
    if out.exists():
        raise ValueError(f"{out}: is there already; name another --dir, or remove it")
    tree = as_tree(parent)
    tree["stages"], notes = _stages(tree["stages"], position, given, str(stage_file))
    tree |= {"name": name or f"{parent.name}-{next(iter(given))}", "dir": str(out)}
    tree["training"]["steps"] = None  # it would end the branch where it ended the run; so would a rule that held there
    if parent.stop_when:
        tree["stop_when"] = []
        notes.append("stop_when is left out: what ends the run would end the branch")
    draft = out.with_name(f".{out.name}.branch.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        config = _write(draft, store, checkpoint, tree, str(stage_file), parent.name, position, say)
        draft.rename(out)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    first = config.stages[next(iter(given))]
    return Branch(out, config, position, (*notes, *_rate_note(store, position, next(iter(given)), first)))


def _checkpoint(run_dir: Path, step: int) -> Path:
    kept = checkpoints_in(run_dir / "checkpoints")
    found = {int(path.name.removeprefix("step-")): path for path in kept}
    if step not in found:
        there = f"there are {', '.join(map(str, found))}" if found else "it keeps none"
        raise ValueError(
            f"--at: {run_dir} keeps no checkpoint of step {step}; {there}; checkpoint.keep says how many stay"
        )
    return found[step]


def _given_stages(path: str | Path) -> dict[str, dict[str, Any]]:
    tree = read_yaml(Path(path))
    problems = [f"{key}: is not read here; the file should hold `stages:` alone" for key in tree if key != "stages"]
    given, stages = tree.get("stages"), {}
    if isinstance(given, dict) and given:
        stages = {name: {} if fields is None else fields for name, fields in given.items()}
        problems = problems or list(unknown_fields({"stages": stages}, Config))
    else:
        problems = problems or ["stages: should name the new stage, with the fields that it changes"]
    if problems:
        raise ConfigError(str(path), problems)
    return stages


def _stages(
    planned: Mapping[str, dict[str, Any]], position: Position, given: Mapping[str, dict[str, Any]], source: str
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The stages of the branch: those that were trained, the last of them as far as it was, then the given ones.

    A given stage of the name in which the checkpoint stands changes that stage from here on: its schedule and its
    position in the data go on.
    """
    names, notes = list(planned), []
    now = names[position.stage]
    before = {name: planned[name] for name in names[: position.stage]}
    if again := [name for name in given if name in before]:
        raise ConfigError(source, [f"stages.{again[0]}: is over at this step; give the new stage another name"])
    done = position.stage_step * planned[now]["global_batch_tok"]
    found = {**before, now: {**planned[now], "tokens": done}}
    for number, (name, fields) in enumerate(given.items()):
        if name == now:
            if number:
                raise ConfigError(source, [f"stages.{name}: the checkpoint stands in it; let it be the first"])
            found[now] = _changed(planned[now], fields, done, f"{source}: stages.{now}")
            continue
        last = next(reversed(found))
        if name not in names and "tokens" not in fields:
            raise ConfigError(source, [f"stages.{name}.tokens: is missing; say how many this stage trains"])
        base = planned.get(name, {**found[last], "warmup_tokens": 0, "goes_on_from": None})
        found[name] = {**base, **fields}
        if found[name].get("pack") or found[name].get("masks", "none") != "none":
            continue  # it takes what is left
        if "goes_on_from" not in fields and all(found[name][key] == found[last][key] for key in SAME_SAMPLES):
            found[name]["goes_on_from"] = last
            notes.append(f"stage {name} goes on in the order of samples of {last}")
        elif found[name]["goes_on_from"] is None:
            notes.append(f"stage {name} draws an order of samples of its own; documents seen before may come again")
    return found, notes


def _changed(planned: dict[str, Any], fields: dict[str, Any], done: int, where: str) -> dict[str, Any]:
    """The stage that the checkpoint stands in, with other fields from here on."""
    changed = {**planned, **fields}
    for key in ("context_tok", "global_batch_tok"):
        if changed[key] != planned[key]:
            raise ConfigError(
                where, [f"{key}: its steps so far were counted in {planned[key]}; name a new stage for it"]
            )
    if isinstance(changed["tokens"], int) and changed["tokens"] <= done:
        raise ConfigError(where, [f"tokens: {done:,} are trained already; give more, or a new stage another name"])
    return changed


def _write(
    draft: Path, store: RunStore, checkpoint: Path, tree: Mapping[str, Any], source: str, parent: str,
    position: Position, say: Callable[[str], None],
) -> Config:  # fmt: skip
    """Fill the directory; ConfigError names the stage file, for everything else ran already."""
    draft.mkdir(parents=True)
    target = RunStore(draft)
    target.config_path.write_text(yaml.safe_dump(dict(tree), sort_keys=False), encoding="utf-8")
    try:
        config = parse_config(target.config_path)
    except ConfigError as error:
        lines = [line.removeprefix(f"{target.config_path}: ") for line in str(error).splitlines()]
        raise ConfigError(source, lines) from error
    target.write_config(dump_config(config))
    _copy_record(store, target, position.step, config.name, say)
    text = f"from {parent} at step {position.step}, {position.tokens} tokens"
    target.append_event("branch", text, step=position.step)
    _link_tree(checkpoint, draft / "checkpoints" / checkpoint.name, say)
    return config


def _copy_record(store: RunStore, target: RunStore, step: int, name: str, say: Callable[[str], None]) -> None:
    """What the run recorded up to this step, under the name of the branch."""
    target.rows_dir.mkdir()
    for path in (store.steps_path, store.metrics_path, store.format_path):
        if path.is_file():
            shutil.copyfile(path, target.dir / path.name)
    events = store.read_events()
    kept = events[(events["step"] <= step) & (events["kind"] != "stop_when")].to_dict("records")
    if kept:
        lines = (json.dumps(event, ensure_ascii=False, default=str) + "\n" for event in kept)
        target.events_path.write_text("".join(lines), encoding="utf-8")
    for first, path in [*store.windows().items(), *((ends[0], file) for ends, file in store.health_files().items())]:
        if first <= step:
            try:
                rows = pq.read_table(path)
            except pa.ArrowException as error:
                say(f"{path}: left out, it is no readable Parquet file ({str(error).splitlines()[0]})")
                continue
            field = rows.schema.field("run")
            own = pa.array([name] * len(rows), pa.string()).cast(field.type)
            rows = rows.set_column(rows.schema.get_field_index("run"), field, own)
            pq.write_table(rows, target.rows_dir / path.name, compression="zstd")
    target.rewind(step)


def _link_tree(source: Path, target: Path, say: Callable[[str], None]) -> None:
    copied = 0

    def link(one: str, other: str) -> None:
        nonlocal copied
        try:
            os.link(one, other)
        except OSError:  # another file system, or one without hard links
            if not copied:
                size = sum(file.stat().st_size for file in source.rglob("*") if file.is_file())
                say(f"copies the checkpoint ({size / 1e9:.1f} GB): it cannot be linked from there")
            copied += 1
            shutil.copy2(one, other)

    target.parent.mkdir()
    try:
        shutil.copytree(source, target, copy_function=link)
    except shutil.Error as error:  # of every file that it could not copy: the first says enough
        file, _, why = error.args[0][0]
        raise OSError(errno.EIO, f"cannot be copied: {why}", str(file)) from error


def _rate_note(store: RunStore, position: Position, name: str, stage: Any) -> list[str]:
    """The learning rate on both sides of the step, if they differ."""
    steps = store.read_steps()
    at = steps.loc[steps["step"] == position.step, "lr"]
    if not len(at) or name == str(steps.loc[steps["step"] == position.step, "stage"].iloc[0]):
        return []
    before, after = float(at.iloc[0]), 0.0 if stage.warmup_tokens else float(stage.lr)
    if abs(before - after) <= 0.01 * before:
        return []
    return [f"the learning rate goes from {before:.3g} at the checkpoint to {after:.3g} where stage {name} begins"]


def branch_text(made: Branch) -> str:
    """What was made, and what to do with it."""
    steps = sum(stage_steps(stage) for stage in made.config.stages.values()) - made.position.step
    lines = [
        f"{made.directory}: branches at step {made.position.step}, {made.position.tokens:,} tokens; {steps:,} steps to train",
        *(f"  {note}" for note in made.notes),
        f"train it with: lccp train {made.directory}/config.yaml",
    ]
    return "\n".join(lines)
