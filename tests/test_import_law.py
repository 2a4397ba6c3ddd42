"""The import law: data flows left to right, and a file imports only from its own room and those to its left.

In: the source files of megatron_lccp and tools, read as syntax trees. Out: every import that breaks the law, by file
and line, and every circle of files.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "megatron_lccp"

# Left to right. "" is the package itself, which hands out `attach` of `suite`.
NOUNS = ("", "schema", "text", "processes", "files", "lock", "config")
PAPER = (*NOUNS, "records", "analysis")  # meets the training only in the rows on disk
TORCH = (*NOUNS, "parallel", "data", "model", "measuring", "weights", "monitors", "training", "planning", "probes")
COMPOSE = ("suite", "commands", "cli")
LEFT_OF = {room: {*zone[: i + 1]} for zone in (TORCH, PAPER) for i, room in enumerate(zone)}
LEFT_OF |= {room: {*TORCH, *PAPER, *COMPOSE[: i + 1]} for i, room in enumerate(COMPOSE)}
LEFT_OF["training"] -= {"monitors"}  # the loop calls what it was given
LEFT_OF[""] |= {"suite"}

TORCH_FREE = {*PAPER}
TORCH_PACKAGES = {"torch", "megatron", "transformer_engine", "apex"}


def violations(root: Path) -> list[str]:
    """Every import under root/megatron_lccp that breaks the law, also inside functions; TYPE_CHECKING is exempt."""
    return [
        f"{path.relative_to(root)}:{line}: {problem}"
        for path in sorted((root / PACKAGE).rglob("*.py"))
        for line, name in _imports(path, root)
        if (problem := _problem(_room(path, root), name, root))
    ]


def _problem(room: str, name: str, root: Path) -> str | None:
    """What is wrong with importing the dotted `name` from a file in `room`; None if nothing is."""
    top, *rest = name.split(".")
    if room not in LEFT_OF:
        return f"{room} has no place in the order"
    if top in TORCH_PACKAGES and room in TORCH_FREE:
        return f"{room or PACKAGE} imports {name}, and must work without torch and Megatron"
    if top == PACKAGE:
        target = rest[0] if rest and _is_module(root / PACKAGE / rest[0]) else ""
        if target not in LEFT_OF[room]:
            return f"{room or PACKAGE} imports {target}, which is not to its left"
    return None


def _room(path: Path, root: Path) -> str:
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


def circle(files: dict[str, Path], root: Path) -> list[str] | None:
    """Dotted names of files that import one another in a circle, also inside functions; None if there are none."""
    needs = {
        module: {name for _, dotted in _imports(path, root) if (name := _file_of(dotted, files)) not in (None, module)}
        for module, path in files.items()
    }
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def _file_of(dotted: str, files: dict[str, Path]) -> str | None:
    """The file that an imported name lies in: the name itself if it is a module, else what it is taken from."""
    names = (dotted, dotted.rpartition(".")[0])
    return next((name for name in names if name in files), None)


def test_imports_point_left() -> None:
    found = violations(ROOT)
    assert not found, "\n".join(["the import law is broken:", *found])


def test_no_files_import_one_another_in_a_circle() -> None:
    def named(folder: Path, base: Path) -> dict[str, Path]:
        return {
            ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__"): path
            for path in folder.rglob("*.py")
        }

    package = named(ROOT / PACKAGE, ROOT)
    del package[PACKAGE]  # it hands out `attach`, loaded when asked for
    assert (circle(package, ROOT), circle(named(ROOT / "tools", ROOT / "tools"), ROOT)) == (None, None)


def test_one_file_says_what_the_model_is() -> None:
    files = [path for folder in (PACKAGE, "tools") for path in (ROOT / folder).rglob("*.py")]
    asked = {str(p.relative_to(ROOT)) for p in files for _, name in _imports(p, ROOT) if name.endswith(".family_of")}
    assert asked == {f"{PACKAGE}/model/resolved.py"}


def test_sizes_load_neither_torch_nor_megatron() -> None:
    names = ", ".join(f"{PACKAGE}.{name}" for name in ("model.shape", "model.resolved", "planning.memory"))
    code = f"import sys, {names}\nprint(sorted({TORCH_PACKAGES} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_a_monitor_needs_no_other_import_of_ours() -> None:
    """Ours show it: whatever they take from the package, they take from megatron_lccp.measuring."""
    folder = ROOT / PACKAGE / "monitors"
    for path in folder.glob("*.py"):
        ours = [name for _, name in _imports(path, ROOT) if name.split(".")[0] == PACKAGE]
        where = f"{PACKAGE}.monitors" if path.name == "__init__.py" else f"{PACKAGE}.measuring"
        strange = [name for name in ours if name.rpartition(".")[0] != where and not name.startswith(f"{where}.")]
        assert not strange and ours, f"{path.name}: {strange}"
        deep = [name for name in ours if path.name != "__init__.py" and name.count(".") != 2]
        assert not deep, f"{path.name} imports from a file of measuring: {deep}"


def test_a_planted_circle_is_found(tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.py" for name in ("a", "b", "c")}
    for name, source in (("a", "from b import f"), ("b", "def f():\n    import c"), ("c", "import a")):
        files[name].write_text(source)
    assert {*(circle(files, tmp_path) or ())} == {"a", "b", "c"}
    files["c"].write_text("if TYPE_CHECKING:\n    import a")
    assert circle(files, tmp_path) is None


def test_a_report_loads_neither_torch_nor_megatron() -> None:
    """What the syntax trees cannot see: an import that a library makes on our behalf."""
    files = (path for path in (ROOT / PACKAGE).rglob("*.py") if _room(path, ROOT) in TORCH_FREE)
    names = sorted(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files)
    code = f"import sys, {', '.join(names)}\nprint(sorted({TORCH_PACKAGES} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


@pytest.mark.parametrize(
    ("file", "source", "problem"),
    [
        ("training/loop.py", "from megatron_lccp.monitors import niah", "training imports monitors"),
        ("training/loop.py", "import megatron_lccp.monitors.niah as niah", "training imports monitors"),
        ("training/loop.py", "from ..monitors.niah import Niah", "training imports monitors"),
        ("training/deep/loop.py", "from ...monitors import niah", "training imports monitors"),
        ("training/loop.py", "def f():\n    from megatron_lccp import monitors", "training imports monitors"),
        ("training/loop.py", "from megatron_lccp.records.store import RunStore", "training imports records"),
        ("measuring/window.py", "from megatron_lccp.training import loop", "measuring imports training"),
        ("records/store.py", "from ..training.loop import train", "records imports training"),
        ("analysis/report/page.py", "from megatron_lccp.data import people", "analysis imports data"),
        ("analysis/report/page.py", "def f():\n    import torch.nn as nn", "must work without torch"),
        ("config/load.py", "from megatron.core import parallel_state", "must work without torch"),
        ("monitors/niah.py", "from megatron_lccp.cli import main", "monitors imports cli"),
        ("helpers.py", "import math", "has no place in the order"),
        ("analysis/run.py", "if TYPE_CHECKING:\n    pass\nelse:\n    import torch", "must work without torch"),
        ("analysis/run.py", "if TYPE_CHECKING:\n    import torch", None),
        ("training/loop.py", "from . import step\nfrom ..schema import Row\nfrom .. import __version__", None),
        ("cli.py", "import torch\nfrom . import training, analysis, records, commands", None),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, file: str, source: str, problem: str | None) -> None:
    for room in LEFT_OF:
        (tmp_path / PACKAGE / room).mkdir(parents=True, exist_ok=True)
    path = tmp_path / PACKAGE / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    found = violations(tmp_path)
    assert len(found) == (problem is not None), found
    assert problem is None or problem in found[0]
