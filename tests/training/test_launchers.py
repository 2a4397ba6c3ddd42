"""How long a stop may take: what the launchers' own times are, and that ours leave room."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_lccp.config.tree import TrainingConfig
from megatron_lccp.training.launchers import KILL_S, NOTICE_S, Deadline, deadlines, take_too_short

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_the_examples_leave_time_for_a_save() -> None:
    """A stop, then as long again for a save, then torchrun's kill; and Slurm signals earlier than all of it."""
    script = (EXAMPLES / "pretrain_lccp.sh").read_text()
    kill_s = int(re.search(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-(\d+)", script)[1])
    assert 2 * TrainingConfig().stop_within_s <= kill_s == KILL_S
    batches = sorted((EXAMPLES / "slurm").glob("*.sbatch"))
    notices = {int(re.search(r"^#SBATCH --signal=B:USR1@(\d+)$", path.read_text(), re.M)[1]) for path in batches}
    noted = re.search(r"LCCP_NOTICE_S:-(\d+)", (EXAMPLES / "slurm" / "pretrain_lccp.sbatch").read_text())
    assert notices == {int(noted[1])} and len(batches) > 3 and kill_s < int(noted[1]) == NOTICE_S


def test_deadlines_are_the_launchers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm is asked by its own command; here a file stands in for it that prints what Debian's prints."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\necho 'KillOnBadExit           = 0'\necho 'KillWait                = 30 sec'\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = deadlines({"TORCHELASTIC_RUN_ID": "x", "LCCP_NOTICE_S": "600", "SLURM_JOB_ID": "7"})
    assert [each.seconds for each in found] == [30, 600, 30]
    assert deadlines({}) == [] and deadlines({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300"}) == []
    (found,) = deadlines({"TORCHELASTIC_RUN_ID": "x", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300"})
    assert found.seconds == 300


def test_each_is_said_once_when_it_is_too_short() -> None:
    found = [Deadline(30, "torchrun kills its ranks", "A"), Deadline(300, "the job's time is up", "B")]
    (line,) = take_too_short(found, 120)
    assert "torchrun kills its ranks 30 s after the signal" in line and "raise A" in line
    assert take_too_short(found, 120, 100) == []
    (line,) = take_too_short(found, 120, 200)
    assert "a save takes 200 s" in line and "raise B" in line
    assert take_too_short(found, 120, 200) == found == []
