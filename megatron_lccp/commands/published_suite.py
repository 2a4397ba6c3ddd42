"""What `lccp measure --hf` measures unless it is given other monitors: a suite for two cores and a few minutes.

In: the lengths, and the names of the texts. Out: monitors, and the same as YAML, to edit and to give back by --suite.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import yaml

from megatron_lccp.config.load import as_tree
from megatron_lccp.monitors import CopyBack, CorpusPPL, HeadAblation, InterferenceGrid, NeedleGrid
from megatron_lccp.schema import Monitor

LENGTHS_TOK = (512, 1024, 2048)
"""Of the samples, unless --lengths names others."""
HAYSTACK, CORPORA = "bundled/stdlib", ("bundled/stdlib", "bundled/biographies")
"""Text that needs no file."""
PREFILL_TOK = 8192
"""Of a longer sample, a part at a time: what a prefill takes beside keys and values no longer grows with it."""


def published_suite(
    lengths_tok: Sequence[int] = LENGTHS_TOK, haystack: str = HAYSTACK, corpora: Sequence[str] = CORPORA
) -> list[Monitor]:
    """Monitors for samples of these lengths. Heads are scored in the forwards of the grid, which cost most."""
    shortest, longest = min(lengths_tok), max(lengths_tok)
    common: dict[str, Any] = dict(haystacks=(haystack,), prefill_tok=PREFILL_TOK if longest > PREFILL_TOK else None)
    quarter, lattice = longest // 4, max(longest // 16, 1)
    return [
        NeedleGrid(
            lengths_tok=tuple(sorted(set(lengths_tok))), depths=(0.0, 0.25, 0.5, 0.75, 1.0), lattice_tok=lattice, samples=3,
            scores=("retrieval_score", "content_score", "needle_mass"), **common,
        ),
        InterferenceGrid(befores_tok=(0, quarter, 2 * quarter), afters_tok=(0, quarter), samples=2, **common),
        CorpusPPL(corpora=tuple(corpora), length_tok=longest, sequences=2),
        CopyBack(longest_tok=longest, samples=2),
        HeadAblation(lengths_tok=(shortest,), depths=(0.25, 0.75), lattice_tok=lattice, samples=2, top=(10,), **common),
    ]  # fmt: skip


def suite_text(monitors: Sequence[Monitor]) -> str:
    """The monitors as YAML: what `load_monitors` reads, fields with their defaults left out."""
    tree = [{"class_path": as_tree(monitor)["class_path"], "init_args": _given(monitor)} for monitor in monitors]
    return yaml.safe_dump({"monitors": tree}, sort_keys=False, width=120, default_flow_style=None)


def _given(monitor: Monitor) -> dict[str, Any]:
    """Its fields that do not have their defaults."""
    tree = as_tree(monitor)["init_args"]
    return {f.name: tree[f.name] for f in dataclasses.fields(cast(Any, monitor)) if tree[f.name] != as_tree(f.default)}
