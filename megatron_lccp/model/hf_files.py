"""Hugging Face's folder of a model -> one whole-model file that `model.init_from` reads, and back.

In: a folder with config.json and *.safetensors, or a file of `save_whole` or of this module. Out: the other. Values
pass unchanged, a piece at a time (see convert.py); names, shapes and types are checked from the headers before the
first byte is written, and what is cut off goes on where it stopped. The header of a whole-model file keeps the
config.json, for the way back.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_lccp.model.convert import EMBEDDING, Piece, Source, check_names, describe, join, pieces_of, split
from megatron_lccp.model.convert import with_rope_base as with_base
from megatron_lccp.model.streams import Entry, PartWriter, part_label, read_entries, read_part

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TIED = ("lm_head.weight", "model.embed_tokens.weight")  # some files store tied embeddings under both
Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


def read_source(path: Path) -> tuple[Source, str]:
    """What a config.json says, and its text. ValueError names the file and what is wrong."""
    try:
        text = path.read_text(encoding="utf-8")
        return describe(json.loads(text)), text
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error


def read_folder(folder: Path) -> dict[str, Entry]:
    """Every tensor of a Hugging Face folder. ValueError if its index and its files disagree."""
    files = sorted(folder.glob("*.safetensors"))
    if not (folder / INDEX).exists():
        if [file.name for file in files] != [SINGLE]:
            raise ValueError(f"{folder}: expected {SINGLE} alone or {INDEX}; there are {len(files)} *.safetensors")
        return read_entries(files[0])[0]
    try:
        listed: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / INDEX}: is no index of tensors: {error}") from error
    if odd := sorted({file.name for file in files} ^ set(listed.values())):
        raise ValueError(f"{folder}: {odd[0]} is in the folder or in {INDEX}, not in both")
    entries: dict[str, Entry] = {}
    for file in files:
        found = read_entries(file)[0]
        check_names(f"{file} against {INDEX}", set(found), {name: 0 for name in listed if listed[name] == file.name})
        entries |= found
    return entries


def hf_to_whole(folder: Path, out: Path, vocab_multiple: int, progress: Progress) -> dict[str, str]:
    """Write a folder's model as one file; returns what went into its header. ValueError for what does not fit."""
    source, config = read_source(folder / "config.json")
    entries = read_folder(folder)
    pieces = pieces_of(source, -(-source.vocab_size // vocab_multiple) * vocab_multiple)
    twice = source.tied_embeddings and TIED[0] in entries
    if twice:
        _check_equal(folder, entries)
    of = {name: piece for piece in pieces for name in piece.names} | ({TIED[0]: None} if twice else {})
    check_names(str(folder), set(entries), of)
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for piece in pieces:
        for name, shape in zip(piece.names, piece.shapes):
            _check_entry(name, entries[name], shape, tensors.get(piece.key, (0, entries[piece.names[0]].dtype))[1])
            tensors.setdefault(piece.key, (piece.whole_shape, entries[name].dtype))
    _check_tiling(pieces, {key: shape for key, (shape, _) in tensors.items()})
    about = {"hf_config": config, "rope_base": repr(source.rope_base), "stored_tied_head": str(twice)}
    metadata = {"about": json.dumps(about | {"source": str(folder.resolve()), "of": _identity(entries)})}
    writer = PartWriter(out, tensors, metadata)
    if writer.complete:
        return about
    with writer as file:
        _each(pieces, file.has, lambda p: file.write(p.key, p.at, join(p, _read(p, entries))), tensors, progress)
        file.finish({part_label(p.key, p.at) for p in pieces})
    return about


def _read(piece: Piece, entries: Mapping[str, Entry]) -> list[torch.Tensor]:
    return [read_part(entries[name]) for name in piece.names]


def _each(
    pieces: Sequence[Piece], has: Callable, convert: Callable[[Piece], None], tensors: Mapping, progress: Progress
) -> None:
    def size(piece: Piece) -> int:
        return math.prod(piece.part_shape) * tensors[piece.key][1].itemsize

    total, done = sum(map(size, pieces)), 0
    for piece in pieces:
        if not has(piece.key, piece.at):
            convert(piece)
        done += size(piece)
        progress(done, total)


def _check_entry(name: str, entry: Entry, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if entry.shape != shape or entry.dtype != dtype:
        raise ValueError(f"{entry.path}: {name} is {entry.dtype} {list(entry.shape)}, expected {dtype} {list(shape)}")


def _check_tiling(pieces: Sequence[Piece], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Every element of every whole tensor is written once: pieces are distinct and add up."""
    written = dict.fromkeys(shapes, 0)
    for piece in pieces:
        written[piece.key] += math.prod(piece.part_shape)
    assert len({(p.key, p.at) for p in pieces}) == len(pieces)
    assert written == {key: math.prod(shape) for key, shape in shapes.items()}


def _check_equal(folder: Path, entries: Mapping[str, Entry]) -> None:
    """ValueError unless the output layer that is stored beside tied embeddings is the same, bit by bit."""
    head, embedding = (entries[name] for name in TIED)
    same = (head.shape, head.dtype) == (embedding.shape, embedding.dtype) and all(
        torch.equal(read_part(head, (row,)).view(torch.uint8), read_part(embedding, (row,)).view(torch.uint8))
        for row in range(head.shape[0])
    )
    if not same:
        raise ValueError(f"{folder}: embeddings are tied by config.json, but {TIED[0]} differs from {TIED[1]}")


def _identity(entries: Mapping[str, Entry]) -> str:
    """A digest of which tensors these are, by their files' paths, sizes and times."""
    stats = {path: path.stat() for path in sorted({entry.path for entry in entries.values()})}
    text = "".join(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}\n" for path, stat in stats.items())
    return hashlib.sha256(text.encode()).hexdigest()


def whole_to_hf(
    path: Path, folder: Path, progress: Progress, config: Path | None = None, rope_base: float | None = None,
    file_bytes: int = 5 << 30,
) -> list[Path]:  # fmt: skip
    """Write a whole-model file as a folder of files up to `file_bytes` (a larger piece is one file); returns them.

    `config` is the config.json of the model, needed if the header has none; `rope_base` replaces its rotary base.
    """
    entries, metadata = read_entries(path)
    try:
        about = dict(json.loads(metadata.get("about", "{}")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: its header's `about` is no object of JSON: {error}") from error
    source, text = read_source(config) if config else _source_in(path, about)
    if EMBEDDING not in entries:
        raise ValueError(f"{path}: has no tensor {EMBEDDING}; it is no whole model")
    pieces = pieces_of(source, entries[EMBEDDING].shape[0])
    shapes = {piece.key: piece.whole_shape for piece in pieces}
    check_names(str(path), set(entries), shapes)
    for key, shape in shapes.items():
        _check_entry(key, entries[key], shape, entries[key].dtype)
    _check_tiling(pieces, shapes)
    copies = dict([TIED[::-1]]) if about.get("stored_tied_head") == "True" and source.tied_embeddings else {}
    plan = _planned_files(pieces, entries, copies, file_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    if other := sorted({file.name for file in folder.glob("*.safetensors")} - set(plan)):
        raise ValueError(f"{folder}: {other[0]} is none of this model's files; name another folder")
    total, done, identity = sum(_bytes(p, entries) for p in pieces), 0, _identity(entries)
    for name, of in plan.items():
        _write_file(folder / name, of, entries, copies, identity, lambda d, _t, base=done: progress(base + d, total))
        done += sum(_bytes(p, entries) for p in of)
    _write_texts(folder, plan, entries, copies, _config_out(text, rope_base, entries[EMBEDDING].dtype))
    return [folder / name for name in plan]


def _source_in(path: Path, about: Mapping[str, str]) -> tuple[Source, str]:
    if "hf_config" not in about:
        raise ValueError(f"{path}: its header has no config.json; give one with --config")
    return describe(json.loads(about["hf_config"])), about["hf_config"]


def _bytes(piece: Piece, entries: Mapping[str, Entry]) -> int:
    return math.prod(piece.part_shape) * entries[piece.key].dtype.itemsize


def _planned_files(
    pieces: Sequence[Piece], entries: Mapping[str, Entry], copies: Mapping[str, str], limit: int
) -> dict[str, list[Piece]]:
    files: list[list[Piece]] = [[]]
    room = limit
    for piece in pieces:
        size = _bytes(piece, entries) * (1 + sum(name in copies for name in piece.names))
        if files[-1] and size > room:
            files.append([])
            room = limit
        files[-1].append(piece)
        room -= size
    if len(files) == 1:
        return {SINGLE: files[0]}
    return {f"model-{n:05d}-of-{len(files):05d}.safetensors": of for n, of in enumerate(files, 1)}


def _outputs(pieces: Sequence[Piece], entries: Mapping[str, Entry], copies: Mapping[str, str]) -> dict[str, tuple]:
    """Name, shape and type of every tensor under transformers' names."""
    found = {n: (s, entries[p.key].dtype) for p in pieces for n, s in zip(p.names, p.shapes)}
    return found | {copies[name]: found[name] for name in copies if name in found}


def _write_file(
    path: Path, pieces: Sequence[Piece], entries: Mapping[str, Entry], copies: Mapping[str, str], identity: str,
    progress: Progress,
) -> None:  # fmt: skip
    tensors = _outputs(pieces, entries, copies)
    writer = PartWriter(path, tensors, {"format": "pt", "of": identity})
    if writer.complete:
        return

    def convert(piece: Piece) -> None:
        for name, tensor in zip(piece.names, split(piece, read_part(entries[piece.key], piece.at))):
            for to in [name, *([copies[name]] if name in copies else [])]:
                if not file.has(to):
                    file.write(to, (), tensor)

    with writer as file:
        sizes = {piece.key: (None, entries[piece.key].dtype) for piece in pieces}
        _each(pieces, lambda key, at: False, convert, sizes, progress)
        file.finish({part_label(name, ()) for name in tensors})


def _config_out(text: str, rope_base: float | None, dtype: torch.dtype) -> str:
    """The config.json to write: as it was where nothing changed."""
    before: dict[str, Any] = json.loads(text)
    config = with_base(before, rope_base) if rope_base is not None else dict(before)
    name = str(dtype).removeprefix("torch.")
    config |= {key: name for key in ("dtype", "torch_dtype") if key in config}
    return text if config == before else json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def _write_texts(
    folder: Path, plan: Mapping[str, Sequence[Piece]], entries: Mapping[str, Entry], copies: Mapping, config: str
) -> None:
    outputs = {file: _outputs(pieces, entries, copies) for file, pieces in plan.items()}
    (folder / INDEX).unlink(missing_ok=True)
    if len(plan) > 1:
        size = sum(math.prod(s) * d.itemsize for found in outputs.values() for s, d in found.values())
        names = {name: file for file, found in outputs.items() for name in sorted(found)}
        index = {"metadata": {"total_size": size}, "weight_map": names}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (folder / "config.json").write_text(config, encoding="utf-8")
