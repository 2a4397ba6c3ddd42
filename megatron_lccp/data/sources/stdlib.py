"""The standard library of the running Python as documents.

In: the fields of a source. Out: modules or whole packages, the same ones in the same order every time.
"""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_lccp.config.tree import Document, Source

TEST_DIRS = {"test", "tests", "idle_test"}
# Installed packages, tables that are no code, and what holds paths of the machine.
SKIPPED_DIRS = {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")
FILE_HEADER = "# file: "


@dataclass(frozen=True)
class PythonStdlib(Source):
    """The standard library of the running Python, as files (short documents) or as whole packages (long ones).

    Each module follows a line `# file: package/module.py`. A package is kept on one side of the held-out split in both
    grains. Packages come in a scattered but fixed order, so that `max_bytes` takes a fair sample of them.
    """

    grain: Literal["file", "package"] = "file"
    """file: each module is a document. package: the modules of each package joined."""
    max_bytes: int | None = None
    """Stop with the document that reaches this many bytes; null: everything."""
    min_bytes: int = 0
    """Documents with fewer bytes are left out."""
    document_bytes: int = 400_000
    """A package with more bytes than this is cut between modules into several documents."""
    tests: bool = False
    """Take the modules of test directories too; they are more than half of the library."""

    def __post_init__(self) -> None:
        if (self.max_bytes is not None and self.max_bytes < 1) or self.min_bytes < 0 or self.document_bytes < 1:
            raise ValueError(
                "max_bytes, min_bytes and document_bytes: should be at least 1, 0 and 1, are "
                f"{self.max_bytes}, {self.min_bytes} and {self.document_bytes}"
            )

    def documents(self, vocab_size: int) -> Iterator[str]:
        taken = 0
        for group, paths in sorted(self._groups().items(), key=lambda item: _scattered(item[0])):
            for text in self._joined(paths):
                size = len(text.encode())
                if size < self.min_bytes:
                    continue
                yield text
                taken += size
                if self.max_bytes is not None and taken >= self.max_bytes:
                    return

    def split_key(self, document: Document) -> str:
        assert isinstance(document, str), "a document is modules"
        return _group(document[len(FILE_HEADER) : document.index("\n")])

    def inputs(self) -> str:
        return f"Python {sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"

    def _groups(self) -> dict[str, list[str]]:
        """Package or lone module -> its files, relative to the library; lone modules make no package."""
        groups: dict[str, list[str]] = {}
        root = sysconfig.get_paths()["stdlib"]
        skipped = SKIPPED_DIRS if self.tests else SKIPPED_DIRS | TEST_DIRS
        for folder, subfolders, files in os.walk(root):
            subfolders[:] = [d for d in subfolders if d not in skipped and not d.startswith(SKIPPED_PREFIXES)]
            for file in files:
                if file.endswith(".py") and not file.startswith(SKIPPED_PREFIXES):
                    path = Path(folder, file).relative_to(root).as_posix()
                    groups.setdefault(_group(path), []).append(path)
        return {g: sorted(paths) for g, paths in groups.items() if self.grain == "file" or len(paths) > 1}

    def _joined(self, paths: list[str]) -> Iterator[str]:
        parts: list[str] = []
        size = 0
        for path in paths:
            try:
                text = Path(sysconfig.get_paths()["stdlib"], path).read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            if not text.strip() or "\0" in text:
                continue
            part = f"{FILE_HEADER}{path}\n{text.rstrip()}\n"
            part_bytes = len(part.encode())
            if parts and (self.grain == "file" or size + part_bytes > self.document_bytes):
                yield "".join(parts)
                parts, size = [], 0
            parts.append(part)
            size += part_bytes
        if parts:
            yield "".join(parts)


def _group(path: str) -> str:
    """asyncio/base_events.py -> asyncio, abc.py -> abc, test/test_json/test_dump.py -> test/test_json."""
    parts = path.removesuffix(".py").split("/")
    return "/".join(parts[:2] if parts[0] in TEST_DIRS else parts[:1])


def _scattered(group: str) -> bytes:
    return hashlib.sha256(f"order of {group}".encode()).digest()
