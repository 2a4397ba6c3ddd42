"""Say whether two runs are the same numbers: the proof that a change of the code changed nothing else.

    python tools/same_run.py BEFORE AFTER

In: two run directories. Out: what differs, a line for each column, with the first step where it does. Compared bit by
bit are the steps and the rows of all windows and of training health. Not compared are times, names of runs and the hash
of the configuration. Columns and metrics that one of them lacks are named as new or gone, and the rest is compared.
Exit codes: 0 the same, 1 not the same, 2 no run. Needs neither torch nor Megatron.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from megatron_lccp.config.arguments import OneLineParser
from megatron_lccp.records.store import RunStore
from megatron_lccp.schema import KEY_COLUMNS

OF_THE_MACHINE = ("time_s", "tokens_per_s", "ranks", "run", "config_hash")
"""Columns that differ between two runs of the same code."""


def main(argv: Sequence[str]) -> int:
    parser = OneLineParser(prog="same_run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", metavar="BEFORE", type=Path, help="run directory")
    parser.add_argument("after", metavar="AFTER", type=Path, help="another")
    args = parser.parse_args(argv)
    stores = [RunStore(folder) for folder in (args.before, args.after)]
    for store in stores:
        if not store.exists():
            print(f"same_run: {store.dir} is not a run directory", file=sys.stderr)
            return 2
    tables = [(steps_of(store), rows_of(store)) for store in stores]
    found = [
        f"{name}: {line}"
        for name, before, after in zip(("steps", "rows"), *tables, strict=True)
        for line in differences(before, after)
    ]
    steps, rows = tables[0]
    print("\n".join(found) if found else f"the same: {len(steps):,} steps and {len(rows):,} rows, bit by bit")
    return 1 if found else 0


def steps_of(store: RunStore) -> pd.DataFrame:
    steps = store.read_steps()
    return steps[[name for name in steps if name not in OF_THE_MACHINE]]


def rows_of(store: RunStore) -> pd.DataFrame:
    """All rows that are no times, in an order of their own: how they are spread over files is not compared."""
    rows = store.read_rows()
    rows = rows[rows["unit"] != "s"]
    rows = rows[[name for name in rows if name not in OF_THE_MACHINE]]
    first = [name for name in KEY_COLUMNS if name in rows]
    coordinates = sorted({*rows} - {*first, "value", "unit", "n"})
    return rows.sort_values([*first, *coordinates], kind="stable", ignore_index=True)


def differences(before: pd.DataFrame, after: pd.DataFrame) -> Iterator[str]:
    """What tells the tables apart; columns that are missing on one side and empty on the other do not."""
    for here, there, word in ((before, after, "gone"), (after, before, "new")):
        for name in sorted({*here} - {*there}):
            if here[name].notna().any():
                yield f"column {name} is {word}"
    if "metric" in before and "metric" in after:
        kept = []
        for here, there, word in ((before, after, "gone"), (after, before, "new")):
            own, theirs = ([*zip(rows["monitor"], rows["metric"], strict=True)] for rows in (here, there))
            shared = {*own} & {*theirs}
            for (monitor, metric), count in sorted(Counter(each for each in own if each not in shared).items()):
                yield f"{metric} of {monitor} is {word}: {count:,}"
            kept.append(here[[each in shared for each in own]].reset_index(drop=True))
        before, after = kept
    if len(before) != len(after):
        yield f"{len(before):,} before, {len(after):,} after"
        return
    for name in [name for name in before if name in after]:
        one, other = before[name], after[name]
        differs = ~((one == other) | (one.isna() & other.isna())).fillna(False).astype(bool)
        if differs.any():
            at = differs.idxmax()
            yield (
                f"{name} differs in {differs.sum():,} of {len(before):,}, first at step {before['step'][at]}: "
                f"{one[at]!r} before, {other[at]!r} after"
            )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
