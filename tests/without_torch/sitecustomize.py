"""Refuses torch, Megatron-Core and what knows them, in every Python that starts with this folder in PYTHONPATH.

tests/conftest.py puts it there around tests of WITHOUT_TORCH, and refuses the same in its own process.
"""

from __future__ import annotations

import sys
from typing import Any

TORCH = {"torch", "megatron", "transformer_engine", "apex"}
PAPER = {
    "",
    "schema",
    "text",
    "processes",
    "files",
    "lock",
    "config",
    "records",
    "analysis",
}  # as in tests/test_import_law.py
COMMANDS = {"cli", *(f"commands{x}" for x in ("", ".parser", ".sinks", ".wandb_log", ".wandb_sink"))}
"""What loads the rest when it is called."""


def is_refused(name: str) -> bool:
    """Whether a module is torch or Megatron-Core, a room of ours that knows them, or what starts ranks for a test."""
    top, *rest = name.split(".")
    if top == "megatron_lccp":
        return ".".join(rest[: 2 if rest[:1] == ["commands"] else 1]) not in PAPER | COMMANDS
    return top in TORCH or (top, *rest[:1]) == ("tests", "distributed")


class Refuse:
    """Of the finders of modules the first: it finds none, and lets no other find one that is refused."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if is_refused(name):
            raise ImportError(f"{name} is not for a test in this folder; see WITHOUT_TORCH in tests/conftest.py")


if __name__ == "sitecustomize":
    sys.meta_path.insert(0, Refuse())
