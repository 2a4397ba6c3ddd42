"""Config -> the things that a command works with: checked settings, model, train state.

In: a configuration and started ranks. Out: what `lccp train` and `lccp measure` begin with. Errors are ConfigError or
CheckpointError, the same on all ranks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_lccp import lock
from megatron_lccp.config.load import ConfigError, config_hash, recorded_config
from megatron_lccp.config.rules import layout_problems
from megatron_lccp.config.tree import Config
from megatron_lccp.data.loader import text_of
from megatron_lccp.data.manifest import check_data
from megatron_lccp.data.tokenizers.base import Tokenizer
from megatron_lccp.data.tokenizers.load import configured_tokenizer
from megatron_lccp.files import error_text
from megatron_lccp.measuring.beforehand import monitor_problems, planning_window
from megatron_lccp.model.build import (
    ARCHITECTURE,
    FUNCTION,
    build_chunks,
    passthrough_problems,
    refused_by_megatron,
    wrap_for_training,
)
from megatron_lccp.model.hf_config import describe
from megatron_lccp.model.resolved import ResolvedModel, resolve
from megatron_lccp.parallel.compat import MEGATRON_VERSION
from megatron_lccp.parallel.gather import agreed, first_text
from megatron_lccp.parallel.groups import Groups
from megatron_lccp.training.loop import TrainState
from megatron_lccp.training.optimizer import make_optimizer
from megatron_lccp.weights.checkpoint import (
    DamagedCheckpoint,
    another_run,
    checkpoints_in,
    discard_drafts,
    incomplete_in,
    load_checkpoint,
    load_weights,
    read_complete,
    set_aside,
)
from megatron_lccp.weights.fit import model_differences
from megatron_lccp.weights.hf_tensors import differences
from megatron_lccp.weights.sharded import CheckpointError, read_about
from megatron_lccp.weights.whole import load_whole, read_header


def with_precision(config: Config) -> Config:
    """The configuration with `training.precision: auto` decided for this machine."""
    if config.training.precision != "auto":
        return config
    has_bf16 = torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    training = dataclasses.replace(config.training, precision="bf16" if has_bf16 else "fp32")
    return dataclasses.replace(config, training=training)


@contextlib.contextmanager
def sole_user(directory: Path, is_main: bool, field: str = "dir") -> Iterator[None]:
    """Hold the directory that `field` names for this job; ValueError on all ranks if another one holds it."""
    problem = None
    with contextlib.ExitStack() as held:
        if is_main:
            try:
                directory.mkdir(parents=True, exist_ok=True)
                held.enter_context(lock.sole_user(directory / ".lock", str(directory)))
            except lock.Held as error:
                problem = str(error)
            except OSError as error:
                problem = error_text(error)
        if problem := first_text(problem):
            raise ConfigError(field, [problem])
        yield


def check_everything(config: Config, source: str, launched: bool = True) -> tuple[ResolvedModel, Tokenizer]:
    """The model and the tokenizer, once nothing contradicts; ConfigError lists every problem of layout, pass-through
    and data, or else everything that the monitors cannot do.

    `launched`: the layout has to fit the ranks that the launcher started.
    """
    model = resolve(with_precision(config))
    problems = passthrough_problems(config, model)
    if launched:
        problems += layout_problems(config, int(os.environ["WORLD_SIZE"]), model.fields, MEGATRON_VERSION)
    problems = problems or refused_by_megatron(config, model)
    problems += check_data(config)
    if problems:
        raise ConfigError(source, problems)
    tokenizer = configured_tokenizer(config.data.tokenizer)
    if model.vocab_size is not None and tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(source, [f"data.tokenizer.path: {more_ids(tokenizer, model.name, model.vocab_size)}"])
    if tokenizer.bos is None and tokenizer.own_begin() and os.environ.get("RANK", "0") == "0":
        print(
            f"lccp: data.tokenizer.bos: {tokenizer.path} begins a text with a token of its own, and needle samples begin "
            "without; set auto",
            file=sys.stderr,
        )
    model = model.of_vocabulary(tokenizer.vocab_size)
    text_by_name = partial(text_of, config, tokenizer)
    window = planning_window(config, model.shape, model.vocabulary, tokenizer, text_by_name)
    if problems := monitor_problems(config.monitors, window):
        raise ConfigError(source, problems)
    return model, tokenizer


def check_start(config: Config, source: str, model: ResolvedModel, tokenizer: Tokenizer) -> None:
    """ConfigError for weights to start from that cannot be read or are of another model, before anything is written.

    A run that has a checkpoint does not need them any more.
    """
    if config.model.init_from and not checkpoints_in(Path(config.dir) / "checkpoints"):
        try:
            check_base(model, config.model.init_from, tokenizer)
        except ValueError as error:
            raise ConfigError(source, [f"model.init_from: {error}"]) from error


def make_train_state(config: Config, model: ResolvedModel, groups: Groups, tokenizer: Tokenizer) -> TrainState:
    """Model on this rank, weights drawn or read from `model.init_from`, with its optimizer."""
    bare_chunks = build_chunks(config, model, groups)
    if config.model.init_from and newest_checkpoint(config, groups) is None:
        load_base(bare_chunks, config, model, config.model.init_from, tokenizer, next(iter(config.stages)))
    chunks = wrap_for_training(bare_chunks, config, groups)
    return TrainState(
        config=config,
        config_hash=config_hash(config),
        groups=groups,
        chunks=chunks,
        optimizer=make_optimizer(chunks, config),
        tokenizer=tokenizer,
        vocab_size=model.vocabulary,
        about=about_run(config, model, tokenizer),
    )


def about_model(model: ResolvedModel, tokenizer: Tokenizer) -> dict[str, Any]:
    """What identifies the weights of a checkpoint."""
    shape = {key: model.fields[key] for key in ARCHITECTURE if key in model.fields}
    return {"family": model.name, "tokenizer": tokenizer.sha256, "function": function_of(model)} | shape


def function_of(model: ResolvedModel) -> dict[str, Any]:
    """The fields by which the same weights give something else, as far as they are given."""
    return {key: model.fields[key] for key in FUNCTION if key in model.fields}


def about_run(config: Config, model: ResolvedModel, tokenizer: Tokenizer) -> dict[str, Any]:
    """What identifies the weights of a checkpoint and what its position counts: steps over data of these sizes.

    And, for the way back to Hugging Face, the rotary embedding of each stage and the model's config.json, if one is
    known.
    """
    samples = {name: [stage.context_tok, stage.global_batch_tok] for name, stage in config.stages.items()}
    ropes = {name: dataclasses.asdict(model.rope(stage)) for name, stage in config.stages.items()}
    text = model.hf_config or _hf_config_before(config)
    kept = {} if text is None else {"hf_config": text}
    return about_model(model, tokenizer) | {"seed": config.seed, "samples": samples, "ropes": ropes} | kept


def _hf_config_before(config: Config) -> str | None:
    """The config.json that this run's newest checkpoint keeps, or the weights that it starts from."""
    for path in (*checkpoints_in(Path(config.dir) / "checkpoints")[-1:], config.model.init_from):
        if path is not None:
            with contextlib.suppress(ValueError, OSError):  # who reads the weights says what is wrong with them
                return _about_in(Path(path)).get("hf_config")
    return None


def _about_in(path: Path) -> dict[str, Any]:
    return read_about(path)["about"] if path.is_dir() else read_header(str(path))


def load_base(
    chunks: list[torch.nn.Module], config: Config, model: ResolvedModel, path: str, tokenizer: Tokenizer, stage: str
) -> None:
    """Fill bare chunks from weights: a whole-model .safetensors or a checkpoint directory; every rank calls it.

    Raises ValueError or CheckpointError, on all ranks, for weights of another model. Another rotary base than that of
    the `stage` they are for is said, not refused: raising it is what long-context training does.
    """
    with agreed():
        about = check_base(model, path, tokenizer)
    base = model.rope(config.stages[stage]).base
    before = float(about.get("rope_base", base))
    if dist.get_rank() == 0 and not math.isclose(before, base, rel_tol=1e-6):
        print(f"lccp: {path}: its RoPE base is {before:g}, stages.{stage}.rope_base is {base:g}", file=sys.stderr)
    if Path(path).is_dir():
        load_weights(Path(path), chunks)
    else:
        load_whole(chunks, path)


def check_base(model: ResolvedModel, path: str, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """What weights to start from say of themselves; ValueError or CheckpointError if they are of another model."""
    if (Path(path) / "config.json").exists():
        raise ValueError(f"{path}: is a Hugging Face folder; convert it by tools/convert_checkpoint.py to-megatron")
    about = _about_in(Path(path))
    if tokenizer and about.get("tokenizer") not in (None, tokenizer.sha256):
        raise ValueError(f"{path}: was trained with another tokenizer than data.tokenizer.path")
    wrong: list[str] = []  # (an exported file says nothing of its sizes; shapes have to do)
    if "family" in about:  # of a training
        here = {key: model.fields.get(key) for key in ARCHITECTURE}
        wrong = model_differences(about, here | {"function": function_of(model)})
    elif "hf_config" in about:
        source = describe(json.loads(about["hf_config"]))
        wrong = differences(source, model)
        if not wrong and tokenizer and tokenizer.vocab_size > source.vocabulary:
            raise ValueError(more_ids(tokenizer, path, source.vocabulary))
        if not wrong and tokenizer and model.vocabulary < source.vocabulary:
            raise ValueError(
                f"{path}: has {source.vocabulary} tokens, data.tokenizer.path {model.vocabulary}, and {model.name} takes "
                "the tokenizer's; set model.config in place of model.family, or name the weights' tokenizer"
            )
    if wrong:
        raise ValueError(f"{path}: holds another model than {model.name}: {'; '.join(wrong)}")
    return about


def more_ids(tokenizer: Tokenizer, what: str, rows: int) -> str:
    """What is wrong with a tokenizer whose ids go beyond the rows of a model."""
    return (
        f"{tokenizer.path} has {tokenizer.vocab_size} token ids, {what} has weights for {rows}; give the tokenizer that "
        "belongs to it"
    )


def resume(train_state: TrainState) -> list[str] | None:
    """Load the newest complete checkpoint of the run directory into the train state; None if there is none.

    Returns what was set aside on the way, one line for each: with `checkpoint.fall_back` a damaged one, if there is one
    before it.
    """
    directory = train_state.directory / "checkpoints"
    aside: list[str] = []
    if train_state.groups.is_main:
        discard_drafts(directory)
    while (found := newest_checkpoint(train_state.config, train_state.groups)) is not None:
        try:
            _require_recorded_function(found, train_state)
            train_state.position = train_state.saved = load_checkpoint(
                found, train_state.chunks, train_state.optimizer, train_state.about
            )
            with agreed():
                train_state.taken = read_complete(found).get("taken")
            return aside
        except DamagedCheckpoint as error:
            others = len(checkpoints_in(directory)) > 1 if train_state.groups.is_main else False
            if not train_state.config.checkpoint.fall_back or first_text("others" if others else None) is None:
                raise
            with agreed():
                name = set_aside(found).name if train_state.groups.is_main else ""
            aside.append(f"{error}: set aside as {first_text(name or None)}, going on from the one before")
    with agreed():  # else a training would begin anew beside what is left of it
        if train_state.groups.is_main and (left := incomplete_in(directory)):
            raise CheckpointError(f"{left[-1]}: has no checkpoint.json; copy it again, or remove it to begin anew")
    return None


def _require_recorded_function(path: Path, train_state: TrainState) -> None:
    """What `load_checkpoint` asks of `function`, of a checkpoint that does not note it yet: of the configuration that
    the run recorded."""
    with agreed():
        about = read_complete(path)["about"]
        before = None if "function" in about else recorded_config(train_state.directory / "config.yaml")
        if before is not None:
            about = about | {"function": function_of(resolve(before))}
            if found := model_differences(about, train_state.about):
                raise CheckpointError(another_run(path, found))


def newest_checkpoint(config: Config, groups: Groups) -> Path | None:
    """The newest complete checkpoint that the main rank sees: others may see less on a network file system."""
    found = checkpoints_in(Path(config.dir) / "checkpoints") if groups.is_main else []
    path = first_text(str(found[-1]) if found else None)
    return None if path is None else Path(path)
