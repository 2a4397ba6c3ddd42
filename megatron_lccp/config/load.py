"""YAML and dotted overrides -> Config, and back.

In: a YAML file and arguments such as `--training.steps=50`. Out: a checked `Config`, its resolved YAML, its hash.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import SUPPRESS, ArgumentError, ArgumentParser, set_parsing_settings

from megatron_lccp.config.classes import find_class, public_path, settle_types
from megatron_lccp.config.renamed import take_old_names
from megatron_lccp.config.rules import config_problems
from megatron_lccp.config.tree import Config, Source
from megatron_lccp.config.unknown import unknown_fields, wrong_values
from megatron_lccp.files import one_line
from megatron_lccp.schema import Monitor

# Read the string under each field, so that it becomes the help text.
set_parsing_settings(docstring_parse_attribute_docstrings=True)

# Where results go, how often they are saved, who hears of them, when the run ends and how the work is laid out do not
# change what is computed.
NOT_IN_HASH = ("dir", "wandb", "checkpoint", "parallel", "events", "stop_when")
NOT_IN_HASH_OF_TRAINING = (
    "steps", "log_every", "health_every", "loss_chunk_tok", "stop_within_s", "stall_steps", "stall_s"
)  # fmt: skip

# Fields that came later: where they have the value by which all is as before, hashes are as before too.
LATER_FIELDS: dict[str, dict[str, Any]] = {
    "data.tokenizer": {"bos": "none", "bos_in_documents": False},
    "model": {"config": None},
    "stages.*": {"goes_on_from": None, "yarn": None, "pack": None, "masks": "none"},
}

ROPE_BASE = 10_000.0
"""Of a stage that names none, where no config.json does."""
MOST_BYTES = 1 << 24
"""Of a configuration file; a device has no end."""
MOST_SHOWN = 60
"""Letters of a value that changed which a line shows."""
MOST_CHANGES = 12
"""Changes that a line shows."""


class ConfigError(ValueError):
    """A configuration that cannot run; its text lists every problem found, one a line."""

    def __init__(self, source: str, problems: Sequence[str]):
        super().__init__("\n".join(one_line(f"{source}: {problem}") for problem in problems))


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 and 200e9 as text; people write them as numbers, 200e9 tokens as a whole one.

    And of a field that is given twice PyYAML would take the last without a word.
    """

    # The stub takes an anchor, which is a name or None, for the table of all anchors.
    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:  # type: ignore[override]  # see above
        node, seen = super().compose_mapping_node(anchor), set()  # type: ignore[arg-type]  # see above
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return node


def _scientific(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    number = float(loader.construct_scalar(node))
    return int(number) if number.is_integer() else number


_Loader.add_implicit_resolver("!scientific", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))
_Loader.add_constructor("!scientific", _scientific)


def config_parser() -> ArgumentParser:
    """The parser that knows every field of Config."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Config, as_group=False)
    return parser


def fields_help(kind: type) -> str:
    """The help text of one dataclass, without a usage line and without options that are jsonargparse's own."""
    settle_types(kind)
    parser = ArgumentParser(usage="", add_help=False)
    parser.add_class_arguments(kind, as_group=False)
    for action in parser._actions:
        if action.option_strings[0].endswith(".help") or action.help == "Path to a configuration file.":
            action.help = SUPPRESS
    return parser.format_help().partition("options:\n")[2].rstrip()


def parse_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `--key.of.field=value` overrides, check the whole. Raises ConfigError."""
    return _parse(path, overrides, say=_warn)


def _parse(path: str | Path, overrides: Sequence[str], say: Callable[[str], None]) -> Config:
    tree = read_yaml(Path(path))
    for override in overrides:
        _override(tree, override)
    take_old_names(tree, say)
    if problems := list(unknown_fields(tree, Config)):
        raise ConfigError(str(path), problems)
    _spell_out(tree)
    _whole_every(tree)
    try:
        parser = config_parser()
        config = Config(**vars(parser.instantiate(parser.parse_object(deepcopy(tree), defaults=True))))
    except (ArgumentError, TypeError, ValueError) as error:
        wrong = list(wrong_values(tree, Config))
        raise ConfigError(str(path), wrong or [" ".join(str(error).split())]) from error
    if config.model.config is None:  # as it was before a model could say it
        stages = {
            name: stage if stage.rope_base is not None else dataclasses.replace(stage, rope_base=ROPE_BASE)
            for name, stage in config.stages.items()
        }
        config = dataclasses.replace(config, stages=stages)
    if problems := config_problems(config):
        raise ConfigError(str(path), problems)
    return config


def load_monitors(path: str | Path) -> list[Monitor]:
    """The `monitors:` list of a YAML file, for a loop that has no Config of ours. Raises ConfigError."""
    tree = read_yaml(Path(path))
    if unknown := sorted(tree.keys() - {"monitors"}):
        raise ConfigError(str(path), [f"{unknown[0]}: is not read here; the file should hold `monitors:` alone"])
    take_old_names(tree, say=_warn)
    if problems := list(unknown_fields(tree.get("monitors"), list[Monitor], "monitors")):
        raise ConfigError(str(path), problems)
    _spell_out(tree)
    _whole_every(tree)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--monitors", type=list[Monitor])
    try:
        monitors = parser.instantiate(parser.parse_object(deepcopy(tree))).monitors
    except (ArgumentError, TypeError, ValueError) as error:
        wrong = list(wrong_values(tree["monitors"], list[Monitor], "monitors"))
        raise ConfigError(str(path), wrong or [" ".join(str(error).split())]) from error
    if not monitors:
        raise ConfigError(str(path), ["monitors: is empty; name at least one"])
    return monitors


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds, numbers such as 200e9 as numbers. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ConfigError(str(path), [f"has more than {MOST_BYTES:,} bytes, as no configuration has; name another"])
        tree = yaml.load(content.decode("utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be read: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), [f"is not UTF-8 text ({error}); save it as that"]) from error
    except ConfigError:
        raise
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:
        raise ConfigError(str(path), [f"is not YAML: {' '.join(str(error).split())}"]) from error
    if not isinstance(tree, dict):
        raise ConfigError(str(path), ["should hold `field: value` lines"])
    return tree


def _spell_out(tree: dict[str, Any]) -> None:
    """Short names of classes become dotted paths; for a tree without unknown fields."""
    sources, monitors = tree.get("data", {}).get("sources", {}), tree.get("monitors", ())
    own = sources.values() if isinstance(sources, dict) else ()
    for base, entries in ((Source, own), (Monitor, monitors if isinstance(monitors, list) else ())):
        for entry in entries:
            if "." not in entry["class_path"]:
                entry["class_path"] = public_path(find_class(entry["class_path"], base))


def _warn(text: str) -> None:
    """One line on stderr, from one rank."""
    if os.environ.get("RANK", "0") == "0":
        print(f"lccp: {text}", file=sys.stderr, flush=True)


def _whole_every(tree: dict[str, Any]) -> None:
    """`every: {tokens: 1e9}` is all of it: jsonargparse would add the steps of a monitor's default."""
    entries = tree.get("monitors")
    for entry in entries if isinstance(entries, list) else ():
        fields = entry.get("init_args") if isinstance(entry, dict) else None
        if isinstance(fields, dict) and isinstance(fields.get("every"), dict):
            fields["every"] = {"steps": None, "tokens": None, **fields["every"]}


def _override(tree: dict[str, Any], override: str) -> None:
    """Set `--stages.lccp.tokens=1e6` or `--monitors.0.init_args.samples=4` in the tree of a YAML file."""
    key, equals, text = override.removeprefix("--").partition("=")
    if not override.startswith("--") or not equals:
        raise ConfigError("command line", [f"{override!r} should look like --training.steps=50"])
    *parents, last = key.split(".")
    node: Any = tree
    try:
        for name in parents:
            node = node[int(name)] if isinstance(node, list) else node.setdefault(name, {})
        node[int(last) if isinstance(node, list) else last] = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError("command line", [f"--{key}: {text!r} is not YAML: {reason}"]) from error
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise ConfigError("command line", [f"--{key}: there is no such field to set to {text!r}"]) from error


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML that `parse_config` reads back to an equal Config."""
    return yaml.safe_dump(as_tree(config), sort_keys=False, width=120)


def config_hash(config: Config) -> str:
    """12 hex digits that are equal for runs that compute the same thing (see NOT_IN_HASH)."""
    return hashlib.sha256(json.dumps(_computed(as_tree(config)), sort_keys=True).encode()).hexdigest()[:12]


def _computed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration's tree that decides what is computed."""
    tree = {key: value for key, value in tree.items() if key not in NOT_IN_HASH}
    if isinstance(training := tree.get("training"), dict):
        tree["training"] = {key: value for key, value in training.items() if key not in NOT_IN_HASH_OF_TRAINING}
    for path, fields in LATER_FIELDS.items():
        tree = _without(tree, path.split("."), fields)
    return tree


def _without(tree: dict[str, Any], path: Sequence[str], fields: Mapping[str, Any]) -> dict[str, Any]:
    """A tree without those of the `fields` under a path (`*`: every name) that have these values."""
    if not path:
        return {key: value for key, value in tree.items() if fields.get(key, _ABSENT) != value}
    return {
        key: _without(value, path[1:], fields) if path[0] in ("*", key) and isinstance(value, dict) else value
        for key, value in tree.items()
    }


def recorded_config(recorded: Path) -> Config | None:
    """A resolved YAML file as this version takes it: fields by their names of now, those that are new since with their
    defaults, classes by the paths that lead to them. None if it cannot be read, or this version does not take it."""
    try:
        return _parse(recorded, (), say=lambda line: None)
    except ConfigError:
        return None


def changed_fields(recorded: Path, config: Config) -> list[str]:
    """Fields that matter to what is computed and differ from a resolved YAML file, each as `path.of.field: old -> new`;
    none if it cannot be read."""
    before = recorded_config(recorded)
    try:
        tree = read_yaml(recorded) if before is None else as_tree(before)
    except ConfigError:
        return []
    take_old_names(tree)
    return list(_leaf_changes("", _computed(tree), _computed(as_tree(config))))


def changes_text(changes: Sequence[str]) -> str:
    """What `changed_fields` found, as a part of one line."""
    more = f"; and {len(changes) - MOST_CHANGES} more" if len(changes) > MOST_CHANGES else ""
    return "; ".join(changes[:MOST_CHANGES]) + more


_ABSENT = object()


def _leaf_changes(path: str, old: Any, new: Any) -> Iterator[str]:
    if isinstance(old, list) and isinstance(new, list):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, dict) and isinstance(new, dict):
        for key in (*new, *(key for key in old if key not in new)):
            yield from _leaf_changes(
                f"{path}.{key}" if path else str(key), old.get(key, _ABSENT), new.get(key, _ABSENT)
            )
    elif old is _ABSENT or old != new:
        yield f"{path}: {_leaf_text(old)} -> {_leaf_text(new)}"


def _leaf_text(value: Any) -> str:
    if value is _ABSENT:
        return "(not there)"
    if isinstance(value, dict) and "class_path" in value:
        return str(value["class_path"]).rpartition(".")[2]
    text = json.dumps(value, default=str)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def as_tree(value: Any) -> Any:
    """Dataclasses -> nested dicts; sources and monitors as class_path and init_args."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: as_tree(getattr(value, f.name)) for f in dataclasses.fields(value)}
        module = type(value).__module__
        if module.startswith(("megatron_lccp.config.tree", "megatron_lccp.schema")):
            return fields
        return {"class_path": public_path(type(value)), "init_args": fields}
    if isinstance(value, (list, tuple)):
        return [as_tree(item) for item in value]
    if isinstance(value, dict):
        return {key: as_tree(item) for key, item in value.items()}
    return value
