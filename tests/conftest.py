"""Which tests run once, in what order files start, and fixtures that several folders share.

What a fixture needs is imported when a test asks for it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from tests.tiny import tiny_tree
from tests.without_torch import sitecustomize
from tests.without_torch.sitecustomize import Refuse, is_refused

TESTS = Path(__file__).parent
WITHOUT_TORCH = ("analysis", "records")
"""Folders of tests that know neither torch nor Megatron-Core, as the import law (test_import_law.py) has it of what
they test: a test there that imports or starts one of the two fails. They are marked `once`: CI's second run, whose point
is another Megatron-Core, leaves them out (.ci/run). One there that depends on the version of Python, say on the words
of argparse, is marked `each_python` instead. A file elsewhere whose subject is ours alone marks itself `once`."""
LONGEST = ("functional", "distributed", "weights", "model", "planning", "test_recipes.py", "measuring")
"""What starts first, where several files run at a time: a long one that starts last keeps one core waiting."""


def _folder(path: Path) -> str:
    return path.relative_to(TESTS).parts[0]


def _knows_no_torch(item: pytest.Item) -> bool:
    return _folder(item.path) in WITHOUT_TORCH and not item.get_closest_marker("each_python")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _knows_no_torch(item):
            item.add_marker("once")
    order = {folder: place for place, folder in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(_folder(item.path), len(order)))


@contextlib.contextmanager
def _without_torch(applies: bool) -> Iterator[None]:
    """While open, neither this process nor a Python that it starts can import what is_refused says."""
    with pytest.MonkeyPatch.context() as patch:
        if applies:
            for name in filter(is_refused, list(sys.modules)):
                parent, _, child = name.rpartition(".")
                patch.delitem(sys.modules, name)
                if parent and not is_refused(parent):
                    patch.delattr(sys.modules[parent], child, raising=False)
            patch.setattr(sys, "meta_path", [Refuse(), *sys.meta_path])
            path = (str(Path(sitecustomize.__file__).parent), os.environ.get("PYTHONPATH", ""))
            patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
        yield


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    with _without_torch(isinstance(collector, pytest.Module) and _folder(collector.path) in WITHOUT_TORCH):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    with _without_torch(_knows_no_torch(item)):
        return (yield)


@pytest.fixture(scope="session")
def tiny_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny configuration whose data are prepared; tests give it a run directory of their own with --dir."""
    from megatron_lccp.config.load import parse_config
    from megatron_lccp.data.prepare import prepare

    directory = tmp_path_factory.mktemp("tiny")
    path = directory / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_tree(directory)))
    prepare(parse_config(path), say=lambda text: None)
    return path


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A synthetic run with all monitors and two stages, to be read: `dir`, and `rows`, its Rows as written."""
    from tests.synthetic_run import make_run

    directory = tmp_path_factory.mktemp("run")
    return SimpleNamespace(dir=directory, rows=make_run(directory))


@pytest.fixture
def small_run(tmp_path: Path) -> SimpleNamespace:
    """The same, small, to be changed: windows at 0, 5, 10, 15, 20, the second stage from 10."""
    from tests.synthetic_run import make_run

    directory = tmp_path / "run"
    rows = make_run(
        directory, steps=20, lccp_from=10, every=5, lengths=(1024, 4096), depths=(0.0, 0.5, 1.0), samples=2, layers=2,
        heads=3, skip=(7,),
    )  # fmt: skip
    return SimpleNamespace(dir=directory, rows=rows)
