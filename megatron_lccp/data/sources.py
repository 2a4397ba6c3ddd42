"""Where documents come from: the standard library, generated ones, the user's own files.

In: the fields of a source. Out: `documents(vocab_size)`, the same documents in the same order every time, as text or as
token ids. A source of your own is a frozen dataclass deriving from `config.tree.Source` with that one method. Two more
are optional: `split_key(document) -> str`, where documents with equal keys must stay on one side of the held-out split
(otherwise only equal documents do), and `inputs() -> str`, which changes when what it reads has changed.
"""

from __future__ import annotations

import glob as globbing
import gzip
import hashlib
import json
import os
import random
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_lccp.config.tree import Source
from megatron_lccp.data.facts import ATTRIBUTES, WORDS, Fact, Language, Style, draw_name, person_fact, question_text
from megatron_lccp.data.tokenizer import FIRST_ORDINARY_ID

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
    """Stop with the document that reaches this many bytes; None takes everything."""
    min_bytes: int = 0
    """Documents with fewer bytes are left out."""
    document_bytes: int = 400_000
    """A package with more bytes than this is cut between modules into several documents."""
    tests: bool = False
    """Take the modules of test directories too; they are more than half of the library."""

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

    def split_key(self, document: str) -> str:
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


@dataclass(frozen=True)
class Biographies(Source):
    """Documents of short biographies of invented people, and questions whose answers repeat a sentence of them.

    A person is a paragraph: an opening sentence, then one sentence for each attribute in a drawn order. A question
    about a person of the document is `Question: What is the hobby of NAME?` and, on the next line, `Answer: ` with the
    very sentence. No name is one that a needle uses.
    """

    count: int = 1000
    """How many documents."""
    people_per_document: int = 10
    """Biographies in one document, about 110 tokens each."""
    questions_per_document: int = 4
    """Questions in one document."""
    questions_at: Literal["end", "anywhere"] = "end"
    """end: after the last biography. anywhere: each after a drawn biography, about a person before it."""
    seed: int = 0
    """Another seed gives other people."""
    language: Language = "en"
    """en: English. zh: Chinese."""
    style: Style = "standard"
    """standard: one sentence per attribute. paraphrase: one of several. pronoun: people speak of themselves."""

    def documents(self, vocab_size: int) -> Iterator[str]:
        for index in range(self.count):
            yield self._document(random.Random(f"biographies/{self.seed}/{index}"))

    def _document(self, rng: random.Random) -> str:
        words = WORDS[self.language]
        people: dict[str, list[Fact]] = {}
        while len(people) < self.people_per_document:
            name = draw_name(rng, False, self.language)
            attributes = rng.sample(ATTRIBUTES, len(ATTRIBUTES))
            people[name] = [
                person_fact(name, attribute, rng, self.language, self.style, turn=len(people) + place)
                for place, attribute in enumerate(attributes)
            ]
        asked: dict[int, list[Fact]] = {}
        last = len(people) - 1
        for _ in range(self.questions_per_document):
            after = last if self.questions_at == "end" else rng.randint(0, last)
            asked.setdefault(after, []).append(rng.choice(list(people.values())[rng.randint(0, after)]))
        text = ""
        for index, (name, facts) in enumerate(people.items()):
            text += "\n" if text else ""
            text += words.SPACE.join([words.OPENING.format(name=name)] + [fact.sentence for fact in facts])
            text += "".join(question_text(fact) + words.SPACE + fact.sentence for fact in asked.get(index, []))
        return text + "\n"


@dataclass(frozen=True)
class RepeatedSegments(Source):
    """Token ids: random segments that come back within the document, which teach a model to copy (induction).

    Each segment is new or one of the document's earlier ones; with few new ones almost every token can be copied.
    """

    count: int = 200
    """How many documents."""
    length_tok: int = 4096
    """Tokens of a document, without the end token."""
    segment_tok_min: int = 8
    """Tokens of the shortest segment."""
    segment_tok_max: int = 64
    """Tokens of the longest segment."""
    new_share: float = 0.5
    """Chance of a segment to be new; the first of a document always is."""
    first_id: int = FIRST_ORDINARY_ID
    """Ids from this on are drawn; the default leaves out special tokens and bytes of a tokenizer trained here."""
    seed: int = 0
    """Another seed gives other segments."""

    def documents(self, vocab_size: int) -> Iterator[list[int]]:
        if not 0 < self.segment_tok_min <= self.segment_tok_max:
            raise ValueError(f"RepeatedSegments.segment_tok_min: {self.segment_tok_min} should be 1..segment_tok_max")
        if self.first_id >= vocab_size:
            raise ValueError(f"RepeatedSegments.first_id: {self.first_id} leaves nothing of {vocab_size} ids")
        for index in range(self.count):
            rng = np.random.default_rng([self.seed, index])
            segments: list[np.ndarray] = []
            order: list[np.ndarray] = []
            length = 0
            while length < self.length_tok:
                if not segments or rng.random() < self.new_share:
                    size = int(rng.integers(self.segment_tok_min, self.segment_tok_max + 1))
                    segments.append(rng.integers(self.first_id, vocab_size, size))
                    order.append(segments[-1])
                else:
                    order.append(segments[int(rng.integers(len(segments)))])
                length += len(order[-1])
            yield np.concatenate(order)[: self.length_tok].tolist()


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
