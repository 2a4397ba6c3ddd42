"""Classes that installed packages ship: named by a short name, recorded by their path, and what is wrong with some."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from megatron_lccp.config.classes import GROUPS, find_class, public_path, shipped
from megatron_lccp.config.load import ConfigError, load_monitors, parse_config
from megatron_lccp.config.tree import Source
from megatron_lccp.monitors import NeedleGrid
from megatron_lccp.schema import Monitor
from tests.distributed.ranks import ROOT
from tests.tiny import tiny_tree

PARTS = '''
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_lccp.config.tree import Source
from megatron_lccp.schema import Every, Metric, Monitor


@dataclass(frozen=True)
class Counting(Source):
    """Numbers in words."""

    upto: int = 30
    """The last number."""

    def documents(self, vocab_size: int) -> Iterator[str]:
        for number in range(self.upto):
            yield f"number {number} of {self.upto} " * 20


@dataclass(frozen=True)
class Steps(Monitor):
    """Which step it is."""

    metrics = (Metric(name="step", unit="count", about="Which step it is."),)
    every: Every = Every(steps=3)
    """When it is due."""
    on_error: str = "skip"
    """What follows an exception."""
    offset: int = 0
    """Is added."""

    def measure(self, window):
        yield window.row(self, "step", window.step + self.offset, 1)
'''


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed a package that ships a source and a monitor."""
    project, target = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("installed")
    (project / "counting_parts").mkdir()
    (project / "counting_parts/_parts.py").write_text(PARTS)
    (project / "counting_parts/__init__.py").write_text("from counting_parts._parts import Counting, Steps\n")
    (project / "pyproject.toml").write_text(
        f"""
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "counting-parts"
version = "1.0"
[project.entry-points."{GROUPS[Source]}"]
counting = "counting_parts._parts:Counting"
[project.entry-points."{GROUPS[Monitor]}"]
which_step = "counting_parts:Steps"
"""
    )
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(project)], check=True
    )
    return target


def run(installed: Path, *command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


READ = """
import json, sys
from megatron_lccp.config.load import ConfigError, as_tree, config_hash, load_monitors, parse_config
from megatron_lccp.data.prepare import prepare
from megatron_lccp.schema import Every
short, full, monitors = sys.argv[1:]
one, other = parse_config(short), parse_config(full)
said = []
first = prepare(one, say=said.append)
second = prepare(other, say=said.append)
try:
    parse_config(short, ["--data.sources.numbers.init_args.up_to=3", "--monitors.0.init_args.ofset=1"])
except ConfigError as error:
    unknown = str(error).splitlines()
try:
    parse_config(short, ["--data.sources.numbers.init_args.upto=many"])
except ConfigError as error:
    wrong = str(error).splitlines()
print(json.dumps({
    "every": one.monitors[0].every == Every(steps=4), "equal": one == other and config_hash(one) == config_hash(other), "recorded": as_tree(one),
    "definition": first.sources["numbers"].definition, "said": said[-1], "same": first == second,
    "unknown": unknown, "wrong": wrong, "alone": [as_tree(m)["class_path"] for m in load_monitors(monitors)],
}))
"""


def test_an_installed_package_ships_a_source_and_a_monitor(installed: Path, tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path)
    tree["data"]["tokenizer"] |= {"train_on": ["numbers"], "vocab_size": 285}
    tree["data"]["sources"] = {"numbers": {"class_path": "counting", "init_args": {"upto": 40}}}
    for stage in tree["stages"].values():
        stage["mixture"] = {"all": {"sources": {"numbers": 1.0}}}
    tree["monitors"] = [{"class_path": "which_step", "init_args": {"every": {"steps": 4}, "offset": 1}}]
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "monitors.yaml").write_text(yaml.safe_dump({"monitors": tree["monitors"]}))
    tree["data"]["sources"]["numbers"]["class_path"] = "counting_parts.Counting"
    tree["monitors"][0]["class_path"] = "counting_parts.Steps"
    (tmp_path / "full.yaml").write_text(yaml.safe_dump(tree))
    done = run(installed, "-c", READ, *(str(tmp_path / f"{name}.yaml") for name in ("short", "full", "monitors")))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["every"], "though the module of the class does not import all types of its base"
    assert found["equal"] and found["same"] and "up to date, 1 source" in found["said"]
    tree["monitors"][0]["init_args"] |= {"every": {"steps": 4, "tokens": None}, "on_error": "skip"}
    assert found["recorded"]["monitors"] == tree["monitors"] and found["alone"] == ["counting_parts.Steps"]
    assert found["recorded"]["data"]["sources"]["numbers"] == tree["data"]["sources"]["numbers"]
    assert found["definition"]["source"]["class_path"] == "counting_parts.Counting"
    assert [line.partition(": ")[2] for line in found["unknown"]] == [
        "data.sources.numbers.init_args.up_to: is not a field of Counting; did you mean upto?",
        "monitors.0.init_args.ofset: is not a field of Steps; did you mean offset?",
    ]
    (line,) = found["wrong"]
    assert line.endswith("data.sources.numbers.init_args.upto: should be a whole number, is 'many'")


def test_help_lists_what_packages_ship(installed: Path) -> None:
    done = run(installed, "-m", "megatron_lccp.cli", "prepare", "--help")
    assert done.returncode == 0, done.stderr
    source, monitor = (
        done.stdout.index(f"{where}, of the package counting-parts:")
        for where in ("data.sources.NAME with class_path counting", "monitors.N with class_path which_step")
    )
    assert "Numbers in words." in done.stdout[source:monitor] and "--upto" in done.stdout[source:monitor]
    assert "Which step it is" in done.stdout[monitor:] and "--offset" in done.stdout[monitor:]


def ship(folder: Path, package: str, base: type, *lines: str) -> None:
    """The metadata that pip leaves of an installed package."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("\n".join([f"[{GROUPS[base]}]", *lines, ""]))


@pytest.fixture
def damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on sys.path with packages that ship what cannot be used."""
    ship(tmp_path, "alpha", Monitor, "lag = shipped_alpha:Lag", "gone = shipped_nowhere:Lag", "none = shipped_alpha:f")
    ship(
        tmp_path, "beta", Monitor, "lag = shipped_beta:Lag", "broken = shipped_broken:Lag", "other = shipped_alpha:Not"
    )
    ship(tmp_path, "gamma", Source, "count = shipped_nowhere:Count")
    (tmp_path / "shipped_alpha.py").write_text("f = print\n")
    (tmp_path / "shipped_broken.py").write_text("def :\n")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


UNUSABLE = {
    "lag": "'lag' is shipped twice, by alpha and beta; write shipped_alpha.Lag or shipped_beta.Lag, or uninstall one",
    "gone": "'gone' of the package alpha cannot be imported (shipped_nowhere:Lag): No module named 'shipped_nowhere'; "
    "install what it needs, or another version of alpha",
    "other": "'other' of the package beta cannot be imported (shipped_alpha:Not): AttributeError: module 'shipped_alp",
    "broken": "'broken' of the package beta cannot be imported (shipped_broken:Lag): SyntaxError: ",
    "none": "'none' of the package alpha (shipped_alpha:f) is no class that derives from Monitor; ask alpha to correct",
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_what_cannot_be_used_is_one_line(damaged: Path, name: str) -> None:
    for read, text in ((load_monitors, ""), (parse_config, "seed: 3\n")):
        (damaged / "run.yaml").write_text(f"{text}monitors: [{{class_path: {name}}}]\n")
        with pytest.raises(ConfigError) as caught:
            read(damaged / "run.yaml")
        (line,) = str(caught.value).splitlines()
        assert line.startswith(f"{damaged}/run.yaml: monitors.0.class_path: {UNUSABLE[name]}")


def test_help_goes_on_after_what_cannot_be_used(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_lccp.cli import main

    assert main(["plan", "--help"]) == 0
    text = capsys.readouterr().out
    for where, name in (("monitors.N", "lag"), ("monitors.N", "none")):
        assert f"{where} with class_path {name}:\n  {UNUSABLE[name]}" in text
    assert "data.sources.NAME with class_path count:\n  'count' of the package gamma cannot be imported" in text


def test_short_names_are_those_of_their_group(damaged: Path) -> None:
    assert {*UNUSABLE} <= {*shipped(Monitor)} and "count" in shipped(Source)
    with pytest.raises(ValueError, match="'count' is shipped by no installed package; write the path of the class as"):
        find_class("count", Monitor)
    assert find_class(public_path(NeedleGrid), Monitor) is NeedleGrid


def test_a_module_that_breaks_is_one_line_by_its_path_too(damaged: Path) -> None:
    (damaged / "run.yaml").write_text("monitors: [{class_path: shipped_broken.Lag}]\n")
    with pytest.raises(ConfigError, match="'shipped_broken.Lag' cannot be imported: SyntaxError: ") as caught:
        load_monitors(damaged / "run.yaml")
    assert len(str(caught.value).splitlines()) == 1


def test_a_class_that_is_imported_has_a_short_name_too(tmp_path: Path) -> None:
    assert find_class("NeedleGrid", Monitor) is NeedleGrid
    with pytest.raises(
        ValueError, match=r"'NedleGrid' is shipped by .* package.module.Class; did you mean NeedleGrid\?"
    ):
        find_class("NedleGrid", Monitor)
    twin = dataclass(frozen=True)(type("NeedleGrid", (NeedleGrid,), {"__module__": "elsewhere"}))
    with pytest.raises(
        ValueError, match="several classes; write elsewhere.NeedleGrid or megatron_lccp.monitors.NeedleGr"
    ):
        find_class("NeedleGrid", Monitor)
    del twin
    gc.collect()  # or other tests would find it
    assert find_class("NeedleGrid", Monitor) is NeedleGrid
