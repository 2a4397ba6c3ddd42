"""Writing a file whole, and what a writer that was killed leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from megatron_lccp.files import ABANDONED_S, write_whole
from megatron_lccp.processes import this_process

WRITER = """
import sys, time
from pathlib import Path
from megatron_lccp.files import write_whole
def write(draft):
    draft.write_text("half")
    print(draft, flush=True)
    time.sleep(600)
write_whole(Path(sys.argv[1]), write)
"""
AGAIN = "import sys; from pathlib import Path; from megatron_lccp.files import write_whole as w; w(Path(sys.argv[1]), lambda d: d.write_text('whole'))"


def test_the_next_writer_removes_the_draft_of_one_that_was_killed_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout
        draft = Path(writer.stdout.readline().strip())
        subprocess.run([sys.executable, "-c", AGAIN, str(tmp_path / "another.html")], check=True)
        assert draft.exists(), "its writer lives"
        writer.send_signal(signal.SIGKILL)
    subprocess.run([sys.executable, "-c", AGAIN, str(tmp_path / "another.html")], check=True)
    assert [file.name for file in tmp_path.iterdir()] == ["another.html"]


def test_drafts_of_another_machine_go_when_they_are_old(tmp_path: Path) -> None:
    names = ("a.json.0123abcd-17-4711.tmp", "steps.jsonl.17.tmp", f"b.json.{this_process().name}.tmp", "users.tmp")
    for name in (*names, "new.json.0123abcd-17-4711.tmp"):
        (tmp_path / name).touch()
    for name in names:
        os.utime(tmp_path / name, (time.time() - 2 * ABANDONED_S,) * 2)
    write_whole(tmp_path / "c.json", lambda draft: draft.write_text("{}"))
    kept = {"c.json", "new.json.0123abcd-17-4711.tmp", f"b.json.{this_process().name}.tmp", "users.tmp"}
    assert {file.name for file in tmp_path.iterdir()} == kept
