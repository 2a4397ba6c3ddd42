"""What the needle monitors share: samples built once a run, run through shared prefills, and put into rows.

In: an open window and a monitor that says which cells, families and scores it wants. Out: samples with what the model
said of each. The same samples at every checkpoint; as few forward tokens as the cells allow (measuring/prefills.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

from megatron_lccp.data.needles import NeedleSample, NeedleSet, NeedleSetSpec, build_needle_set
from megatron_lccp.measuring.forward import Found
from megatron_lccp.measuring.head_scores import HeadMetric, head_scores
from megatron_lccp.measuring.prefill_attention import why_not_shared
from megatron_lccp.measuring.prefills import Tree, one_each, shared
from megatron_lccp.measuring.runs import Work, run_trees
from megatron_lccp.measuring.window import EvalWindow
from megatron_lccp.model.build import bare
from megatron_lccp.parallel.gather import agreed, first_text
from megatron_lccp.schema import Metric, Monitor, Row


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
            about="Samples whose every answer token is the most likely one, which greedy decoding would write.",
        ),
    )  # fmt: skip


class WantsNeedles(Protocol):
    """What a monitor says of the samples it wants; which axes a grid has is its own business."""

    samples: int
    families: tuple[str, ...]
    haystacks: tuple[str, ...]
    seed: int
    share: bool
    prefill_tok: int | None


def spec_of(wanted: WantsNeedles) -> NeedleSetSpec:
    """The set a monitor wants: its fields by the names that NeedleSetSpec gives them."""
    values = {f.name: getattr(wanted, f.name) for f in fields(NeedleSetSpec) if hasattr(wanted, f.name)}
    return NeedleSetSpec(**{name: tuple(v) if isinstance(v, (list, tuple)) else v for name, v in values.items()})


def check_wanted(wanted: WantsNeedles) -> None:
    """ValueError for what no samples or prefills can be made of, before a run has begun."""
    spec_of(wanted)
    if wanted.prefill_tok is not None and wanted.prefill_tok < 1:
        raise ValueError(f"prefill_tok: should be at least 1, or null for the longest sample, is {wanted.prefill_tok}")


def needle_set(window: EvalWindow, wanted: WantsNeedles) -> NeedleSet:
    """The samples a monitor wants; kept in the window's cache, so that they are built once a run."""
    spec = spec_of(wanted)
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
    window: EvalWindow, wanted: WantsNeedles, heads: Sequence[HeadMetric] = (), label: str = ""
) -> Measured:
    """Run the samples of a monitor. `label` tells runs of the same samples apart (a model with heads set to zero)."""
    with agreed():  # a text that one rank cannot read leaves no other rank waiting
        chosen = needle_set(window, wanted)
    share = wanted.share and _can_share(window)
    trees = trees_for(chosen.samples, share, heads, window.groups.dp.size(), wanted.prefill_tok)
    null = "mass_minus_null" in heads
    name, what = f"{type(wanted).__name__} {label}".strip(), (chosen.sha, bool(heads), null, label)
    found = run_trees(window, trees, name, what, look=bool(heads), questions=null)
    return Measured(chosen, [found[number] for number in range(len(chosen.samples))])


def _can_share(window: EvalWindow) -> bool:
    """True if every rank's part of the model can run shared prefills."""
    if "can share" not in window.cache:
        window.cache["can share"] = first_text(why_not_shared([bare(chunk) for chunk in window.chunks])) is None
    return window.cache["can share"]


def trees_for(
    samples: Sequence[NeedleSample], share: bool, heads: Sequence[HeadMetric], replicas: int, prefill_tok: int | None
) -> list[Tree]:
    """The prefills that answer these samples, and their null questions if a score wants those."""
    null = "mass_minus_null" in heads
    return shared(samples, null, replicas, prefill_tok) if share else one_each(samples, null)


def work_of(window: EvalWindow, wanted: WantsNeedles, heads: Sequence[HeadMetric] = ()) -> Work:
    """What `run_samples` would run on one data-parallel replica; needs no model."""
    samples = needle_set(window, wanted).samples
    alone = one_each(samples, "mass_minus_null" in heads)
    planned = trees_for(samples, wanted.share, heads, 1, wanted.prefill_tok)
    return Work(len(samples) // wanted.samples, len(samples), alone, planned)


def needle_rows(window: EvalWindow, monitor: Monitor, measured: Measured) -> Iterable[Row]:
    """`answer_nll` and `exact` of each sample."""
    for sample, found in zip(measured.chosen.samples, measured.found):
        where, n = place_of(sample, measured.chosen.sha), found.nll_r.size
        right = found.best_r == sample.tokens[slice(*sample.answer)]
        yield window.row(monitor, "answer_nll", found.nll_r.mean(), n, **where)
        yield window.row(monitor, "exact", float(right.all()), n, **where)


def head_rows(window: EvalWindow, monitor: Monitor, measured: Measured, heads: Sequence[HeadMetric]) -> Iterable[Row]:
    """The wanted scores of every head on each sample."""
    for sample, found in zip(measured.chosen.samples, measured.found):
        where, n = place_of(sample, measured.chosen.sha), found.nll_r.size
        for metric, score_LN in head_scores(sample, found, heads).items():
            for layer, of_layer in enumerate(score_LN.tolist()):
                for head, score in enumerate(of_layer):
                    yield window.row(monitor, metric, score, n, layer=layer, head=head, **where)


def place_of(sample: NeedleSample, sample_set: str) -> dict[str, Any]:
    """The coordinates of a sample for its rows."""
    return dict(
        length_tok=sample.length_tok, depth=sample.depth, depth_cell=sample.depth_cell, before_tok=sample.before_tok,
        after_tok=sample.after_tok, family=sample.family, sample=sample.sample, sample_set=sample_set,
    )  # fmt: skip
