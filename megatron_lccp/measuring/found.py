"""What a model said of one sample: losses, most likely tokens, and where its heads looked.

In: nothing. Out: plain arrays, the same on all ranks. r answer tokens, L layers and N query heads of the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Look:
    """Where the heads of the whole model look from the rows of one question and answer."""

    position_LNr: np.ndarray
    """Position of the largest attention of the row that predicts each answer token, in the sample; int32."""
    answer_mass_LN: np.ndarray
    """Share of the attention of those rows that lies on the needle, mean over rows."""
    question_mass_LN: np.ndarray | None = None
    """The same for the rows of the question, where those were asked for."""


@dataclass
class Found:
    """What the model said of one sample."""

    nll_r: np.ndarray
    """Negative log-likelihood of each answer token, nat."""
    best_r: np.ndarray
    """Most likely token in the place of each answer token (the lowest id on a tie), int64."""
    look: Look | None = None
    """Where the heads looked."""
    null_mass_LN: np.ndarray | None = None
    """Share of attention on the needle, mean over the rows of the null question."""
    measured_LNr: Mapping[str, np.ndarray] = field(default_factory=dict)
    """By name, what each score that measures attention itself found at the rows that predict the answer."""
