"""Documents -> tokens on disk (`lccp prepare`).

In: the sources and the tokenizer of a configuration. Out: `<data.dir>/<source>.{train,heldout}.{bin,idx}` in
Megatron's indexed format, and manifest.json. What is already there and unchanged is kept. New files are built in a
hidden directory inside `data.dir` and moved into place one by one at the end. Until then the old state stands, and in
between the manifest leaves out what is being replaced, so it never describes a file that is half there. One process at
a time builds in a directory; another one that has something to build there waits for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from pathlib import Path

import numpy as np

from megatron_lccp import lock
from megatron_lccp.config.tree import Config, DataConfig, Document, Source
from megatron_lccp.data.heldout import forced_heldout, holds_any, key_hash, side
from megatron_lccp.data.manifest import (
    FILE_NAME,
    PARTS,
    Manifest,
    Part,
    SourceEntry,
    TokenizerEntry,
    definition_of,
    document_bos,
    file_problems,
    load_manifest,
    prefix,
    save_manifest,
)
from megatron_lccp.data.tokenizers.base import Tokenizer
from megatron_lccp.data.tokenizers.load import configured_tokenizer, train_tokenizer
from megatron_lccp.files import file_sha256, flush_to_disk
from megatron_lccp.text import count_text

BATCH_CHARACTERS = 2_000_000
BATCH_DOCUMENTS = 256
SECONDS_BETWEEN_LINES = 10.0
BUILDING = ".building-"
"""How a directory is called in which new files are built."""


def prepare(config: Config, say: Callable[[str], object] = print, verify: bool = False) -> Manifest:
    """Tokenize every source that is new or has changed; train the tokenizer first if its file is missing.

    With `verify` all that was prepared is read and compared with its SHA-256: what has changed is tokenized again.
    `say` gets progress lines. Returns the manifest of everything in `data.dir`. Raises ValueError naming the field, the
    source or the file that is wrong, OSError that names `data.dir` if it cannot be written; what was prepared before is
    then still whole.
    """
    try:
        return _prepare(config, say, verify)
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        text = f"cannot be written: {error.strerror}; free some space and run `lccp prepare CONFIG` again"
        raise OSError(error.errno, text, config.data.dir) from error


def _prepare(config: Config, say: Callable[[str], object], verify: bool) -> Manifest:
    directory = Path(config.data.dir)
    for name in config.data.sources:
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            raise ValueError(
                f"data.sources: {name!r} should be letters, digits, `_`, `.` and `-`; files are named after it"
            )
    seen: tuple[Manifest, list[str]] | None = None  # what was there, and what of it has to be made anew
    if Path(config.data.tokenizer.path).exists():  # what is up to date needs no lock: others may only read it
        seen = _stale(config, _tokenizer(config.data, say), verify)
        if not seen[1]:
            say(f"{directory}: up to date, {count_text(len(seen[0].sources), 'source')}")
            return seen[0]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with lock.sole_user(directory / ".lock", str(directory), say, wait=True):
            for left in directory.glob(f"{BUILDING}*"):
                shutil.rmtree(left)  # of a process that was killed
            return _build_stale(config, directory, seen, say, verify)
    finally:
        with contextlib.suppress(OSError):
            directory.rmdir()  # if nothing came of it


def _stale(config: Config, tokenizer: Tokenizer, verify: bool) -> tuple[Manifest, list[str]]:
    """What is prepared, and the sources that have to be tokenized."""
    old = _manifest_before(Path(config.data.dir), tokenizer, config)
    return old, [name for name in config.data.sources if not _is_current(config, name, old, verify)]


def _build_stale(
    config: Config, directory: Path, seen: tuple[Manifest, list[str]] | None, say: Callable[[str], object], verify: bool
) -> Manifest:
    """Build what is new or has changed; for one process at a time. `seen` was found before it was the only one."""
    tokenizer = _tokenizer(config.data, say)
    if seen is None or seen[0] != _manifest_before(directory, tokenizer, config):
        seen = _stale(config, tokenizer, verify)
    old, stale = seen
    if not stale:  # another one has done it meanwhile
        say(f"{directory}: up to date, {count_text(len(old.sources), 'source')}")
        return old
    data, before, drawn = config.data, frozenset(old.forced_heldout), tokenizer.ordinary_size
    new = forced_heldout({name: data.sources[name] for name in stale}, data.heldout_share, drawn) - before
    for name, source in data.sources.items():
        if name not in stale and holds_any(source, new, drawn):
            stale.append(name)  # it would go on training on what another source holds out from now on
    forced = before | new
    with tempfile.TemporaryDirectory(prefix=BUILDING, dir=directory) as building:
        built = {name: _build(config, name, tokenizer, forced, Path(building), say) for name in stale}
        kept = {name: entry for name, entry in old.sources.items() if name not in built}
        if (directory / FILE_NAME).exists():
            save_manifest(directory, dataclasses.replace(old, sources=kept))
        for entry in built.values():
            for file in entry.files:
                os.replace(Path(building, file), directory / file)
    manifest = dataclasses.replace(old, sources=kept | built, forced_heldout=tuple(sorted(forced)))
    save_manifest(directory, manifest)
    return manifest


def _tokenizer(data: DataConfig, say: Callable[[str], object]) -> Tokenizer:
    """Load the tokenizer, or train it on its sources' documents in turn (held-out ones too)."""
    if Path(data.tokenizer.path).exists():
        return configured_tokenizer(data.tokenizer)
    if not data.tokenizer.train_on:
        raise ValueError(
            f"data.tokenizer.path: {data.tokenizer.path} does not exist and data.tokenizer.train_on is empty "
            f"(paths are relative to {Path.cwd()})"
        )
    if Path(data.tokenizer.path).suffix in (".json", ".tiktoken"):
        raise ValueError(
            f"data.tokenizer.path: {data.tokenizer.path} does not exist; what is trained here is a sentencepiece "
            "model, name it .model"
        )
    start = time.monotonic()
    sources = [data.sources[name].documents(data.tokenizer.vocab_size) for name in data.tokenizer.train_on]
    in_turn = (document for turn in zip_longest(*sources) for document in turn if isinstance(document, str))
    tokenizer = train_tokenizer(data.tokenizer.path, in_turn, data.tokenizer.vocab_size)
    say(f"{data.tokenizer.path}: trained {tokenizer.vocab_size} pieces in {time.monotonic() - start:.1f} s")
    return configured_tokenizer(data.tokenizer)


def _manifest_before(directory: Path, tokenizer: Tokenizer, config: Config) -> Manifest:
    """What the directory holds that this tokenizer made; an empty manifest if nothing."""
    bos = document_bos(config.data.tokenizer, tokenizer)
    entry = TokenizerEntry(tokenizer.path.name, tokenizer.sha256, tokenizer.vocab_size, tokenizer.eod, bos)
    if not config.data.sources or (directory / FILE_NAME).exists():
        old = load_manifest(directory)
        if (old.tokenizer.sha256, old.tokenizer.bos) == (tokenizer.sha256, bos):
            return old
        if lost := sorted(old.sources.keys() - config.data.sources.keys()):
            raise ValueError(
                f"data.dir: {directory} holds sources of another tokenizer or begin token that are not in data.sources: "
                f"{', '.join(lost)}; prepare into another directory"
            )
    return Manifest(entry)


def _is_current(config: Config, name: str, old: Manifest, verify: bool) -> bool:
    entry = old.sources.get(name)
    return (
        entry is not None
        and entry.definition == definition_of(config, name)
        and entry.inputs == config.data.sources[name].inputs()
        and not file_problems(Path(config.data.dir), entry, verify)
    )


def _build(
    config: Config,
    name: str,
    tokenizer: Tokenizer,
    forced: frozenset[str],
    building: Path,
    say: Callable[[str], object],
) -> SourceEntry:
    """Tokenize one source into `building`; say how far it is now and then."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder  # seconds; not needed if up to date

    source = config.data.sources[name]
    inputs = source.inputs()
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    writers = {part: IndexedDatasetBuilder(prefix(building, name, part) + ".bin", dtype=dtype) for part in PARTS}
    documents: dict[Part, int] = dict.fromkeys(PARTS, 0)
    tokens: dict[Part, int] = dict.fromkeys(PARTS, 0)
    start = said = time.monotonic()
    for hashed, ids in _tokenized(name, source, tokenizer, document_bos(config.data.tokenizer, tokenizer)):
        part = side(hashed, config.data.heldout_share, forced)
        writers[part].add_document(np.array(ids, dtype=dtype), [len(ids)])
        documents[part] += 1
        tokens[part] += len(ids)
        if time.monotonic() - said > SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            say(f"{name}: {sum(documents.values()):,} documents, {sum(tokens.values()):,} tokens so far")
    if not documents["train"]:
        raise ValueError(f"data.sources.{name}: every document is held out; give it more or lower data.heldout_share")
    assert documents["heldout"], "the documents of a source are the same every time"
    for part, writer in writers.items():
        writer.finalize(prefix(building, name, part) + ".idx")
    files = {}
    for path in (Path(prefix(building, name, part) + suffix) for part in PARTS for suffix in (".bin", ".idx")):
        flush_to_disk(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    say(
        f"{name}: {documents['train']:,} documents and {tokens['train']:,} tokens to train on, "
        f"{documents['heldout']:,} and {tokens['heldout']:,} held out, in {time.monotonic() - start:.1f} s"
    )
    return SourceEntry(definition_of(config, name), inputs, documents, tokens, files)


def _tokenized(name: str, source: Source, tokenizer: Tokenizer, bos: int | None) -> Iterator[tuple[str, list[int]]]:
    """(split hash, ids with the end token, behind `bos`) of each document; empty documents are left out."""
    begin = [] if bos is None else [bos]
    for batch in _batches(filter(None, source.documents(tokenizer.ordinary_size))):
        texts = [document for document in batch if isinstance(document, str)]
        encoded = iter(tokenizer.encode_batch(texts, threads=min(os.cpu_count() or 1, 16)))
        for document in batch:
            ids = next(encoded) if isinstance(document, str) else _checked(name, document, tokenizer)
            yield key_hash(source, document), begin + ids + [tokenizer.eod]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _checked(name: str, ids: list[int], tokenizer: Tokenizer) -> list[int]:
    if min(ids) < 0 or max(ids) >= tokenizer.vocab_size or tokenizer.eod in ids:
        raise ValueError(
            f"data.sources.{name}: token ids should be 0..{tokenizer.vocab_size - 1} "
            f"without the end token {tokenizer.eod}"
        )
    return list(ids)
