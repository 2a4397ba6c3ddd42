"""The journal of a measurement: its results, kept on disk as they come, so that one that was cut off goes on.

In: results by sample number, on every rank. Out: one safetensors file a batch, under the key of what is measured. The
main rank reads and writes; the others hear of it.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from megatron_lccp.measuring.found import Found, Look
from megatron_lccp.measuring.prefills import Tree

MEASURED = "measured_LNr."
"""What stands before the name of a score that measured attention itself."""


class FileJournal:
    """A directory of finished batches. Delete it when the rows are written."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)

    def read(self, key: str) -> dict[int, Found]:
        """What was kept under this key, on all ranks; a file that a killed process left torn is left out."""
        kept: list[dict[int, Found]] = [{}]
        if dist.get_rank() == 0:
            for path in sorted(self.directory.glob(f"{key}-*.safetensors")):
                try:
                    kept[0] |= _unpacked(load_file(path))
                except (SafetensorError, OSError):
                    continue  # it will be written again
        dist.broadcast_object_list(kept)
        return kept[0]

    def write(self, key: str, found: dict[int, Found]) -> None:
        """Keep more under this key; if it cannot be kept, only a later call pays for it."""
        if dist.get_rank() == 0 and found:
            path = self.directory / f"{key}-{min(found)}.safetensors"
            draft = path.with_suffix(".tmp")
            with contextlib.suppress(OSError, SafetensorError):
                self.directory.mkdir(parents=True, exist_ok=True)
                save_file(_packed(found), draft)
                draft.replace(path)

    def discard(self) -> None:
        """Forget everything: the rows are written."""
        shutil.rmtree(self.directory, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.directory.parent.rmdir()  # unless another measurement is in there

    def batches(self, trees: Sequence[Tree], prefills: int) -> Iterable[Sequence[Tree]]:
        """Trees, in order, until there are `prefills` of them: that much is lost at most."""
        batch: list[Tree] = []
        for tree in trees:
            batch.append(tree)
            if sum(map(len, batch)) >= prefills:
                yield batch
                batch = []
        if batch:
            yield batch


def _packed(found: dict[int, Found]) -> dict[str, np.ndarray]:
    """number.array -> array, of all samples."""
    return {
        f"{number}.{name}": np.ascontiguousarray(array)
        for number, one in found.items()
        for name, array in _arrays(one).items()
        if array is not None
    }


def _arrays(one: Found) -> dict[str, np.ndarray | None]:
    arrays = {"nll_r": one.nll_r, "best_r": one.best_r, "null_mass_LN": one.null_mass_LN}
    if look := one.look:
        arrays |= {"position_LNr": look.position_LNr, "answer_mass_LN": look.answer_mass_LN}
        arrays["question_mass_LN"] = look.question_mass_LN
    return arrays | {f"{MEASURED}{name}": array for name, array in one.measured_LNr.items()}


def _unpacked(arrays: dict[str, np.ndarray]) -> dict[int, Found]:
    by_number: dict[int, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        number, _, field = name.partition(".")
        by_number.setdefault(int(number), {})[field] = array
    found: dict[int, Found] = {}
    for sample, fields in by_number.items():
        look = None
        if "position_LNr" in fields:
            look = Look(fields["position_LNr"], fields["answer_mass_LN"], fields.get("question_mass_LN"))
        measured = {name.removeprefix(MEASURED): x for name, x in fields.items() if name.startswith(MEASURED)}
        found[sample] = Found(fields["nll_r"], fields["best_r"], look, fields.get("null_mass_LN"), measured)
    return found
