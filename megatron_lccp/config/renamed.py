"""Fields of monitors by the names that earlier versions gave them.

In: nested dicts and lists as YAML gives them, of a user's file or of the configuration that an older run recorded. Out:
the same with the names of now, and a line for each that was taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_lccp.config.classes import find_class
from megatron_lccp.schema import Monitor


def take_old_names(tree: dict[str, Any], say: Callable[[str], None] = lambda line: None) -> None:
    """Rename, in place, the fields of monitors whose class says that they had another name (`Monitor.renamed`).

    A field that is given by both names stays, and so does what is wrong with an entry: others say that.
    """
    entries = tree.get("monitors")
    for number, entry in enumerate(entries if isinstance(entries, list) else ()):
        fields = entry.get("init_args") if isinstance(entry, dict) else None
        if not isinstance(fields, dict):
            continue
        for old, new in _renamed(entry.get("class_path")).items():
            if old in fields and new not in fields:
                entry["init_args"] = fields = {new if key == old else key: value for key, value in fields.items()}
                say(f"monitors.{number}.init_args.{old}: is called {new} now; taken as that")


def _renamed(path: Any) -> dict[str, str]:
    """What the class of a `class_path` says; nothing if there is none, which is said elsewhere."""
    try:
        kind = find_class(path, Monitor) if isinstance(path, str) else None
    except ValueError:
        return {}
    return dict(kind.renamed) if isinstance(kind, type) and issubclass(kind, Monitor) else {}
