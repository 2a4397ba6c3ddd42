"""The classes that a configuration names by `class_path`.

In: a dotted path, or the short name under which an installed package ships a class. Out: the class, and the dotted path
that is recorded of it, so that what is recorded says the same wherever the class lies and whichever name was written.
A package ships a class by an entry point: a line of its metadata, in the group of GROUPS, that gives the class a name.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import pkgutil
import sys
import typing
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from megatron_lccp.config.tree import Source
from megatron_lccp.schema import Monitor

GROUPS: dict[type, str] = {Source: "megatron_lccp.sources", Monitor: "megatron_lccp.monitors"}
"""Base class -> the group of entry points in which packages ship classes of it."""

FEW = 20
"""So many names are listed where none is close."""


def closest(name: str, known: Sequence[str]) -> str:
    """The end of a line that says that `name` is unknown: what was probably meant, or what there is if that is few."""
    if close := difflib.get_close_matches(name, known, 1):
        return f"; did you mean {close[0]}?"
    return f"; there are {', '.join(known)}" if 0 < len(known) <= FEW else ""


def find_class(name: str, base: type) -> Any:
    """What `name` stands for: a dotted path as package.module.Class, or the short name of a class that an installed
    package ships or that is imported already.

    Raises ValueError in one line with the remedy for what is unknown, cannot be imported, is there twice, or is shipped
    and no `base`.
    """
    if "." in name:
        found = _at_path(name)
    elif points := shipped(base).get(name):
        found = _loaded(points, base)
    else:
        found = _imported(name, base)
    if isinstance(found, type):
        settle_types(found)
    return found


def settle_types(kind: type) -> None:
    """Put types in place of the names of types in the signature of a dataclass, for the parser.

    It would look up all of them in the class's own module, where those of fields that a base has need not be known.
    """
    if not dataclasses.is_dataclass(kind):
        return
    try:
        hints = typing.get_type_hints(kind)
    except NameError:  # a class that imports its types for type checkers alone
        return
    written = kind.__init__.__annotations__
    written.update({name: hints[name] for name in written.keys() & hints.keys()})


def public_path(kind: type) -> str:
    """The shortest dotted path that leads to a class: where YAML names it, in whichever file it lies."""
    parts, name = kind.__module__.split("."), kind.__qualname__
    packages = (".".join(parts[: n + 1]) for n in range(len(parts)))
    found = (p for p in packages if getattr(sys.modules.get(p), name, None) is kind)
    return f"{next(found, kind.__module__)}.{name}"


def shipped(base: type) -> dict[str, list[EntryPoint]]:
    """Short name -> entry points of that name, by name; more than one where several packages took the same."""
    found: dict[str, list[EntryPoint]] = {}
    for point in sorted(entry_points(group=GROUPS[base]), key=lambda point: (point.name, package_of(point))):
        found.setdefault(point.name, []).append(point)
    return found


def package_of(point: EntryPoint) -> str:
    """Name of the installed package that an entry point is of."""
    return point.dist.name if point.dist else "?"


def _at_path(name: str) -> Any:
    try:
        return pkgutil.resolve_name(name)
    except AttributeError as error:
        raise ValueError(f"{error}{closest(error.name or '', dir(error.obj))}") from error
    except Exception as error:  # importing runs a module of the user's
        remedy = "; put its folder into PYTHONPATH" if isinstance(error, ModuleNotFoundError) else ""
        raise ValueError(f"{name!r} cannot be imported: {_one_line(error)}{remedy}") from error


def _imported(name: str, base: type) -> type:
    """The one class of a name among the imported ones that derive from `base`."""
    every: set[type] = set()
    left = [base]
    while left:
        new: set[type] = {*left.pop().__subclasses__()} - every
        left += new
        every |= new
    found = sorted((kind for kind in every if kind.__name__ == name), key=public_path)
    if len(found) > 1:
        raise ValueError(f"{name!r} is the name of several classes; write {' or '.join(map(public_path, found))}")
    if not found:
        text = f"{name!r} is shipped by no installed package; write the path of the class as package.module.Class"
        known = {kind.__name__ for kind in every if not inspect.isabstract(kind) and not kind.__name__.startswith("_")}
        raise ValueError(text + closest(name, [*shipped(base), *sorted(known)]))
    return found[0]


def _loaded(points: Sequence[EntryPoint], base: type) -> type:
    point, package = points[0], package_of(points[0])
    if len(points) > 1:
        packages = " and ".join(dict.fromkeys(map(package_of, points)))
        paths = " or ".join(dict.fromkeys(p.value.replace(":", ".") for p in points))
        raise ValueError(f"{point.name!r} is shipped twice, by {packages}; write {paths}, or uninstall one")
    try:
        kind = point.load()
    except Exception as error:
        text = f"{point.name!r} of the package {package} cannot be imported ({point.value}): {_one_line(error)}"
        raise ValueError(f"{text}; install what it needs, or another version of {package}") from error
    if not (isinstance(kind, type) and issubclass(kind, base)):
        what = f"{point.name!r} of the package {package} ({point.value})"
        raise ValueError(
            f"{what} is no class that derives from {base.__name__}; ask {package} to correct its entry point"
        )
    return kind


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, (ImportError, ValueError)) and text else f"{type(error).__name__}: {text}"
