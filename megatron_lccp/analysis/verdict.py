"""What a run's signals say of convergence: saturated, improving or undecided, each with the numbers it rests on.

In: RunFrames. Out: one Verdict. It is advice: nothing here stops a job.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

State = Literal["saturated", "improving", "undecided"]
Level = Literal["behavioural", "probabilistic", "mechanistic"]


@dataclass(frozen=True)
class Forecast:
    """When a law, fitted to what was measured, brings the gain of a signal under its margin."""

    law: Literal["log", "plateau"]
    """log: y = B + A ln N, whose gain per +25 % tokens never changes. plateau: y = c + a N^-alpha, which ends at c."""
    tokens: float
    """Training tokens, all stages, at which its gain per +25 % tokens passes the margin; inf: never."""
    low: float
    """Interval of `tokens`."""
    high: float
    error: float
    """Root mean square error in predicting each checkpoint from those before it, in the unit of the signal."""


@dataclass(frozen=True)
class SignalVerdict:
    """One signal: whether what +25 % tokens (of the LCCP) bring to it is under a margin set beforehand."""

    signal: str
    """Name, as `--margin` takes it: niah_exact, answer_nll, answer_nll[32K-64K], ..."""
    level: Level
    state: State
    """saturated: the whole interval of the gain is under the margin. improving: all of it is above. undecided: else."""
    unit: str
    """Unit of margin and gain: nat, share, heads."""
    margin: float
    """Gain per +25 % tokens that is no longer worth them."""
    gain_per_25pct: float | None
    """Estimated gain per +25 % tokens at the end, positive is better; None with too few checkpoints."""
    low: float | None
    """Interval of the gain, over samples and over the noise of checkpoints, corrected for repeated looks."""
    high: float | None
    checkpoints: int
    """Checkpoints that the interval rests on: the last doubling of the LCCP's tokens."""
    samples: int
    """Independent samples (clusters) that were resampled; 0: the rows are averages already."""
    tokens_from: int
    """Training tokens, all stages, at the first and at the last of these checkpoints."""
    tokens_to: int
    law: Literal["log", "plateau", "none"]
    """The law that predicts held-out checkpoints better; none: too few to tell."""
    forecasts: tuple[Forecast, ...]
    """Of both laws, the better one first; empty with too few checkpoints."""
    settled_at_tokens: int | None
    """First checkpoint from which on it stayed within a margin and noise of where it ended; None: not settled."""
    lead_tokens: int | None
    """How many tokens earlier it settled than the slowest signal, which counts as settled no earlier than now if it
    has not settled; None: not settled."""
    why: str
    """The state in one sentence."""

    @property
    def forecast_tokens(self) -> float | None:
        return self.forecasts[0].tokens if self.forecasts else None

    @property
    def forecast_low(self) -> float | None:
        return self.forecasts[0].low if self.forecasts else None

    @property
    def forecast_high(self) -> float | None:
        return self.forecasts[0].high if self.forecasts else None


@dataclass(frozen=True)
class Alert:
    """A signal fell back beyond noise: an early warning of instability."""

    signal: str
    tokens: int
    """Training tokens, all stages, at the checkpoint that fell back."""
    text: str
    """One sentence."""


@dataclass(frozen=True)
class Verdict:
    """What all signals of a run say together."""

    run: str
    state: State
    """saturated: every signal is. improving: at least one is. undecided: else."""
    sentence: str
    """The verdict in one sentence."""
    deceptive: bool
    """The needle score is flat while other signals still improve: deceptive saturation."""
    signals: tuple[SignalVerdict, ...]
    alerts: tuple[Alert, ...]

    def to_json(self) -> str:
        """One JSON object; null is what is not known, "never" a forecast that is never reached."""
        return json.dumps(_plain(asdict(self)), indent=2, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "never" if value > 0 else None
    return value
