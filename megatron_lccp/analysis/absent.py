"""What a monitor could not give, and why, in its own words.

In: a Run with its events. Out: Absents. A monitor that failed leaves an event `monitor_error`; one whose samples no gate
lets through leaves `no_rows`. The text of both begins with what is missing: "HeadAblation: ...", "RetrievalHeads.wu2024: ...".
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from megatron_lccp.analysis.run import Run
from megatron_lccp.text import count_text

KINDS = ("monitor_error", "no_rows")


@dataclass(frozen=True)
class Absent:
    """Rows that are not there."""

    subject: str
    """A monitor, or one of its metrics: RetrievalHeads.wu2024."""
    windows: int
    """Windows that lack them."""
    of: int
    """Windows of the run."""
    last: bool
    """Whether the last window lacks them too."""
    reason: str
    """Why, at the last of these windows."""

    @property
    def text(self) -> str:
        """One sentence without a full stop."""
        which = "all" if self.windows == self.of else f"{self.windows} of"
        where = f"{which} {count_text(self.of, 'window')}" if self.of > 1 else "the only window"
        end = "" if self.windows == self.of else ", the last one too" if self.last else ", not the last one"
        return f"{self.subject} gave no rows at {where}{end}: {self.reason}"


def absent_rows(run: Run) -> list[Absent]:
    """What no rows were had of, in the order first met; a window that was measured again and then had them is no more
    among these."""
    events = run.events[run.events["kind"].isin(KINDS)]
    if not len(events):
        return []
    texts = events["text"].astype(str).str.replace(r"^step \d+: ", "", regex=True)  # of version 0.1's `lccp measure`
    parts = texts.str.partition(": ")
    events = events.assign(subject=parts[0], reason=parts[2])
    windows, found = {*run.rows["step"]} | {*run.head_means["step"]} | {*events["step"]}, []
    for subject, own in events.groupby("subject", sort=False):
        steps = {*own["step"]} - _measured(run, str(subject))
        if steps:
            reason = " ".join(own.loc[own["step"].isin(steps), "reason"].iloc[-1].removeprefix("ValueError: ").split())
            found.append(Absent(str(subject), len(steps), len(windows), max(windows) in steps, reason))
    return found


def _measured(run: Run, subject: str) -> set[int]:
    """Steps at which there are rows of a monitor, or of a metric of it."""
    monitor, _, metric = subject.partition(".")
    rows = pd.concat([frame[["step", "monitor", "metric"]] for frame in (run.rows, run.head_means)])
    rows = rows[(rows["monitor"] == monitor) & ((rows["metric"] == metric) | (metric == ""))]
    return {*rows["step"]}
