"""The pages of the site that say what the code says: written at every build, from the code itself, never committed.

    python tools/docs_reference.py OUT

In: the dataclasses with the strings under their fields, the metrics that monitors declare, `measuring`'s public names,
and what the commands print for --help. Out: one Markdown page each in the folder OUT, which is made anew.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import io
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 100
"""Columns of a help text."""
TOOLS = (
    "convert_checkpoint.py to-megatron", "convert_checkpoint.py to-hf", "export_weights.py", "quantize_checkpoint.py",
    "bench_monitors.py eager", "bench_monitors.py sharing", "bench_monitors.py heads",
    "bench_verdict.py", "bench_report.py", "bench_gpu.py",
)  # fmt: skip
FIRST = (
    "Monitor", "Metric", "Every", "EvalWindow", "Row", "run_trees", "plain", "Found", "sequences_of", "Work", "NeedleMonitor",
    "run_samples", "needle_rows", "HeadScore", "AttentionRows",
)  # fmt: skip
"""What authors of monitors need before the rest."""
SCRIPTS = (
    "examples/pretrain_lccp.sh", "examples/slurm/pretrain_lccp.sbatch", "tools/setup_env.sh", "tests/run.sh",
    "tools/build_docs.sh",
)  # fmt: skip
"""Scripts whose header says how they are called."""


def main(out: Path) -> None:
    os.environ["COLUMNS"] = str(WIDTH)
    from megatron_lccp.parallel import compat, cpu

    compat.quiet()
    cpu.install()  # before the monitors import Megatron-Core
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    pages = {
        "configuration": configuration(),
        "monitors": monitors(),
        "sources": sources(),
        "families": families(),
        "measuring": measuring(),
        "commands": commands(),
        "contributing": file_of_the_root("CONTRIBUTING.md"),
        "changelog": file_of_the_root("CHANGELOG.md"),
    }
    for name, lines in pages.items():
        (out / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def configuration() -> Iterator[str]:
    """Every field of Config and of what it holds."""
    from megatron_lccp.config.tree import Config, DataConfig, MixtureConfig, StageConfig, StopRule, TokenizerConfig
    from megatron_lccp.schema import Every

    yield "# Configuration fields\n"
    yield "One YAML file describes a run. Every field below stands in it by its dotted name, and is overridden on the "
    yield "command line by the same name: `--training.steps=50`. A field that is left out keeps its default.\n"
    yield from section("Top level", Config, "")
    parts: dict[str, Any] = {
        f.name: f.default for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.default)
    }
    parts |= {"megatron": Config().megatron, "data": DataConfig()}
    for name in (f.name for f in dataclasses.fields(Config) if f.name in parts):
        yield from section(f"`{name}`", type(parts[name]), f"{name}.")
        if name == "data":
            yield from section("`data.tokenizer`", TokenizerConfig, "data.tokenizer.")
            yield "What may stand in `data.sources` has [a page of its own](sources.md).\n"
    yield from section("`stages.NAME`", StageConfig, "stages.NAME.")
    yield from section("`stages.NAME.mixture.PART`", MixtureConfig, "stages.NAME.mixture.PART.")
    yield from section("`stop_when.N`", StopRule, "stop_when.N.")
    yield from section("`every`", Every, "every.")
    yield "What may stand in `monitors` has [a page of its own](monitors.md).\n"


def sources() -> Iterator[str]:
    """Every source that is shipped."""
    from megatron_lccp.config.load import public_path
    from megatron_lccp.config.tree import Source
    from megatron_lccp.data import sources as package

    yield "# Sources\n"
    yield "An entry of `data.sources` names one of these classes as `class_path` and its fields as `init_args`. "
    yield "[Data](../data.md) says how they are used.\n"
    for kind in (getattr(package, name) for name in package.__all__):
        yield from section(kind.__name__, kind, "", f"`class_path: {public_path(kind)}`\n\n{prose(kind)}")
    yield f"## The interface\n\n{prose(Source)}\n"
    yield from methods(Source)


def monitors() -> Iterator[str]:
    """Every monitor that is shipped, with its metrics."""
    from megatron_lccp import monitors as package
    from megatron_lccp.config.load import public_path

    yield "# Monitors and their metrics\n"
    yield "An entry of `monitors` names one of these classes as `class_path` and its fields as `init_args`. "
    yield "[What is measured](../monitors.md) says how to choose.\n"
    for kind in (getattr(package, name) for name in package.__all__):
        yield f"## {kind.__name__}\n\n`class_path: {public_path(kind)}`\n\n{prose(kind)}\n\n### Metrics of {kind.__name__}\n"
        yield from (metric_text(metric) for metric in kind.metrics)
        yield f"### Fields of {kind.__name__}\n"
        yield from fields(kind, "")


def families() -> Iterator[str]:
    """Every model family."""
    from megatron_lccp.model.families import FAMILIES

    yield "# Model families\n"
    yield "`model.family` is one of these names. Parameters are counted without the padding of the vocabulary.\n"
    for name, make in FAMILIES.items():
        yield f"`{name}`\n: {escaped(inspect.getdoc(make) or '')}\n"


def measuring() -> Iterator[str]:
    """What an author of monitors imports."""
    from megatron_lccp import measuring as package

    yield "# For authors of monitors\n"
    yield "A monitor imports everything from one place: `from megatron_lccp.measuring import ...`. "
    yield "[Add a monitor](../howto/monitor.md) shows one from start to end.\n"
    for name in [*FIRST, *sorted(set(package.__all__) - {*FIRST}, key=str.lower)]:
        yield f"## {name}\n"
        value = getattr(package, name)
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            said = ", ".join(value) if isinstance(value, dict) else str(value).replace("typing.", "")
            yield f"`{said}`\n"
            continue
        if not inspect.isclass(value):
            yield f"```python\n{signature(name, value)}\n```\n"
        yield f"{prose(value)}\n"
        if isinstance(value, type) and dataclasses.is_dataclass(value):
            yield from fields(value, "")
        if inspect.isclass(value):
            yield from methods(value)


def commands() -> Iterator[str]:
    """What each command prints for --help."""
    from megatron_lccp.cli import COMMANDS

    yield "# Commands\n"
    yield "These are the texts that `--help` prints. `lccp` lies in the environment's `bin` folder, `.venv/bin` unless "
    yield "`LCCP_VENV` says otherwise.\n"
    yield f"## lccp\n\n```text\n{help_of(['--help'])}\n```\n"
    for name in COMMANDS:
        text, fields_follow, _ = help_of([name, "--help"]).partition("\nFields of a configuration:")
        yield f"## lccp {name}\n\n```text\n{text.rstrip()}\n```\n"
        if fields_follow:
            yield "The text goes on with [every field of a configuration](configuration.md).\n"
    yield "## Tools\n"
    for call in TOOLS:
        tool, *rest = call.split()
        found = subprocess.run(
            [sys.executable, str(ROOT / "tools" / tool), *rest, "--help"], capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        yield f"### tools/{call}\n\n```text\n{found.stdout.strip()}\n```\n"
    yield "## Scripts\n"
    for path in SCRIPTS:
        yield f"### {path}\n\n```text\n{header(ROOT / path)}\n```\n"


def file_of_the_root(name: str) -> Iterator[str]:
    """A Markdown file that lies beside the README; links to pages of docs/ are made to fit."""
    yield re.sub(r"\]\(docs/", "](../", (ROOT / name).read_text(encoding="utf-8"))


def section(title: str, kind: type, prefix: str, text: str | None = None) -> Iterator[str]:
    yield f"## {title}\n\n{prose(kind) if text is None else text}\n"
    yield from fields(kind, prefix)


def fields(kind: Any, prefix: str) -> Iterator[str]:
    """A definition list of the fields of a dataclass: name, type, default, meaning."""
    from megatron_lccp.schema import Every

    texts = field_texts(kind)
    for field in dataclasses.fields(kind):
        if not field.init:
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        kind_text = str(field.type).replace("typing.", "")
        if dataclasses.is_dataclass(default) and not isinstance(default, Every):
            facts = "a group of fields, below"
        else:
            shown = "" if default is dataclasses.MISSING else f", default `{default_text(default)}`"
            facts = f"`{kind_text}`{shown}"
        yield f"`{prefix}{field.name}` ({facts})\n: {texts.get(field.name, '')}\n"


def default_text(value: Any) -> str:
    """A default as YAML would have it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if dataclasses.is_dataclass(value):
        given = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return "{" + ", ".join(f"{name}: {number}" for name, number in given.items() if number is not None) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(default_text, value)) + "]"
    return without_addresses(str(value)) if value != "" else "''"


def without_addresses(text: str) -> str:
    """Functions and objects by their names: where they lie in memory differs at each build."""
    text = re.sub(r"<function (?:[\w.]+\.)?<lambda> at 0x[0-9a-f]+>", "a function", text)
    text = re.sub(r"<function (?:[\w.<>]+\.)?(\w+) at 0x[0-9a-f]+>", r"\1", text)
    return re.sub(r"<(?:[\w.<>]+\.)?(\w+) object at 0x[0-9a-f]+>", r"\1()", text)


def field_texts(kind: type) -> dict[str, str]:
    """Field -> the string under it, of the class and what it derives from."""
    texts: dict[str, str] = {}
    for base in reversed([base for base in kind.__mro__ if base is not object]):
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
        except (OSError, TypeError):
            continue
        for before, this in zip(body, body[1:]):
            if (
                isinstance(before, ast.AnnAssign)
                and isinstance(this, ast.Expr)
                and isinstance(this.value, ast.Constant)
            ):
                texts[before.target.id] = escaped(inspect.cleandoc(str(this.value.value)))  # type: ignore[union-attr]
    return texts


def metric_text(metric: Any) -> str:
    said = [f"in {metric.unit}"]
    said += [f"{metric.better} is better"] if metric.better else []
    said += [f"{metric.level} level"] if metric.level else []
    low, high = metric.bounds
    said += [f"from {low:g} to {high:g}" if None not in (low, high) else f"at least {low:g}"] if low is not None else []
    said += ["over " + " and ".join(f"`{axis}`" for axis in metric.axes)] if metric.axes else []
    said += ["one series for each " + " and ".join(f"`{name}`" for name in metric.series)] if metric.series else []
    said += ["judged" + (f" with a margin of {metric.margin:g}" if metric.margin else "")] if metric.judged else []
    return f"`{metric.name}` ({', '.join(said)})\n: {escaped(metric.about)}\n"


def methods(kind: type) -> Iterator[str]:
    """The public methods and properties that a class defines itself, as a definition list."""
    for name, value in vars(kind).items():
        if name.startswith("_"):
            continue
        if isinstance(value, property):
            yield f"`{name}`\n: {described(value.fget)}\n"
        elif inspect.isfunction(value):
            yield f"`{signature(name, value)}`\n: {described(value)}\n"


def signature(name: str, value: Any) -> str:
    """As a caller writes it."""
    text = str(inspect.signature(value)).replace("typing.", "").replace("collections.abc.", "")
    text = re.sub(r"\b(?:[a-z_]+\.)+([A-Z])", r"\1", without_addresses(text).replace("'", ""))
    return f"{name}{text}".replace("(self, ", "(").replace("(self)", "()")


def described(value: Any) -> str:
    return escaped(inspect.getdoc(value) or "").replace("\n", "\n  ")


def prose(value: Any) -> str:
    """A docstring as Markdown."""
    return escaped(inspect.getdoc(value) or "")


def escaped(text: str) -> str:
    """What Markdown would take for a tag, outside code."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else part.replace("<", "\\<").replace("*", "\\*") for part in parts)


def help_of(arguments: list[str]) -> str:
    from megatron_lccp.cli import main as lccp

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        lccp(arguments)
    return printed.getvalue().rstrip()


def header(path: Path) -> str:
    """The comment that a script opens with."""
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    end = next(number for number, line in enumerate(lines) if not line.startswith("#") or line.startswith("#SBATCH"))
    return "\n".join(line[1:].removeprefix(" ") for line in lines[:end]).strip().removesuffix("\n#")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
