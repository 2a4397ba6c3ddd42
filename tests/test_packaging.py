"""What surrounds the package: its metadata, its shell scripts, and how the launcher calls it."""

from __future__ import annotations

import ast
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.metadata import packages_distributions, requires
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement

import megatron_lccp
from megatron_lccp.cli import OF_TRAINING
from tests.synthetic_run import make_run

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [
    *(path for folder in ("examples", "tests", "tools") for path in sorted((ROOT / folder).rglob("*.sh"))),
    *sorted((ROOT / "examples").rglob("*.sbatch")),
    ROOT / ".ci/run",
]

# Built with a container's torch, not installed by pip.
NOT_ON_THE_INDEX = {"apex"}


@pytest.fixture(scope="module")
def metadata() -> dict[str, Any]:
    """What setup.py passes to setuptools."""
    passed: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", passed.update)
        runpy.run_path(str(ROOT / "setup.py"))
    return passed


def test_version_is_the_packages(metadata: dict[str, Any]) -> None:
    assert metadata["version"] == megatron_lccp.__version__


def test_every_import_is_a_declared_requirement(metadata: dict[str, Any]) -> None:
    requirements = [*metadata["install_requires"], *(r for extra in metadata["extras_require"].values() for r in extra)]
    declared = {_canonical(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements}
    distributions = packages_distributions()
    missing = {
        f"{name} ({path.relative_to(ROOT)})"
        for path in sorted((ROOT / "megatron_lccp").rglob("*.py"))
        for name in _imported(path) - sys.stdlib_module_names - {"megatron_lccp"} - NOT_ON_THE_INDEX
        if not declared & {_canonical(each) for each in distributions.get(name, [name])}
    }
    assert not missing, f"not in setup.py: {sorted(missing)}"


def test_the_slim_install_declares_what_the_paper_zone_imports(metadata: dict[str, Any]) -> None:
    """No more and no less: a package too few is found on a laptop only, and one too many may weigh gigabytes."""
    paths = [
        path
        for room in ("__init__.py", "schema.py", "files.py", "config", "records", "analysis")
        for path in [ROOT / "megatron_lccp" / room, *(ROOT / "megatron_lccp" / room).rglob("*.py")]
        if path.is_file()
    ]
    names = set().union(*map(_imported, paths)) - sys.stdlib_module_names - {"megatron_lccp"}
    distributions = packages_distributions()
    imported = {_canonical(each) for name in names for each in distributions.get(name, [name])}
    assert imported == {_canonical(Requirement(each).name) for each in metadata["install_requires"]}


def test_every_extra_that_runs_the_training_brings_what_it_needs(metadata: dict[str, Any]) -> None:
    extras = metadata["extras_require"]
    for name in ("gpu", "container", "convert", "test"):
        assert not {*extras["train"]} - {*extras[name]}, name


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_each_python_gets_one_version_of_what_is_pinned(python: str, metadata: dict[str, Any]) -> None:
    newer, gpu = python not in ("3.10", "3.11"), metadata["extras_require"]["gpu"]
    taken = {}
    for requirement in map(Requirement, [*metadata["install_requires"], *gpu]):
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
            assert requirement.name not in taken
            taken[requirement.name] = str(requirement.specifier)
    assert taken["megatron-core"] == ("==0.19.2" if newer else "==0.16.1")
    assert taken["transformer-engine"] == ("==2.20.2" if newer else "==2.11.0")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as its wheel installs it, built from a copy of what is in the repository."""
    source, site = (tmp_path_factory.mktemp(name) for name in ("source", "site"))
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "megatron_lccp", source / "megatron_lccp", ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", str(site)]
    done = subprocess.run(build, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = site.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def test_the_wheel_holds_every_file_of_the_package(installed: Path) -> None:
    """Also what is no Python: style, script and plotly.js of the report."""
    folders = [(root / "megatron_lccp") for root in (ROOT, installed)]
    ours, theirs = (
        {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}
        for folder in folders
    )
    assert {"analysis/assets/report.css", "analysis/assets/plotly-cartesian.min.js", "cli.py", "py.typed"} <= ours
    assert theirs == ours


SLIM = """
import sys
from importlib.machinery import PathFinder

class Slim(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in absent else PathFinder.find_spec(name, path, target)

absent = {*sys.argv[1].split(",")}
sys.meta_path[:] = [Slim if finder is PathFinder else finder for finder in sys.meta_path]
import megatron_lccp
from megatron_lccp.cli import main
assert sys.path[1] in megatron_lccp.__file__  # of the wheel
sys.exit(main(sys.argv[2:]))
"""
"""Runs `lccp` where the modules that its first argument names are as if not installed."""


@pytest.fixture(scope="module")
def slim(metadata: dict[str, Any]) -> str:
    """Every module of this environment that no distribution of the slim install brings."""
    brought, seen = {"megatron-lccp"}, set()
    left = [Requirement(each) for each in metadata["install_requires"]]
    while left:
        requirement = left.pop()
        wanted = (requirement.name, *sorted(requirement.extras))
        if wanted in seen:
            continue
        seen.add(wanted)
        brought.add(_canonical(requirement.name))
        for each in map(Requirement, requires(requirement.name) or ()):
            extras = ("", *requirement.extras)
            if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in extras):
                left.append(each)
    modules = packages_distributions().items()
    return ",".join(sorted(name for name, of in modules if not brought & {_canonical(each) for each in of}))


@pytest.fixture(scope="module")
def start(installed: Path, slim: str) -> Callable[..., subprocess.Popen[str]]:
    """Starts `lccp` in a folder, as the wheel brings it and where a slim install is all there is."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}

    def run(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SLIM, slim, *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=cwd, env=environment, text=True, **pipes)

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two small runs in it."""
    folder = tmp_path_factory.mktemp("slim")
    sizes = dict(steps=4, lccp_from=0, every=2, lengths=(1024,), samples=2, layers=2, heads=2, skip=())
    for name in ("run", "other"):
        make_run(folder / name, **sizes)
    return folder


@pytest.mark.parametrize(
    ("arguments", "codes", "left"),
    [
        (["report", "run"], [0], "run/report.html"),
        (["verdict", "run"], [0, 10, 11, 12], None),
        (["export", "run", "--only=tables", "--only=rows"], [0], "run/export"),
        (["compare", "run", "other"], [0], None),
        (["correlate", "--r=0.86", "--n=6"], [0], None),
    ],
    ids=["report", "verdict", "export", "compare", "correlate"],
)
def test_a_slim_install_redraws_a_run(
    folder: Path, start: Callable, arguments: list[str], codes: list[int], left: str | None
) -> None:
    process = start(*arguments, cwd=folder)
    said, errors = process.communicate(timeout=120)
    assert said and process.returncode in codes, errors
    assert left is None or (folder / left).exists()
    if arguments[0] == "report":
        page, assets = (folder / "run/report.html").read_text(), ROOT / "megatron_lccp/analysis/assets"
        assert all((assets / name).read_text() in page for name in ("report.js", "report.css"))


def test_a_slim_install_watches_a_run(folder: Path, start: Callable) -> None:
    process = start("watch", "run", "--every=0.1", "--out=watched.html", cwd=folder)
    first = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode in (0, 130) and "windows" in first, errors
    assert (folder / "watched.html").is_file()


@pytest.mark.parametrize("command", ["prepare", "plan", "train", "measure", "branch"])
def test_a_slim_install_says_in_one_line_what_a_training_needs(tmp_path: Path, start: Callable, command: str) -> None:
    more = ["--at=1", "stage.yaml"] if command == "branch" else []
    process = start(command, str(ROOT / "examples/tiny_moe.yaml"), *more, cwd=tmp_path)
    said, errors = process.communicate(timeout=120)
    assert (process.returncode, said) == (2, "")
    assert re.fullmatch(rf"lccp: {command}: needs [\w-]+; pip install 'megatron_lccp\[train\]'\n", errors), errors


def test_that_line_is_said_of_every_package_of_the_training(metadata: dict[str, Any]) -> None:
    distributions = packages_distributions()
    named = {_canonical(each) for name in OF_TRAINING for each in distributions.get(name, [name])}
    assert named >= {_canonical(Requirement(each).name) for each in metadata["extras_require"]["train"]}


def _imported(path: Path) -> set[str]:
    """Top-level names of what a file imports absolutely, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    return names


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_script_is_executable_and_parses(script: Path) -> None:
    assert os.access(script, os.X_OK)
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("python", "message"),
    [
        ('case "$*" in *version_info*) exit 1;; -V) echo Python 3.9.18;; esac', "Python 3.10 or newer is needed"),
        ('case "$*" in *ensurepip*) exit 1;; esac', "has no venv module"),
    ],
    ids=["too old", "without venv"],
)
def test_set_up_refuses_an_unfit_python_in_one_line(tmp_path: Path, python: str, message: str) -> None:
    stub = tmp_path / "python"
    stub.write_text(f"#!/bin/sh\n{python}\n")
    stub.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(stub), "LCCP_VENV": str(tmp_path / "new venv")}
    done = subprocess.run(["bash", ROOT / "tools/setup_env.sh"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    assert message in done.stderr.splitlines()[-1]


OLD, STARTS, SHIM = "exit 1", "exit 0", "echo no such version >&2; exit 127"


@pytest.mark.parametrize(
    ("default", "in_path", "of_pyenv", "second", "said"),
    [
        (OLD, STARTS, STARTS, "bin/python3.12", "second run with"),
        (OLD, SHIM, STARTS, "pyenv/versions/3.12.1/bin/python", "second run with"),
        (OLD, SHIM, SHIM, None, "no Python 3.12 that starts"),
        (OLD, SHIM, None, None, "no Python 3.12 that starts"),
        (STARTS, STARTS, STARTS, None, "is 3.12 or newer"),
    ],
    ids=["in PATH", "a shim, and pyenv's", "two that do not start", "a shim alone", "the default is one"],
)
def test_ci_takes_a_second_python_only_if_it_starts(
    tmp_path: Path, default: str, in_path: str, of_pyenv: str | None, second: str | None, said: str
) -> None:
    """Checks run once, after the first tests. What fails is not forgotten, and does not keep the rest from running."""
    programs = {"bin/python3": default, "bin/python3.12": in_path, "bin/chromium": "", "bin/slurmctld": ""}
    if of_pyenv is not None:
        programs |= {"bin/pyenv": f'echo "{tmp_path}/pyenv"', "pyenv/versions/3.12.1/bin/python": of_pyenv}
    log = f'echo "${{PYTHON:-}}|${{LCCP_VENV:-}}|$*" >>"{tmp_path}/log"'
    programs["bin/make"] = f'echo "${{*: -1}}" >>"{tmp_path}/log"; [[ ! -e "{tmp_path}/fail-checks" ]]'
    programs["tests/run.sh"] = f'{log}; [[ -n "${{PYTHON:-}}" || ! -e "{tmp_path}/fail" ]]'
    for name, lines in programs.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/bash\n{lines}\n")
        path.chmod(0o755)
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci/run").write_bytes((ROOT / ".ci/run").read_bytes())
    environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}
    second_run = [f"{tmp_path / second}|{tmp_path}/.venv-3.12|-m not once"] if second else []
    expected = ["||", "checks", *second_run]
    for fails in (None, "fail-checks", "fail"):
        (tmp_path / "log").unlink(missing_ok=True)
        if fails is not None:
            (tmp_path / fails).touch()
        done = subprocess.run(["bash", tmp_path / ".ci/run"], env=environment, capture_output=True, text=True)
        assert done.returncode == (fails is not None) and said in done.stderr.splitlines()[-1]
        assert (tmp_path / "log").read_text().splitlines() == expected


class Launcher:
    """The launcher in a repository whose environment is a Python that writes down how it is called."""

    def __init__(self, directory: Path, gpus: int) -> None:
        self.root = directory / "a repository"
        self.log = directory / "calls"
        for folder in ("examples", "tools"):
            (self.root / folder).mkdir(parents=True)
        (self.root / "examples/tiny_moe.yaml").touch()
        (self.root / "examples/pretrain_lccp.sh").write_bytes((ROOT / "examples/pretrain_lccp.sh").read_bytes())
        python = self.root / "python"
        python.write_text(
            "#!/bin/bash\n"
            f'case "$*" in *device_count*) echo {gpus};; *socket*) echo 12345;; *)\n'
            f'  {{ printf "%s|" "$OMP_NUM_THREADS" "$PWD" "$@"; echo; }} >>"{self.log}";; esac\n'
        )
        python.chmod(0o755)
        (self.root / "tools/setup_env.sh").write_text(f'LCCP_PYTHON="{python}"\n')

    def __call__(self, *arguments: str, cwd: Path, **variables: str) -> list[list[str]]:
        """The calls made, each as OMP_NUM_THREADS, working directory and arguments."""
        hidden = ("OMP_NUM_THREADS", "GPUS_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
        environment = {name: value for name, value in os.environ.items() if name not in hidden} | variables
        script = self.root / "examples/pretrain_lccp.sh"
        subprocess.run(["bash", script, *arguments], cwd=cwd, env=environment, check=True, timeout=60)
        return [line.split("|")[:-1] for line in self.log.read_text().splitlines()]


def test_launcher_prepares_then_trains_the_default_on_cpu_ranks(tmp_path: Path) -> None:
    launch = Launcher(tmp_path, gpus=0)
    prepare, train = launch("--training.steps=5", "--name=two words", cwd=tmp_path)
    request = [str(launch.root / "examples/tiny_moe.yaml"), "--training.steps=5", "--name=two words"]
    assert prepare[1:] == [str(launch.root), "-m", "megatron_lccp.cli", "prepare", *request]
    threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert train[:3] == [threads, str(launch.root), str(launch.root / "tools/torchrun.py")]
    assert _option(train, "--nproc-per-node") == "2" and _option(train, "--nnodes") == "1"
    assert _option(train, "--master-addr") == "127.0.0.1" and _option(train, "--master-port") == "12345"
    assert train[-len(request) - 3 :] == ["-m", "megatron_lccp.cli", "train", *request]


def test_launcher_starts_a_rank_for_each_gpu_of_each_node(tmp_path: Path) -> None:
    launch = Launcher(tmp_path, gpus=1)
    _, train = launch(cwd=tmp_path, NNODES="2", NODE_RANK="1", MASTER_ADDR="first")
    options = ("--nnodes", "--node-rank", "--nproc-per-node", "--master-addr", "--master-port")
    assert [_option(train, name) for name in options] == ["2", "1", "1", "first", "29500"]
    assert train[0] == ""  # torchrun's own choice


def test_launcher_prefers_the_callers_config_to_the_repositorys(tmp_path: Path) -> None:
    launch = Launcher(tmp_path, gpus=0)
    own = tmp_path / "elsewhere/examples/tiny_moe.yaml"
    own.parent.mkdir(parents=True)
    own.touch()
    prepare, _ = launch("examples/tiny_moe.yaml", cwd=tmp_path / "elsewhere")
    assert prepare[-1] == str(own)


def test_launcher_says_where_it_looked_for_a_config(tmp_path: Path) -> None:
    launch = Launcher(tmp_path, gpus=0)
    script = launch.root / "examples/pretrain_lccp.sh"
    done = subprocess.run(["bash", script, "absent.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and not launch.log.exists()
    assert done.stderr == f"pretrain_lccp: there is no absent.yaml in {tmp_path} or {launch.root}\n"


def _option(call: list[str], name: str) -> str:
    return call[call.index(name) + 1]
