"""What needle monitors share: their fields, and samples built once a run, run through shared prefills, put into rows.

In: an open window and a monitor that says which cells, families and scores it wants. Out: samples with what the model
said of each. The same samples at every checkpoint; as few forward tokens as the cells allow (measuring/prefills.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import numpy as np

from megatron_lccp.data.needles import NeedleSample, NeedleSet, NeedleSetSpec, build_needle_set, room_problems
from megatron_lccp.measuring.found import Found
from megatron_lccp.measuring.head_scores import HeadScore, chosen_scores, head_metric, head_scores
from megatron_lccp.measuring.prefills import Tree, one_each, shared
from megatron_lccp.measuring.runs import Work, run_trees
from megatron_lccp.measuring.window import EvalWindow
from megatron_lccp.parallel.gather import agreed, first_text
from megatron_lccp.schema import Every, Metric, Monitor, Row
from megatron_lccp.text import ranges_text


def needle_metrics(*axes: str) -> tuple[Metric, ...]:
    """What `needle_rows` gives, over two coordinates of its cells."""
    return (
        Metric(
            name="answer_nll", unit="nat", level="probabilistic", better="lower", bounds=(0.0, None), axes=axes,
            judged=True, margin=0.01,
            about="Mean NLL of the answer's tokens given the text before them; 0 is certain. The paper's cell is the "
            "mean over samples of its exponential (mean_ppl).",
        ),
        Metric(
            name="exact", unit="share", level="behavioural", better="higher", bounds=(0.0, 1.0), axes=axes,
            judged=True, margin=0.01,
            about="Samples whose every answer token is the most likely one, which greedy decoding would write. A model "
            "that would answer in other words has 0.",
        ),
        Metric(
            name="content_nll", unit="nat", level="probabilistic", better="lower", bounds=(0.0, None), axes=axes,
            judged=True, margin=0.01,
            about="Mean NLL of the answer's name and value tokens given the sentence before them, whatever words a model "
            "would have chosen itself.",
        ),
        Metric(
            name="content_exact", unit="share", level="behavioural", better="higher", bounds=(0.0, 1.0), axes=axes,
            judged=True, margin=0.01,
            about="Samples whose every name and value token is the most likely one, given the sentence before it.",
        ),
    )  # fmt: skip


@dataclass(frozen=True)
class NeedleMonitor(Monitor):
    """A monitor that asks for needles. Add the fields of the cells by the names that NeedleSetSpec has, and `measure`.

    Its metrics are those of the class and those of its `scores`.
    """

    every: Every = Every(steps=100)
    """When it is due; besides, at the start of a stage and at the end."""
    on_error: Literal["skip", "stop"] = "skip"
    """After an exception: record it and go on, or stop the run."""
    _: KW_ONLY  # so that the fields of the cells come here, between these, in its --help
    samples: int = 4
    """Samples per cell; each has a haystack and a needle of its own, the same ones in every cell."""
    families: tuple[str, ...] = ("biography",)
    """Families of needles (megatron_lccp/data/needles.py)."""
    haystacks: tuple[str, ...] = ()
    """Sources whose held-out documents make the haystacks, or bundled/...; samples take them in turn."""
    seed: int = 0
    """Seed of the sample set."""
    share: bool = True
    """One prefill for many cells where the model allows it; false: a forward for every sample."""
    prefill_tok: int | None = None
    """Tokens of such a prefill; null: those of the longest sample. Fewer take less memory, and give the same results:
    a long sample goes through in several prefills, and keys and values of what later tokens see are kept."""

    def __post_init__(self) -> None:
        self.spec()
        if self.prefill_tok is not None and self.prefill_tok < 1:
            raise ValueError(
                f"prefill_tok: should be at least 1, or null for the longest sample, is {self.prefill_tok}"
            )
        of_scores = (head_metric(score.metric) for score in self.asked())
        object.__setattr__(self, "metrics", (*type(self).metrics, *of_scores))

    def asked(self) -> tuple[HeadScore, ...]:
        """The scores of heads that are measured, and make rows."""
        return ()

    def spec(self, samples: int | None = None) -> NeedleSetSpec:
        """The sample set: its fields by the names that NeedleSetSpec gives them. ValueError for what cannot be made."""
        names = {f.name for f in dataclasses.fields(NeedleSetSpec)} & {f.name for f in dataclasses.fields(self)}
        values: dict[str, Any] = {name: getattr(self, name) for name in names} | (
            {"samples": samples} if samples else {}
        )
        values = {name: tuple(v) if isinstance(v, (list, tuple)) else v for name, v in values.items()}
        return NeedleSetSpec(**values)

    def work(self, window: EvalWindow) -> Work:
        """What `measure` runs, for a plan."""
        return work_of(window, self, self.asked())

    def check(self, window: EvalWindow) -> Iterable[str]:
        """Samples that are too short for a needle, by the tokenizer's count."""
        return () if window.sketch else room_problems(self.spec(), window.tokenizer)  # (a stand-in counts roughly)


@dataclass(frozen=True)
class ByDepth:
    """Cells by length and depth: fields for a needle monitor."""

    lengths_tok: tuple[int, ...] = (1024,)
    """Total tokens of a sample, answer included."""
    depths: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Where the needle stands: share of the haystack before it."""
    lattice_tok: int | None = None
    """Tokens before the needle are rounded to a multiple of this, so that cells share prefills; the real depth is
    recorded. A sixteenth of the longest length makes a usual grid ten times cheaper. null: exact depths."""


@dataclass(frozen=True)
class Scored:
    """Scores of heads: a field for a needle monitor."""

    _: KW_ONLY
    scores: tuple[str, ...] = ()
    """Scores of every head to take from the same forwards, many rows: retrieval_score, content_score, wu2024,
    needle_mass, mass_minus_null (megatron_lccp/measuring/head_scores.py), a short name that an installed package ships,
    or the dotted path of a class."""

    def asked(self) -> tuple[HeadScore, ...]:
        """What `scores` names."""
        return chosen_scores(self.scores)


def needle_set(window: EvalWindow, wanted: NeedleMonitor) -> NeedleSet:
    """The samples a monitor wants; kept in the window's cache, so that they are built once a run.

    In a window for plans, one of each cell.
    """
    spec = wanted.spec(1 if window.sketch else None)
    if spec not in window.cache:
        longest = max(*spec.lengths_tok, *(cell.before_tok + cell.after_tok for cell in spec.cells(0)), 1)
        window.cache[spec] = build_needle_set(spec, window.tokenizer, lambda s: window.text(s, longest * spec.samples))
    return window.cache[spec]


@dataclass(frozen=True, eq=False)
class Measured:
    """A needle set and what the model said of its samples, in their order."""

    chosen: NeedleSet
    found: list[Found]


def run_samples(
    window: EvalWindow, wanted: NeedleMonitor, scores: Sequence[HeadScore] = (), label: str = ""
) -> Measured:
    """Run the samples of a monitor. `label` tells runs of the same samples apart (a model with heads set to zero)."""
    with agreed():  # a text that one rank cannot read leaves no other rank waiting
        chosen = needle_set(window, wanted)
    for text in chosen.repeated:
        window.caution(wanted, text)
    share, questions = wanted.share and can_share(window), _questions(scores)
    trees = trees_for(chosen.samples, share, questions, window.groups.dp.size(), wanted.prefill_tok)
    seeing = tuple(score.metric.name for score in scores if score.sees_rows)
    what = (chosen.sha, bool(scores), questions, label, *((seeing,) if seeing else ()))
    found = run_trees(
        window, trees, f"{wanted.name} {label}".strip(), what, look=bool(scores), questions=questions, scores=scores
    )
    return Measured(chosen, [found[number] for number in range(len(chosen.samples))])


def can_share(window: EvalWindow) -> bool:
    """True if every rank's part of the model can run shared prefills; every rank calls it."""
    if "can share" not in window.cache:
        window.cache["can share"] = first_text(window.engine.why_not_shared()) is None
    return window.cache["can share"]


def trees_for(
    samples: Sequence[NeedleSample], share: bool, questions: bool, replicas: int, prefill_tok: int | None
) -> list[Tree]:
    """The prefills that answer these samples, and with `questions` their null questions."""
    return shared(samples, questions, replicas, prefill_tok) if share else one_each(samples, questions)


def work_of(window: EvalWindow, wanted: NeedleMonitor, scores: Sequence[HeadScore] = ()) -> Work:
    """What `run_samples` would run on one data-parallel replica; needs no model."""
    samples, questions = needle_set(window, wanted).samples, _questions(scores)
    alone = one_each(samples, questions)
    planned = trees_for(samples, wanted.share, questions, 1, wanted.prefill_tok)
    each = 1 if window.sketch else wanted.samples
    cells = len(samples) // each
    return Work(
        cells, cells * wanted.samples, alone, planned, times=wanted.samples // each, look=bool(scores),
        questions=questions,
    )  # fmt: skip


def _questions(scores: Sequence[HeadScore]) -> bool:
    return any(score.questions for score in scores)


def needle_rows(window: EvalWindow, monitor: Monitor, measured: Measured) -> Iterable[Row]:
    """`answer_nll` and `exact` of each sample, and `content_nll` and `content_exact` over its name and value tokens."""
    for sample, found in zip(measured.chosen.samples, measured.found):
        where, right = place_of(sample, measured.chosen.sha), found.best_r == sample.tokens[slice(*sample.answer)]
        for of, some_r in (("answer", np.ones_like(sample.content)), ("content", sample.content)):
            if n := int(some_r.sum()):
                yield window.row(monitor, f"{of}_nll", found.nll_r[some_r].mean(), n, **where)
                exact = "exact" if of == "answer" else "content_exact"
                yield window.row(monitor, exact, float(right[some_r].all()), n, **where)


def head_rows(window: EvalWindow, monitor: Monitor, measured: Measured, scores: Sequence[HeadScore]) -> Iterable[Row]:
    """The scores of every head on each sample; of one that is defined for none, the window is told why."""
    absent, headless = {score.metric.name: score.gate for score in scores}, _headless(measured)
    for sample, found in zip(measured.chosen.samples, measured.found):
        where, n = place_of(sample, measured.chosen.sha), found.nll_r.size
        for metric, score_LN in head_scores(sample, found, scores).items():
            absent.pop(metric, None)
            for layer, of_layer in enumerate(score_LN.tolist()):
                for head, score in enumerate(of_layer):
                    if headless is not None and headless[layer, head]:
                        continue
                    yield window.row(monitor, metric, score, n, layer=layer, head=head, **where)
    if headless is not None and headless.any():
        layers = ranges_text(np.flatnonzero(headless.any(1)).tolist())
        for score in scores:
            window.cannot(monitor, score.metric.name, f"no attention to score in layers {layers}")
    for metric, gate in absent.items():
        count = len(measured.chosen.samples)
        window.cannot(monitor, metric, f"defined for none of {count} samples" + (f"; {gate}" if gate else ""))


def mean_scores(measured: Measured, score: HeadScore) -> np.ndarray:
    """[L, N]: a score of every head, mean over the samples for which it is defined; NaN for heads that there are not.

    ValueError if it is defined for no sample.
    """
    of_samples = [score.of_sample(sample, found) for sample, found in zip(measured.chosen.samples, measured.found)]
    defined = [score_LN for score_LN in of_samples if score_LN is not None]
    if not defined:
        raise ValueError(f"{score.metric.name}: is defined for none of {len(of_samples)} samples")
    mean_LN, headless = np.mean(defined, axis=0), _headless(measured)
    return mean_LN if headless is None else np.where(headless, np.nan, mean_LN)


def _headless(measured: Measured) -> np.ndarray | None:
    """[L, N]: where the model has no head, in layers without attention; None if nobody looked."""
    look = measured.found[0].look
    return None if look is None else np.isnan(look.answer_mass_LN)


def place_of(sample: NeedleSample, sample_set: str) -> dict[str, Any]:
    """The coordinates of a sample for its rows."""
    return dict(
        length_tok=sample.length_tok, depth=sample.depth, depth_cell=sample.depth_cell, before_tok=sample.before_tok,
        after_tok=sample.after_tok, family=sample.family, sample=sample.sample, sample_set=sample_set,
    )  # fmt: skip
