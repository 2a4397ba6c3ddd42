"""Scores of a head on one sample, from where it looks: the definitions, in numpy.

In: a needle sample and what the model said of it. Out: score -> [L layers, N heads].

All are teacher-forced: the answer (the needle's sentence, word for word) stands in the text, and the row that predicts
a token is the row before it. r answer tokens = r needle tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from megatron_lccp.data.needles import NeedleSample
from megatron_lccp.measuring.forward import Found
from megatron_lccp.schema import Metric

HeadMetric = Literal["retrieval_score", "content_score", "wu2024", "needle_mass", "mass_minus_null"]

WU_STEPS = 50
"""Decoded tokens that the public code looks at."""
_OF_A_HEAD = Metric(name="", unit="share", about="", level="mechanistic", axes=("head", "layer"))
HEAD_METRICS: tuple[Metric, ...] = (
    replace(
        _OF_A_HEAD, name="retrieval_score", better="higher", bounds=(0.0, 1.0), judged=True, margin=0.005,
        about="Answer tokens for which the row that predicts the token has its largest attention inside the needle, on "
        "a position that holds that same token (the paper, A.1): 1 for a head that copies the whole sentence.",
    ),
    replace(
        _OF_A_HEAD, name="content_score", better="higher", bounds=(0.0, 1.0),
        about="The same over name and value tokens alone, which no other sentence has.",
    ),
    replace(
        _OF_A_HEAD, name="wu2024", better="higher", bounds=(0.0, None),
        about="As in the public code of Wu et al., on the one forward: the token is the one that the model would write.",
    ),
    replace(
        _OF_A_HEAD, name="needle_mass", bounds=(0.0, 1.0),
        about="Attention of the answer's rows on the needle; needle / context length for a blind head.",
    ),
    replace(
        _OF_A_HEAD, name="mass_minus_null", bounds=(-1.0, 1.0),
        about="Attention of the question's rows on the needle, less that of a question without content in its place; 0 "
        "for a head that looks there anyway.",
    ),
)  # fmt: skip
"""What each score says of a head."""


def head_scores(sample: NeedleSample, found: Found, wanted: Sequence[HeadMetric]) -> dict[str, np.ndarray]:
    """The wanted scores of all heads; one that is not defined for this sample is left out.

    - `retrieval_score`, share in [0, 1]: answer tokens for which the row that predicts the token has its largest
      attention inside the needle, on a position that holds that same token (the paper, A.1).
    - `content_score`, share in [0, 1]: the same over name and value tokens only, which no other sentence has. Absent
      if the needle has none.
    - `wu2024`, from 0, can exceed 1: as in Wu et al.'s public code, the token is the one that the model would write
      (the most likely one), at most 50 of them, each adds 1 / needle tokens, and only samples count whose answer has
      more than half of the needle's tokens (there: ROUGE-1 recall of words). Equal to retrieval_score where greedy
      decoding gives the sentence; where it does not, the public code would decode on from its own mistakes.
    - `needle_mass`, share in [0, 1]: attention of the answer's rows on the needle, mean over rows.
    - `mass_minus_null`, share in [-1, 1]: attention of the question's rows on the needle, less that of the rows of a
      question without content in its place; 0 for a head that looks there anyway. Needs no answer (QRHead).
    """
    scores = {metric: _SCORES[metric](sample, found) for metric in wanted}
    return {metric: score for metric, score in scores.items() if score is not None}


def _hits(sample: NeedleSample, found: Found, token_r: np.ndarray) -> np.ndarray:
    """[L, N, r]: the head looks at the needle, at a position that holds this row's token."""
    position = found.look.position_LNr
    inside = (position >= sample.needle[0]) & (position < sample.needle[1])
    return inside & (sample.tokens[np.where(inside, position, 0)] == token_r)


def _retrieval(sample: NeedleSample, found: Found) -> np.ndarray:
    return _hits(sample, found, sample.tokens[slice(*sample.answer)]).mean(-1)


def _content(sample: NeedleSample, found: Found) -> np.ndarray | None:
    if not sample.content.any():
        return None
    return _hits(sample, found, sample.tokens[slice(*sample.answer)])[..., sample.content].mean(-1)


def _wu2024(sample: NeedleSample, found: Found) -> np.ndarray | None:
    needle, written = sample.tokens[slice(*sample.needle)], found.best_r[:WU_STEPS]
    common = Counter(needle.tolist()) & Counter(written.tolist())
    if common.total() <= len(needle) / 2:
        return None
    return _hits(sample, found, found.best_r)[..., :WU_STEPS].sum(-1) / len(needle)


def _needle_mass(sample: NeedleSample, found: Found) -> np.ndarray:
    return found.look.answer_mass_LN


def _mass_minus_null(sample: NeedleSample, found: Found) -> np.ndarray:
    return found.look.question_mass_LN - found.null_mass_LN


_SCORES = {
    "retrieval_score": _retrieval, "content_score": _content, "wu2024": _wu2024, "needle_mass": _needle_mass,
    "mass_minus_null": _mass_minus_null,
}  # fmt: skip
