"""The monitors in anyone's loop: attach them to a Megatron-Core model, measure from the loop's own hook.

    from megatron_lccp import attach
    suite = attach(model, "monitors.yaml", "tokenizer.model", dir="runs/mine")
    rows = suite.measure(step)

In: a list of model chunks as Megatron-Core's schedules take them (plain, in Float16Module, in DDP), process groups, a
tokenizer, monitors. Out: rows, the same on every rank; with `dir`, a run directory for `lccp report`. Every rank calls
`attach` and `measure`. Nothing of the foreign training changes: the window gives back modes, hooks and random states.
Megatron-LM: call `measure` in the `non_loss_data_func` given to `pretrain`. Megatron-Bridge: in a callback's
`on_eval_end`. Both are handed the model: attach at their first call. A loop of its own: examples/attach_plain_mcore.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_lccp.config.load import load_monitors
from megatron_lccp.config.tree import ParallelConfig
from megatron_lccp.data.haystacks import bundled_tokens
from megatron_lccp.data.tokenizers.load import as_tokenizer
from megatron_lccp.files import error_text
from megatron_lccp.measuring.beforehand import monitor_problems, place
from megatron_lccp.measuring.forward import learned_positions
from megatron_lccp.measuring.megatron_engine import MegatronEngine
from megatron_lccp.measuring.window import EvalWindow
from megatron_lccp.model.build import bare
from megatron_lccp.parallel import compat
from megatron_lccp.parallel.gather import agreed, first_text
from megatron_lccp.parallel.groups import Groups
from megatron_lccp.records.store import RunStore
from megatron_lccp.schema import Monitor, Row


@dataclass
class _Step:
    """What was measured at a step."""

    step: int
    tokens: int
    tokens_before: int
    """Of the step that was measured before it."""
    done: dict[int, tuple[Monitor, list[Row]]] = field(default_factory=dict)
    """By the monitor's id(), for it need not be hashable."""

    def rows_of(self, monitors: Iterable[Monitor]) -> list[Row]:
        """Rows of these monitors, in their order."""
        return [row for monitor in monitors for row in self.done[id(monitor)][1]]


@dataclass
class Suite:
    """Monitors on a model; make it with `attach`."""

    chunks: Sequence[torch.nn.Module]
    """The model chunks of this rank."""
    monitors: Sequence[Monitor]
    """What is measured."""
    groups: Groups
    """Process groups of the foreign loop."""
    tokenizer: Any
    """Encodes needles and bundled text."""
    texts: Mapping[str, np.ndarray]
    """Token ids of the user's own held-out texts by name."""
    run: str
    """Name in the rows."""
    store: RunStore | None
    """Where windows are written, on the main rank."""
    say: Callable[[str], None] = lambda text: None
    """Is told what is being measured."""
    cache: dict[Any, Any] = field(default_factory=dict)
    last: _Step | None = None
    """The step of the last call."""

    def measure(self, step: int, tokens: int = 0, due_only: bool = False) -> list[Row]:
        """Run the monitors (with `due_only`, those whose `every` says so) and return their rows; every rank calls it.

        `tokens` is what training has consumed. A monitor runs once a step: called again at the same step, as
        Megatron-LM does at its last one, this returns the same rows. A monitor that fails alike on all ranks is
        reported as an event and gives no rows. Raises OSError on all ranks if the run directory cannot be written.
        """
        if self.last is None or self.last.step != step:
            self.last = _Step(step, tokens, self.last.tokens if self.last else 0)
        at = self.last
        wanted = [m for m in self.monitors if not due_only or m.every.due(step, at.tokens, at.tokens_before)]
        new = [monitor for monitor in wanted if id(monitor) not in at.done]
        if not new:
            return at.rows_of(wanted)
        window = self.window(step, at.tokens)
        events: list[tuple[str, str]] = []
        with window.opened():
            for monitor in new:
                at.done[id(monitor)] = monitor, window.measure([monitor], lambda *event: events.append(event))
        for kind, text in events:
            self.say(f"{kind}: {text}")
        problem = None
        if self.store is not None:
            try:
                for kind, text in events:
                    self.store.append_event(kind, text, step=step)
                if rows := at.rows_of(monitor for monitor, _ in at.done.values()):
                    self.store.write_metrics(new)
                    self.store.write_window(rows, step)
            except OSError as error:
                problem = error_text(error)
        if problem := first_text(problem):  # on all ranks, or those that could write would wait for the others
            raise OSError(problem)
        return at.rows_of(wanted)

    def window(self, step: int, tokens: int) -> EvalWindow:
        """A window on the model as it is; not open yet."""
        return EvalWindow(
            engine=MegatronEngine(self.chunks, self.groups, self.tokenizer.vocab_size), run=self.run,
            tokenizer=self.tokenizer, config_hash="", stage="train", step=step, tokens=tokens,
            text=self.text, corpora=tuple(self.texts), say=self.say, cache=self.cache,
        )  # fmt: skip

    def text(self, name: str, at_least_tok: int) -> np.ndarray:
        """Tokens of one of the user's texts, or of a bundled one with at least so many."""
        if name in self.texts:
            return self.texts[name]
        if not name.startswith("bundled/"):
            raise ValueError(f"texts: has no {name!r}; give it to attach(texts=...), or take bundled/stdlib")
        return bundled_tokens(name, self.tokenizer, at_least_tok)


def attach(
    model: Sequence[torch.nn.Module] | torch.nn.Module,
    monitors: str | Path | Sequence[Monitor],
    tokenizer: Any,
    process_groups: Any = None,
    texts: Mapping[str, str | Path | np.ndarray] | None = None,
    run: str = "run",
    dir: str | Path | None = None,
    say: Callable[[str], None] | None = None,
    bos: str = "none",
) -> Suite:
    """Monitors for a Megatron-Core model in training.

    `model`: the chunks of this rank, plain or wrapped; every rank of the job holds some. `monitors`: monitors, or a
    YAML file with a `monitors:` list as in a run's configuration. `tokenizer`: a path as
    data.tokenizer.path, or a tokenizer of Hugging Face's or Megatron's. `process_groups`: a ProcessGroupCollection with
    tp, pp, dp and cp; None takes Megatron-Core's global ones. `texts`: held-out texts by name, as token ids or UTF-8
    files, for CorpusPPL and haystacks (besides bundled/stdlib, bundled/biographies, bundled/biographies_zh). `dir`: a
    run directory to write. `bos`: the token that samples begin with, as data.tokenizer.bos.
    Raises ValueError in one line for what does not fit, and a line for everything that the monitors cannot do.
    """
    compat.apply()
    chunks = [model] if isinstance(model, torch.nn.Module) else list(model)
    first = bare(chunks[0])
    groups, found = _groups(process_groups, first, len(chunks)), as_tokenizer(tokenizer, bos)
    if found.vocab_size > first.vocab_size:
        raise ValueError(f"tokenizer: has {found.vocab_size} tokens, the model's vocabulary {first.vocab_size} rows")
    if first.position_embedding_type == "mrope":
        raise ValueError("model: its positions have several axes (mrope); monitors ask plain sequences of other models")
    for where, name in (("run", run), *(("texts", name) for name in texts or ())):
        if not name.isprintable():
            raise ValueError(f"{where}: {name!r} has a character that cannot be seen; give another name")
    own = {name: _tokens(name, text, found) for name, text in (texts or {}).items()}
    chosen = load_monitors(monitors) if isinstance(monitors, (str, Path)) else list(monitors)
    with agreed():  # a directory of a newer format leaves no rank waiting
        store = RunStore(dir) if dir is not None and groups.is_main else None
    suite = Suite(chunks, chosen, groups, found, own, run, store, say or (lambda text: None))
    if problems := monitor_problems(chosen, suite.window(0, 0)) or list(_too_long(suite, first)):
        raise ValueError("\n".join(problems))
    return suite


def _too_long(suite: Suite, model: GPTModel) -> Iterator[str]:
    """Monitors whose longest sample has more tokens than the model has learned positions for."""
    limit = learned_positions(model)
    if limit is None:
        return
    window = replace(suite.window(0, 0), sketch=True, cache={})  # one sample of each cell says how long they are
    for number, monitor in enumerate(suite.monitors):
        try:
            work = monitor.work(window)
        except Exception:  # a text that cannot be read, say: it is an event of the first window
            continue
        longest = max((len(prefill) for tree in getattr(work, "alone", ()) for prefill in tree), default=0)
        if longest > limit:
            yield (
                f"{place(number, monitor)}: its longest sample has {longest} tokens, the model has learned positions "
                f"for {limit}; ask for samples of at most {limit} tokens"
            )


def _groups(collection: Any, model: torch.nn.Module, chunks: int) -> Groups:
    """Groups of ours from those of the loop."""
    if collection is None:
        from megatron.core.process_groups_config import ProcessGroupCollection

        collection = ProcessGroupCollection.use_mpu_process_groups(["tp", "pp", "dp", "cp"])
    missing = [name for name in ("tp", "pp", "dp", "cp") if getattr(collection, name, None) is None]
    if missing:
        raise ValueError(f"process_groups: has no {', '.join(missing)}")
    tp, pp, dp, cp = (getattr(collection, name) for name in ("tp", "pp", "dp", "cp"))
    layout = ParallelConfig(
        tensor=tp.size(), pipeline=pp.size(), virtual_pipeline=chunks if chunks > 1 else None, context=cp.size()
    )
    device = next(model.parameters()).device
    return Groups(collection=collection, tp=tp, pp=pp, dp=dp, cp=cp, device=device, layout=layout)


def _tokens(name: str, text: str | Path | np.ndarray, tokenizer: Any) -> np.ndarray:
    if isinstance(text, (str, Path)):
        try:
            return np.array(tokenizer.encode_document(Path(text).read_text(encoding="utf-8")), dtype=np.int32)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"texts.{name}: {text} cannot be read as UTF-8 text: {error_text(error)}") from error
    tokens = np.asarray(text)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(f"texts.{name}: should be a path or token ids [tokens], is {tokens.dtype} {tokens.shape}")
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < tokenizer.vocab_size:
        raise ValueError(
            f"texts.{name}: has ids {tokens.min()} to {tokens.max()}, the tokenizer 0 to {tokenizer.vocab_size - 1}; "
            "give the ids of this tokenizer"
        )
    return tokens
