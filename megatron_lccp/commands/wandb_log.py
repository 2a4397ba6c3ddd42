"""What W&B's own file of a start holds, which after a service that was killed is less than it was told.

In: a `.wandb` file (a header of 7 bytes, then records of protobuf in LevelDB's log format, blocks of 32 KiB). Out: up to
where steps and windows are in it. A file that ends in the middle of a record is read up to there.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_HEADER, _BLOCK, _RECORD = 7, 32 * 1024, struct.Struct("<IHB")
_WHOLE, _LAST = 1, 4
"""Kinds of a part of a record: the whole of it, and the last part."""


@dataclass(frozen=True)
class Held:
    """The last of each that is on file; -1 if none is."""

    step: int = -1
    """Of optimizer steps."""
    window_tok: int = -1
    """Of windows, by the tokens they were measured at."""


def held_in(path: Path) -> Held:
    """The last step and window that the file holds; of each they are in order. Raises OSError."""
    from wandb.proto import wandb_internal_pb2

    step = window_tok = -1
    for data in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]  # made when it is imported
        record.ParseFromString(data)
        if record.WhichOneof("record_type") != "history":
            continue
        line = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        if "train/step" in line:
            step = max(step, int(float(line["train/step"])))
        elif any(key.startswith("window/rows") for key in line):
            window_tok = max(window_tok, int(float(line["tokens"])))
    return Held(step, window_tok)


def _records(data: bytes) -> Iterator[bytes]:
    at, parts = _HEADER, b""
    while at + _RECORD.size <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _RECORD.size:  # what is left of a block is padding
            at += left
            continue
        _, length, kind = _RECORD.unpack_from(data, at)
        at += _RECORD.size + length
        if at > len(data):
            return
        parts += data[at - length : at]
        if kind in (_WHOLE, _LAST):
            yield parts
            parts = b""
