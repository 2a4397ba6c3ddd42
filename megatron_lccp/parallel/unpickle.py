"""Files that others unpickle, read as data: nothing that a pickle names is run unless it is on a list.

In: nothing. Out: `data_only()`, inside which pickles become plain values, tensors and the records of torch's
checkpoints, or are refused. Those who would build whatever a file says, lines of torch 2.13.0 and Megatron-Core 0.16.1:
with either version torch/distributed/checkpoint/filesystem.py:930 (`.metadata`) and default_planner.py:387 (objects
beside tensors); with 0.16.1 also datasets/gpt_dataset.py:579 (indices) and extensions/transformer_engine.py:1690.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO
from unittest import mock

import torch
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException

_ALLOWED = {
    "builtins": "bool bytearray bytes complex dict float frozenset int list set slice str tuple",
    "collections": "OrderedDict",
    "pathlib": "PosixPath",
    "torch": "Size",
    "torch._utils": "_rebuild_tensor_v2",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo _StoragePrefix",
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex StorageMeta TensorProperties "
        "TensorStorageMetadata _MEM_FORMAT_ENCODING"
    ),
    "torch.distributed.checkpoint.planner": "BytesIOWriteData SavePlan TensorWriteData WriteItem WriteItemType",
    "torch.serialization": "_get_layout",
    # Transformer Engine's extra state (FP8 scales and their recipe).
    "transformer_engine.common.recipe": (
        "DelayedScaling Float8BlockScaling Float8CurrentScaling Format MMParams MXFP8BlockScaling NVFP4BlockScaling "
        "QParams _FormatHelper"
    ),
    "megatron.core.extensions.transformer_engine": "TEDelayedScaling",
}
# Transformer Engine 2.20 (pytorch/_extra_state.py:85), unlike 2.11, unpickles scales of delayed scaling only if told.
_TOLD = {"NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE": "1"}
_STORAGES = {("torch.storage", "_load_from_bytes"), ("megatron.core.safe_globals", "safe_load_from_bytes")}
"""What pickled tensors name: torch's function, and what 0.19.2 puts in its place (megatron/core/__init__.py:61)."""


class _MoreThanData(BaseException):
    """Not an Exception, upon which callers log a trace and try another file."""


class _Unpickler(pickle.Unpickler):
    """Notes in `refused` what it did not build, for a caller may put its own error in the place of ours."""

    def __init__(self, stream: BinaryIO, refused: list[str], **options: Any):
        super().__init__(stream, **options)
        self._refused = refused

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _STORAGES:
            return _storage  # torch's own unpickles without limits
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _ALLOWED.get(module, "").split():
            return super().find_class(module, name)
        self._refused.append(f"it would run {module}.{name}")
        raise _MoreThanData


def _storage(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), weights_only=True)


@contextlib.contextmanager
def data_only(where: str | Path) -> Iterator[None]:
    """While open, `pickle.load`, `pickle.loads` and `torch.load` of this process build nothing but data.

    Raises ValueError at the end if something in `where`, the directory that is read, wanted more.
    """
    refused: list[str] = []
    torch_load = torch.load

    def load(stream: BinaryIO, **options: Any) -> Any:
        return _Unpickler(stream, refused, **options).load()

    def loads(content: bytes, /, **options: Any) -> Any:
        return load(io.BytesIO(content), **options)

    def load_weights(*arguments: Any, **options: Any) -> Any:
        try:
            return torch_load(*arguments, **{**options, "weights_only": True})
        except pickle.UnpicklingError as error:
            refused.append(str(error).splitlines()[0])
            raise

    try:
        with contextlib.ExitStack() as patches:
            for name, safe in {"pickle.load": load, "pickle.loads": loads, "torch.load": load_weights}.items():
                patches.enter_context(mock.patch(name, safe))
            patches.enter_context(mock.patch.dict(os.environ, _TOLD))
            yield
    except (Exception, CheckpointException, _MoreThanData) as error:
        if not refused and not isinstance(error, pickle.UnpicklingError):
            raise
        refused.append(str(error))  # by 0.19.2's own guard, if not by ours
    if refused:
        raise ValueError(f"{where}: a file there is more than data, do not trust it ({refused[0]})")
