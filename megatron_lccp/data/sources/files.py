"""The user's own files as documents.

In: a pattern of files. Out: the text of each, or of each JSON line.
"""

from __future__ import annotations

import glob as globbing
import gzip
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_lccp.config.tree import Source


@dataclass(frozen=True)
class TextFiles(Source):
    """Your own UTF-8 text files, each a document."""

    glob: str = ""
    """Pattern of the files, for instance books/**/*.txt; relative to where the command runs."""

    def documents(self, vocab_size: int) -> Iterator[str]:
        for path in _matching("TextFiles", self.glob):
            try:
                yield Path(path).read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: is not UTF-8 text (byte {error.start})") from error

    def inputs(self) -> str:
        return _state_of_files(_matching("TextFiles", self.glob))


@dataclass(frozen=True)
class JsonLines(Source):
    """Your own JSON lines, plain or .gz; each line is an object with the text of a document in one field."""

    glob: str = ""
    """Pattern of the files, for instance crawl/*.jsonl.gz; relative to where the command runs."""
    field: str = "text"
    """Field of the text."""

    def documents(self, vocab_size: int) -> Iterator[str]:
        for path in _matching("JsonLines", self.glob):
            opener = gzip.open if path.endswith(".gz") else open
            with opener(path, "rb") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield self._text(f"{path}:{number}", line)

    def inputs(self) -> str:
        return _state_of_files(_matching("JsonLines", self.glob))

    def _text(self, where: str, line: bytes) -> str:
        try:
            text = json.loads(line)[self.field]
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where}: field {self.field!r} has half of a surrogate pair, which is no text") from error
        except ValueError as error:
            raise ValueError(f"{where}: is not a JSON object: {error}") from error
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{where}: has no text in field {self.field!r}") from error
        return text


def _matching(source: str, pattern: str) -> list[str]:
    paths = sorted(path for path in globbing.glob(pattern, recursive=True) if os.path.isfile(path))
    if not paths:
        raise ValueError(f"{source}.glob: {pattern!r} matches no file")
    return paths


def _state_of_files(paths: list[str]) -> str:
    """Hash of names, sizes and times of change: quick, and different once a file was replaced."""
    states = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths]
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()
