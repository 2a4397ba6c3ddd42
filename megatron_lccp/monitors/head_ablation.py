"""Do the heads that score high do the work? Their output is set to zero, and the answer is asked for again.

In: an open window. Out: rows per sample and set of heads. The zeroes stand for the whole forward, the text before the
answer included (the paper's section 6 takes the correlation for granted; Wu et al. mask while decoding only).
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass

import numpy as np

from megatron_lccp.measuring import (
    ByDepth,
    EvalWindow,
    Every,
    Metric,
    NeedleMonitor,
    Row,
    Work,
    head_score,
    mean_scores,
    place_of,
    run_samples,
    work_of,
)

Head = tuple[int, int]
"""(layer, head), both from 0."""


@dataclass(frozen=True)
class HeadAblation(ByDepth, NeedleMonitor):
    """What the answer costs without some heads: the best retrieval heads, as many random others, or heads by name.

    One row per sample and set: none, top10, random10.0, named.
    """

    metrics = (
        Metric(
            name="ablated_nll", unit="nat", level="mechanistic", series=("ablated",),
            about="Mean NLL of the answer's tokens with the heads of `ablated` set to zero.",
        ),
        Metric(
            name="nll_change", unit="nat", level="mechanistic", series=("ablated",),
            about="The same less the whole model's: 0 where the heads do not matter, above 0 where they carry the answer.",
        ),
        Metric(
            name="ablated_head", unit="count", level="mechanistic", axes=("head", "layer"), series=("ablated",),
            about="Always 1; says which heads a set holds.",
        ),
    )  # fmt: skip
    every: Every = Every(steps=500)
    top: tuple[int, ...] = (10,)
    """How many of the heads with the best retrieval score to set to zero, one set each."""
    random_draws: int = 1
    """For each of them: sets of as many heads drawn from all others."""
    heads: tuple[Head, ...] = ()
    """Heads (layer, head) to set to zero together."""
    depths: tuple[float, ...] = (0.25, 0.75)
    _: KW_ONLY
    seed: int = 2
    """Seed of the sample set and of the random heads."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.random_draws < 0:
            raise ValueError(f"random_draws: should be at least 0, is {self.random_draws}")

    def measure(self, window: EvalWindow) -> Iterable[Row]:
        """Rows for the whole model and for each set of heads."""
        score = head_score("retrieval_score")
        whole = run_samples(window, self, (score,))
        sets = self.sets(mean_scores(whole, score))
        for name, heads in {"none": [], **sets}.items():
            measured = whole
            if heads:
                with window.without_heads(heads):
                    measured = run_samples(window, self, label=f"without {name}")
            for sample, found, base in zip(whole.chosen.samples, measured.found, whole.found):
                where, n = dict(ablated=name, **place_of(sample, whole.chosen.sha)), found.nll_r.size
                yield window.row(self, "ablated_nll", found.nll_r.mean(), n, **where)
                if heads:
                    yield window.row(self, "nll_change", found.nll_r.mean() - base.nll_r.mean(), n, **where)
            for layer, head in heads:
                yield window.row(self, "ablated_head", 1, 1, ablated=name, layer=layer, head=head)

    def work(self, window: EvalWindow) -> Work:
        """What `measure` runs, for a plan."""
        once = work_of(window, self, (head_score("retrieval_score"),))
        times = 1 + len(self.top) * (1 + self.random_draws) + bool(self.heads)
        return dataclasses.replace(once, times=times * once.times)

    def check(self, window: EvalWindow) -> Iterable[str]:
        """Heads that the model does not have, sets that it has too few heads for, and what every needle monitor checks."""
        yield from super().check(window)
        yield from self.against(window.layers, window.heads)

    def against(self, layers: int, heads: int, there: int | None = None) -> Iterable[str]:
        """What is wrong with the sets on a model of so many layers, with so many heads each, or with `there` in all."""
        count = layers * heads if there is None else there
        for k in self.top:
            if not 0 < k <= count:
                yield f"top: {k} is no number of heads of a model that has {count}"
            elif self.random_draws and 2 * k > count:
                yield f"top: {k} of {count} heads leave fewer than {k} others to draw from; lower it"
        for layer, head in self.heads:
            if not (0 <= layer < layers and 0 <= head < heads):
                yield f"heads: ({layer}, {head}) is not in a model of {layers} layers with {heads} heads"

    def sets(self, score_LN: np.ndarray) -> dict[str, list[Head]]:
        """Name -> heads to set to zero. ValueError if the model has too few heads or no such head."""
        layers, heads = score_LN.shape
        order = [divmod(int(k), heads) for k in np.argsort(-score_LN.ravel(), kind="stable")]
        order = order[: np.count_nonzero(~np.isnan(score_LN))]  # layers without attention come last, with NaN
        for problem in self.against(layers, heads, len(order)):
            raise ValueError(problem)
        sets: dict[str, list[Head]] = {}
        for k in self.top:
            sets[f"top{k}"] = order[:k]
            for draw in range(self.random_draws):
                rng = random.Random(f"{self.seed}/{k}/{draw}")
                sets[f"random{k}.{draw}"] = sorted(rng.sample(sorted(order[k:]), k))
        if self.heads:
            sets["named"] = sorted({(layer, head) for layer, head in self.heads})
        return sets
