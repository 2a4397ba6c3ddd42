"""Every extra of setup.py can be installed on the platforms that setup.py claims, by pip's own resolver.

It asks the package index, and skips where none answers, or too slowly. Only wheels count, as for what has to be compiled
the answer would be that of this machine. pip resolves for no newer Python than the one it runs on, so each of CI's two
runs does its part.
"""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.markers import default_environment
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
OLDEST_GLIBC = 28
"""Of 2.28, which setup.py claims."""
PYTHONS = {(3, 10): ("3.10",), (3, 11): ("3.10", "3.11")}.get(sys.version_info[:2], ("3.12",))
COMPILED = {"transformer-engine": "pytorch"}
"""What brings a package that is built where it is installed, and by which of its extras."""
NO_INDEX = ("Could not fetch URL", "Failed to establish a new connection", "Temporary failure in name resolution",
            "ProxyError", "Read timed out", "SSLError", "from versions: none")  # fmt: skip
"""What pip says where no index answers, the last of a package that every index has."""


def requirements(python: str) -> list[str]:
    """What all extras together ask for on that Python: if it resolves, each of them does."""
    passed: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", passed.update)
        runpy.run_path(str(ROOT / "setup.py"))
    there = {**default_environment(), "python_version": python, "python_full_version": f"{python}.0"}
    there |= {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}
    found = set()
    for text in [*passed["install_requires"], *(each for extra in passed["extras_require"].values() for each in extra)]:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate(there):
            requirement.marker = None
            requirement.extras -= {COMPILED.get(requirement.name, "")}
            found.add(str(requirement))
    return sorted(found)


def pip(python: str, glibc: int, asked: list[str], *more: str, timeout_s: float = 500) -> subprocess.CompletedProcess:
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(glibc, 4, -1)]
    platforms += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]
    with tempfile.TemporaryDirectory() as target:
        command = [
            sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--dry-run", "--ignore-installed",
            "--quiet", "--target", target, "--python-version", python, "--implementation", "cp",
            "--only-binary=:all:", "--report", f"{target}/report.json", *(f"--platform={each}" for each in platforms),
            "--retries", "1", "--timeout", "20", *more, *asked,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
        if done.returncode == 0:
            done.stdout = Path(target, "report.json").read_text()
        return done


@pytest.fixture(scope="module")
def index() -> None:
    """Skips where no index has a small package that every index has."""
    done = pip("3.11", OLDEST_GLIBC, ["packaging"], "--no-deps", timeout_s=120)
    if done.returncode:
        assert any(each in done.stderr for each in NO_INDEX), done.stderr
        pytest.skip("no package index answers here")


@pytest.mark.parametrize("python", PYTHONS)
def test_every_extra_resolves_where_it_is_claimed(python: str, index: None) -> None:
    try:
        done = pip(python, OLDEST_GLIBC, requirements(python))
    except subprocess.TimeoutExpired:
        pytest.skip("the package index answers too slowly")
    assert done.returncode == 0, done.stderr
    found = {each["metadata"]["name"].lower().replace("_", "-") for each in json.loads(done.stdout)["install"]}
    assert {"torch", "megatron-core", "transformer-engine", "nvidia-modelopt", "transformers", "sphinx"} <= found


def test_what_is_not_claimed_is_refused(index: None) -> None:
    """The test above can fail: nvidia-resiliency-ext has no wheel for this glibc."""
    done = pip(PYTHONS[-1], OLDEST_GLIBC, ["nvidia-resiliency-ext==0.6.0"], "--no-deps")
    assert done.returncode != 0 and "No matching distribution found" in done.stderr


def test_requirements_are_those_of_a_python() -> None:
    assert "megatron-core==0.16.1" in requirements("3.11") and "megatron-core==0.19.2" in requirements("3.12")
    assert "transformer-engine[core_cu13]==2.20.2" in requirements("3.12")
