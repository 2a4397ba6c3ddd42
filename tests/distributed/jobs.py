"""What ranks do in the multi-rank tests; each function runs on every rank and returns plain values and arrays."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import math
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any, Sequence

import numpy as np
import torch
import torch.distributed as dist

from megatron_lccp.config.load import parse_config
from megatron_lccp.parallel.groups import make_groups, start_ranks
from megatron_lccp.parallel.lost import lost_ranks
from megatron_lccp.parallel.zigzag import local_batch

Shards = dict[tuple[str, tuple[int, ...]], np.ndarray]


class Silent:
    """Sinks that keep what they are given."""

    failure = None

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.rows: list[Any] = []
        self.health: list[Any] = []
        self.events: list[tuple[str, str]] = []

    def on_step(self, values, rows):
        self.steps.append(dict(values))
        self.health += rows

    def flush(self):
        pass

    def on_window(self, rows, step):
        self.rows += rows

    def on_event(self, kind, text, step):
        self.events.append((kind, text))

    def has_window(self, step, stage):
        return False

    def why_end(self, tokens):
        return None

    def has_ended(self, step):
        return False


def train_state_for(path: Path, overrides: Sequence[str]):
    """A train state of the configuration on the started ranks."""
    from megatron_lccp.training.setup import check_everything, make_train_state

    device = start_ranks(timeout_s=120)
    torch.set_num_threads(1)
    config = parse_config(path, overrides)
    model, tokenizer = check_everything(config, str(path))
    return make_train_state(config, model, make_groups(config.parallel, device, config.seed), tokenizer)


def shards_of(chunks) -> Shards:
    """A copy of this rank's parameter shards by name and place in the whole."""
    from megatron_lccp.weights.whole import model_shards

    return {(s.key, tuple(s.global_offset)): s.data.detach().float().cpu().numpy().copy() for s in model_shards(chunks)}


def digest_of(chunks) -> str:
    """Hash over all parameters of this rank, bit by bit."""
    state = hashlib.sha256()
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            state.update(name.encode() + parameter.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return state.hexdigest()


@torch.no_grad()
def learned_norms(chunks) -> None:
    """Give every norm weights other than one, with which it matters on which side of RoPE the QK-norm stands.

    And every bias, of a router too, values other than zero.
    """
    torch.manual_seed(11)
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if "layernorm" in name:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.copy_(0.3 * torch.randn_like(parameter))
        for name, buffer in chunk.named_buffers():
            if name.endswith("expert_bias"):
                buffer.copy_(0.3 * torch.randn_like(buffer))


def save_base(path: Path, overrides: Sequence[str], base: str) -> None:
    """One rank: draw weights and write them whole, for all layouts to start from."""
    from megatron_lccp.weights.whole import save_whole

    train_state = train_state_for(path, overrides)
    learned_norms(train_state.chunks)
    save_whole(train_state.chunks, base, {"tokenizer": train_state.tokenizer.sha256})


def initial_weights(path: Path, overrides: Sequence[str]) -> Shards:
    """Shards as drawn, to see that replicas agree."""
    return shards_of(train_state_for(path, overrides).chunks)


def unreadable_on_one_rank(path: Path, overrides: Sequence[str], base: str) -> list[tuple[str, str]]:
    """Errors where rank 0 is given weights, and every other rank the name of something that is not there."""
    from megatron_lccp.model.resolved import resolve
    from megatron_lccp.training.setup import load_base
    from megatron_lccp.weights.checkpoint import load_checkpoint, load_weights
    from megatron_lccp.weights.whole import load_whole

    train_state, said = train_state_for(path, overrides), []
    stage, model = next(iter(train_state.config.stages)), resolve(train_state.config)
    for suffix, read in {
        ".safetensors": lambda name: load_whole(train_state.chunks, name),
        "": lambda name: load_base(train_state.chunks, train_state.config, model, name, train_state.tokenizer, stage),
        "/whole": lambda name: load_weights(Path(name), train_state.chunks),
        "/trained": lambda name: load_checkpoint(Path(name), train_state.chunks, None, {}),
    }.items():
        name = f"{base}{suffix}" if dist.get_rank() == 0 else f"{base}{suffix}.absent"
        try:
            read(name)
        except ValueError as error:
            said.append((type(error).__name__, str(error)))
    return said


def layout(
    path: Path, overrides: Sequence[str], tokens: np.ndarray, passes: int = 1, packs: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """Loss and all gradients of one global batch `tokens` [sequences, s + 1], and the rows of every monitor; then, as
    `packed_loss` and `packed_gradients`, of a step whose micro-batches are `packs`, without auxiliary losses.

    Of the last of some passes over it; delayed scaling has its scales from those before.
    """
    from megatron_lccp.training.step import prepare_schedules

    train_state = train_state_for(path, overrides)
    prepare_schedules(train_state.chunks)
    weights = shards_of(train_state.chunks)
    rows = [{"tokens": row[None, :-1], "labels": row[None, 1:]} for row in torch.as_tensor(tokens)]
    for _ in range(passes):
        loss = step_of(train_state, rows)
    found = {"loss": loss, "weights": weights, "rows": rows_of(train_state)}
    gradients = gradients_of(train_state)
    if packs:
        for chunk in train_state.chunks:
            chunk.config.moe_aux_loss_coeff = 0.0
        load_shards(train_state.chunks, weights)
        found["packed_loss"] = step_of(train_state, packs)
        found["packed_gradients"] = gradients_of(train_state)
    return found | {"gradients": gradients}


def step_of(train_state, micro_batches: Sequence[dict[str, Any]]) -> float:
    """Gradients of a step, dealt to the replicas in turn; its loss, on every rank."""
    from megatron_lccp.training.step import compute_gradients

    groups = train_state.groups
    mine = micro_batches[groups.dp.rank() :: groups.dp.size()]

    def batches():
        for each in mine:
            of_rank = {key: torch.as_tensor(x) if key != "bounds" else x for key, x in each.items()}
            yield local_batch(of_rank, groups.cp, groups.device)

    losses = compute_gradients(
        train_state.chunks, groups, [batches() for _ in train_state.chunks], len(mine), mine[0]["tokens"].shape[1], 1,
        force_all_reduce=True, loss_chunk_tok=train_state.config.training.loss_chunk_tok,
    )  # fmt: skip
    loss = torch.zeros(2, device=groups.device)
    if losses and groups.tp.rank() == 0:
        loss += torch.tensor([torch.stack(losses).sum(), len(losses)], device=groups.device)
    dist.all_reduce(loss)
    return (loss[0] / loss[1]).item()


def gradients_of(train_state) -> Shards:
    """Gradients read the way weights are: by name and place in the whole. The weights are lost."""
    with torch.no_grad():
        for chunk in train_state.chunks:
            for parameter in chunk.parameters():
                parameter.copy_(parameter.main_grad)
    return shards_of(train_state.chunks)


def load_shards(chunks, shards: Shards) -> None:
    """Give the parameters the values that `shards_of` read."""
    from megatron_lccp.weights.whole import model_shards

    with torch.no_grad():
        for shard in model_shards(chunks):
            shard.data.copy_(torch.as_tensor(shards[shard.key, tuple(shard.global_offset)]).view_as(shard.data))


def window_on(train_state, fp8=False, **more):
    """A window on a train state where it stands."""
    from megatron_lccp.data.stages import trained_on
    from megatron_lccp.measuring.megatron_engine import MegatronEngine
    from megatron_lccp.measuring.window import EvalWindow

    return EvalWindow(
        engine=MegatronEngine(train_state.chunks, train_state.groups, train_state.vocab_size, fp8), run="tiny",
        tokenizer=train_state.tokenizer, config_hash="hash", stage="base", step=0, tokens=0, text=train_state.text,
        corpora=trained_on(train_state.config), **more,
    )  # fmt: skip


def rows_of(train_state) -> list[dict[str, Any]]:
    window = window_on(train_state)

    def fail(kind: str, text: str) -> None:
        if kind not in ("no_rows", "sample"):  # a gate that no sample passes closes on every layout
            raise AssertionError(text)

    with window.opened():
        return [dataclasses.asdict(r) for r in window.measure(train_state.config.monitors, fail)]


def tensor_bytes(checkpoint: Path) -> int:
    """Bytes of all tensors of a checkpoint."""
    from torch.distributed.checkpoint import TensorStorageMetadata

    from megatron_lccp.weights.sharded import read_metadata

    described = read_metadata(checkpoint).state_dict_metadata.values()
    tensors = [of for of in described if isinstance(of, TensorStorageMetadata)]
    return sum(math.prod(of.size) * of.properties.dtype.itemsize for of in tensors)


def train(
    path: Path, overrides: Sequence[str], monitors: bool = True, resume: bool = False, break_step: int | None = None,
    one_sees: bool = False, without: Sequence[int] = (), writers: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Train as the command does; losses, rows, and a digest of the final weights.

    `break_step` makes the gradient of that step infinite on the last rank alone; with `one_sees`, only rank 0 is shown
    what checkpoints there are. `without` the checkpoints of these steps. What writes behind the training's back is
    `late`, or the first of the last rank is `killed`.
    """
    from megatron_lccp.training import setup
    from megatron_lccp.training.loop import fit

    if one_sees and os.environ["RANK"] != "0":
        setup.checkpoints_in = lambda directory: []
    train_state = train_state_for(path, overrides)
    if dist.get_rank() == 0:
        for step in without:
            shutil.rmtree(train_state.directory / "checkpoints" / f"step-{step:08d}")
    dist.barrier()
    if resume:
        assert setup.resume(train_state) is not None
    sinks, start = Silent(), train_state.position.step
    if break_step is not None:
        _break(train_state, break_step)
    error = None
    try:
        with _writers(writers):
            fit(train_state, train_state.config.monitors if monitors else (), sinks)
    except (RuntimeError, ValueError) as caught:
        error = str(caught)
    return {
        "start": start, "losses": [s["loss"] for s in sinks.steps], "skipped": [s["skipped"] for s in sinks.steps],
        "rows": [dataclasses.asdict(r) for r in sinks.rows], "events": sinks.events, "error": error,
        "steps": sinks.steps, "health": [dataclasses.asdict(r) for r in sinks.health],
        "digest": digest_of(train_state.chunks), "weights": shards_of(train_state.chunks), "step": train_state.position.step,
    }  # fmt: skip


def stopped_in_window(path: Path, overrides: Sequence[str], pieces: int) -> dict[str, Any]:
    """`fit` with a signal that comes to the last rank alone, in the window at step 3, before its piece of this number.

    The exit code and the line, what the window said of its pieces, and what came of it.
    """
    from megatron_lccp.training import loop
    from megatron_lccp.training.signals import Interrupted

    train_state, sinks, said = train_state_for(path, overrides), Silent(), []

    class Counting(loop.Progress):
        def window(self, step: int, what: str) -> None:
            if step == 3:
                said.append(what)
                if len(said) == pieces and dist.get_rank() == dist.get_world_size() - 1:
                    os.kill(os.getpid(), signal.SIGTERM)

    before, loop.Progress = loop.Progress, Counting
    found: dict[str, Any] = {"code": 0, "line": ""}
    try:
        loop.fit(train_state, train_state.config.monitors, sinks)
    except Interrupted as stop:
        found = {"code": stop.exit_code, "line": str(stop)}
    finally:
        loop.Progress = before
    modules = [module for chunk in train_state.chunks for module in chunk.modules()]
    return {
        **found, "said": said, "windows": sorted({row.step for row in sinks.rows}), "step": train_state.position.step,
        "training": all(module.training for module in modules),
    }  # fmt: skip


def late_rank(path: Path, overrides: Sequence[str], told: Path) -> list[tuple[str, str]]:
    """What the watch tells where the last rank is busy with something of its own, and the others wait in a collective."""
    from megatron_lccp.training.watch import Watch

    start_ranks(timeout_s=120)
    settings, said = parse_config(path, overrides).training, []

    def tell(kind: str, text: str) -> None:
        said.append((kind, text))
        told.touch()

    with Watch(settings, None, tell) as watch:
        watch.mark("step 1")
        while dist.get_rank() == dist.get_world_size() - 1 and not told.exists():
            time.sleep(0.05)
        dist.barrier()
    return said


def ended_by_rule(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """`fit` where the main rank alone says, at step 4, that a rule of the user's ends the run."""
    from megatron_lccp.training.loop import fit

    class Ruled(Silent):
        def why_end(self, tokens):
            return "the rule" if tokens == 4 * 512 else None

    train_state, sinks = train_state_for(path, overrides), Ruled()
    fit(train_state, train_state.config.monitors, sinks)
    last = [row.monitor for row in sinks.rows if row.step == 4]
    return {
        "step": train_state.position.step, "ended": train_state.ended, "saved": train_state.saved.step,
        "events": sinks.events, "last": sorted(set(last)),
    }  # fmt: skip


def removed_in_save(path: Path, overrides: Sequence[str]) -> str:
    """What a rank says where the run directory is removed in the middle of a save, as it is on rank 0."""
    from megatron.core import dist_checkpointing

    from megatron_lccp.parallel import gather
    from megatron_lccp.training import loop

    train_state, save = train_state_for(path, overrides), dist_checkpointing.save
    gather.APART_S = 2.0

    def removed(*arguments: Any, **more: Any) -> Any:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(train_state.directory)
        return save(*arguments, **more)

    dist_checkpointing.save = removed
    try:
        loop.fit(train_state, (), Silent())
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {lost_ranks(error) or error}"
    return "saved"


def refused_resume(path: Path, overrides: Sequence[str], without: Sequence[int]) -> str:
    """What a resume says, of the newest checkpoint but those."""
    try:
        train(path, overrides, resume=True, without=without)
    except ValueError as error:
        return str(error)
    return "resumed"


@contextlib.contextmanager
def _writers(how: str):
    """While open, what each rank forks to write a checkpoint waits for half a second, or dies at the first save."""
    from megatron_lccp.weights import saving

    original, saves, main = saving._write, [], os.getpid()

    def write(*arguments: Any) -> None:
        assert os.getpid() != main
        if how == "killed" and len(saves) == 1 and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.5)
        original(*arguments)

    written_behind = saving._written_behind

    def counted(*arguments: Any):
        saves.append(None)
        return written_behind(*arguments)

    if how:
        saving._write, saving._written_behind = write, counted
    try:
        yield
    finally:
        saving._write, saving._written_behind = original, written_behind


def updates(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """One rank: every weight before training and after; of each step what the optimizer was given (not clipped), and
    the rotary angles of 16 positions."""
    from megatron_lccp.model.build import bare
    from megatron_lccp.training.loop import fit

    train_state, sinks = train_state_for(path, overrides), Silent()
    parameters = {name: p for chunk in train_state.chunks for name, p in chunk.named_parameters()}
    before, gradients = {name: p.detach().numpy().copy() for name, p in parameters.items()}, []
    angles: list[np.ndarray] = []
    original = train_state.optimizer.prepare_grads

    def prepare_grads():
        gradients.append({name: p.main_grad.numpy().copy() for name, p in parameters.items()})
        angles.append(bare(train_state.chunks[0]).rotary_pos_emb(16).numpy().copy())
        return original()

    train_state.optimizer.prepare_grads = prepare_grads
    fit(train_state, (), sinks)
    after = {name: p.detach().numpy().copy() for name, p in parameters.items()}
    return {"before": before, "after": after, "gradients": gradients, "steps": sinks.steps, "angles": angles}


def _break(train_state, step: int) -> None:
    if dist.get_rank() != dist.get_world_size() - 1:
        return
    original = train_state.optimizer.prepare_grads

    def prepare_grads():
        if train_state.position.step == step:
            parameter = next(iter(train_state.chunks[-1].parameters()))
            parameter.main_grad.fill_(float("inf"))
        return original()

    train_state.optimizer.prepare_grads = prepare_grads


def several(jobs: Sequence[tuple[str, dict[str, Any]]]) -> list[Any]:
    """Several jobs one after another in one start of the ranks."""
    return [globals()[name](**arguments) for name, arguments in jobs]


def file_limit(bytes_: int, **arguments: Any) -> dict[str, Any]:
    """`train` where no file may grow beyond a size: what a full disk looks like to a process."""
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing fails with an error instead of ending the process
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, hard))
    try:
        return train(**arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def small_disk(bytes_: int, path: Path, overrides: Sequence[str]) -> dict[str, Any] | None:
    """`train` in a run directory on a disk of that size; None where this machine lets nobody mount one."""
    where = Path(parse_config(path, overrides).dir) / "checkpoints"
    where.mkdir(parents=True)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x00020000) or libc.mount(b"none", b"/", None, 0x44000, None):  # CLONE_NEWNS; MS_REC | MS_PRIVATE
        return None
    if libc.mount(b"tmpfs", str(where).encode(), b"tmpfs", 0, f"size={bytes_}".encode()):
        return None
    found = train(path, overrides, monitors=False)
    return {**found, "kept": sorted(path.name for path in where.iterdir())}


def refused_weights(path: Path, overrides: Sequence[str], directory: Path) -> dict[str, str]:
    """One rank: what each way to load says of weights with a NaN, and of a file with another set of tensors."""
    from safetensors.torch import load_file, save_file

    from megatron_lccp.model.build import bare
    from megatron_lccp.weights.checkpoint import Position, load_checkpoint, load_weights
    from megatron_lccp.weights.saving import save_checkpoint
    from megatron_lccp.weights.streams import whole_header
    from megatron_lccp.weights.whole import load_whole, save_whole

    train_state = train_state_for(path, overrides)
    chunks, file = train_state.chunks, directory / "whole.safetensors"
    save_whole(chunks, file, {})
    tensors, norm = load_file(file), "decoder.final_layernorm.weight"
    save_file(
        {k: v for k, v in tensors.items() if k != norm} | {"x": tensors[norm]}, directory / "set", whole_header({})
    )
    with torch.no_grad():
        expert = bare(chunks[0]).decoder.layers[1].mlp.experts.local_experts[3].linear_fc2.weight
        kept, expert[2, 5] = expert.clone(), torch.nan
    save_whole(chunks, directory / "nan", {})
    saved = save_checkpoint(directory, 1, chunks, None, train_state.groups, Position(1), {})
    with torch.no_grad():
        expert.copy_(kept)
    ways = {
        "set": lambda: load_whole(chunks, directory / "set"),
        "file": lambda: load_whole(chunks, directory / "nan"),
        "weights": lambda: load_weights(saved, chunks),
        "checkpoint": lambda: load_checkpoint(saved, chunks, None, {}),
        "optimizer": lambda: load_checkpoint(saved, chunks, train_state.optimizer, {}),
    }
    said = {}
    for name, load in ways.items():
        try:
            load()
        except ValueError as error:
            said[name] = str(error)
    return said


def look_inside(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """One rank: the texts and samples of all monitors with everything a naive computation needs."""
    from megatron_lccp.data.stages import trained_on
    from megatron_lccp.measuring.needles import needle_set
    from megatron_lccp.model.attention import innermost_core_attention
    from megatron_lccp.model.build import bare

    train_state = train_state_for(path, overrides)
    learned_norms(train_state.chunks)
    model = bare(train_state.chunks[0])
    window = window_on(train_state)
    seen: dict[int, dict[str, np.ndarray]] = {}
    for number, layer in enumerate(model.decoder.layers):

        def after(module, args, output, number=number):
            names = ("query", "key", "value")
            seen[number] = {name: x[:, 0].double().numpy().copy() for name, x in zip(names, args)}
            seen[number]["output"] = output[:, 0].double().numpy().copy()

        innermost_core_attention(layer.self_attention).register_forward_hook(after)

    def logits_of(ids) -> np.ndarray:
        tokens = torch.as_tensor(np.asarray(ids, np.int64))[None]
        return model(tokens, torch.arange(tokens.shape[1])[None], None)[0].double().numpy()

    samples, texts = [], {}
    names = ("tokens", "needle", "question", "answer", "content", "sample", "depth_cell")
    with window.opened():
        rows = rows_of(train_state)
        ablated: dict[str, list[tuple[int, int]]] = {}
        for row in rows:
            if row["metric"] == "ablated_head":
                ablated.setdefault(row["ablated"], []).append((row["layer"], row["head"]))
        copies, copy_back = [], train_state.config.monitors[-1]
        begin = [] if window.tokenizer.bos is None else [window.tokenizer.bos]
        for text_number, text in enumerate(copy_back.texts(window)):
            for lag in copy_back.lags(len(begin)):
                ids = np.concatenate([np.array(begin, int), text[:lag], text[: copy_back.segment_tok]])
                copies.append((text_number, lag, ids, logits_of(ids)))
        for monitor in train_state.config.monitors[1:-1]:
            for sample in needle_set(window, monitor).samples:
                inside = {key: getattr(sample, key) for key in names}
                inside |= {"monitor": monitor.name, "logits": logits_of(sample.tokens), "layers": dict(seen)}
                if monitor.name == "HeadAblation":
                    inside["without"] = {}
                    for name, heads in ablated.items():
                        with _columns_zeroed(model, heads):
                            inside["without"][name] = logits_of(sample.tokens)
                samples.append(inside)
        length = train_state.config.monitors[0].length_tok
        for source in trained_on(train_state.config):
            ids, own = np.asarray(window.text(source, 3 * length)), length - len(begin)
            windows = [np.concatenate([begin, ids[k : k + own]]) for k in range(0, 3 * (length - 1), length - 1)]
            texts[source] = [(one.astype(np.int64), logits_of(one)) for one in windows]
    return {
        "samples": samples, "texts": texts, "copies": copies, "ablated": ablated, "rows": rows, "vocab_size": train_state.vocab_size,
        "weights": shards_of(train_state.chunks),
    }  # fmt: skip


@contextlib.contextmanager
def _columns_zeroed(model, heads):
    """While open, the projection after attention is given zeroes in place of these heads."""
    handles = []
    for number, layer in enumerate(model.decoder.layers):
        attention = layer.self_attention

        def before(module, args, mine=tuple(h for at, h in heads if at == number), width=attention.config.kv_channels):
            x = args[0].clone()
            for head in mine:
                x[..., head * width : (head + 1) * width] = 0
            return (x, *args[1:])

        handles.append(attention.linear_proj.register_forward_pre_hook(before))
    yield
    for handle in handles:
        handle.remove()


def fork_random(path: Path) -> dict[str, Any]:
    """Numbers drawn around and inside forks of Megatron-Core's random state."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    device = start_ranks(timeout_s=60)
    config = parse_config(path)

    def drawn(forks: int) -> tuple[list[float], list[list[float]]]:
        make_groups(config.parallel, device, config.seed)
        outside, inside = torch.rand(2).tolist(), []
        for _ in range(forks):
            with get_cuda_rng_tracker().fork():
                inside.append(torch.rand(2).tolist())
        return outside + torch.rand(2).tolist(), inside

    return {"plain": drawn(0), "forked": drawn(2)}
