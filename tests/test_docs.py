"""What the README and the pages of docs/ name is there: commands, options, files, fields, classes, code.

In: the pages as they lie in the repository. Nothing of them is run here but parsers; tests/functional/test_docs.py runs
the code of the how-to pages. `tools/build_docs.sh` checks links and headings, and writes the reference pages.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import re
import shlex
import statistics
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted(p for p in ROOT.glob("docs/**/*.md") if "generated" not in p.parts)]
ROOMS = ("megatron_lccp/", "examples/", "tools/", "tests/", "docs/", ".ci/")
"""Where a path of this repository begins."""
ELSEWHERE = {"rsync", "git", "unzip"}
"""Programs of the reader's machine, whose arguments are not ours."""
WRITTEN = "megatron_lccp/analysis/measured/top_one.py"
"""A file that a page tells the reader to write."""
SUFFIXES = (".yaml", ".py", ".json", ".jsonl", ".html", ".txt", ".csv")
LONGEST, MEDIAN, README_BYTES = 32, 15, 12_000


def page_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def inline(path: Path) -> list[str]:
    """Code between backticks in the text."""
    return re.findall(
        r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    )


def commands(path: Path) -> Iterator[str]:
    """Every command line: those of blocks, and those in the text that begin as one does."""
    for block in blocks(path, "bash"):
        yield from (line for line in block.replace("\\\n", " ").splitlines() if line.split("#")[0].strip())
    yield from (code for code in inline(path) if re.match(r"(bash|sbatch|\.venv/bin/\w+|[A-Z_]+=\S+ bash) \S", code))


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_every_command_names_what_is_there(path: Path) -> None:
    problems = [f"{line}: {problem}" for line in commands(path) for problem in command_problems(line)]
    assert not problems, "\n".join(problems)


def command_problems(line: str) -> Iterator[str]:
    words = [word for word in shlex.split(line, comments=True) if not word.startswith(">")]
    while re.match(r"[A-Z_]+=", words[0]):
        name, _, value = words.pop(0).partition("=")
        if name == "LCCP_EXTRAS":
            yield from (f"there is no extra {extra}" for extra in value.split(",") if extra not in extras())
    program, *rest = words
    yield from (f"there is no {word}" for word in rest if word.startswith(ROOMS) and not (ROOT / word).exists())
    name = Path(program).name
    if name == "lccp":
        yield from lccp_problems(rest)
    elif name == "torchrun" and "--module" in rest:
        yield from lccp_problems(rest[rest.index("--module") + 2 :])
    elif name in ("bash", "python", "torchrun"):
        script = next(word for word in rest if word.endswith((".sh", ".py")))
        yield from script_problems(script, rest[rest.index(script) + 1 :])
    elif name == "srun":
        yield from command_problems(shlex.join(rest[next(i for i, word in enumerate(rest) if word[0] != "-") :]))
    elif name == "sbatch":
        if not any(word.endswith(".sbatch") for word in rest):
            yield "starts no .sbatch file"
    elif name == "pip":
        yield from (f"there is no extra {extra}" for extra in re.findall(r"\[(\w+)\]", line) if extra not in extras())
    elif name == "make":
        yield from (
            f"there is no target {word}" for word in rest if f"\n{word}:" not in (ROOT / "Makefile").read_text()
        )
    elif name not in ELSEWHERE and line != "python3 -m venv reports":
        yield f"nothing here checks {name}"


def extras() -> set[str]:
    return set(re.findall(r'^        "(\w+)": ', (ROOT / "setup.py").read_text(), flags=re.MULTILINE))


def lccp_problems(words: list[str]) -> Iterator[str]:
    """What the parser of the command, and of the configuration behind it, says against the rest of a command line."""
    from megatron_lccp.cli import ARGUMENTS, COMMANDS, OPTIONS

    if not words or words[0] not in COMMANDS:
        yield f"there is no lccp {' '.join(words[:1])}"
        return
    command, rest = words[0], words[1:]
    parser = argparse.ArgumentParser(exit_on_error=False, add_help=False, allow_abbrev=False)
    for option, settings in OPTIONS.get(command, {}).items():
        parser.add_argument(option, **settings)
    parser.add_argument("--help", action="store_true")
    arguments = ARGUMENTS.get(command, {"of": {"nargs": "*"}})
    for argument, settings in arguments.items():
        parser.add_argument(argument, **settings)
    try:
        known, more = parser.parse_known_args(rest)
    except argparse.ArgumentError as error:
        yield str(error)
        return
    if command in ARGUMENTS or not known.of:
        yield from (f"lccp {command} has no option {word}" for word in more)
    else:
        yield from override_problems(known.of[0], more)


def override_problems(config: str, overrides: list[str]) -> Iterator[str]:
    """What a configuration says against overrides; one of the reader's own is taken for a copy of the small one."""
    from megatron_lccp.config.load import ConfigError, parse_config
    from megatron_lccp.parallel import compat, cpu

    compat.quiet()
    cpu.install()
    path = ROOT / config if config.startswith(ROOMS) else ROOT / "examples/tiny_moe.yaml"
    try:
        parse_config(path, overrides)
    except ConfigError as error:
        yield str(error)


def script_problems(script: str, rest: list[str]) -> Iterator[str]:
    if not (ROOT / script).is_file():
        yield f"there is no {script}"
    elif script == "tests/run.sh":
        text = "".join((ROOT / word).read_text() for word in rest if word.endswith(".py"))
        if "-k" in rest:
            wanted = re.findall(r"\w+", rest[rest.index("-k") + 1])
            yield from (
                f"no test is called {w}" for w in wanted if w != "or" and not re.search(rf"def test_\w*{w}", text)
            )
    elif script == "examples/pretrain_lccp.sh":
        config, overrides = (rest[0], rest[1:]) if rest and not rest[0].startswith("-") else ("", rest)
        yield from override_problems(config, overrides)
    else:  # an option of its own, or a field of the configuration that it takes
        text, options = (ROOT / script).read_text(), [word.split("=")[0] for word in rest if word.startswith("--")]
        config = next((word for word in rest if word.endswith(".yaml")), "")
        own = [option for option in options if f'"{option}"' in text]
        yield from override_problems(config, [w for w in rest if w.startswith("--") and w.split("=")[0] not in own])


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("bash examples/pretrain.sh", "there is no examples/pretrain.sh"),
        ("bash examples/pretrain_lccp.sh --training.stepz=3", "training.stepz"),
        ("bash tests/run.sh tests/planning/test_plan.py -k no_such_test", "no test is called no_such_test"),
        (".venv/bin/lccp reprot runs/a", "there is no lccp reprot"),
        (".venv/bin/lccp report runs/a --json", "has no option --json"),
        (".venv/bin/lccp plan examples/tiny_moe.yaml --gpu H99", "invalid choice"),
        (".venv/bin/python tools/bench_monitors.py eager --lenghts 4096", "should look like"),
        ("LCCP_EXTRAS=nothing bash tools/setup_env.sh", "there is no extra nothing"),
        ("launch_it examples/tiny_moe.yaml", "nothing here checks launch_it"),
    ],
)
def test_a_planted_mistake_in_a_command_is_found(line: str, problem: str) -> None:
    assert problem in "\n".join(command_problems(line))


@pytest.fixture(scope="module")
def own_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder on the path with the modules that the how-to pages tell the reader to write."""
    folder = tmp_path_factory.mktemp("own")
    for page, name in (("monitor", "my_monitors"), ("head_score", "my_scores"), ("source", "my_sources")):
        (folder / f"{name}.py").write_text(blocks(ROOT / f"docs/howto/{page}.md", "python")[0])
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_every_yaml_block_is_a_part_of_a_configuration(path: Path, own_modules: Path) -> None:
    from megatron_lccp.config.tree import Config
    from megatron_lccp.config.unknown import unknown_fields, wrong_values
    from megatron_lccp.parallel import compat, cpu

    compat.quiet()
    cpu.install()
    for block in blocks(path, "yaml"):
        tree = yaml.safe_load(block)
        assert [*unknown_fields(tree, Config)] == [], block
        assert [*wrong_values(tree, Config)] == [], block


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_every_python_block_compiles(path: Path) -> None:
    for block in blocks(path, "python"):
        compile(block, page_id(path), "exec")


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_every_path_and_field_in_the_text_is_there(path: Path) -> None:
    paths = [code for code in inline(path) if code.startswith(ROOMS) and " " not in code and code != WRITTEN]
    missing = [code for code in paths if "RECIPE" not in code and not (ROOT / code).exists()]
    dotted = [code for code in inline(path) if re.fullmatch(r"[a-z]+(\.\w+)+(: .*)?", code)]
    fields = [code.partition(":")[0] for code in dotted if not code.endswith(SUFFIXES)]
    assert (missing, [f for f in fields if not field_is_there(f)]) == ([], [])


def field_is_there(name: str) -> bool:
    """Whether a dotted name leads to a field of Config; what does not begin as one is something else."""
    from megatron_lccp.config.tree import Config

    kind: typing.Any = Config
    for number, part in enumerate(name.split(".")):
        origin, inner = typing.get_origin(kind), typing.get_args(kind)
        if origin is dict:
            kind = inner[1]
            continue
        hints = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        if part not in hints:
            return number == 0 or kind is typing.Any
        kind = hints[part]
    return True


def test_a_field_that_is_not_there_is_found() -> None:
    assert field_is_there("training.fp8") and field_is_there("stages.NAME.lr") and field_is_there("my_scores.Entropy")
    assert not field_is_there("training.fp16") and not field_is_there("stages.NAME.rate")


@pytest.mark.parametrize("path", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=page_id)
def test_every_link_leads_somewhere(path: Path) -> None:
    """As GitHub shows the pages; those that are generated are left to the build of the site."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        page = path.parent / name if name else path
        if "://" in target or "generated/" in name:
            continue
        if not page.exists() or (anchor and anchor not in anchors(page)):
            broken.append(target)
    assert broken == []


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def sentences(text: str) -> list[str]:
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    parts = [part for part in re.split(r"\n\s*\n|\n(?=[-*|#0-9])", text) if not part.lstrip().startswith("|")]
    return [s for part in parts for s in re.split(r"(?<=[.!?:])\s+", " ".join(part.split())) if s]


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_sentences_are_short(path: Path) -> None:
    counts = {sentence: len(sentence.split()) for sentence in sentences(path.read_text(encoding="utf-8"))}
    assert [s for s, n in counts.items() if n > LONGEST] == []
    assert statistics.median(counts.values()) <= MEDIAN


def test_the_readme_is_short_and_has_its_two_commands() -> None:
    text = (ROOT / "README.md").read_bytes()
    assert len(text) <= README_BYTES
    assert b"\nbash examples/pretrain_lccp.sh " in text and b"\nbash tests/run.sh " in text


def test_every_page_is_in_the_menu() -> None:
    listed = set(re.findall(r"^([a-z0-9_/]+)$", (ROOT / "docs/index.md").read_text(), flags=re.MULTILINE))
    there = {p.relative_to(ROOT / "docs").with_suffix("").as_posix() for p in PAGES[1:]} - {"index"}
    assert there == {name for name in listed if not name.startswith("generated/")}


def test_every_field_has_a_text_for_the_reference() -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        from docs_reference import field_texts
    finally:
        sys.path.pop(0)
    from megatron_lccp.config import tree
    from megatron_lccp.parallel import compat, cpu

    compat.quiet()
    cpu.install()
    from megatron_lccp import monitors
    from megatron_lccp.data import sources
    from megatron_lccp.schema import Every, Metric, Row

    kinds = [Every, Metric, Row, *(getattr(p, name) for p in (monitors, sources) for name in p.__all__)]
    kinds += [kind for kind in vars(tree).values() if dataclasses.is_dataclass(kind) and isinstance(kind, type)]
    silent = [
        f"{kind.__name__}.{field.name}" for kind in kinds for field in dataclasses.fields(kind)
        if field.init and not field_texts(kind).get(field.name)
    ]  # fmt: skip
    assert silent == []


def test_the_reference_is_the_same_at_each_build() -> None:
    """Defaults that are functions or objects are shown without where they lie in memory."""
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        from docs_reference import measuring
    finally:
        sys.path.pop(0)
    from megatron_lccp.parallel import compat, cpu

    compat.quiet()
    cpu.install()
    text = "\n".join(measuring())
    assert "default `a function`" in text and "default `NoJournal()`" in text
    assert not re.findall(r" at 0x[0-9a-f]+", text)


def test_the_scripts_of_the_reference_have_a_header() -> None:
    tree = ast.parse((ROOT / "tools/docs_reference.py").read_text())
    (scripts,) = (
        ast.literal_eval(node.value) for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SCRIPTS"
    )  # fmt: skip
    assert all((ROOT / path).read_text().splitlines()[1].startswith("# ") for path in scripts)
