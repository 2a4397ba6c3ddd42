"""Every extra of setup.py can be installed on the platforms that setup.py claims, by uv's resolver.

It asks the package index for what packages say of themselves, and downloads none of them. It skips where no index
answers. Only wheels count: for what has to be compiled, the answer would be that of this machine.
"""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement

pytestmark = pytest.mark.once
ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.11", "3.12")
PLATFORM = "x86_64-manylinux_2_28"
"""Linux on x86_64 with glibc 2.28, which setup.py claims."""
COMPILED = {"transformer-engine": "pytorch"}
"""What brings a package that is built where it is installed, and by which of its extras."""
NO_INDEX = ("Failed to fetch", "Request failed after", "error sending request", "timed out", "not found in the package")
"""What uv says where no index answers."""

pytestmark = pytest.mark.once  # of all Pythons, whichever this one is


def requirements() -> list[str]:
    """What the package and all of its extras ask for, with their markers: if it resolves, each of them does."""
    passed: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", passed.update)
        runpy.run_path(str(ROOT / "setup.py"))
    found = set()
    for text in [*passed["install_requires"], *(each for extra in passed["extras_require"].values() for each in extra)]:
        requirement = Requirement(text)
        requirement.extras -= {COMPILED.get(requirement.name, "")}
        found.add(str(requirement))
    return sorted(found)


def resolve(python: str, asked: list[str]) -> subprocess.CompletedProcess:
    uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    command = [uv, "pip", "compile", "--quiet", "--no-config", "--python-version", python, "--only-binary", ":all:"]
    command += ["--python-platform", PLATFORM, "-"]
    return subprocess.run(command, input="\n".join(asked), capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def index() -> None:
    """Skips where no index has a small package that every index has."""
    done = resolve("3.11", ["packaging"])
    if done.returncode:
        assert any(each in done.stderr for each in NO_INDEX), done.stderr
        pytest.skip("no package index answers here")


@pytest.mark.parametrize("python", PYTHONS)
def test_every_extra_resolves_where_it_is_claimed(python: str, index: None) -> None:
    done = resolve(python, requirements())
    assert done.returncode == 0, done.stderr
    found = dict(line.split(" ")[0].split("==") for line in done.stdout.splitlines() if "==" in line)
    assert {"torch", "transformer-engine", "nvidia-modelopt", "transformers", "sphinx"} <= set(found)
    assert found["megatron-core"] == ("0.19.2" if python == "3.12" else "0.16.1")


def test_what_is_not_claimed_is_refused(index: None) -> None:
    """The test above can fail: nvidia-resiliency-ext has no wheel for this glibc."""
    done = resolve("3.12", ["nvidia-resiliency-ext==0.6.0"])
    assert done.returncode != 0 and "nvidia-resiliency-ext" in done.stderr
