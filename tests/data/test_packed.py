"""Packed batches of real files: the same on any layout and after a stop anywhere, each label in its own document."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_lccp.config.tree import Config, MixtureConfig, PackConfig
from megatron_lccp.data.loader import stage_data
from megatron_lccp.data.manifest import prefix
from megatron_lccp.data.packed import PackedData, attention_work

CONTEXT, PER_STEP, STEPS = 512, 8, 11
SOURCES = ("files", "people")
MIXTURE = {"all": MixtureConfig(sources={"files": 0.5, "people": 0.5})}


def packed(config: Config, **fields: Any) -> Config:
    fields = {
        "tokens": STEPS * PER_STEP * CONTEXT, "global_batch_tok": PER_STEP * CONTEXT, "context_tok": CONTEXT,
        "pack": PackConfig(align_tok=4, window_steps=4), "masks": "documents", "mixture": MIXTURE,
        "micro_batch": 1, **fields,
    }  # fmt: skip
    return dataclasses.replace(config, stages={"lccp": dataclasses.replace(config.stages["lccp"], **fields)})


def step_of(data: Any, step: int, ranks: int = 1, b: int = 1) -> list[dict[str, Any]]:
    """The samples of a step, each a batch of its own, in the order in which the ranks take them."""
    found = []
    for number in range(PER_STEP // (ranks * b)):
        for rank in range(ranks):
            batch = data.batch(step, number, rank, ranks)
            batch.setdefault("loss_weight", torch.full((1, b * CONTEXT), 1 / (b * CONTEXT)))
            bounds = batch.pop("bounds", (0, b * CONTEXT))
            for k in range(b):
                of = {name: x[0, k * CONTEXT : (k + 1) * CONTEXT] for name, x in batch.items()}
                inside = [at - k * CONTEXT for at in bounds if k * CONTEXT <= at <= (k + 1) * CONTEXT]
                found.append(of | {"bounds": inside})
    return found


def same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    return all(
        a["bounds"] == b["bounds"] and all(torch.equal(a[name], b[name]) for name in a if name != "bounds")
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("how", ["best_fit", "concat"])
def test_every_label_is_the_next_token_of_its_own_document(config: Config, tmp_path: Path, how: str) -> None:
    config = packed(config, pack=PackConfig(how=how, align_tok=4, window_steps=4))
    data = stage_data(config, "lccp", tmp_path)
    texts = Counter()
    for source in SOURCES:
        for document in IndexedDataset(prefix(config.data.dir, source, "train")):
            texts[" ".join(map(str, document))] += 1
    whole = " ; ".join(texts)
    for step in range(3):
        weights = 0.0
        for sample in step_of(data, step):
            weights += float(sample["loss_weight"].sum())
            for start, end in zip(sample["bounds"], sample["bounds"][1:]):
                assert (end - start) % 4 == 0
                real = ~sample["padding"][start:end]
                count = int(real.sum())
                assert bool(real[:count].all())
                trained = sample["loss_weight"][start:end] > 0
                assert not trained[count:].any() and trained[: max(count - 1, 0)].all()
                tokens, labels = sample["tokens"][start:end], sample["labels"][start:end]
                text = [*tokens[:count].tolist(), *labels[count - 1 : count][trained[count - 1 : count]].tolist()]
                assert " ".join(map(str, text)) in whole
                assert torch.equal(labels[: max(count - 1, 0)], tokens[1:count])
        assert weights == pytest.approx(PER_STEP)  # of as many micro-batches


def test_ranks_and_micro_batches_change_nothing(config: Config, tmp_path: Path) -> None:
    one = stage_data(packed(config), "lccp", tmp_path)
    other = stage_data(packed(config, micro_batch=2), "lccp", tmp_path)
    for step in range(5):
        here, there = step_of(one, step), step_of(other, step, ranks=2, b=2)
        for sample in there:
            sample["loss_weight"] *= 2  # half as many micro-batches
        here, there = (sorted(samples, key=lambda sample: sample["tokens"].tolist()) for samples in (here, there))
        assert same(here, there)


def test_a_stop_anywhere_goes_on_with_the_same_samples(config: Config, tmp_path: Path) -> None:
    config = packed(config)
    whole = stage_data(config, "lccp", tmp_path)
    steps, kept = [], []
    for step in range(STEPS):
        kept.append(json.dumps(whole.taken(step)))
        steps.append(step_of(whole, step))
    for at in range(STEPS):
        data = stage_data(config, "lccp", tmp_path / "elsewhere", json.loads(kept[at]), at)
        assert all(same(step_of(data, step), steps[step]) for step in range(at, min(at + 3, STEPS)))


def counted(data: PackedData, steps: range) -> Counter:
    """How often each token was taken, by source and place."""
    taken: Counter = Counter()
    for step in steps:
        for sample in data.samples(step):
            for piece in sample:
                taken.update((piece.source, piece.document, at) for at in range(piece.start, piece.end))
    return taken


def test_a_longer_stage_another_mixture_and_a_further_stage_take_what_is_left(config: Config, tmp_path: Path) -> None:
    """Token by token: an epoch is gone through once before anything comes again."""
    first = packed(config, tokens=6 * PER_STEP * CONTEXT)
    data = stage_data(first, "lccp", tmp_path)
    taken = counted(data, range(5))
    longer = packed(
        config, tokens=12 * PER_STEP * CONTEXT, mixture={"all": MixtureConfig(sources={"files": 0.2, "people": 0.8})}
    )
    data = stage_data(longer, "lccp", tmp_path, data.taken(5), 5)
    taken += counted(data, range(5, 12))
    stages = {"a": longer.stages["lccp"], "b": dataclasses.replace(longer.stages["lccp"], context_tok=64)}
    both = dataclasses.replace(longer, stages=stages)
    further = stage_data(both, "b", tmp_path, data.taken(12), 0)
    taken += counted(further, range(12))
    left = further.taken(12)["behind"]
    places = further.places
    for source in SOURCES:
        corpus = further._corpora[source]
        carried = sum(end - start for name, _, start, end in left["carried"] if name == source)
        times = Counter(count for (name, _, _), count in taken.items() if name == source)
        epoch = places[source].epoch
        # carried pieces are of the epochs that are through, or of the running one
        assert set(times) <= {epoch, epoch + 1} or carried
        total = sum(times.elements()) + carried
        begun = total - epoch * corpus.length_d.sum()
        assert 0 <= begun <= corpus.length_d.sum(), source
        assert max(times) <= epoch + 1


def test_a_stage_that_was_cut_short_leaves_its_window_to_the_next(config: Config, tmp_path: Path) -> None:
    data = stage_data(packed(config), "lccp", tmp_path)
    taken = counted(data, range(6))  # two of the second window's four steps are left
    after = stage_data(packed(config), "lccp", tmp_path, data.taken(6), 0)
    unused = Counter(
        (piece.source, piece.document, at)
        for step in (6, 7) for sample in data.samples(step) for piece in sample for at in range(piece.start, piece.end)
    )  # fmt: skip
    new = counted(after, range(4))
    assert all(new[token] >= 1 for token in unused) and sum(taken.values())


def test_one_whole_document_a_sequence_is_as_without_masks(config: Config, tmp_path: Path) -> None:
    """All labels count: no weights, so the loss is the same bit for bit."""
    config = packed(config, pack=PackConfig(long="exact", align_tok=4))
    source = {"all": MixtureConfig(sources={"packages": 1.0})}
    config = packed(config, pack=PackConfig(long="exact", align_tok=4), mixture=source)
    batch = stage_data(config, "lccp", tmp_path).batch(0, 0, 0, 1)
    assert batch["bounds"] == (0, CONTEXT) and not batch["padding"].any()


def test_what_cannot_be_continued_is_refused(config: Config, tmp_path: Path) -> None:
    config = packed(config)
    data = stage_data(config, "lccp", tmp_path)
    data.batch(0, 0, 0, 1)
    taken = data.taken(1)
    source, _, start, end = taken["left"][0][0][0]
    taken["left"][0][0][0] = (source, 1, start, end)
    with pytest.raises(ValueError, match="a document is gone that the running window"):
        stage_data(config, "lccp", tmp_path, taken, 1)
    long = packed(config, context_tok=4096 * 64, global_batch_tok=4096 * 64 * 8, pack=PackConfig(long="exact"))
    with pytest.raises(ValueError, match="has no document of 262144 tokens to train on; give source .* pack.long"):
        stage_data(long, "lccp", tmp_path)
    assert np.array_equal(data.batch(1, 0, 0, 1)["tokens"], data.batch(1, 0, 0, 1)["tokens"])


def test_attention_work_is_that_of_the_batches(config: Config, tmp_path: Path) -> None:
    config = packed(config)
    data = stage_data(config, "lccp", tmp_path)
    squares = [
        sum((end - start) ** 2 for start, end in zip(sample["bounds"], sample["bounds"][1:])) / CONTEXT**2
        for step in range(8)
        for sample in step_of(data, step)
    ]
    found = attention_work(config, "lccp", 2, windows=2)
    assert found is not None and found.share == pytest.approx(np.mean(squares), rel=0.1)  # another order
    assert 1 <= found.busiest < 1.1 and 0 < found.padding < 0.1
    elsewhere = dataclasses.replace(config, data=dataclasses.replace(config.data, dir=str(tmp_path)))
    assert attention_work(elsewhere, "lccp", 2) is None
