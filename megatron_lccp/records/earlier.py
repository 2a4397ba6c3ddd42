"""What the monitors of version 0.1 measured, which kept no metrics.json: so that their runs still open.

In: nothing. Out: the declarations, as metrics.json holds them. It stays as it is: later runs say it of themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_Fields = dict[str, Any]
"""What a metric declares of itself."""
_Metrics = dict[str, _Fields]
"""Metrics of a monitor by name."""

_NLL: _Fields = {"unit": "nat", "better": "lower", "bounds": [0.0, None]}
_PPL: _Fields = {"unit": "ppl", "better": "lower", "bounds": [1.0, None]}
_SHARE: _Fields = {"unit": "share", "better": "higher", "bounds": [0.0, 1.0]}
_HEAD: _Fields = {"unit": "share", "level": "mechanistic", "axes": ["head", "layer"]}
_CORPUS: _Fields = {"level": "probabilistic", "series": ["corpus", "length_tok"]}
_DEPTHS, _DISTANCES = ["length_tok", "depth_cell"], ["after_tok", "before_tok"]
_ABLATED: _Fields = {"unit": "nat", "level": "mechanistic", "series": ["ablated"]}

_HEADS: _Metrics = {
    "retrieval_score": _HEAD | _SHARE | {"judged": True, "margin": 0.005},
    "content_score": _HEAD | _SHARE | {"about": "The retrieval score over name and value tokens alone."},
    "wu2024": _HEAD | {"better": "higher", "bounds": [0.0, None], "about": "As in the public code of Wu et al."},
    "needle_mass": _HEAD | {"bounds": [0.0, 1.0], "about": "Attention of the answer's rows on the needle."},
    "mass_minus_null": _HEAD | {
        "bounds": [-1.0, 1.0],
        "about": "Attention of the question's rows on the needle, less that of a question without content.",
    },
}  # fmt: skip
_NEEDLES: _Metrics = {"answer_nll": _NLL | {"level": "probabilistic"}, "exact": _SHARE | {"level": "behavioural"}}
_DECLARED: Mapping[str, _Metrics] = MappingProxyType({
    "CorpusPPL": {
        "nll": _CORPUS | _NLL | {"judged": True, "margin": 0.005}, "ppl": _CORPUS | _PPL,
        "position_nll": _CORPUS | _NLL | {"axes": ["to_tok"]}, "sequence_nll": _CORPUS | _NLL,
        "sequence_position_nll": _CORPUS | _NLL | {"axes": ["to_tok"]},
    },
    "NeedleGrid": {name: it | {"axes": _DEPTHS, "judged": True, "margin": 0.01} for name, it in _NEEDLES.items()}
    | _HEADS,
    "InterferenceGrid": {
        name: it | {"axes": _DISTANCES, "judged": True, "margin": 0.01} for name, it in _NEEDLES.items()
    } | _HEADS,
    "RetrievalHeads": _HEADS,
    "HeadAblation": {
        "ablated_nll": _ABLATED, "nll_change": _ABLATED,
        "ablated_head": _ABLATED | {"unit": "count", "axes": ["head", "layer"]},
    },
})  # fmt: skip


def declared_by_0_1() -> dict[str, list[dict[str, Any]]]:
    """Monitor -> its metrics, as `RunStore.write_metrics` keeps them."""
    return {
        monitor: [{"name": name, "about": "", **declared} for name, declared in metrics.items()]
        for monitor, metrics in _DECLARED.items()
    }
