"""Checkpoints that are whole or absent: which there are, and reading one.

In: a directory, the model chunks and optimizer to fill. Out: `<dir>/step-00000100/` in Megatron-Core's
dist_checkpointing format, with `checkpoint.json` (what it is, where the training stands, a SHA-256 of every file), which
is written last (saving.py) and checked first.

A checkpoint fits any layout: DP, TP, PP and EP may change between save and load. One that says `layout` has its
optimizer's state as the layout that saved it held it, and a training goes on from it there alone; its weights fit any.
Random states need no saving: the loop seeds every step anew.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch.distributed.checkpoint import TensorStorageMetadata

from megatron_lccp.files import error_text, file_sha256
from megatron_lccp.model.build import bare
from megatron_lccp.model.vocabulary import vocabulary_of
from megatron_lccp.parallel.gather import agreed
from megatron_lccp.parallel.unpickle import data_only
from megatron_lccp.weights.fit import check_fit, model_differences, require_numbers
from megatron_lccp.weights.sharded import ABOUT, CheckpointError, read_about, read_metadata, tensors_in
from megatron_lccp.weights.state import (
    fill_for_any_layout,
    fill_of_this_layout,
    make_state,
    shards_in,
    slices_digest,
    state_for_any_layout,
    state_of_this_layout,
)
from megatron_lccp.weights.whole import model_shards

SAMPLES = ("context_tok", "global_batch_tok")
"""Fields of a stage that a position counts in, in the order in which a checkpoint notes them."""
REMEDY = "move it away: the one before it counts then (checkpoint.fall_back: true does so by itself)"
DAMAGED = ".damaged"
"""A checkpoint that is set aside has its name with this."""


class DamagedCheckpoint(CheckpointError):
    """Its files are not what was saved; the one before it may be whole."""


@dataclass(frozen=True)
class Position:
    """Where a training stands."""

    step: int = 0
    """Optimizer steps done over all stages."""
    tokens: int = 0
    """Tokens consumed over all stages."""
    stage: int = 0
    """Number of the stage, from 0."""
    stage_step: int = 0
    """Steps done in this stage: with the seed, the position in the data."""
    updates: int = 0
    """Steps that were not skipped: Adam's step count."""


def checkpoints_in(directory: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    return [path for path in _named_as_checkpoints(directory) if (path / ABOUT).is_file()]


def incomplete_in(directory: Path) -> list[Path]:
    """What has the name of a checkpoint and is none, as no save leaves it: somebody lost a part of it."""
    return [path for path in _named_as_checkpoints(directory) if not (path / ABOUT).is_file()]


def _named_as_checkpoints(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))


def discard_drafts(directory: Path) -> None:
    """Remove what a killed save left behind; for one rank, before the training goes on."""
    for draft in directory.glob("step-*.tmp"):
        shutil.rmtree(draft)


def drop_old(directory: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and the newest of those that fit any layout."""
    found = checkpoints_in(directory)
    newest_for_any = [path for path in found if fits_any_layout(path)][-1:]
    for old in found[:-keep]:
        if old not in newest_for_any:
            drop(old)


def drop(path: Path) -> None:
    """Remove a checkpoint; what is left of it if this is cut off is a draft."""
    shutil.rmtree(path.rename(f"{path}.tmp"), ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Give a damaged checkpoint a name under which it is none, and say which."""
    aside, number = path.with_name(path.name + DAMAGED), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}{DAMAGED}-{number}")
    return path.rename(aside)


def fits_any_layout(path: Path) -> bool:
    """False for a checkpoint of one layout alone, and for one that cannot be read."""
    try:
        return "layout" not in read_about(path)
    except CheckpointError:
        return False


def load_checkpoint(
    path: Path,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None,
    about: Mapping[str, Any],
) -> Position:
    """Fill model and optimizer from a checkpoint of any layout; every rank calls it. Returns where it stood.

    Nothing in it is run: `.metadata` and what is pickled beside tensors, Transformer Engine's extra state among it, are
    read as data (tests/parallel/test_unpickle.py, tests/model/test_transformer_engine.py; of a whole command,
    tests/functional/test_bad_input.py).
    Raises CheckpointError if a file is missing or altered, or if `about` (the model) differs from what was saved
    (`require_same_run`), and ValueError if one is more than data.
    """
    with agreed():
        content = read_complete(path)
        require_same_run(path, content, about)
    _check_files(path, content)
    layout = content.get("layout")
    if optimizer is None:
        state: dict[str, Any] = state_for_any_layout(chunks, None, loading=True)
    else:
        make_state(optimizer)
        if layout is not None:
            _require_same_layout(path, layout, slices_digest(optimizer))
            state = state_of_this_layout(chunks, optimizer)
        else:
            state = state_for_any_layout(chunks, optimizer, loading=True)
    with agreed():
        found = _shapes_in(path, with_optimizer=optimizer is not None)
    check_fit(path, found, shards_in(state), vocabulary_of(bare(chunks[0])))
    with data_only(path):  # `.metadata`, and Transformer Engine's extra state
        loaded = dist_checkpointing.load(state, str(path))
        for number, chunk in enumerate(chunks):
            bare(chunk).load_state_dict(loaded[f"model{number}"])
    require_numbers(path, model_shards(chunks))
    position = Position(**content["position"])
    if optimizer is not None:
        fill = fill_for_any_layout if layout is None else fill_of_this_layout
        fill(optimizer, loaded["optimizer"], position.updates)
    return position


def read_complete(path: Path) -> dict[str, Any]:
    """The content of checkpoint.json. DamagedCheckpoint where that is no content of ours, CheckpointError if a newer
    version wrote it."""
    try:
        return read_about(path)
    except CheckpointError as error:
        if "newer megatron_lccp" in str(error):
            raise
        raise DamagedCheckpoint(str(error)) from error


def _require_same_layout(path: Path, saved: Mapping[str, Any], digest: str) -> None:
    """CheckpointError if a checkpoint of one layout is of another than this one."""
    if saved.get("digest") == digest:
        return
    others = [other for other in checkpoints_in(path.parent) if fits_any_layout(other)]
    instead = f"move it away: {others[-1].name} fits any layout" if others else "there is none for any layout beside it"
    raise CheckpointError(
        f"{path}: was saved for its layout alone ({saved.get('text')}; checkpoint.any_layout_every), and this one is "
        f"another; go on with that layout, or {instead}"
    )


def _shapes_in(path: Path, with_optimizer: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of the model, and of the optimizer if asked, by name."""
    metadata = read_metadata(path)
    if not with_optimizer:
        return {name: shape for name, (shape, _) in tensors_in(metadata).items()}
    described = metadata.state_dict_metadata.items()
    return {name: tuple(of.size) for name, of in described if isinstance(of, TensorStorageMetadata)}


def require_same_run(path: Path, content: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """CheckpointError unless a checkpoint (its `content`) is of the run that `about` describes.

    Of the stages' samples those count that it has come to: what comes after them may change, or be new.
    """
    if "position" not in content:
        raise CheckpointError(f"{path}: holds weights alone, no training; name it in model.init_from")
    try:
        reached = Position(**content["position"]).stage + 1
    except TypeError as error:
        raise CheckpointError(f"{path}: {ABOUT}: position cannot be read ({error}); move it away") from error
    there = content["about"]
    if found := [*_run_differences(there, about, reached), *(model_differences(there, about) if about else [])]:
        raise CheckpointError(another_run(path, found))


def another_run(path: Path, found: Sequence[str]) -> str:
    """One line for the fields, `name: there -> here`, that make a checkpoint one of another run."""
    return f"{path}: is of another run: {'; '.join(found)}; set the values that were, or take another run directory"


def _run_differences(there: Mapping[str, Any], here: Mapping[str, Any], reached: int) -> list[str]:
    """What makes a run another one than that of a checkpoint, its model apart, as `field: there -> here`."""
    fields = {"family": "model.family", "seed": "seed"}
    found = [
        f"{fields[name]}: {there.get(name)} -> {here[name]}"
        for name in fields
        if name in here and there.get(name) != here[name]
    ]
    if "tokenizer" in here and there.get("tokenizer") != here["tokenizer"]:
        found.append("data.tokenizer.path: is another tokenizer")
    was, now = (list(about.get("samples", {}).items())[:reached] for about in (there, here))
    if "samples" not in here or was == now:
        return found
    if (names := [[name for name, _ in stages] for stages in (was, now)])[0] != names[1]:
        return [*found, f"stages: {', '.join(names[0])} -> {', '.join(names[1])}"]
    return found + [
        f"stages.{name}.{field}: {a} -> {b}"
        for (name, before), (_, after) in zip(was, now)
        for field, a, b in zip(SAMPLES, before, after)
        if a != b
    ]


@torch.no_grad()
def load_weights(path: Path, chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """Fill the model alone from a checkpoint of a training or of a conversion, of any layout; every rank calls it.

    Returns its `about`. Nothing but tensors is read, and nothing run. Raises CheckpointError as `load_checkpoint`, and
    ValueError if it is another model's or more than data.
    """
    with agreed():
        content, found = read_complete(path), _shapes_in(path, with_optimizer=False)
    _check_files(path, content)
    shards = list(model_shards(chunks))
    check_fit(path, found, shards, vocabulary_of(bare(chunks[0])))
    targets = [shard.data for shard in shards]
    with data_only(path):
        loaded = dist_checkpointing.load({str(n): shard for n, shard in enumerate(shards)}, str(path))
    for n, target in enumerate(targets):
        target.copy_(loaded[str(n)])  # read in place, but where the weights are not plain tensors (FP8)
    require_numbers(path, model_shards(chunks))
    return content["about"]


def _check_files(path: Path, content: Mapping[str, Any]) -> None:
    """CheckpointError on all ranks unless the files are those of checkpoint.json."""
    found, problem = digests_of(path)
    if problem is not None:
        raise DamagedCheckpoint(f"{path}: cannot be read: {problem}; {REMEDY}")
    if found != content["sha256"]:
        names = sorted(name for name, digest in content["sha256"].items() if found.get(name) != digest)
        raise DamagedCheckpoint(
            f"{path}: missing or altered since it was saved: {', '.join(names) or 'extra files'}; {REMEDY}"
        )
    with agreed():
        read_metadata(path)  # refuses what would run code when Megatron-Core unpickles it


def digests_of(path: Path, known: Mapping[str, str] | None = None) -> tuple[dict[str, str], str | None]:
    """(SHA-256 of every file of a checkpoint, what could not be read), on all ranks, which share the reading.

    Files whose digests are `known` to all ranks are not read.
    """
    listing: list[list[str]] = [[]]
    if dist.get_rank() == 0:  # one rank lists: on a network file system others may see less
        listing = [
            sorted(file.name for file in path.glob("*") if file.name != ABOUT and file.name not in (known or {}))
        ]
    dist.broadcast_object_list(listing)
    mine, problem = {}, None
    try:
        mine = {name: file_sha256(path / name) for name in listing[0][dist.get_rank() :: dist.get_world_size()]}
    except OSError as error:
        problem = error_text(error)
    everyone: list[tuple[dict[str, str], str | None]] = [({}, None)] * dist.get_world_size()
    dist.all_gather_object(everyone, (mine, problem))
    digests = dict(known or {}) | {name: digest for part, _ in everyone for name, digest in part.items()}
    return dict(sorted(digests.items())), next((text for _, text in everyone if text is not None), None)
