"""Perplexity on held-out documents: the smallest monitor, and the pattern for one of your own.

In: an open window. Out: one row per corpus and metric. Paper: section 7.1, Figure 6.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_lccp.data.loader import heldout_sequences
from megatron_lccp.model.forward import Request, predict
from megatron_lccp.schema import Every, Monitor, Row
from megatron_lccp.training.window import EvalWindow


@dataclass(frozen=True)
class CorpusPPL(Monitor):
    """How well the model predicts held-out documents of each corpus.

    Metrics: `nll`, nat, mean over all predicted tokens, from 0 (certain and right) up; ln(vocabulary) is what knowing
    nothing gives. `ppl` = exp(nll), from 1 up.
    """

    every: Every = Every(steps=100)
    """When it is due; besides, at the start of a stage and at the end."""
    on_error: Literal["skip", "stop"] = "skip"
    """After an exception: record it and go on, or stop the run."""
    corpora: tuple[str, ...] = ()
    """Sources whose held-out documents are measured; empty means all that the stages train on."""
    length_tok: int = 1024
    """Tokens of a sequence."""
    sequences: int = 8
    """Sequences per corpus."""

    def measure(self, window: EvalWindow) -> Iterable[Row]:
        """Rows `nll` and `ppl` per corpus."""
        for corpus in self.corpora or trained_on(window):
            sequence_ks = heldout_sequences(window.config, corpus, self.length_tok - 1, self.sequences)
            requests = [Request(tokens_s, (1, len(tokens_s))) for tokens_s in sequence_ks]
            found = predict(window.chunks, window.groups, requests, window.vocab_size)
            nll = np.concatenate([prediction.nll_r for prediction in found])
            where = dict(corpus=corpus, length_tok=self.length_tok)
            yield window.row(self, "nll", nll.mean(), "nat", nll.size, **where)
            yield window.row(self, "ppl", np.exp(nll.mean()), "ppl", nll.size, **where)


def trained_on(window: EvalWindow) -> list[str]:
    """Every source that some stage trains on, in the order of the configuration."""
    mixtures = (part for stage in window.config.stages.values() for part in stage.mixture.values())
    return list(dict.fromkeys(source for part in mixtures for source in part.sources))
