"""Any causal model of transformers as the engine of a window.

    engine = HFEngine.load("HuggingFaceTB/SmolLM2-135M")        # a folder, a name on the hub, or a .gguf file
    window = EvalWindow(
        engine=engine, run="smollm2", tokenizer=as_tokenizer(folder), config_hash="", stage="", step=0, tokens=0,
        text=lambda name, at_least_tok: bundled_tokens(name, tokenizer, at_least_tok),
    )
    with window.opened():
        rows = window.measure([NeedleGrid(), RetrievalHeads()], on_event=print)

In: a model, on one device, spread by `device_map`, or tensor parallel under torchrun. Out: answers to prefills. Only the
rows that predict answers go through the output layer, and what the model does after it (soft caps, scaling) is its own.

What a model does with attention is not known by its name: `HFEngine` runs a few short forwards when it is made, and
compares them with transformers' eager attention. So it knows which layers have heads, whether they can be followed
(`why_not_followed`), and whether cells can share prefills (`why_not_shared`). A model that cannot be followed still
answers, sample by sample, through its own attention: it has losses, but no head scores.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_lccp.config.tree import ParallelConfig
from megatron_lccp.measuring.attention_rows import AttentionRows
from megatron_lccp.measuring.engine import Asked, Sizes, Slots, in_rounds
from megatron_lccp.measuring.found import Found
from megatron_lccp.measuring.hf_attention import HFAttention, Unfollowed
from megatron_lccp.measuring.hf_files import load_model, quiet
from megatron_lccp.measuring.pieces import Pieces
from megatron_lccp.measuring.prefill_attention import forward_of
from megatron_lccp.measuring.prefills import Prefill, Segment, Tap
from megatron_lccp.measuring.taps import RowScores
from megatron_lccp.parallel.gather import first_text
from megatron_lccp.parallel.groups import Groups, make_groups, start_ranks
from megatron_lccp.text import ranges_text

ROWS_AT_ONCE = 1024
"""Rows that go through the output layer together: bounds the logits to this many times the vocabulary."""
PROBE_TOK = 24
"""Tokens of the short forwards that say how a model attends."""
FAR_TOK = 1 << 22
"""The furthest position that is tried."""
SAME, COARSE = 1e-3, 0.25
"""Logits are the same up to this share of their spread; in BF16 and FP16 the second. SmolLM2-135M's two orders of adding
differ by 6e-6 in FP32 and by 0.06 in BF16."""


@dataclass(frozen=True)
class _Known:
    """What the short forwards say of a model."""

    has_heads_LN: np.ndarray
    """Which heads of the whole model there are; layers without attention have none."""
    first_head: int
    """Of this rank."""
    says_heads: bool
    """This rank tells of its heads: it is the first of those that hold them."""
    why_not_followed: str | None
    why_not_shared: str | None
    stretches: bool
    """The positions' rotation depends on the longest of them, and on forwards before (RoPE type dynamic)."""


class HFEngine:
    """A causal model of transformers; an Engine. Every rank makes one alike."""

    def __init__(self, model: Any, groups: Groups):
        """`model`: in any mode and on any device; `groups`: those of `tp` are the ranks that its weights are spread
        over, those of `dp` hold replicas. Raises ValueError for a model that does not predict tokens."""
        self._model, self._groups = model, groups
        self._config = model.config.get_text_config()
        if model.get_output_embeddings() is None:
            raise ValueError(f"{type(model).__name__}: has no output layer to predict tokens with")
        self._attention = HFAttention(model, groups.tp, groups.cp)
        self._inner: torch.nn.Module | None = None
        self._vocab_size = 0
        self._known = _Known(np.zeros((0, 0), bool), 0, True, None, None, False)
        with self.opened(), quiet():
            self._known = self._probed()

    @classmethod
    def load(
        cls, source: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | str | None = None,
        device_map: Any = None, tp: int = 1,
    ) -> HFEngine:  # fmt: skip
        """A model of a folder or name on the hub, in safetensors, or of a .gguf file.

        Starts the ranks if none are: one process alone, or those of torchrun, on which `tp` neighbours share a model
        and all others hold replicas. `device`: None takes the rank's own. `dtype`: None takes FP32 on a CPU and the
        file's own on a GPU. `device_map`: spreads one process's model over its devices (needs accelerate).
        Raises ValueError in one line for pickles, code of the model's own, and weights that do not fit.
        """
        own = start_ranks()
        groups = make_groups(ParallelConfig(tensor=tp), torch.device(device) if device else own, seed=0)
        return cls(load_model(source, groups, dtype, device_map), groups)

    @property
    def groups(self) -> Groups:
        """Process groups."""
        return self._groups

    @property
    def model(self) -> Any:
        """The model of transformers."""
        return self._model

    @property
    def sizes(self) -> Sizes:
        """The model's shape; its vocabulary is the rows of the output layer, which transformers' softmax is over."""
        layers, heads = self._known.has_heads_LN.shape
        return Sizes(layers, heads, self._context_tok, self._vocab_size)

    @property
    def _context_tok(self) -> int:
        return int(getattr(self._config, "max_position_embeddings", None) or 1 << 30)

    @property
    def why_not_followed(self) -> str | None:
        """Why no head can be scored or set to zero; None if some can."""
        return self._known.why_not_followed

    def why_not_shared(self) -> str | None:
        """Why each sample runs on its own; None if cells share prefills."""
        return self._known.why_not_shared

    @property
    def notes(self) -> list[str]:
        """What a user should know of how this model is measured, one line each."""
        known, notes = self._known, []
        if known.why_not_followed:
            notes.append(f"heads cannot be scored, and prefills are not shared: {known.why_not_followed}")
        elif absent := [layer for layer, has_N in enumerate(known.has_heads_LN) if not has_N.any()]:
            notes.append(f"{len(absent)} of {len(known.has_heads_LN)} layers have no attention: {ranges_text(absent)}")
        if known.why_not_shared and not known.why_not_followed:
            notes.append(f"prefills are not shared: {known.why_not_shared}")
        return notes

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Evaluation mode and no gradients; on leaving, modes and random states are as before."""
        modules = list(self._model.modules())
        was_training = [module.training for module in modules]
        cpu_state, cuda_states = torch.get_rng_state(), torch.cuda.get_rng_state_all() if _has_cuda() else []
        try:
            for module in modules:
                module.training = False
            with torch.no_grad():
                yield
        finally:
            for module, training in zip(modules, was_training):
                module.training = training
            torch.set_rng_state(cpu_state)
            if cuda_states:
                torch.cuda.set_rng_state_all(cuda_states)

    @contextlib.contextmanager
    def without_heads(self, heads: Iterable[tuple[int, int]]) -> Iterator[None]:
        """While open, the output of these heads (layer, head) is zero in every forward. ValueError for one that is not
        there."""
        known, chosen = self._known, list(heads)
        if known.why_not_followed:
            raise ValueError(f"heads cannot be set to zero: {known.why_not_followed}")
        if strange := [at for at in chosen if not (_is_in(at, known.has_heads_LN) and known.has_heads_LN[at])]:
            raise ValueError(f"heads: layer {strange[0][0]} has no attention head {strange[0][1]}")
        by_layer: dict[int, list[int]] = {}
        for layer, head in chosen:
            count = self._held[layer]
            if 0 <= head - known.first_head * count < count:
                by_layer.setdefault(layer, []).append(head - known.first_head * count)
        self._attention.zeroed = by_layer
        try:
            yield
        finally:
            self._attention.zeroed = {}

    def predict(
        self, replicas: Sequence[Sequence[Prefill]], asked: Asked, done: Callable[[int], None] | None = None,
        pieces: Pieces | None = None,
    ) -> dict[int, Found]:  # fmt: skip
        """What the model says of every sample, on all ranks. Raises ValueError for what it cannot be asked."""
        known, groups = self._known, self._groups
        if asked.looks and (reason := first_text(known.why_not_followed)):
            raise ValueError(f"heads cannot be scored: {reason}")
        longest = max((int(p.positions.max()) + 1 for of in replicas for p in of), default=0)
        if self._has_learned_positions and longest > self._context_tok:
            raise ValueError(f"a sample has {longest} tokens, the model has learned positions for {self._context_tok}")
        found: dict[int, Found] = {}
        nulls: dict[int, np.ndarray] = {}

        slots: list[Slots] = []

        def on_rows(layer: int, tap: Tap, scores: RowScores, rows: AttentionRows | None) -> None:
            slots[-1].put_rows(layer, tap, scores, rows, mine=known.says_heads)

        def one_round(now: list[list[Prefill]]) -> None:
            taps = [tap for prefills in now for prefill in prefills for tap in prefill.taps]
            slots[:] = [Slots(taps, known.has_heads_LN.shape, asked, groups.device, known.first_head)]
            for prefill in now[groups.dp.rank()]:
                self._run(prefill, slots[-1])
            slots[-1].collect(found, nulls, ~known.has_heads_LN)

        # around all rounds: a prefill may see keys of an earlier one's
        with self._followed(on_rows if asked.looks else None, asked.questions):
            in_rounds(replicas, 1, one_round, done, pieces)
        for number, mass_LN in nulls.items():
            found[number].null_mass_LN = mass_LN
        return found

    def _followed(self, on_rows: Any = None, questions: bool = False) -> contextlib.AbstractContextManager[None]:
        """While open, the model attends as the prefill says; as it does by itself, if it cannot be followed."""
        if self._known.why_not_followed:
            return contextlib.nullcontext()
        return self._attention.opened(self._known.first_head, on_rows, questions)

    def _run(self, prefill: Prefill, slots: Slots) -> None:
        """A forward, and the losses of its answers."""
        if self._known.stretches:
            self._forward(_text(prefill.tokens[:1]))  # a short text takes such a rotation back
        taps = [tap for tap in prefill.taps if not tap.is_null]
        target_r = np.concatenate([np.arange(tap.answer, tap.end) for tap in taps] or [np.zeros(0, np.int64)])
        target_r -= prefill.start
        row_r, wanted_r = torch.as_tensor(target_r - 1), torch.as_tensor(prefill.tokens[target_r])
        nll, best = [], []
        for logit_rv, id_r in zip(self._logits(prefill, row_r), wanted_r.split(ROWS_AT_ONCE)):
            logit_rv = logit_rv.float()
            id_r = id_r.to(logit_rv.device)
            top_r = logit_rv.amax(-1)
            # top first, for then nothing is lost where logits are large
            wanted_r = logit_rv.gather(1, id_r[:, None])[:, 0]
            nll.append((logit_rv - top_r[:, None]).exp().sum(-1).log() + (top_r - wanted_r))
            ids_v = torch.arange(logit_rv.shape[1], device=logit_rv.device)
            # not argmax(): which of equal ones it returns is not defined
            best.append(torch.where(logit_rv == top_r[:, None], ids_v, len(ids_v)).amin(-1))
        if taps and self._groups.tp.rank() == 0:
            sizes = [tap.end - tap.answer for tap in taps]
            for tap, nll_r, best_r in zip(
                taps, *(torch.cat(x).to(self._groups.device).split(sizes) for x in (nll, best))
            ):
                slots.put_answer(tap, nll_r, best_r)

    def _logits(self, prefill: Prefill, row_r: torch.Tensor) -> Iterator[torch.Tensor]:
        """[r, v]: logits of some rows, ROWS_AT_ONCE at a time; one forward.

        The model's own forward makes them, so that what it does after its output layer is done: what runs before that
        layer runs once, and gives back the rows that are wanted.
        """
        inner, held = self._inner, list[Any]()
        assert inner is not None
        original = inner.forward
        self._attention.starts(prefill)
        for rows in row_r.split(ROWS_AT_ONCE) if len(row_r) else [torch.zeros(1, dtype=torch.int64)]:

            def some(*args: Any, rows: torch.Tensor = rows, **kwargs: Any) -> Any:
                if not held:
                    held.append(original(*args, **kwargs))
                return _rows_of(held[0], rows)

            with forward_of(inner, some):
                yield self._outputs(prefill)

    def _forward(self, prefill: Prefill) -> torch.Tensor:
        """[s, v]: the logits of all rows of a prefill."""
        self._attention.starts(prefill)
        return self._outputs(prefill)

    def _outputs(self, prefill: Prefill) -> torch.Tensor:
        """What the model's forward gives for a prefill that has started: logits."""
        device = self._model.get_input_embeddings().weight.device
        token_s = torch.as_tensor(prefill.tokens, device=device)
        position_s = torch.as_tensor(prefill.positions, device=device)
        # A mask of ones: else transformers takes a jump of the positions for a text that begins.
        out = self._model(
            input_ids=token_s[None], attention_mask=torch.ones_like(token_s)[None], position_ids=position_s[None],
            use_cache=False,
        )  # fmt: skip
        return out.logits[0]

    def _probed(self) -> _Known:
        """What some short forwards say of how the model attends; every rank runs them."""
        model, tp = self._model, self._groups.tp
        layers, heads = self._config.num_hidden_layers, getattr(self._config, "num_attention_heads", None) or 1
        most = min(self._context_tok, PROBE_TOK)
        table = model.get_input_embeddings().weight
        token_s = np.random.default_rng(0).integers(0, min(table.shape[0], self._config.vocab_size), most)
        probe, followed = _text(token_s), None
        before = model.config._attn_implementation
        model.set_attn_implementation("eager")
        try:
            self._inner, eager_sv = self._inner_of(probe)
        except (AttributeError, TypeError, IndexError, RuntimeError, NotImplementedError) as error:
            raise ValueError(f"{type(model).__name__}: a short text does not go through it: {_line(error)}") from error
        finally:
            model.set_attn_implementation(before)
        self._vocab_size = eager_sv.shape[1]
        none = np.zeros((layers, heads), bool)
        try:
            with self._attention.opened():
                followed = _apart(eager_sv, self._forward(probe))
        except (Unfollowed, AttributeError, TypeError, IndexError, RuntimeError, NotImplementedError) as error:
            why = str(error) if isinstance(error, Unfollowed) else f"its attention needs a mask matrix ({_line(error)})"
            return _Known(none, 0, True, why, why, False)
        calls = self._attention.calls
        if not calls:
            why = "none of its layers calls transformers' attention interface"
            return _Known(none, 0, True, why, why, False)
        if followed > self._tolerance:
            given = sorted({name for call in calls for name in call.more})
            why = f"its attention is not what query, key and value say (logits differ by {followed:.1g} of their spread"
            why += f"; beside them it is given {', '.join(given)})" if given else ")"
            return _Known(none, 0, True, why, why, False)
        self._held = {call.layer: call.heads for call in calls}
        if len(self._held) < len(calls):
            why = "some of its layers attend more than once"
            return _Known(none, 0, True, why, why, False)
        spread = tp.size() > 1 and max(self._held.values()) * tp.size() <= heads
        ranks, first = (tp.size(), tp.rank()) if spread else (1, 0)
        layers = max(layers, *(layer + 1 for layer in self._held))
        has_heads_LN = np.zeros((layers, max(self._held.values()) * ranks), bool)
        for layer, count in self._held.items():
            has_heads_LN[layer, : count * ranks] = True
        stretched, alone = self._shares(probe, eager_sv)
        if len(self._held) < self._config.num_hidden_layers:
            alone = "some of its layers have no attention, and may carry a state from token to token"
        return _Known(has_heads_LN, first, spread or tp.rank() == 0, None, alone, stretched)

    def _inner_of(self, probe: Prefill) -> tuple[torch.nn.Module, torch.Tensor]:
        """(the part of the model before its output layer, the logits [s, v] of a forward)."""
        table = self._model.get_input_embeddings()
        for inner in self._model.modules():  # from the outermost on
            if inner in (self._model, table) or not any(module is table for module in inner.modules()):
                continue
            shapes: list[tuple[int, ...]] = []

            def seen(*args: Any, original: Any = inner.forward, shapes: list = shapes, **kwargs: Any) -> Any:
                out = original(*args, **kwargs)
                shapes.append(tuple(out[0].shape[:2]))
                return out

            with forward_of(inner, seen):
                logit_sv = self._forward(probe)
            if shapes == [(1, len(probe))] and len(logit_sv) == len(probe):
                return inner, logit_sv
        raise ValueError(f"{type(self._model).__name__}: does not say which part of it comes before its output layer")

    def _shares(self, probe: Prefill, eager_sv: torch.Tensor) -> tuple[bool, str | None]:
        """(its positions' rotation depends on the longest of them, why cells cannot share prefills)."""
        token_s, count = probe.tokens, len(probe)
        half, quarter = count // 2, count // 4
        # Half of the text; what a sample reads that leaves it after a quarter; and a token far away, which nothing sees.
        # A rotation that is worked out from the positions of a text has none that is too far.
        made = any(hasattr(module, "max_seq_len_cached") for module in self._model.modules())
        end = min(self._context_tok * (2 if made else 1), FAR_TOK) - 1
        positions = np.concatenate([np.arange(half), quarter + np.arange(count - half), [end]])
        segments = (Segment(0, half), Segment(half, count, ((0, quarter),)), Segment(count, count + 1))
        near = Prefill(token_s, positions[:-1], segments[:-1], ())
        far = Prefill(np.append(token_s, token_s[0]), positions, segments, ())
        branch = _text(np.concatenate([token_s[:quarter], token_s[half:]]))
        with self._attention.opened():
            alone_sv = self._forward(branch)[quarter:]
            near_sv = self._forward(near)
            far_sv = self._forward(far)
            self._forward(_text(token_s[:1]))
        differs = max(_apart(eager_sv[:half], near_sv[:half]), _apart(alone_sv, near_sv[half:]))
        stretched = _apart(near_sv, far_sv[:-1])
        if differs > self._tolerance:
            why = "a token depends on more than what it sees and on where it stands"
            return False, f"{why} (logits differ by {differs:.1g} of their spread)"
        if stretched > self._tolerance:
            return True, "the rotation of its positions depends on the longest of them"
        return False, None

    @property
    def _tolerance(self) -> float:
        return SAME if torch.finfo(self._model.dtype).bits >= 32 else COARSE

    @property
    def _has_learned_positions(self) -> bool:
        """Whether it has a table of positions, which a longer text leaves."""
        tables = [module for module in self._model.modules() if isinstance(module, torch.nn.Embedding)]
        longest = self._context_tok
        return any(
            longest <= table.num_embeddings <= longest + 8 and table is not self._model.get_input_embeddings()
            for table in tables
        )


def _text(token_s: np.ndarray) -> Prefill:
    """An ordinary sequence of which nothing is asked."""
    return Prefill(token_s, np.arange(len(token_s)), (Segment(0, len(token_s)),), ())


def _rows_of(out: Any, rows: torch.Tensor) -> Any:
    """What a model gave before its output layer, for some rows of it."""
    hidden = out[0]
    some = hidden[:, rows.to(hidden.device)]
    if isinstance(out, tuple):
        return (some, *out[1:])
    found = copy.copy(out)
    found[next(iter(out))] = some
    return found


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """How far apart logits [s, v] are, as a share of their spread; the median over rows, for a router may flip."""
    a, b = a.float(), b.float()
    return float(((a - b).square().mean(-1).sqrt() / a.std(-1).clamp(min=1e-30)).median())


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _is_in(at: tuple[int, int], table: np.ndarray) -> bool:
    return 0 <= at[0] < table.shape[0] and 0 <= at[1] < table.shape[1]


def _has_cuda() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()
