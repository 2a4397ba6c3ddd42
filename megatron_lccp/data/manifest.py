"""What a data directory holds: its manifest.json, and whether the files are still those it describes.

In: the directory, or a configuration. Out: a `Manifest`, or the problems that would spoil a training start. Neither
torch nor Megatron is imported, so this answers at once.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_lccp.config.load import as_tree
from megatron_lccp.config.tree import Config, TokenizerConfig
from megatron_lccp.data.tokenizers.base import Tokenizer
from megatron_lccp.data.tokenizers.files import find_tokenizer
from megatron_lccp.data.tokenizers.load import configured_tokenizer
from megatron_lccp.files import file_sha256, require_format, write_whole

Part = Literal["train", "heldout"]
PARTS: tuple[Part, ...] = ("train", "heldout")
FILE_NAME = "manifest.json"
FORMAT = 2
"""The newest version of the data directory's format, which is read. Data without begin tokens are written as 1 still."""


@dataclass(frozen=True)
class TokenizerEntry:
    """The tokenizer that made the ids."""

    name: str
    sha256: str
    vocab_size: int
    eod: int
    bos: int | None = None
    """What each document begins with, if with any token of its own; since format 2."""


@dataclass(frozen=True)
class SourceEntry:
    """One tokenized source."""

    definition: dict[str, Any]
    """The source's class_path and init_args, and the held-out share: another definition means other documents."""
    inputs: str
    """What the source said of the files it read."""
    documents: dict[Part, int]
    """Documents in each part."""
    tokens: dict[Part, int]
    """Tokens in each part, the ends of documents included."""
    files: dict[str, dict[str, Any]]
    """File name -> bytes and sha256."""


@dataclass(frozen=True)
class Manifest:
    """What a data directory holds."""

    tokenizer: TokenizerEntry
    sources: dict[str, SourceEntry] = field(default_factory=dict)
    forced_heldout: tuple[str, ...] = ()
    """Hashes held out beyond the share, see `heldout.forced_heldout`."""

    def entry(self, source: str, directory: str | Path) -> SourceEntry:
        """Raises ValueError if the source is not there."""
        if source not in self.sources:
            raise ValueError(f"{Path(directory) / FILE_NAME}: has no source {source!r}; run `lccp prepare CONFIG`")
        return self.sources[source]


def prefix(directory: str | Path, source: str, part: Part) -> str:
    """Path of the .bin and .idx of a part without the suffix, as Megatron-Core wants it."""
    return str(Path(directory) / f"{source}.{part}")


def load_manifest(directory: str | Path) -> Manifest:
    """Read manifest.json. Raises ValueError if it is missing, not one of ours, or of a newer format."""
    path = Path(directory) / FILE_NAME
    try:
        tree = json.loads(path.read_text())
        require_format(path, tree.get("format"), FORMAT)
        sources = {name: SourceEntry(**entry) for name, entry in tree["sources"].items()}
        found = Manifest(TokenizerEntry(**tree["tokenizer"]), sources, tuple(tree["forced_heldout"]))
        _require_kinds(found)
        return found
    except FileNotFoundError as error:
        raise ValueError(f"{path}: is missing; run `lccp prepare CONFIG`") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        text = f"{path}: is not a manifest of `lccp prepare` ({error!r}); remove it and run `lccp prepare CONFIG`"
        raise ValueError(text) from error


def _require_kinds(manifest: Manifest) -> None:
    """TypeError or KeyError for what a manifest of ours would not hold."""
    entry = manifest.tokenizer
    wanted: list[tuple[Any, type]] = [(entry.name, str), (entry.sha256, str), (entry.vocab_size, int), (entry.eod, int)]
    if entry.bos is not None:
        wanted.append((entry.bos, int))
    for source in manifest.sources.values():
        wanted += [(source.definition, dict), (source.inputs, str)]
        wanted += [(of[part], int) for of in (source.documents, source.tokens) for part in PARTS]
        for about in source.files.values():
            wanted += [(about["bytes"], int), (about["sha256"], str)]
    for value, kind in wanted:
        if not isinstance(value, kind):
            raise TypeError(f"{value!r} should be {kind.__name__}")


def save_manifest(directory: str | Path, manifest: Manifest) -> None:
    """Write manifest.json, whole or not at all. Raises OSError."""
    path = Path(directory) / FILE_NAME
    tree = dataclasses.asdict(manifest)
    if manifest.tokenizer.bos is None:
        del tree["tokenizer"]["bos"]
    text = json.dumps({"format": 1 if manifest.tokenizer.bos is None else FORMAT, **tree}, indent=1) + "\n"
    write_whole(path, lambda draft: draft.write_text(text))


def definition_of(config: Config, source: str) -> dict[str, Any]:
    """What decides the documents of a configured source and their split, as it stands in the manifest."""
    tree = {"source": as_tree(config.data.sources[source]), "heldout_share": config.data.heldout_share}
    return json.loads(json.dumps(tree))


def document_bos(given: TokenizerConfig, tokenizer: Tokenizer) -> int | None:
    """The token that each document is to begin with, or None."""
    return tokenizer.bos if given.bos_in_documents else None


def check_data(config: Config, verify: bool = False) -> list[str]:
    """Why training must not start on this data, one line each; the sha256 of every file only with `verify`."""
    directory = Path(config.data.dir)
    try:
        manifest = load_manifest(directory)
    except ValueError as error:
        return [str(error)]
    problems = _tokenizer_problems(config, manifest)
    used = {name for stage in config.stages.values() for part in stage.mixture.values() for name in part.sources}
    for name in sorted(used | config.data.sources.keys()):
        if name not in manifest.sources:
            problems.append(f"{directory / FILE_NAME}: has no source {name!r}; run `lccp prepare CONFIG`")
            continue
        if name in config.data.sources and definition_of(config, name) != manifest.sources[name].definition:
            problems.append(f"{directory / FILE_NAME}: source {name!r} has changed since; run `lccp prepare CONFIG`")
        problems += file_problems(directory, manifest.sources[name], verify)
    return problems


def _tokenizer_problems(config: Config, manifest: Manifest) -> list[str]:
    path = Path(config.data.tokenizer.path)
    try:
        sha256 = find_tokenizer(path, config.data.tokenizer.end_token).sha256
    except ValueError as error:
        return [str(error)]
    if sha256 != manifest.tokenizer.sha256:
        wrong = (
            f"{path}: wrong tokenizer for the data in {config.data.dir}: sha256 {sha256[:12]}, the data were made with "
        )
        return [wrong + f"{manifest.tokenizer.sha256[:12]} ({manifest.tokenizer.name})"]
    there, here = manifest.tokenizer.bos, None
    if config.data.tokenizer.bos_in_documents:
        try:
            here = document_bos(config.data.tokenizer, configured_tokenizer(config.data.tokenizer))
        except ValueError as error:
            return [str(error)]
    if there != here:
        field = "data.tokenizer.bos_in_documents"
        return [f"{field}: documents in {config.data.dir} begin with {there}, not {here}; run `lccp prepare CONFIG`"]
    return []


def file_problems(directory: Path, entry: SourceEntry, verify: bool) -> list[str]:
    """Files of one source that are missing or are not those of the manifest."""
    problems = []
    for name, expected in entry.files.items():
        path = directory / name
        if not path.exists():
            problems.append(f"{path}: is missing; run `lccp prepare CONFIG`")
        elif path.stat().st_size != expected["bytes"]:
            sizes = f"{path.stat().st_size} bytes, not {expected['bytes']}"
            problems.append(f"{path}: is truncated or changed: {sizes}; run `lccp prepare CONFIG`")
        elif path.suffix == ".idx" and (problem := _index_problem(path)):
            problems.append(f"{path}: is no index of Megatron-Core: {problem}; run `lccp prepare CONFIG --verify`")
        elif verify and file_sha256(path) != expected["sha256"]:
            problems.append(
                f"{path}: its content has changed: the sha256 is not that of the manifest; run `lccp prepare CONFIG "
                "--verify`"
            )
    return problems


def _index_problem(path: Path) -> str | None:
    """What is wrong with the head of an .idx file, which says how large it is (datasets/indexed_dataset.py:156)."""
    head = struct.Struct("<9sQBQQ")
    with path.open("rb") as file:
        content = file.read(head.size)
    if len(content) < head.size:
        return "it is cut short"
    magic, version, kind, sequences, documents = head.unpack(content)
    if magic != b"MMIDIDX\x00\x00" or version != 1 or not 1 <= kind <= 8:
        return "it does not begin as one"
    if (size := path.stat().st_size) != head.size + 12 * sequences + 8 * documents:
        return f"it counts {sequences:,} sequences and {documents:,} documents, which are not {size:,} bytes"
    return None
