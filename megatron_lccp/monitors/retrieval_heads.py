"""The retrieval score of every attention head: how often it looks at the very token that is to be copied next.

In: an open window. Out: rows per sample, layer and head. Paper: section 6 and appendix A.1, Figures 4 and 5.

Shapes: n query heads on this rank, N query heads of a layer, L layers of the model, k samples, r answer rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from megatron_lccp.data.needles import NeedleSample
from megatron_lccp.model.forward import Request, predict
from megatron_lccp.model.taps import score_rows, tap_attention
from megatron_lccp.monitors.samples import needle_set, place_of
from megatron_lccp.parallel.gather import sum_over_ranks
from megatron_lccp.schema import Every, Monitor, Row
from megatron_lccp.training.window import EvalWindow


@dataclass(frozen=True)
class RetrievalHeads(Monitor):
    """Which heads copy from the needle.

    Metrics, one row each per sample and head: `retrieval_score`, share in [0, 1] of the answer tokens for which the
    attention row that predicts the token has its maximum inside the needle, on a position that holds that same token;
    0 for a head that does not retrieve, 1 for one that copies the whole sentence. `needle_mass`, share in [0, 1] of
    the attention of those rows that lies on the needle, averaged over rows; needle / context length for a blind head.
    A head's score is the mean over samples; the paper calls it a retrieval head above 0.1.
    """

    every: Every = Every(steps=100)
    """When it is due; besides, at the start of a stage and at the end."""
    on_error: Literal["skip", "stop"] = "skip"
    """After an exception: record it and go on, or stop the run."""
    lengths_tok: tuple[int, ...] = (1024,)
    """Total tokens of a sample, answer included."""
    depths: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Where the needle stands: share of the haystack before it."""
    samples: int = 4
    """Samples per length and depth; each has a haystack and a needle of its own."""
    families: tuple[str, ...] = ("biography",)
    """Families of needles (megatron_lccp/data/needles.py)."""
    haystacks: tuple[str, ...] = ()
    """Sources whose held-out documents make the haystacks; samples take them in turn."""
    seed: int = 1
    """Seed of the sample set."""

    def measure(self, window: EvalWindow) -> Iterable[Row]:
        """Rows `retrieval_score` and `needle_mass` per sample and head."""
        chosen = needle_set(window, self)
        samples, total = chosen.samples, len(chosen.samples)
        requests = [Request(sample.tokens, sample.answer) for sample in samples]
        # each rank fills what its data-parallel replica, pipeline stage and tensor-parallel heads saw
        found = torch.zeros(2, total, window.layers, window.heads, device=window.groups.device)
        in_flight: list[int | None] = [None]

        def before(number: int | None) -> None:
            in_flight[0] = number

        def visit(layer: int, query_sbnh: torch.Tensor, key_sbgh: torch.Tensor, scale: float) -> None:
            number, heads = in_flight[0], query_sbnh.shape[2]
            if number is not None:
                score_n, mass_n = head_scores(samples[number], query_sbnh[:, 0], key_sbgh[:, 0], scale)
                first = window.groups.tp.rank() * heads
                found[0, number, layer, first : first + heads] = score_n
                found[1, number, layer, first : first + heads] = mass_n

        with tap_attention(window.chunks, visit):
            predict(
                window.chunks, window.groups, requests, window.vocab_size, before=before,
                done=lambda count: window.say(f"{self.name} {count}/{total}"),
            )  # fmt: skip
        score_kLN, mass_kLN = sum_over_ranks(found).cpu().numpy()
        for number, sample in enumerate(samples):
            where, n = place_of(sample, chosen.sha), sample.answer[1] - sample.answer[0]
            for layer, head in np.ndindex(window.layers, window.heads):
                at = dict(layer=layer, head=head, **where)
                yield window.row(self, "retrieval_score", score_kLN[number, layer, head], "share", n, **at)
                yield window.row(self, "needle_mass", mass_kLN[number, layer, head], "share", n, **at)


def head_scores(
    sample: NeedleSample, query_snh: torch.Tensor, key_sgh: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(retrieval score [n], attention mass on the needle [n]) of the heads whose query and key these are (A.1)."""
    start, end = sample.answer
    rows_r = torch.arange(start - 1, end - 1, device=query_snh.device)  # row t - 1 predicts token t
    rows = score_rows(query_snh[start - 1 : end - 1], key_sgh, rows_r, sample.needle, scale)
    tokens_s = torch.as_tensor(sample.tokens, device=query_snh.device)
    inside_rn = (rows.argmax_rn >= sample.needle[0]) & (rows.argmax_rn < sample.needle[1])
    same_rn = tokens_s[rows.argmax_rn] == tokens_s[start:end, None]
    return (inside_rn & same_rn).float().mean(0), rows.mass_rn.mean(0)
