"""What an earlier version wrote: a run of 0.1 goes on as it would have there; what a newer version writes is refused.

In: tests/fixtures/run_0_1, whose README says how it was made. Formats had no versions then, which is the first version.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import save_file

from megatron_lccp.config.load import dump_config, parse_config
from megatron_lccp.data.manifest import load_manifest
from megatron_lccp.files import require_format
from megatron_lccp.records.store import RunStore
from megatron_lccp.records.wandb import keep_record
from megatron_lccp.weights.hf_files import open_stored
from megatron_lccp.weights.sharded import CheckpointError, read_about
from megatron_lccp.weights.streams import whole_header
from megatron_lccp.weights.whole import read_header
from tests.distributed.ranks import ROOT, lccp

EARLIER = ROOT / "tests/fixtures/run_0_1"
LAST_CHECKPOINT, LAST_STEP = 6, 12
OLD_WEIGHTS = ROOT / "examples/tiny_moe/base.safetensors"
MONITORS = {"CorpusPPL", "NeedleGrid", "InterferenceGrid", "RetrievalHeads", "HeadAblation"}


def contents(folder: Path) -> dict[str, str]:
    """Digest of each file below a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def command(folder: Path, *arguments: str) -> str:
    """What a command prints that works in a folder."""
    done = lccp(*arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """A copy of the earlier run."""
    return Path(shutil.copytree(EARLIER, tmp_path / "earlier"))


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A copy that was prepared and trained to its end, and what both commands said."""
    folder = Path(shutil.copytree(EARLIER, tmp_path_factory.mktemp("resumed") / "earlier"))
    return folder, command(folder, "prepare", "config.yaml"), command(folder, "train", "config.yaml")


def test_nothing_is_tokenized_anew(resumed: tuple[Path, str, str]) -> None:
    folder, said, _ = resumed
    assert said == "tokens: up to date, 2 sources\n"
    for name in ("tokens", "run/cache"):
        assert contents(folder / name) == contents(EARLIER / name)


def test_training_goes_on_as_it_would_have(resumed: tuple[Path, str, str]) -> None:
    """The checkpoint is of Megatron-Core 0.16.1, whichever version runs here."""
    folder, _, said = resumed
    assert f"resumed after step {LAST_CHECKPOINT}\n" in said, "without a word on other values"
    lines, old = ((path / "run/steps.jsonl").read_text().splitlines() for path in (folder, EARLIER))
    assert lines[:LAST_CHECKPOINT] == old[:LAST_CHECKPOINT]
    steps = [json.loads(line) for line in lines]
    assert [step["step"] for step in steps] == list(range(1, LAST_STEP + 1))
    expected = json.loads((EARLIER / "expected_losses.json").read_text())
    assert {str(s["step"]): s["loss"] for s in steps[LAST_CHECKPOINT:]} == pytest.approx(expected, rel=1e-5)


def test_what_was_measured_before_is_there_bitwise(resumed: tuple[Path, str, str]) -> None:
    folder, *_ = resumed
    before, after = contents(EARLIER / "run/rows"), contents(folder / "run/rows")
    assert len(before) == 7 and before.items() <= after.items()
    rows = RunStore(folder / "run").read_rows(health=False)
    assert list(rows["step"].unique()) == [0, 3, 4, 6, 9, 12] and set(rows["monitor"]) >= MONITORS
    kinds = rows[rows["monitor"].isin(MONITORS)].groupby("step")[["monitor", "metric"]]
    sizes = kinds.value_counts().unstack("step")
    came_later = sizes.index.get_level_values("metric").isin(["content_nll", "content_exact"])
    new, sizes = sizes[came_later], sizes[~came_later]
    assert (sizes.nunique(axis="columns") == 1).all() and not sizes.isna().any(axis=None), "the same rows at each step"
    assert len(new) == 4 and new[[0, 3, 4, 6]].isna().all(axis=None) and not new[[9, 12]].isna().any(axis=None)
    sets = rows.dropna(subset=["sample_set"]).groupby(["monitor", "corpus"], dropna=False)["sample_set"]
    assert len(sets) >= len(MONITORS) and (sets.nunique() == 1).all(), "the samples of before"


def test_it_is_judged_and_shown_whole(resumed: tuple[Path, str, str]) -> None:
    folder, *_ = resumed
    command(folder, "report", "run", "--out=page.html")
    page = (folder / "page.html").read_text()
    assert page.count('<section class="verdict') == 1
    verdict = lccp("verdict", "run", "--json", cwd=folder)
    assert verdict.returncode == 11 and verdict.stderr == "", "too few checkpoints to decide"
    assert json.loads(verdict.stdout)["signals"]
    command(folder, "export", "run", "--out=files", "--only=rows")
    exported = pd.read_parquet(folder / "files/rows.parquet")
    assert set(exported["step"]) == {0, 3, 4, 6, 9, 12}


def test_it_opens_as_the_first_format_and_says_so_from_then_on(resumed: tuple[Path, str, str]) -> None:
    folder, *_ = resumed
    assert not (EARLIER / "run/format.json").exists()
    assert json.loads((folder / "run/format.json").read_text()) == {"format": 1}


def test_what_was_measured_is_not_measured_again(earlier: Path) -> None:
    rows = contents(earlier / "run/measured/rows")
    said = command(earlier, "measure", "config.yaml")
    assert "0 measured, 1 were measured before" in said
    assert contents(earlier / "run/measured/rows") == rows
    record = json.loads((earlier / "run/measured/measured.json").read_text())
    old = json.loads((EARLIER / "run/measured/measured.json").read_text())
    assert record["format"] == 1 and record["done"] == old["done"]
    other = lccp("measure", "config.yaml", "--seed=12", cwd=earlier)
    assert other.returncode == 2 and "was measured with another configuration (seed: 11 -> 12)" in other.stderr


def test_its_configuration_is_the_same_one(earlier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes are recorded by their public paths now, whichever the record has."""
    monkeypatch.chdir(earlier)
    recorded, own = parse_config(earlier / "run/config.yaml"), parse_config(earlier / "config.yaml")
    assert recorded == own
    paths = [entry["class_path"] for entry in yaml.safe_load(dump_config(recorded))["monitors"]]
    assert set(paths) == {f"megatron_lccp.monitors.{name}" for name in MONITORS}


def changed(path: Path, version: object) -> None:
    """Note another format in a file of JSON; None takes out what it says."""
    content = json.loads(path.read_text()) if path.exists() else {}
    content["format"] = version
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def weights(folder: Path, version: object) -> Path:
    header = {
        name: str(version) if name == "lccp_format" else text for name, text in whole_header({"run": "x"}).items()
    }
    save_file({"x": torch.zeros(2)}, folder / "w.safetensors", metadata=header)
    return folder / "w.safetensors"


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "run": ("run/format.json", lambda folder: RunStore(folder / "run").read_rows()),
    "data": ("tokens/manifest.json", lambda folder: load_manifest(folder / "tokens")),
    "checkpoint": (
        f"run/checkpoints/step-{LAST_CHECKPOINT:08d}/checkpoint.json",
        lambda folder: read_about(next((folder / "run/checkpoints").iterdir())),
    ),
}


@pytest.mark.parametrize("what", READERS)
@pytest.mark.parametrize(
    ("version", "problem"),
    [
        (3, "has format 3, written by a newer megatron_lccp (this one reads up to "),
        ("x", "has format 'x', which is none"),
        (0, "has format 0, which is none"),
    ],
)
def test_a_newer_format_is_refused(earlier: Path, what: str, version: object, problem: str) -> None:
    file, read = READERS[what]
    changed(earlier / file, version)
    with pytest.raises(ValueError) as caught:
        read(earlier)
    assert problem in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert isinstance(caught.value, CheckpointError) == (what == "checkpoint")
    changed(earlier / file, None)
    if what != "run":  # (the file that says nothing but the format is not there then)
        read(earlier)


def test_a_newer_format_of_which_nothing_else_is_known_is_refused_too(earlier: Path) -> None:
    """Only the version is looked at, so nothing is read by halves."""
    for what in ("data", "checkpoint"):
        file, read = READERS[what]
        (earlier / file).write_text(json.dumps({"format": 7, "all": "else"}))
        with pytest.raises(ValueError, match="has format 7, written by a newer megatron_lccp"):
            read(earlier)


def test_weights_of_a_newer_format_are_refused(tmp_path: Path) -> None:
    for read in (read_header, open_stored):
        with pytest.raises(ValueError, match=r"w.safetensors: has format 2, written by a newer megatron_lccp"):
            read(weights(tmp_path, 2))
        with pytest.raises(ValueError, match=r"w.safetensors: has format 'x', which is none"):
            read(weights(tmp_path, "x"))
    assert read_header(weights(tmp_path, 1)) == open_stored(weights(tmp_path, 1)).about == {"run": "x"}
    assert read_header(OLD_WEIGHTS) == open_stored(OLD_WEIGHTS).about and "tokenizer" in read_header(OLD_WEIGHTS)


@pytest.mark.parametrize(
    ("file", "arguments", "code"),
    [
        ("run/format.json", ["report", "run"], 2),
        ("run/format.json", ["train", "config.yaml"], 2),
        ("tokens/manifest.json", ["train", "config.yaml"], 2),
        (READERS["checkpoint"][0], ["train", "config.yaml"], 1),
        ("run/measured/measured.json", ["measure", "config.yaml"], 2),
        ("run/measured/format.json", ["measure", "config.yaml"], 2),
    ],
)
def test_a_command_says_it_in_one_line_and_changes_nothing(
    earlier: Path, file: str, arguments: list[str], code: int
) -> None:
    changed(earlier / file, 3)
    before = contents(earlier)
    done = lccp(*arguments, cwd=earlier)
    (line,) = done.stderr.splitlines()
    assert done.returncode == code and "has format 3, written by a newer megatron_lccp" in line
    after = contents(earlier)
    assert {name: digest for name, digest in after.items() if not name.endswith(".lock")} == before


def test_the_format_goes_with_the_record(tmp_path: Path) -> None:
    """Into W&B's copy of a run, and with what is set aside."""
    store = RunStore(tmp_path / "run")
    store.append_step({"step": 1, "tokens": 1})
    keep_record(store, tmp_path / "wandb/files/record")
    changed(store.format_path, 2)
    with pytest.raises(ValueError, match="newer megatron_lccp"):
        RunStore(store.dir)
    keep_record(store, tmp_path / "wandb/files/record")
    with pytest.raises(ValueError, match="newer megatron_lccp"):
        RunStore(tmp_path / "wandb/files/record")
    aside = store.set_aside()
    assert aside is not None and not store.format_path.exists() and (aside / "format.json").exists()
    store.append_step({"step": 1, "tokens": 1})
    assert json.loads(store.format_path.read_text()) == {"format": 1}


def test_no_version_is_the_first_one() -> None:
    assert [require_format("here", found, 3) for found in (None, 1, 3)] == [1, 1, 3]
    for found in (True, 1.0, -1):
        with pytest.raises(ValueError, match="here: has format .*, which is none"):
            require_format("here", found, 3)
