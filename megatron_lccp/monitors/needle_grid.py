"""Needle in a haystack as a number that does not saturate: the perplexity of the answer over length x depth.

In: an open window. Out: rows per sample. Paper: section 5, Figures 2 and 3.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from megatron_lccp.model.forward import Request, predict
from megatron_lccp.monitors.samples import needle_set, place_of
from megatron_lccp.schema import Every, Monitor, Row
from megatron_lccp.training.window import EvalWindow


@dataclass(frozen=True)
class NeedleGrid(Monitor):
    """How sure the model is of a sentence it has read before, by length of the text and depth of the sentence.

    Metrics, one row each per sample: `answer_nll`, nat, mean over the n answer tokens given the text before them; 0 is
    certain. `exact`, 1 if every answer token is the most likely one (what greedy decoding would give), else 0.
    The paper's cell is the mean of exp(answer_nll) over its samples; analysis calls it mean_ppl.
    """

    every: Every = Every(steps=100)
    """When it is due; besides, at the start of a stage and at the end."""
    on_error: Literal["skip", "stop"] = "skip"
    """After an exception: record it and go on, or stop the run."""
    lengths_tok: tuple[int, ...] = (1024, 2048, 4096)
    """Total tokens of a sample, answer included."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where the needle stands: share of the haystack before it."""
    samples: int = 4
    """Samples per cell; each has a haystack and a needle of its own, the same ones in every cell."""
    families: tuple[str, ...] = ("biography",)
    """Families of needles (megatron_lccp/data/needles.py)."""
    haystacks: tuple[str, ...] = ()
    """Sources whose held-out documents make the haystacks; samples take them in turn."""
    seed: int = 0
    """Seed of the sample set."""

    def measure(self, window: EvalWindow) -> Iterable[Row]:
        """Rows `answer_nll` and `exact` per sample."""
        chosen = needle_set(window, self)
        requests = [Request(sample.tokens, sample.answer) for sample in chosen.samples]
        total = len(requests)
        found = predict(
            window.chunks, window.groups, requests, window.vocab_size,
            done=lambda count: window.say(f"{self.name} {count}/{total}"),
        )  # fmt: skip
        for sample, prediction in zip(chosen.samples, found):
            where, n = place_of(sample, chosen.sha), prediction.nll_r.size
            yield window.row(self, "answer_nll", prediction.nll_r.mean(), "nat", n, **where)
            yield window.row(self, "exact", float(prediction.hit_r.all()), "share", n, **where)
