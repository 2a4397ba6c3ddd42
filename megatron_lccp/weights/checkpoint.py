"""Checkpoints that are whole or absent, and fit any layout.

In: model chunks, optimizer, position. Out: `<dir>/step-00000100/` in Megatron-Core's dist_checkpointing format, with
`checkpoint.json` (what it is, where the training stands, a SHA-256 of every file) written last and checked first.

Model and optimizer state are kept per parameter of the whole model ("fully reshardable"), so DP, TP, PP and EP may
change between save and load. Random states need no saving: the loop seeds every step anew.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException

from megatron_lccp.files import file_sha256, write_whole
from megatron_lccp.model.build import bare
from megatron_lccp.parallel.compat import save_without_helpers
from megatron_lccp.parallel.gather import RanksApart, agreed, all_out, first_text
from megatron_lccp.parallel.groups import Groups
from megatron_lccp.parallel.lost import lost_ranks
from megatron_lccp.parallel.unpickle import data_only
from megatron_lccp.weights.sharded import ABOUT, FORMAT, CheckpointError, read_about, read_metadata, tensors_in
from megatron_lccp.weights.whole import check_fit, model_shards

ROOM_BYTES = 1 << 20
# `chained_optim_avoid_prefix`: names without the number of optimizers in them, which differs between EP = 1 and EP > 1.
METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


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
    named = (path for path in directory.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))
    return sorted(path for path in named if (path / ABOUT).is_file())


def discard_drafts(directory: Path) -> None:
    """Remove what a killed save left behind; for one rank, before the training goes on."""
    for draft in directory.glob("step-*.tmp"):
        shutil.rmtree(draft)


def drop_old(directory: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints; what is left of one if this is cut off is a draft."""
    for old in checkpoints_in(directory)[:-keep]:
        shutil.rmtree(old.rename(f"{old}.tmp"), ignore_errors=True)


def save_checkpoint(
    directory: Path,
    keep: int,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    groups: Groups,
    position: Position,
    about: Mapping[str, Any],
) -> Path:
    """Write `step-*` under `directory` and drop all but the newest `keep`; every rank calls it.

    Raises CheckpointError on all ranks if one could not write (a full disk, say); earlier checkpoints stay.
    """
    final = directory / f"step-{position.step:08d}"
    temporary = directory / f"{final.name}.tmp"
    for chunk in chunks:
        if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)  # else what is saved is from before the last update
    problem = first_text(_make_room(temporary) if groups.is_main else None)
    digests: dict[str, str] = {}
    if problem is None:
        try:
            save_without_helpers()
            dist_checkpointing.save(_sharded_state(chunks, optimizer, loading=False), str(temporary))
        except (Exception, CheckpointException) as error:  # whatever one rank met, all must hear of it
            if lost_ranks(error):
                raise
            problem = _last_line(error)
        if not all_out(failed=problem is not None):
            raise RanksApart(
                f"{final}: not saved ({problem}), and other ranks wait in the middle of the save; earlier ones stay, and "
                "the same command resumes"
            )
        problem = first_text(problem)
    if problem is None:
        digests, problem = _digests(temporary)
    if problem is None and groups.is_main:
        try:
            content = {"format": FORMAT, "position": asdict(position), "about": dict(about), "sha256": digests}
            # on disk before the directory has its name
            write_whole(temporary / ABOUT, lambda draft: draft.write_text(json.dumps(content, indent=1)))
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            drop_old(directory, keep)
        except OSError as error:
            problem = str(error)
    if problem := first_text(problem):
        if groups.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"{final}: not saved, free some space or fix the directory; earlier ones stay ({problem})"
        )
    return final


def _make_room(temporary: Path) -> str | None:
    """An empty directory that can be written to, or what is wrong with it.

    Rank 0 writes some files of a checkpoint alone; a disk without room for those is found out here, where no other
    rank waits in the middle of a save.
    """
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        probe = temporary / "probe"
        with probe.open("wb") as stream:
            stream.write(bytes(ROOM_BYTES))
            os.fsync(stream.fileno())
        probe.unlink()
    except OSError as error:
        return str(error)
    return None


def _last_line(error: BaseException) -> str:
    """What went wrong, without the traces that torch puts into the text of its own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


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
        content = read_about(path)
        require_same_run(path, content, about)
    _check_files(path, content)
    if optimizer is not None:
        _make_state(optimizer)
    with data_only(path):  # `.metadata`, and Transformer Engine's extra state
        state = dist_checkpointing.load(_sharded_state(chunks, optimizer, loading=True), str(path))
        for number, chunk in enumerate(chunks):
            bare(chunk).load_state_dict(state[f"model{number}"])
    position = Position(**content["position"])
    if optimizer is not None:
        _fill_state(optimizer, state["optimizer"], position.updates)
    return position


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
    for name, value in about.items():
        was = content["about"].get(name)
        if name == "samples" and isinstance(was, dict):
            was, value = (list(stages.items())[:reached] for stages in (was, value))
        if was != value:
            raise CheckpointError(
                f"{path}: is a checkpoint of another run: {name} was {was!r}, is {value!r} here; take another run "
                "directory or the value that was"
            )


@torch.no_grad()
def load_weights(path: Path, chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """Fill the model alone from a checkpoint of a training or of a conversion, of any layout; every rank calls it.

    Returns its `about`. Nothing but tensors is read, and nothing run. Raises CheckpointError as `load_checkpoint`, and
    ValueError if it is another model's or more than data.
    """
    with agreed():
        content, found = read_about(path), tensors_in(read_metadata(path))
    _check_files(path, content)
    shards = list(model_shards(chunks))
    check_fit(path, {name: shape for name, (shape, _) in found.items()}, shards)
    targets = [shard.data for shard in shards]
    with data_only(path):
        loaded = dist_checkpointing.load({str(n): shard for n, shard in enumerate(shards)}, str(path))
    for n, target in enumerate(targets):
        target.copy_(loaded[str(n)])  # read in place, but where the weights are not plain tensors (FP8)
    return content["about"]


def _check_files(path: Path, content: Mapping[str, Any]) -> None:
    """CheckpointError on all ranks unless the files are those of checkpoint.json."""
    found, problem = _digests(path)
    if problem is not None:
        raise CheckpointError(f"{path}: cannot be read: {problem}; move it away: the one before it counts then")
    if found != content["sha256"]:
        names = sorted(name for name, digest in content["sha256"].items() if found.get(name) != digest)
        raise CheckpointError(
            f"{path}: missing or altered since it was saved: {', '.join(names) or 'extra files'}; move it away: the "
            "one before it counts then"
        )
    with agreed():
        read_metadata(path)  # refuses what would run code when Megatron-Core unpickles it


def _digests(path: Path) -> tuple[dict[str, str], str | None]:
    """(SHA-256 of every file of a checkpoint, what could not be read), on all ranks, which share the reading."""
    listing: list[list[str]] = [[]]
    if dist.get_rank() == 0:  # one rank lists: on a network file system others may see less
        listing = [sorted(file.name for file in path.glob("*") if file.name != ABOUT)]
    dist.broadcast_object_list(listing)
    mine, problem = {}, None
    try:
        mine = {name: file_sha256(path / name) for name in listing[0][dist.get_rank() :: dist.get_world_size()]}
    except OSError as error:
        problem = str(error)
    everyone: list[tuple[dict[str, str], str | None]] = [({}, None)] * dist.get_world_size()
    dist.all_gather_object(everyone, (mine, problem))
    digests = {name: digest for part, _ in everyone for name, digest in part.items()}
    return dict(sorted(digests.items())), next((text for _, text in everyone if text is not None), None)


def _sharded_state(chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer | None, loading: bool) -> dict:
    state: dict[str, Any] = {f"model{n}": bare(c).sharded_state_dict(metadata=METADATA) for n, c in enumerate(chunks)}
    if optimizer is not None:
        models, state["optimizer"] = dict(state), {}
        for n, part in enumerate(_parts(optimizer)):
            with mock.patch.object(part, "get_parameter_state_dp_zero", partial(_padded_state, part)):
                state["optimizer"][str(n)] = part.sharded_param_state_fully_reshardable(
                    models, is_loading=loading, metadata=METADATA
                )
    return state


def _padded_state(part: DistributedOptimizer, *args: Any, **kwargs: Any) -> dict:
    """The gathered state of an optimizer, every bucket of a buffer at its offset there.

    Megatron-Core puts buckets together without the padding at their ends, and then cuts parameters out at places that
    count it (optimizer/distrib_optimizer.py:1041, 1479). With several buckets, which overlap_grad_reduce makes, and
    sizes that need padding (to 128 and to the replicas), moments and FP32 weights would become other parameters'.
    """
    state = type(part).get_parameter_state_dp_zero(part, *args, **kwargs)
    for number, buffer in enumerate(part.buffers):
        (tensors,) = state[number].values()
        for name, joined in tensors.items():
            if isinstance(joined, torch.Tensor):
                padded, start = joined.new_zeros(buffer.numel), 0
                for bucket in buffer.buckets:
                    end = start + bucket.numel_unpadded
                    padded[bucket.offset : bucket.offset + bucket.numel_unpadded] = joined[start:end]
                    start = end
                tensors[name] = padded
    return state


def _parts(optimizer: MegatronOptimizer) -> Iterator[DistributedOptimizer]:
    """The optimizers that have parameters: one for the dense part and, with expert parallelism, one for the experts."""
    return (part for part in optimizer.chained_optimizers if not part.is_stub_optimizer)


def _make_state(optimizer: MegatronOptimizer) -> None:
    """Have every optimizer allocate its moments, as its first step does; the weights that moves are loaded after."""
    for part in _parts(optimizer):
        part._init_optimizer_states_with_dummy_values()


@torch.no_grad()
def _fill_state(
    optimizer: MegatronOptimizer, loaded: Mapping[str, Mapping[int, Mapping[str, torch.Tensor]]], updates: int
):
    """Copy whole-parameter states into this rank's flat slices of them.

    Stands in for load_parameter_state_from_fully_reshardable, which without Transformer Engine and Apex fails on the
    missing `step` (optimizer/distrib_optimizer.py:940), and whose load_state_dict lets all parameters share one `step`
    tensor, so that each update would advance it many times (optimizer/distrib_optimizer.py:845).
    """
    for number, part in enumerate(_parts(optimizer)):
        slices = {
            parameter: ranges["param"]
            for gbuf in part.gbuf_ranges
            for buckets in gbuf.values()
            for bucket in buckets
            for parameter, ranges in bucket["param_map"].items()
        }
        everything = (p for buffer in part.buffers for p in buffer.param_index_map)
        for index, parameter in enumerate(everything):  # the order in which the state was made
            if parameter in slices:
                own = part._get_main_param_and_optimizer_states(parameter)
                for name, whole in loaded[str(number)][index].items():
                    name = "param" if name == "fp32_param" else name
                    own[name].copy_(whole.flatten()[slices[parameter].start : slices[parameter].end])
        _set_adam_step(part, updates)


def _set_adam_step(part: DistributedOptimizer, updates: int) -> None:
    """torch's Adam counts per parameter, Apex's and Transformer Engine's per group."""
    for state in part.optimizer.state.values():
        if "step" in state:
            state["step"] = torch.tensor(float(updates))
    for group in part.optimizer.param_groups:
        if "step" in group:
            group["step"] = updates
