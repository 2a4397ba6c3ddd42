"""Hugging Face's folder of a model -> a checkpoint that `model.init_from` reads on any layout, and back.

In: a folder with config.json and *.safetensors, or one of what Megatron's side can be: a whole-model .safetensors
(of this module or of `save_whole`), a checkpoint directory (of this module or of a training). Out: the other. Values
pass unchanged, a piece at a time (see hf_tensors.py); names, shapes and types are checked from the headers before the
first byte is written, and what is cut off goes on where it stopped. What is written for Megatron keeps the config.json,
for the way back.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_lccp.model.hf_config import Description, describe, read_config
from megatron_lccp.model.rope import POSITIONS, Rope, with_rope
from megatron_lccp.weights.hf_tensors import EMBEDDING, Piece, check_names, join, pieces_of, split
from megatron_lccp.weights.sharded import ShardedReader, Tensors, write_sharded
from megatron_lccp.weights.streams import Entry, PartWriter, about_in, part_label, read_entries, read_part, whole_header

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TIED = ("lm_head.weight", "model.embed_tokens.weight")  # some files store tied embeddings under both
MTP = "num_nextn_predict_layers"
BUFFER = re.compile(r"rotary_emb\.inv_freq$")
NUMBERED = re.compile(r"model\.layers\.(\d+)\.")
FUSED = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(gate_up|down)_proj")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "*.tiktoken", "vocab.json", "merges.txt", "added_tokens.json",
    "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "tokenization_*.py",
    "generation_config.json",
)  # fmt: skip
GIB = 1 << 30
Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


def read_folder(folder: Path) -> dict[str, Entry]:
    """Every tensor of the files that transformers takes of a folder: the single one, else those of the index.

    ValueError if its index and its files disagree, or if it has neither.
    """
    if (folder / SINGLE).exists():
        return _unfused(read_entries(folder / SINGLE)[0])
    if not (folder / INDEX).exists():
        raise ValueError(f"{folder}: expected {SINGLE} or {INDEX}; download the model's safetensors")
    try:
        listed: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(name, str) for name in listed.values()):
            raise TypeError("its weight_map should name a file for each tensor")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / INDEX}: is no index of tensors: {error}") from error
    files = [folder / name for name in sorted(set(listed.values()))]
    if absent := [file.name for file in files if Path(file.name).name != file.name or not file.is_file()]:
        raise ValueError(f"{folder}: {absent[0]} is in {INDEX}, but not in the folder; download it")
    entries: dict[str, Entry] = {}
    for file in files:
        found = read_entries(file)[0]
        check_names(f"{file} against {INDEX}", set(found), {name: 0 for name in listed if listed[name] == file.name})
        entries |= found
    return _unfused(entries)


def _unfused(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Experts that newer files keep in one tensor ([expert, gate then up, hidden] and [expert, hidden, up]), singly."""
    found = dict(entries)
    for name, entry in entries.items():
        if (match := FUSED.fullmatch(name)) is None or len(entry.shape) != 3:
            continue
        del found[name]
        parts = ("gate", "up") if match[2] == "gate_up" else ("down",)
        experts, rows, columns = entry.shape
        shape = (rows // len(parts), columns)
        for index in range(experts * len(parts)):
            one = f"{match[1]}.{index // len(parts)}.{parts[index % len(parts)]}_proj.weight"
            start = entry.start + index * math.prod(shape) * entry.dtype.itemsize
            found[one] = Entry(shape, entry.dtype, entry.path, start)
    return found


def hf_to_megatron(
    folder: Path, out: Path, vocab_multiple: int, progress: Progress, file_bytes: int = GIB,
    say: Callable[[str], None] = lambda text: None, notes: Sequence[str] = (),
) -> dict[str, str]:  # fmt: skip
    """Write a folder's model for `model.init_from`; returns what its header says. ValueError for what does not fit.

    `out` is one file if it ends in .safetensors, else a directory in Megatron-Core's format, in files of `file_bytes`.
    Layers for multi-token prediction are left out, as transformers leaves them. `say` hears of it, and of the `notes`,
    once all fits and before the first byte is written.
    """
    source, config = read_config(folder)
    entries = read_folder(folder)
    if buffers := {name for name in entries if BUFFER.search(name)}:
        notes = [
            *notes,
            f"{folder}: {len(buffers)} buffers of rotary frequencies are left out, as transformers leaves them",
        ]
        entries = {name: entry for name, entry in entries.items() if name not in buffers}
    further = _further_layers(entries, source.shape.layers, json.loads(config).get(MTP) or 0)
    if further:
        notes = [*notes, f"{folder}: {len(further)} tensors of layers for multi-token prediction are left out"]
        entries = {name: entry for name, entry in entries.items() if name not in further}
    rows = -(-source.vocabulary // vocab_multiple) * vocab_multiple
    pieces = pieces_of(source, rows)
    if source.tied_embeddings and TIED[0] in entries and TIED[1] not in entries:
        entries = {TIED[1] if name == TIED[0] else name: entry for name, entry in entries.items()}
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
    about = {"hf_config": config, "rope_base": repr(source.rope.base), "stored_tied_head": str(twice)}
    about |= {"vocab_rows": str(rows)} | ({"left_out": MTP} if further else {})
    about |= {"source": str(folder.resolve()), "of": _identity({entry.path for entry in entries.values()})}
    by_place = {(piece.key, piece.at): piece for piece in pieces}

    def read(key: str, at: tuple[int, ...]) -> torch.Tensor:
        piece = by_place[key, at]
        return join(piece, [read_part(entries[name]) for name in piece.names])

    for note in notes:
        say(note)
    if out.suffix == ".safetensors":
        _write_whole(out, tensors, list(by_place), read, about, progress)
    else:
        write_sharded(out, tensors, list(by_place), read, about, file_bytes, progress)
    return about


def _further_layers(entries: Mapping[str, Entry], layers: int, further: int) -> set[str]:
    """Tensors of so many layers after the model's own."""
    numbers = {name: int(match[1]) for name in entries if (match := NUMBERED.match(name))}
    return {name for name, number in numbers.items() if layers <= number < layers + further}


def _write_whole(
    out: Path, tensors: Tensors, parts: Sequence[tuple[str, tuple[int, ...]]], read: Callable,
    about: Mapping[str, str], progress: Progress,
) -> None:  # fmt: skip
    writer = PartWriter(out, tensors, whole_header(about))
    if writer.complete:
        return
    with writer as file:
        sizes = [math.prod(tensors[key][0][len(at) :]) * tensors[key][1].itemsize for key, at in parts]
        done = 0
        for (key, at), size in zip(parts, sizes):
            if not file.has(key, at):
                file.write(key, at, read(key, at))
            progress(done := done + size, sum(sizes))
        file.finish({part_label(key, at) for key, at in parts})


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
        raise ValueError(
            f"{folder}: embeddings are tied by config.json, but {TIED[0]} differs from {TIED[1]}; set "
            "tie_word_embeddings: false there, as transformers takes them"
        )


def _identity(paths: set[Path]) -> str:
    """A digest of which tensors these are, by their files' paths, sizes and times."""
    stats = {path: path.stat() for path in sorted(paths)}
    text = "".join(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}\n" for path, stat in stats.items())
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Stored:
    """A model on Megatron's side, on disk."""

    path: Path
    tensors: Tensors
    """Shape and type of each whole tensor."""
    read: Callable[..., torch.Tensor]
    """(name, leading indices) -> that part of a tensor."""
    about: Mapping[str, Any]
    """What it says of itself."""
    identity: str
    check: Callable[[Progress], None] = lambda progress: None
    """Reads its files whole and raises CheckpointError unless they are as they were saved."""


def open_stored(path: Path) -> Stored:
    """A whole-model file, or a checkpoint directory. ValueError if it is neither."""
    if path.is_dir():
        reader = ShardedReader(path)
        about = reader.about
        if reader.position is not None:
            about = about | _of_training(path, reader.position, about)
        return Stored(path, reader.tensors, reader.read, about, reader.identity, reader.check_files)
    entries, metadata = read_entries(path)
    about = about_in(path, metadata)
    tensors = {name: (entry.shape, entry.dtype) for name, entry in entries.items()}
    return Stored(path, tensors, lambda name, at=(): read_part(entries[name], at), about, _identity({path}))


def _of_training(path: Path, position: Mapping[str, int], about: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding of the last stage that moved the weights, and the longest context up to it.

    Of a checkpoint that does not note its stages, by the run's config.yaml; None if it is not there.
    """
    if "ropes" in about:
        last = position["stage"] - (position["stage"] > 0 and position["stage_step"] == 0)
        moved = list(about["samples"].values())[: last + 1]
        return {
            "rope": list(about["ropes"].values())[last],
            "context_tok": max(context_tok for context_tok, _ in moved),
        }
    try:
        stages = yaml.safe_load((path.parent.parent / "config.yaml").read_text(encoding="utf-8"))["stages"]
        number = position["stage"] - (position["stage"] > 0 and position["stage_step"] == 0)
        moved = list(stages.values())[: number + 1]
        context_tok = max(int(stage["context_tok"]) for stage in moved)
        return {"rope_base": float(moved[-1]["rope_base"]), "context_tok": context_tok}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, yaml.YAMLError):
        return {"rope_base": None, "context_tok": None}


def megatron_to_hf(
    path: Path, folder: Path, progress: Progress, config: Path | None = None, rope_base: float | None = None,
    file_bytes: int = 5 * GIB, tokenizer: Path | None = None, max_positions: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Path]:  # fmt: skip
    """Write a whole-model file or a checkpoint as a folder of files up to `file_bytes` (a larger piece is one file).

    `config` is the config.json of the model, needed if it keeps none. Its rotary base is replaced by `rope_base`, else
    by that of the stage that trained the weights; its positions by `max_positions`, else raised to the longest context
    trained, or `say` hears that it is not known. `tokenizer` is a folder whose tokenizer is copied. Returns the files.
    """
    stored = open_stored(path)
    source, text = read_config(config) if config else _hf_model_in(stored)
    pieces = _checked_pieces(stored, source)
    about = stored.about
    rope = _rope_in(about, source.rope, rope_base)
    if rope is None:
        raise ValueError(f"{path}: no config.yaml in its run says the RoPE base; give it with --rope-base")
    if max_positions is None and about.get("context_tok") is None and "hf_config" not in about:
        say(f"{path}: does not say what context it was trained at; config.json keeps its max_position_embeddings, "
            "--max-positions changes it")  # fmt: skip
    extras = [file for pattern in TOKENIZER_FILES for file in sorted(tokenizer.glob(pattern))] if tokenizer else []
    if tokenizer and not extras:
        raise ValueError(f"{tokenizer}: has no files of a tokenizer")
    copies = dict([TIED[::-1]]) if about.get("stored_tied_head") == "True" and source.tied_embeddings else {}
    plan = _planned_files(pieces, stored, copies, file_bytes)
    if other := sorted({file.name for file in folder.glob("*.safetensors")} - set(plan)):
        raise ValueError(f"{folder}: {other[0]} is none of this model's files; name another folder")
    stored.check(progress)  # takes as long as the copy: after everything else that can be wrong
    folder.mkdir(parents=True, exist_ok=True)
    total, done = sum(_bytes(p, stored) for p in pieces), 0
    for name, of in plan.items():
        _write_file(folder / name, of, stored, copies, partial(_further, progress, done, total))
        done += sum(_bytes(p, stored) for p in of)
    positions = max_positions or max(json.loads(text).get(POSITIONS) or 0, int(about.get("context_tok") or 0))
    without = about.get("left_out", "")
    changed = _config_out(text, source, rope, positions, stored.tensors[EMBEDDING][1], without)
    _write_texts(folder, plan, stored, copies, changed)
    for file in extras:
        shutil.copy(file, folder)
    return [folder / name for name in plan]


def _hf_model_in(stored: Stored) -> tuple[Description, str]:
    if "hf_config" not in stored.about:
        raise ValueError(f"{stored.path}: keeps no config.json; give the model's with --config")
    return describe(json.loads(stored.about["hf_config"])), stored.about["hf_config"]


def _checked_pieces(stored: Stored, source: Description) -> list[Piece]:
    """Every piece of the model; ValueError if what is stored is not `source`'s, tensor by tensor."""
    if EMBEDDING not in stored.tensors:
        raise ValueError(f"{stored.path}: has no tensor {EMBEDDING}; it is no whole model")
    for field, value in source.transformer.items():
        if stored.about.get(field, value) != value:
            was = stored.about[field]
            raise ValueError(f"{stored.path}: was trained with {field} {was}, config.json says {value}")
    pieces = pieces_of(source, stored.tensors[EMBEDDING][0][0])
    shapes = {piece.key: piece.whole_shape for piece in pieces}
    check_names(str(stored.path), set(stored.tensors), shapes)
    for key, wanted in shapes.items():
        shape, dtype = stored.tensors[key]
        if shape != wanted:
            raise ValueError(f"{stored.path}: {key} is {dtype} {list(shape)}, expected {dtype} {list(wanted)}")
    _check_tiling(pieces, shapes)
    return pieces


def _bytes(piece: Piece, stored: Stored) -> int:
    return math.prod(piece.part_shape) * stored.tensors[piece.key][1].itemsize


def _planned_files(
    pieces: Sequence[Piece], stored: Stored, copies: Mapping[str, str], limit: int
) -> dict[str, list[Piece]]:
    files: list[list[Piece]] = [[]]
    room = limit
    for piece in pieces:
        size = _bytes(piece, stored) * (1 + sum(name in copies for name in piece.names))
        if files[-1] and size > room:
            files.append([])
            room = limit
        files[-1].append(piece)
        room -= size
    if len(files) == 1:
        return {SINGLE: files[0]}
    return {f"model-{n:05d}-of-{len(files):05d}.safetensors": of for n, of in enumerate(files, 1)}


def _outputs(pieces: Sequence[Piece], stored: Stored, copies: Mapping[str, str]) -> dict[str, tuple]:
    """Name, shape and type of every tensor under transformers' names."""
    found = {n: (s, stored.tensors[p.key][1]) for p in pieces for n, s in zip(p.names, p.shapes)}
    return found | {copies[name]: found[name] for name in copies if name in found}


def _further(progress: Callable[[int, int], None], done: int, total: int, more: int) -> None:
    progress(done + more, total)


def _write_file(
    path: Path, pieces: Sequence[Piece], stored: Stored, copies: Mapping[str, str], progress: Callable[[int], None]
) -> None:
    tensors = _outputs(pieces, stored, copies)
    writer = PartWriter(path, tensors, {"format": "pt", "of": stored.identity})
    if writer.complete:
        return
    with writer as file:
        done = 0
        for piece in pieces:
            wanted = {to for name in piece.names for to in (name, copies.get(name, name)) if not file.has(to)}
            tensors_of = split(piece, stored.read(piece.key, piece.at)) if wanted else ()
            for name, tensor in zip(piece.names, tensors_of):
                for to in wanted & {name, copies.get(name, name)}:
                    file.write(to, (), tensor)
            progress(done := done + _bytes(piece, stored))
        file.finish({part_label(name, ()) for name in tensors})


def _rope_in(about: Mapping[str, Any], own: Rope, base: float | None) -> Rope | None:
    """The rotary embedding of stored weights, `base` in place of its own; None if nothing says which it is.

    Weights say all of it (`rope`), or their base alone, beside which it is the model's own.
    """
    if (noted := about.get("rope")) is not None:
        rope = Rope(**(json.loads(noted) if isinstance(noted, str) else noted))
    elif (noted := about.get("rope_base", own.base)) is None and base is None:
        return None
    else:
        rope = replace(own, base=float(own.base if noted is None else noted))
    return rope if base is None else replace(rope, base=base)


def _config_out(text: str, source: Description, rope: Rope, positions: int, dtype: torch.dtype, without: str) -> str:
    """The config.json to write: as it was where nothing changed. `without` names the number of what was left out."""
    before: dict[str, Any] = json.loads(text)
    config = dict(before)
    if replace(rope, base=source.rope.base) != source.rope or not math.isclose(rope.base, source.rope.base):
        config = with_rope(before, rope, source.shape.width, source.rope)
    config |= {POSITIONS: positions} if positions else {}
    config |= {without: 0} if without else {}
    name = str(dtype).removeprefix("torch.")
    config |= {key: name for key in ("dtype", "torch_dtype") if key in config}
    return text if config == before else json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def _write_texts(
    folder: Path, plan: Mapping[str, Sequence[Piece]], stored: Stored, copies: Mapping, config: str
) -> None:
    outputs = {file: _outputs(pieces, stored, copies) for file, pieces in plan.items()}
    (folder / INDEX).unlink(missing_ok=True)
    if len(plan) > 1:
        size = sum(math.prod(s) * d.itemsize for found in outputs.values() for s, d in found.values())
        names = {name: file for file, found in outputs.items() for name in sorted(found)}
        index = {"metadata": {"total_size": size}, "weight_map": names}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (folder / "config.json").write_text(config, encoding="utf-8")
