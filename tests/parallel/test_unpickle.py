"""Files that could run something when read: refused as they are, read where they are data."""

from __future__ import annotations

import collections
import pickle
import warnings
from pathlib import Path
from typing import Any

import megatron.core  # noqa: F401 (0.19.2 changes what a pickled tensor names)
import numpy as np
import pytest
import torch
from torch.distributed import checkpoint

from megatron_lccp.parallel.unpickle import data_only


class Touch:
    """What a pickle does that is more than data."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def read_metadata(directory: Path, evil: Any) -> None:
    checkpoint.save({"x": torch.ones(2)}, checkpoint_id=directory)
    if evil:
        (directory / ".metadata").write_bytes(pickle.dumps(evil))
    checkpoint.load({"x": torch.zeros(2)}, checkpoint_id=directory)


def read_object(directory: Path, evil: Any) -> None:
    checkpoint.save({"x": evil or "text"}, checkpoint_id=directory)
    checkpoint.load({"x": None}, checkpoint_id=directory)


def read_index(directory: Path, evil: Any) -> None:
    np.save(directory / "index.npy", np.arange(3))
    if evil:
        (directory / "index.npy").write_bytes(pickle.dumps(evil))
    assert np.load(directory / "index.npy", allow_pickle=True).sum() == 3


def read_extra_state(directory: Path, evil: Any) -> None:
    state = collections.OrderedDict(scale=torch.ones(2), steps=(3, b"x"), dtype=torch.bfloat16, more=evil)
    assert pickle.loads(pickle.dumps(state))["scale"].sum() == 2


@pytest.mark.parametrize("read", [read_metadata, read_object, read_index, read_extra_state])
def test_code_is_refused_and_data_is_read(read: Any, tmp_path: Path) -> None:
    warnings.simplefilter("ignore")  # torch's, of a checkpoint without ranks
    trap = tmp_path / "sprung"
    for name in ("good", "bad", "open"):
        (tmp_path / name).mkdir()
    with data_only(tmp_path):
        read(tmp_path / "good", None)
    with pytest.raises(ValueError, match="a file there is more than data"), data_only(tmp_path / "bad"):
        read(tmp_path / "bad", Touch(trap))
    assert not trap.exists()
    try:
        read(tmp_path / "open", Touch(trap))  # it works where pickles may do what they like
    except BaseException as error:
        assert not isinstance(error, KeyboardInterrupt)
    assert trap.exists()


def test_what_else_goes_wrong_stays_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), data_only(tmp_path):
        np.load(tmp_path / "absent.npy")


@pytest.mark.parametrize("name", ["os.system", "torch.hub.load", "builtins.eval", "torch.serialization.os"])
def test_names_are_whole(name: str, tmp_path: Path) -> None:
    """Neither a function beside an allowed one, nor what a module on the list has imported."""
    module, _, function = name.rpartition(".")
    with pytest.raises(ValueError, match=name), data_only(tmp_path):
        pickle.loads(f"c{module}\n{function}\n.".encode())
