"""Who hears of events: a real command, a real web server, W&B offline. What fails is one line, and stops nothing."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_lccp.commands.hooks import Hooks
from megatron_lccp.commands.rules import why_end
from megatron_lccp.commands.sinks import RunSinks
from megatron_lccp.config.load import parse_config
from megatron_lccp.config.tree import EventsConfig, StopRule
from megatron_lccp.records.store import RunStore
from tests.analysis.planted import needle_rows
from tests.tiny import tiny_tree


def found_run(directory: Path) -> None:
    """A run whose needles were all found from the start: it has less than a margin left to gain."""
    for step in range(1, 13):
        rows = needle_rows([1.0] * 4, tokens=step, metric="exact", length_tok=1024, depth_cell=0.5)
        RunStore(directory).write_window(rows, step)


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict]]]:
    """The address of a server, and what it was sent; /broken answers with an error."""
    got: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            got.append({"type": self.headers["Content-Type"], **body})
            self.send_response(500 if self.path == "/broken" else 200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_address[1]}", got
        http.shutdown()


def test_command_and_webhook_hear_the_kinds_they_are_to(server: tuple[str, list[dict]], tmp_path: Path) -> None:
    address, got = server
    keep = f'cat >"{tmp_path}/$LCCP_EVENT_STEP.json"; echo "$LCCP_EVENT_KIND $LCCP_RUN $LCCP_RUN_DIR" >>{tmp_path}/said'
    hooks = Hooks(EventsConfig(command=keep, webhook=address, kinds=("stall", "resume")), "mine", tmp_path / "run")
    text = 'rank 1 does not answer; "$(touch never)"\nsecond line, ä'
    hooks.send("stall", text, 7)
    hooks.send("verdict", "improving", 8)
    hooks.send("resume", "resumed after step 9", 9)
    hooks.close()
    assert (tmp_path / "said").read_text().splitlines() == [
        f"stall mine {tmp_path / 'run'}", f"resume mine {tmp_path / 'run'}"
    ]  # fmt: skip
    sent = json.loads((tmp_path / "7.json").read_text())
    assert {sent["kind"], sent["run"], sent["step"]} == {"stall", "mine", 7} and sent["text"] == text
    assert [(each["kind"], each["type"]) for each in got] == [
        ("stall", "application/json"), ("resume", "application/json")
    ]  # fmt: skip
    assert got[0]["text"] == text and not Path("never").exists()


def test_the_page_has_every_kind() -> None:
    page = (Path(__file__).parents[2] / "docs" / "stops.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE) == [*EventsConfig().kinds]


def test_what_fails_or_hangs_is_one_line_and_holds_nothing_up(
    server: tuple[str, list[dict]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    address, got = server
    settings = EventsConfig(command="echo why >&2; exit 3", webhook=f"{address}/broken", timeout_s=1)
    hooks = Hooks(settings, "run", tmp_path)
    hooks.send("failed", "x", 1)
    hooks.close()
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and "command: exit code 3: why" in lines[0] and "webhook: HTTP Error 500" in lines[1]
    hung = Hooks(EventsConfig(command=f"sleep 30 & echo $! >{tmp_path}/pid; wait", timeout_s=1), "run", tmp_path)
    start = time.monotonic()
    hung.send("failed", "x", 1)
    assert time.monotonic() - start < 0.5
    hung.close()
    (line,) = capfd.readouterr().err.splitlines()
    assert "longer than events.timeout_s (1 s), ended" in line
    pid = int((tmp_path / "pid").read_text())
    end = time.monotonic() + 20
    while _runs(pid):
        assert time.monotonic() < end, "what the command started still runs"
        time.sleep(0.02)
    nobody = Hooks(EventsConfig(), "run", tmp_path)
    nobody.send("failed", "x", 1)
    assert not nobody.anyone and nobody._thread is None


def _runs(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    try:
        return state.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_training_sends_what_it_records(server: tuple[str, list[dict]], tmp_path: Path) -> None:
    """A resume, an alarm of a thread, a verdict that changed; and W&B's alerts, read back from its own file."""
    address, got = server
    tree = tiny_tree(tmp_path)
    tree |= {"wandb": {"mode": "offline"}, "events": {"webhook": address, "wandb_alert": True, "timeout_s": 200}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tree))
    config = parse_config(tmp_path / "tiny.yaml")
    found_run(tmp_path / "run")
    sinks = RunSinks(config, True, say=lambda text: None)
    sinks.alarm("stall", "before there is a record", 0)
    sinks.open(20, True)
    assert sinks.failure is None
    sinks.alarm("stall", "rank 1 does not answer", 20)
    sinks.on_window([*needle_rows([1.0] * 4, tokens=20, metric="exact", length_tok=1024, depth_cell=0.5)], 20)
    sinks.close(done=True)
    events = RunStore(tmp_path / "run").read_events()
    assert "before there is a record" not in [*events["text"]] and got[0]["text"] == "before there is a record"
    assert {*events["kind"]} == {"resume", "stall", "verdict"} == {each["kind"] for each in got}
    (verdict,) = events.loc[events["kind"] == "verdict", "text"]
    assert verdict.startswith("saturated, was undecided")
    (kept,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert b"rank 1 does not answer" in kept.read_bytes() and b"tiny: resume" in kept.read_bytes()
    again = RunSinks(config, True, say=lambda text: None)
    again.open(20, True)
    again.on_window([*needle_rows([1.0] * 4, tokens=20, metric="exact", length_tok=1024, depth_cell=0.5)], 20)
    again.close(done=True)
    assert [each["kind"] for each in got].count("verdict") == 1  # it has not changed since


def test_a_rule_holds_by_the_verdict_of_the_rows(tmp_path: Path) -> None:
    found_run(tmp_path)
    said: list[str] = []

    def held(**rule: Any) -> str | None:
        return why_end(tmp_path, [StopRule(**rule)], 1000, said.append)

    assert held(states={"verdict": "saturated"}) == "stop_when.0 holds at 1,000 tokens: verdict is saturated"
    both = {"niah_exact": "saturated", "verdict": "saturated"}
    assert "niah_exact is saturated, verdict is saturated" in held(states=both)
    assert "after at least 1,000 tokens" in held(states=both, at_least_tokens=1000)
    assert not said
    for rule in (
        {"at_least_tokens": 1001},
        {"states": {"niah_exact": "improving"}},
        {"states": {**both, "nil": "worse"}},
    ):
        assert held(**{"states": both, **rule}) is None
    assert held(states=both, margins={"nil": 0.1}) is None
    assert len(said) == 2 and "'nil' is no signal of this run (niah_exact)" in said[0] and "nil: no such" in said[1]
    rules = [StopRule(states={"niah_exact": "worse"}), StopRule(states=both)]
    assert why_end(tmp_path, rules, 1, said.append).startswith("stop_when.1 holds")
    assert why_end(tmp_path / "empty", rules, 1, said.append) is None
