"""The progress line on terminals of any width, and without one."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from types import SimpleNamespace

import pytest

from megatron_lccp.training.progress import Progress
from tests.distributed.ranks import ROOT


@pytest.mark.parametrize("columns", [0, 80, None])
def test_progress_shows_everywhere(
    columns: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bar where there is room for it; lines without a terminal, or on one that has no columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns or 0, 0, 0))
    with os.fdopen(theirs, "w") as terminal:
        if columns is not None:
            monkeypatch.setattr(sys, "stderr", terminal)
        progress = Progress(True, 1000, 0, 1)
        progress.step("lccp", 1, 1, 1000, 2.5)
        progress.close()
        terminal.write("end")
    drawn = ""
    while not drawn.endswith("end"):  # a terminal hands on what comes a part at a time
        drawn += os.read(ours, 10_000).decode()
    os.close(ours)
    assert ("lccp step 1/1: 100%" in drawn) is (columns == 80)
    assert ("lccp step 1/1  loss 2.500" in capsys.readouterr().out) is (columns != 80)


def test_without_a_terminal_a_long_measurement_says_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now_s = [0.0]
    monkeypatch.setattr("megatron_lccp.training.progress.time", SimpleNamespace(monotonic=lambda: now_s[0]))
    progress = Progress(True, 1000, 0, 1)
    for second, what in ((0, "Grid"), (1, "Grid 10%"), (9, "Grid 40%"), (11, "Grid 60%"), (12, "Heads 1%")):
        now_s[0] = second
        progress.window("step 3", what)
    progress.close()
    said = [f"step 3: measuring {what}" for what in ("Grid", "Grid 60%", "Heads 1%")]
    assert capsys.readouterr().out.splitlines() == said


def test_a_reader_who_has_left_hears_no_more_of_either_stream() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    script = "import sys; from megatron_lccp.training.progress import tell; tell('a'); print('b', file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], stdout=writer, stderr=writer, cwd=ROOT, timeout=100)
    os.close(writer)
    assert done.returncode == 0
