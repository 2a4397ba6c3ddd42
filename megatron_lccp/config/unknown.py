"""Fields of a YAML tree that nothing reads, each by its place with the field that was probably meant; and values that
the parser refuses, each by its place, for the parser (see `load`) does not say in which stage or monitor one is.

In: nested dicts and lists as YAML gives them, and the dataclass they describe. Out: one line a problem.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from megatron_lccp.config.classes import closest, find_class
from megatron_lccp.config.tree import Source
from megatron_lccp.schema import Monitor

WORDS = {
    int: "be a whole number", float: "be a number", str: "be a text", bool: "be true or false",
    list: "be a list", tuple: "be a list", dict: "hold `field: value` lines",
}  # fmt: skip
"""What a value should do to be of a type."""


def unknown_fields(tree: Any, kind: Any, path: str = "") -> Iterator[str]:
    """Every key under `path` that is no field of `kind`, a dataclass or a container of some, what is no mapping, and
    what is empty, which the parser would take for any type."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if tree is None:
        if kind not in (None, Any, type(None)) and type(None) not in inner:
            yield f"{path}: is empty; give it a value, or leave the line out"
        return
    if origin in (typing.Union, types.UnionType):
        for one in inner:
            yield from unknown_fields(tree, one, path)
    elif origin is dict and isinstance(tree, dict):
        for name, value in tree.items():
            if not isinstance(name, str):
                yield f"{path}.{name}: is not text in YAML; put it in quotes"
            elif not name.isprintable():  # a control character, or one that turns the writing round
                yield f"{path}: {name!r} has a character that cannot be seen; give it another name"
                continue
            yield from unknown_fields(value, inner[1], f"{path}.{name}")
    elif origin in (list, tuple) and isinstance(tree, list):
        for number, value in enumerate(tree):
            yield from unknown_fields(value, inner[0], f"{path}.{number}")
    elif kind in (Source, Monitor):
        yield from _of_a_class(tree, kind, path)
    elif isinstance(kind, type) and dataclasses.is_dataclass(kind):
        yield from _of_a_dataclass(tree, kind, path)


def _of_a_dataclass(tree: Any, kind: type, path: str) -> Iterator[str]:
    known = [field.name for field in dataclasses.fields(kind) if field.init]
    yield from _not_among(tree, known, kind, path)
    try:
        hints = typing.get_type_hints(kind)
    except NameError:  # a user's class that imports its types for type checkers alone; the parser says the rest
        return
    for name in [name for name in known if isinstance(tree, dict) and name in tree]:
        yield from unknown_fields(tree[name], hints[name], f"{path}.{name}".lstrip("."))


def _of_a_class(tree: Any, base: type, path: str) -> Iterator[str]:
    """An entry `{class_path: package.Class, init_args: {...}}`, which may be of the user's own class or a shipped one."""
    yield from _not_among(tree, ["class_path", "init_args"], base, path)
    if not isinstance(tree, dict):
        return
    if not isinstance(name := tree.get("class_path"), str):
        yield f"{path}.class_path: should name a class as package.module.Class, is {name!r}"
        return
    try:
        kind = find_class(name, base)
    except ValueError as error:
        yield f"{path}.class_path: {error}"
    else:
        if isinstance(kind, type) and dataclasses.is_dataclass(kind) and tree.get("init_args") is not None:
            yield from _of_a_dataclass(tree["init_args"], kind, f"{path}.init_args")


def _not_among(tree: Any, known: Sequence[str], kind: type, path: str) -> Iterator[str]:
    if not isinstance(tree, dict):
        yield f"{path}: should hold `field: value` lines, is {tree!r}"
        return
    for key in map(str, tree):
        if key not in known:
            yield f"{path}.{key}: is not a field of {kind.__name__}{closest(key, known)}".lstrip(".")


def wrong_values(tree: Any, kind: Any, path: str = "") -> Iterator[str]:
    """Every value under `path` that the parser refuses, and, where all values inside are taken, what the class itself
    says against them. It parses each part alone: for a tree that has no unknown fields and was refused as a whole."""
    options = [one for one in typing.get_args(kind) if one is not type(None)]
    if typing.get_origin(kind) in (typing.Union, types.UnionType) and len(options) == 1:
        kind = kind if tree is None else options[0]
    inside = list(_inside(tree, kind, path))
    if found := [line for part in inside for line in wrong_values(*part)]:
        yield from found
    elif path and (reason := _refused(tree, kind)):
        origin, words = typing.get_origin(kind), WORDS.get(typing.get_origin(kind) or kind)
        if origin is typing.Literal:
            words = f"be one of {', '.join(map(str, typing.get_args(kind)))}"
        yield f"{path}: should {words}, is {tree!r}" if words and not inside else f"{path}: {reason}"


def _inside(tree: Any, kind: Any, path: str) -> Iterator[tuple[Any, Any, str]]:
    """(value, type, path) of what a container or dataclass holds."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is dict and isinstance(tree, dict):
        yield from ((value, inner[1], f"{path}.{name}") for name, value in tree.items())
    elif isinstance(tree, list) and (origin is list or (origin is tuple and inner[-1] is Ellipsis)):
        yield from ((value, inner[0], f"{path}.{number}") for number, value in enumerate(tree))
    elif kind in (Source, Monitor) and isinstance(tree, dict):
        yield from _inside(tree.get("init_args"), find_class(tree["class_path"], kind), f"{path}.init_args")
    elif isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(tree, dict):
        try:
            hints = typing.get_type_hints(kind)
        except NameError:  # as above
            return
        yield from ((value, hints[name], f"{path}.{name}".lstrip(".")) for name, value in tree.items())


def _refused(value: Any, kind: Any) -> str:
    """Why the parser, or the class that it makes, does not take this value; empty if it does."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    try:
        parser.instantiate(parser.parse_object({"value": value}))
    except (ArgumentError, TypeError, ValueError) as error:
        return " ".join(str(error).removeprefix('Parser key "value": ').split())
    return ""
