"""Every monitor with every score, as one override of a configuration: what the tests measure on all layouts."""

from __future__ import annotations

import json
from typing import Any

from tests.measuring.own_scores import OWN
from tests.tiny import MONITORS

SCORES = ["retrieval_score", "content_score", "wu2024", "needle_mass", "mass_minus_null", *OWN]


def suite(share: bool = True, every: int = 3) -> str:
    """`--monitors=[...]`: odd lengths, cells that coincide, several trees, text of two haystacks, small prefills."""
    common = {"every": {"steps": every}, "haystacks": ["code", "people"]}
    needles = {**common, "share": share}
    grid = {**needles, "lengths_tok": [161, 200, 230], "depths": [0.0, 0.3, 0.5, 1.0], "samples": 2, "lattice_tok": 24}
    parts = {
        "CorpusPPL": {"every": {"steps": every}, "length_tok": 65, "sequences": 3, "edges_tok": [16, 32]},
        "NeedleGrid": {**grid, "families": ["biography", "single"]},
        "InterferenceGrid": {
            **needles, "befores_tok": [0, 17, 60], "afters_tok": [5, 40], "samples": 2, "families": ["paraphrase"],
            "scores": SCORES, "prefill_tok": 75,
        },
        "RetrievalHeads": {
            **needles, "lengths_tok": [180], "depths": [0.25, 0.75], "samples": 1, "scores": SCORES,
            "prefill_tok": 50,
        },
        "HeadAblation": {**needles, "top": [2], "heads": [[0, 1], [1, 3]], "lengths_tok": [150], "samples": 1},
        "CopyBack": {
            "every": {"steps": every}, "longest_tok": 111, "segment_tok": 9, "samples": 3, "share": share,
        },
    }  # fmt: skip
    return _override(parts)


def small_suite(share: bool = True) -> str:
    """The same monitors and scores in few forwards, for many layouts."""
    common = {"every": {"steps": 50}, "haystacks": ["code", "people"], "share": share, "samples": 1}
    parts = {
        "CorpusPPL": {"every": {"steps": 50}, "length_tok": 65, "sequences": 2, "edges_tok": [16, 32]},
        "NeedleGrid": {**common, "lengths_tok": [161, 200], "depths": [0.3, 1.0], "lattice_tok": 24},
        "InterferenceGrid": {
            **common, "befores_tok": [0, 60], "afters_tok": [5, 40], "families": ["paraphrase"], "scores": SCORES,
            "prefill_tok": 75,
        },
        "RetrievalHeads": {**common, "lengths_tok": [180], "depths": [0.75], "scores": SCORES, "prefill_tok": 50},
        "HeadAblation": {
            **common, "top": [2], "random_draws": 1, "heads": [[0, 1], [1, 3]], "lengths_tok": [150], "depths": [0.5],
        },
        "CopyBack": {"every": {"steps": 50}, "longest_tok": 111, "segment_tok": 9, "samples": 1, "share": share},
    }  # fmt: skip
    return _override(parts)


def _override(parts: dict[str, dict[str, Any]]) -> str:
    return "--monitors=" + json.dumps([{"class_path": f"{MONITORS}.{k}", "init_args": v} for k, v in parts.items()])
