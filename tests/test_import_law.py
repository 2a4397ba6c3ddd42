"""The import law: data flows left to right, and a file imports only from its own folder and those to its left.

In: the source files of megatron_lccp, read as syntax trees. Out: every import that breaks the law, by file and line.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "megatron_lccp"

# Left to right. "" is the package itself; `cli` composes, so everything is to its left.
TRAINING = ("", "schema", "config", "parallel", "data", "model", "training", "monitors", "probes")
REPORTING = ("", "schema", "config", "records", "analysis")  # meets the training side only in the rows on disk
LEFT_OF = {place: {*zone[: i + 1]} for zone in (TRAINING, REPORTING) for i, place in enumerate(zone)}
LEFT_OF["cli"] = {*TRAINING, *REPORTING, "cli"}
LEFT_OF["compose"] = {*TRAINING, "compose"}  # what commands begin with
LEFT_OF["monitor_cost"] = {*TRAINING, "monitor_cost"}
LEFT_OF["measure"] = {*TRAINING, *REPORTING, "compose", "monitor_cost", "measure"}
LEFT_OF["plan_table"] = {"", "plan_table"}  # a plan in plain values -> text
LEFT_OF["plan"] = {*TRAINING, "monitor_cost", "plan_table", "plan"}
LEFT_OF["walk"] = {*TRAINING, "walk"}  # one rank of a dry run
LEFT_OF["dry_run"] = {*TRAINING, "compose", "monitor_cost", "plan", "walk", "dry_run"}
LEFT_OF["outlets"] = {"", "schema", "config", "records", "analysis", "outlets"}  # where a training's results go
LEFT_OF["cli"] |= {"compose", "measure", "plan", "dry_run", "outlets"}
LEFT_OF["suite"] = {*TRAINING, "records", "suite"}  # composes the monitors alone, for loops of others
LEFT_OF[""] = {"", "suite"}  # which the package gives out by name, loaded when asked for

TORCH_FREE = {"", *REPORTING}
TORCH = {"torch", "megatron", "transformer_engine", "apex"}


def violations(root: Path) -> list[str]:
    """Every import under root/megatron_lccp that breaks the law, also inside functions; TYPE_CHECKING is exempt."""
    return [
        f"{path.relative_to(root)}:{line}: {problem}"
        for path in sorted((root / PACKAGE).rglob("*.py"))
        for line, name in _imports(path, root)
        if (problem := _problem(_place(path, root), name, root))
    ]


def _problem(place: str, name: str, root: Path) -> str | None:
    """What is wrong with importing the dotted `name` from a file at `place`; None if nothing is."""
    top, *rest = name.split(".")
    if place not in LEFT_OF:
        return f"{place} has no place in the order"
    if top in TORCH and place in TORCH_FREE:
        return f"{place or PACKAGE} imports {name}, and must work without torch and Megatron"
    if top == PACKAGE:
        target = rest[0] if rest and _is_module(root / PACKAGE / rest[0]) else ""
        if target not in LEFT_OF[place]:
            return f"{place or PACKAGE} imports {target}, which is not to its left"
    return None


def _place(path: Path, root: Path) -> str:
    """The first name below the package: `model` for model/build.py, `schema` for schema.py, "" for __init__.py."""
    first = path.relative_to(root / PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def _is_module(path: Path) -> bool:
    return path.is_dir() or path.with_suffix(".py").is_file()


def _imports(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of whatever a file imports; `from a import b` counts as a.b."""
    package = path.relative_to(root).parent.parts
    for node in _runtime_nodes(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            prefix = [*base, *([node.module] if node.module else [])]
            yield from ((node.lineno, ".".join([*prefix, alias.name])) for alias in node.names)


def _runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below this one, less the bodies of `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from (inner for branch in child.orelse for inner in [branch, *_runtime_nodes(branch)])
        else:
            yield child
            yield from _runtime_nodes(child)


def test_imports_point_left() -> None:
    found = violations(ROOT)
    assert not found, "\n".join(["the import law is broken:", *found])


def test_a_report_loads_neither_torch_nor_megatron() -> None:
    """What the syntax trees cannot see: an import that a library makes on our behalf."""
    files = (path for path in (ROOT / PACKAGE).rglob("*.py") if _place(path, ROOT) in TORCH_FREE)
    names = sorted(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files)
    code = f"import sys, {', '.join(names)}\nprint(sorted({TORCH} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


@pytest.mark.parametrize(
    ("file", "source", "problem"),
    [
        ("training/loop.py", "from megatron_lccp.monitors import niah", "training imports monitors"),
        ("training/loop.py", "import megatron_lccp.monitors.niah as niah", "training imports monitors"),
        ("training/loop.py", "from megatron_lccp import monitors", "training imports monitors"),
        ("training/loop.py", "from ..monitors.niah import Niah", "training imports monitors"),
        ("training/loop.py", "from .. import monitors", "training imports monitors"),
        ("training/deep/loop.py", "from ...monitors import niah", "training imports monitors"),
        ("training/loop.py", "def f():\n    from megatron_lccp import monitors", "training imports monitors"),
        ("training/loop.py", "from megatron_lccp.records import Store", "training imports records"),
        ("records.py", "from .training.loop import train", "records imports training"),
        ("analysis/report.py", "from megatron_lccp.data import facts", "analysis imports data"),
        ("analysis/report.py", "def f():\n    import torch.nn as nn", "must work without torch"),
        ("config/load.py", "from megatron.core import parallel_state", "must work without torch"),
        ("monitors/niah.py", "from megatron_lccp.cli import main", "monitors imports cli"),
        ("helpers.py", "import math", "has no place in the order"),
        ("analysis/report.py", "if TYPE_CHECKING:\n    pass\nelse:\n    import torch", "must work without torch"),
        ("analysis/report.py", "if TYPE_CHECKING:\n    import torch", None),
        ("schema.py", "if typing.TYPE_CHECKING:\n    from .training.window import EvalWindow", None),
        ("training/loop.py", "from . import step\nfrom ..schema import Row\nfrom .. import __version__", None),
        ("analysis/report.py", "from ..records import Store\nimport megatron_lccp.config.tree", None),
        ("cli.py", "import torch\nfrom . import training, analysis, records", None),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, file: str, source: str, problem: str | None) -> None:
    for place in LEFT_OF:
        (tmp_path / PACKAGE / place).mkdir(parents=True, exist_ok=True)
    path = tmp_path / PACKAGE / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    found = violations(tmp_path)
    assert len(found) == (problem is not None), found
    assert problem is None or problem in found[0]
