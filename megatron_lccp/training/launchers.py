"""How long a stop may take before whoever sent the signal kills: torchrun, Slurm, the job script.

In: the environment that a launcher gives, `training.stop_within_s`, seconds of a save. Out: a line for each time that
is too short for both. Nothing is refused for it: a run without signals is none the worse.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Deadline:
    """From a signal to the kill that follows it."""

    seconds: float
    what: str
    """What kills, and when."""
    remedy: str
    """What to set so that it comes later."""


KILL_S, NOTICE_S = 300.0, 600.0
"""What examples/pretrain_lccp.sh gives torchrun, and how far ahead examples/slurm/*.sbatch have Slurm signal."""


def deadlines(environment: Mapping[str, str] = os.environ) -> list[Deadline]:
    """Those of the launchers that started this process."""
    found = []
    if "TORCHELASTIC_RUN_ID" in environment:
        seconds = float(environment.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT") or 30)
        found.append(Deadline(seconds, "torchrun kills its ranks", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"))
    if (notice := environment.get("LCCP_NOTICE_S", "")).isdigit():
        found.append(
            Deadline(float(notice), "the job's time is up", "--signal of the sbatch script, and LCCP_NOTICE_S")
        )
    if "SLURM_JOB_ID" in environment and (seconds_or_none := _kill_wait_s()) is not None:
        what = "Slurm kills after scancel or preemption (KillWait)"
        found.append(Deadline(seconds_or_none, what, "KillWait in slurm.conf, or GraceTime of the partition"))
    return found


def take_too_short(found: list[Deadline], stop_within_s: float, save_s: float | None = None) -> list[str]:
    """A line for each deadline that comes before the save is done, and takes it off the list, so that it is said once.

    `save_s`: seconds of a save, if they are known.
    """
    wanted_s = stop_within_s + (save_s or 0.0)
    save = "" if save_s is None else f" and a save takes {save_s:.0f} s"
    short = [deadline for deadline in found if deadline.seconds < wanted_s]
    found[:] = [deadline for deadline in found if deadline not in short]
    return [
        f"training.stop_within_s: is {stop_within_s:g} s{save}, but {deadline.what} {deadline.seconds:g} s after the "
        f"signal, and the steps since the last checkpoint are lost; lower it, or raise {deadline.remedy}"
        for deadline in short
    ]


def _kill_wait_s() -> float | None:
    """Slurm's time between SIGTERM and SIGKILL, if Slurm is there to be asked."""
    if shutil.which("scontrol") is None:
        return None
    try:
        done = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"^KillWait\s*=\s*(\d+)", done.stdout, flags=re.MULTILINE)
    return float(match[1]) if match else None
