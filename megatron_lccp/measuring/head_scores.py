"""Scores of attention heads: what one is, the five that come with it, and how a name becomes one.

In: a needle sample and what the model said of it, or query, key and value. Out: a number for each head, [L, N].

All are teacher-forced: the answer (the needle's sentence, word for word) stands in the text, and the row that predicts
a token is the row before it. r answer tokens = r needle tokens, L layers and N query heads of the whole model, n query
heads on this rank.

A score of your own is a class in a file of your own, with a `metric` and one of two methods:
- `of_sample`, if it can be had from where the heads looked (`found.look`), as the five here;
- `of_rows`, if it needs query, key or value: it runs inside attention, on every rank that holds the layer.
Name it in a monitor's `scores` by its dotted path (my_package.scores.Entropy), or ship it by an entry point in the group
`megatron_lccp.head_scores` under a short name.
"""

from __future__ import annotations

import dataclasses
import pkgutil
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any, ClassVar

import numpy as np
import torch

from megatron_lccp.config.unknown import closest
from megatron_lccp.data.needles import NeedleSample
from megatron_lccp.measuring.attention_rows import AttentionRows
from megatron_lccp.measuring.found import Found, Look
from megatron_lccp.schema import Metric

GROUP = "megatron_lccp.head_scores"
"""Entry points by which packages ship scores."""
WU_STEPS = 50
"""Decoded tokens that the public code of Wu et al. looks at."""
_OF_A_HEAD: dict[str, Any] = dict(unit="share", level="mechanistic", axes=("head", "layer"))


class HeadScore:
    """A number for every head on a sample. Give it a `metric`, and write `of_sample` or `of_rows`."""

    metric: ClassVar[Metric]
    """What it is; the axes are ("head", "layer"). Rows carry its name."""
    gate: ClassVar[str] = ""
    """Which samples it is defined for, as a clause: "the needle should hold a name or a value"; empty: for all."""
    questions: ClassVar[bool] = False
    """Whether `found` is to say where heads look from the question, and from a question without content too."""

    def of_rows(self, rows: AttentionRows) -> torch.Tensor | None:
        """[r, n]: a number for each row and each head of this rank; None: it does not need query, key or value.

        Called once for each layer and each question asked, on every rank that holds the layer, so that it may make
        collectives over `rows.context`.
        """
        return None

    def of_sample(self, sample: NeedleSample, found: Found) -> np.ndarray | None:
        """[L, N], the same on all ranks: the mean over rows of what `of_rows` gave. None: not defined for this sample."""
        return found.measured_LNr[self.metric.name].mean(-1)

    @property
    def sees_rows(self) -> bool:
        """Whether it has an `of_rows` of its own."""
        return type(self).of_rows is not HeadScore.of_rows


def _look(found: Found) -> Look:
    assert found.look is not None, "where heads look was not asked for"
    return found.look


def _hits(sample: NeedleSample, found: Found, token_r: np.ndarray) -> np.ndarray:
    """[L, N, r]: the head looks at the needle, at a position that holds this row's token."""
    position = _look(found).position_LNr
    inside = (position >= sample.needle[0]) & (position < sample.needle[1])
    return inside & (sample.tokens[np.where(inside, position, 0)] == token_r)


class RetrievalScore(HeadScore):
    """Share of answer tokens that a head looks up in the needle (the paper, A.1)."""

    metric = Metric(
        **_OF_A_HEAD, name="retrieval_score", better="higher", bounds=(0.0, 1.0), judged=True, margin=0.005,
        about="Answer tokens for which the row that predicts the token has its largest attention inside the needle, on "
        "a position that holds that same token (the paper, A.1): 1 for a head that copies the whole sentence.",
    )  # fmt: skip

    def of_sample(self, sample: NeedleSample, found: Found) -> np.ndarray:
        """[L, N]."""
        return _hits(sample, found, sample.tokens[slice(*sample.answer)]).mean(-1)


class ContentScore(HeadScore):
    """The same over name and value tokens. Absent if the needle has none."""

    metric = Metric(
        **_OF_A_HEAD, name="content_score", better="higher", bounds=(0.0, 1.0),
        about="The same over name and value tokens alone, which no other sentence has.",
    )  # fmt: skip
    gate = "the needle should hold a name or a value"

    def of_sample(self, sample: NeedleSample, found: Found) -> np.ndarray | None:
        """[L, N]."""
        if not sample.content.any():
            return None
        return _hits(sample, found, sample.tokens[slice(*sample.answer)])[..., sample.content].mean(-1)


class Wu2024(HeadScore):
    """Counted as Wu et al.'s public code counts, on the one teacher-forced forward: the token is the most likely one.

    At most 50 of them count, each adds 1 / needle tokens, and only samples count whose answer has more than half of the
    needle's tokens (there: ROUGE-1 recall of words). In [0, 1], and equal to retrieval_score where every answer token
    is the most likely one and there are no more than 50. It is not the public code's number. That decodes freely for up
    to 50 tokens, from its own mistakes if it makes some, and with byte-level tokenizers past the end of the line, so
    that an answer which is written twice counts twice and a head can pass 1. A decoded variant would need generation.
    """

    metric = Metric(
        **_OF_A_HEAD, name="wu2024", better="higher", bounds=(0.0, 1.0),
        about="Counted as in the public code of Wu et al., but teacher-forced: the token is the most likely one, given the "
        "sentence before it. That code decodes up to 50 tokens, and can pass 1.",
    )  # fmt: skip
    gate = "what the model would write should have more than half of the needle's tokens"

    def of_sample(self, sample: NeedleSample, found: Found) -> np.ndarray | None:
        """[L, N]."""
        needle, written = sample.tokens[slice(*sample.needle)], found.best_r[:WU_STEPS]
        common = Counter(needle.tolist()) & Counter(written.tolist())
        if common.total() <= len(needle) / 2:
            return None
        return _hits(sample, found, found.best_r)[..., :WU_STEPS].sum(-1) / len(needle)


class NeedleMass(HeadScore):
    """How much of the attention lies on the needle."""

    metric = Metric(
        **_OF_A_HEAD, name="needle_mass", bounds=(0.0, 1.0),
        about="Attention of the answer's rows on the needle; needle / context length for a blind head.",
    )  # fmt: skip

    def of_sample(self, sample: NeedleSample, found: Found) -> np.ndarray:
        """[L, N]."""
        return _look(found).answer_mass_LN


class MassMinusNull(HeadScore):
    """What the question adds to the attention on the needle. Needs no answer (QRHead)."""

    metric = Metric(
        **_OF_A_HEAD, name="mass_minus_null", bounds=(-1.0, 1.0),
        about="Attention of the question's rows on the needle, less that of a question without content in its place; 0 "
        "for a head that looks there anyway.",
    )  # fmt: skip
    questions = True

    def of_sample(self, sample: NeedleSample, found: Found) -> np.ndarray:
        """[L, N]."""
        asked_LN, null_LN = _look(found).question_mass_LN, found.null_mass_LN
        assert asked_LN is not None and null_LN is not None, "its questions were not asked for"
        return asked_LN - null_LN


HEAD_SCORES: dict[str, HeadScore] = {
    score.metric.name: score for score in (RetrievalScore(), ContentScore(), Wu2024(), NeedleMass(), MassMinusNull())
}
"""The scores that come with it, by name."""


def head_score(name: str) -> HeadScore:
    """The score of this name: one of ours, one that an installed package ships, or a class by its dotted path.

    Raises ValueError, in one line with the closest name, for what is none.
    """
    if name in HEAD_SCORES:
        return HEAD_SCORES[name]
    shipped = {point.name: point for point in entry_points(group=GROUP)}
    try:
        if name in shipped:
            found = shipped[name].load()
        elif "." in name:
            found = pkgutil.resolve_name(name)
        else:
            raise ValueError(f"scores: {name!r} is no score of heads{closest(name, [*HEAD_SCORES, *sorted(shipped)])}")
    except AttributeError as error:
        raise ValueError(f"scores: {error}{closest(error.name or '', dir(error.obj))}") from error
    except ImportError as error:
        raise ValueError(f"scores: {name!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, HeadScore)):
        raise ValueError(f"scores: {name} is no class of scores; derive it from megatron_lccp.measuring.HeadScore")
    score = found()
    if not isinstance(getattr(score, "metric", None), Metric):
        raise ValueError(f"scores: {name} declares no `metric`; give the class a megatron_lccp.measuring.Metric")
    return score


def chosen_scores(names: Sequence[str]) -> tuple[HeadScore, ...]:
    """The scores of these names. Raises ValueError for a name that is none, or two that give rows of one name."""
    scores = tuple(head_score(name) for name in names)
    measured = [score.metric.name for score in scores]
    if twice := [name for name in measured if measured.count(name) > 1]:
        raise ValueError(f"scores: two of them measure {twice[0]!r}; leave one out")
    return scores


def head_scores(sample: NeedleSample, found: Found, wanted: Sequence[str | HeadScore]) -> dict[str, np.ndarray]:
    """The wanted scores of all heads by the metric's name; one that is not defined for this sample is left out."""
    scores = [head_score(one) if isinstance(one, str) else one for one in wanted]
    values = {score.metric.name: score.of_sample(sample, found) for score in scores}
    return {metric: value for metric, value in values.items() if value is not None}


def head_metric(metric: Metric) -> Metric:
    """The declaration with the axes of heads, for a score that names none."""
    return metric if metric.axes else dataclasses.replace(metric, axes=("head", "layer"))
