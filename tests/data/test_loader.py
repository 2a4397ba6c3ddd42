"""Batches: real samples, the same for every layout and after a restart, in the shares of the mixture."""

import dataclasses
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_lccp.config.tree import Config, MixtureConfig
from megatron_lccp.data.loader import StageData, calibration_sequences, heldout_tokens, sequences_of
from megatron_lccp.data.manifest import prefix
from megatron_lccp.data.prepare import prepare
from megatron_lccp.data.stages import mixture_weights, order_of, stage_steps, trained_on

CONTEXT, PER_STEP, STEPS = 128, 8, 37


def stage_of(config: Config, **fields) -> Config:
    return dataclasses.replace(config, stages={"lccp": dataclasses.replace(config.stages["lccp"], **fields)})


def samples_of_step(data: StageData, step: int, data_ranks: int, micro_batch: int) -> np.ndarray:
    """All samples of a step in their global order: [samples, context + 1]."""
    rows = []
    for index in range(PER_STEP // (data_ranks * micro_batch)):
        for rank in range(data_ranks):
            batch = data.batch(step, index, rank, data_ranks)
            assert batch["tokens"].shape == batch["labels"].shape == (micro_batch, CONTEXT)
            assert batch["tokens"].dtype == batch["labels"].dtype == torch.int64
            assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
            rows.append(torch.cat([batch["tokens"], batch["labels"][:, -1:]], dim=1).numpy())
    return np.concatenate(rows)


def all_samples(data: StageData, data_ranks: int = 1, micro_batch: int = 2) -> np.ndarray:
    return np.concatenate([samples_of_step(data, step, data_ranks, micro_batch) for step in range(data.steps)])


@pytest.fixture(scope="module")
def data(config, tmp_path_factory) -> StageData:
    return StageData(config, "lccp", 7, tmp_path_factory.mktemp("indices"))


@pytest.fixture(scope="module")
def samples(data) -> np.ndarray:
    return all_samples(data)


def stored(config: Config, part: str) -> dict[str, list[np.ndarray]]:
    found = {}
    for source in mixture_weights(config.stages["lccp"]):
        dataset = IndexedDataset(prefix(config.data.dir, source, part))
        found[source] = [np.array(dataset[i], np.int64) for i in range(len(dataset))]
    return found


def find(needle: np.ndarray, text: str) -> bool:
    return "".join(map(chr, needle)) in text


def as_text(documents: list[np.ndarray]) -> str:
    return "".join(chr(token) for document in documents for token in document)


def test_steps_and_weights(config, data):
    assert data.steps == stage_steps(config.stages["lccp"]) == STEPS and data.samples_per_step == PER_STEP
    assert data.weights == pytest.approx(
        {"files": 1 / 8, "people": 1 / 8 + 1 / 8, "packages": 1 / 2, "segments": 1 / 8}
    )
    assert trained_on(config) == ("files", "people", "packages", "segments")
    tokens = {name: sum(map(len, documents)) for name, documents in stored(config, "train").items()}
    budget = STEPS * PER_STEP * CONTEXT
    assert data.epochs == pytest.approx({name: budget * data.weights[name] / tokens[name] for name in tokens})


def test_a_step_has_the_same_samples_on_any_layout(config, data, samples, tmp_path):
    by_one = StageData(stage_of(config, micro_batch=1), "lccp", 7, tmp_path)
    for step in (0, 5, STEPS - 1):
        expected = samples[step * PER_STEP : (step + 1) * PER_STEP]
        assert np.array_equal(samples_of_step(data, step, data_ranks=2, micro_batch=2), expected)
        assert np.array_equal(samples_of_step(data, step, data_ranks=4, micro_batch=2), expected)
        assert np.array_equal(samples_of_step(by_one, step, data_ranks=8, micro_batch=1), expected)
    with pytest.raises(AssertionError):
        data.batch(STEPS, 0, 0, 1)
    with pytest.raises(AssertionError):
        data.batch(0, 4, 0, 1)
    with pytest.raises(AssertionError):
        data.batch(0, 0, 2, 2)


def test_a_resumed_run_goes_on_with_the_same_samples(config, samples, tmp_path):
    """From kept indices, from indices of a build that was cut off, and from none."""
    first = StageData(config, "lccp", 7, tmp_path)
    built = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    assert built and np.array_equal(samples_of_step(first, 11, 1, 2), samples[11 * PER_STEP : 12 * PER_STEP])
    again = StageData(config, "lccp", 7, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")} == built
    assert np.array_equal(samples_of_step(again, 20, 1, 2), samples[20 * PER_STEP : 21 * PER_STEP])
    del first, again
    for path in built:
        os.truncate(path, path.stat().st_size - 8)
    next(tmp_path.rglob("complete")).unlink()
    assert np.array_equal(all_samples(StageData(config, "lccp", 7, tmp_path)), samples)


def test_seed_and_stage_decide_the_samples(config, samples, tmp_path):
    other_seed = all_samples(StageData(config, "lccp", 8, tmp_path))
    assert not np.array_equal(other_seed, samples)
    two = dataclasses.replace(config, stages={**config.stages, "next": config.stages["lccp"]})
    next_stage = all_samples(StageData(two, "next", 7, tmp_path))
    assert not np.array_equal(next_stage, samples) and not np.array_equal(next_stage, other_seed)
    assert np.array_equal(all_samples(StageData(two, "lccp", 7, tmp_path)), samples)


def test_a_stage_that_goes_on_takes_up_the_order(config, data, samples, tmp_path):
    """A stage cut into three: the last one ends the order that the whole stage has."""
    whole, step = config.stages["lccp"], PER_STEP * CONTEXT
    cut = {
        "lccp": dataclasses.replace(whole, tokens=3 * step),
        "decay": dataclasses.replace(whole, tokens=4 * step, goes_on_from="lccp"),
        "rest": dataclasses.replace(whole, tokens=(STEPS - 7) * step, goes_on_from="decay"),
    }
    assert [order_of(cut, name) for name in cut] == [("lccp", 0), ("lccp", 3), ("lccp", 7)]
    rest = StageData(dataclasses.replace(config, stages=cut), "rest", 7, tmp_path)
    assert rest.steps == STEPS - 7 and rest.epochs == data.epochs
    assert np.array_equal(all_samples(rest), samples[7 * PER_STEP :])


def test_indices_of_each_order_have_a_directory_of_their_own(config, tmp_path):
    """One that is complete says nothing of another."""
    mixture = config.stages["lccp"].mixture
    others = (
        {"context_tok": 64, "tokens": STEPS * 512, "global_batch_tok": 512},  # as many samples
        {"mixture": mixture | {"long": dataclasses.replace(mixture["long"], share=9.0)}},
        {"mixture": {"long": mixture["long"]}},
        {"tokens": 9 * 1024},
        {"global_batch_tok": 512},
    )
    for changed in (config, config, stage_of(config, micro_batch=1), *(stage_of(config, **other) for other in others)):
        StageData(changed, "lccp", 7, tmp_path)
    StageData(config, "lccp", 8, tmp_path)
    assert len(list(tmp_path.iterdir())) == len(list(tmp_path.glob("*/complete"))) == 2 + len(others)


def test_new_data_under_the_same_name_is_not_read_with_old_indices(config, tmp_path):
    """Megatron's own cache knows a file by its path only."""
    shutil.copytree(config.data.dir, tmp_path / "tokens")
    here = dataclasses.replace(config, data=dataclasses.replace(config.data, dir=str(tmp_path / "tokens")))
    one = stage_of(here, mixture={"all": MixtureConfig(sources={"files": 1.0})})
    before = all_samples(StageData(one, "lccp", 7, tmp_path / "indices"))
    people = dataclasses.replace(one.data, sources={"files": config.data.sources["people"]})
    prepare(dataclasses.replace(one, data=people), say=lambda line: None)
    after = all_samples(StageData(one, "lccp", 7, tmp_path / "indices"))
    assert np.array_equal(after, all_samples(StageData(one, "lccp", 7, tmp_path / "none yet")))
    assert not np.array_equal(after, before)


def test_every_sample_is_training_text_and_none_is_held_out(config, data, samples):
    """A sample is a stretch of joined training documents of one source; no stretch of a held-out one is in any."""
    train, heldout = stored(config, "train"), stored(config, "heldout")
    documents = {tuple(document) for documents in train.values() for document in documents}
    assert not documents & {tuple(document) for documents in heldout.values() for document in documents}
    texts = {source: as_text(found) for source, found in train.items()}
    eod = 1
    for sample in samples:
        pieces = np.split(sample, np.flatnonzero(sample == eod) + 1)
        assert any(all(find(piece, text) for piece in pieces) for text in texts.values())
    everything = "\0".join("".join(map(chr, sample)) for sample in samples)
    stretches = [doc[i : i + 24] for found in heldout.values() for doc in found for i in range(0, len(doc) - 24, 24)]
    alien = [stretch for stretch in stretches if not any(find(stretch, text) for text in texts.values())]
    assert len(alien) > 100  # what training text does not happen to say too
    assert not any(find(stretch, everything) for stretch in alien)


def test_shares_are_of_tokens(config, tmp_path):
    """Whose text a sample is, found out from the text alone; these three sources have none in common."""
    parts = {
        "a": MixtureConfig(share=2, sources={"people": 3, "segments": 7}),
        "b": MixtureConfig(share=3, sources={"packages": 9}),
    }
    three = stage_of(config, mixture=parts)
    texts = {source: as_text(documents) for source, documents in stored(three, "train").items()}
    owners = []
    for sample in all_samples(StageData(three, "lccp", 7, tmp_path)):
        pieces = np.split(sample, np.flatnonzero(sample == 1) + 1)
        owners += [source for source, text in texts.items() if all(find(piece, text) for piece in pieces)]
    assert len(owners) == STEPS * PER_STEP
    for source, share in {"people": 0.12, "segments": 0.28, "packages": 0.6}.items():
        assert owners.count(source) / len(owners) == pytest.approx(share, abs=0.005)
        assert owners[:100].count(source) / 100 == pytest.approx(share, abs=0.02)  # and at any time


def test_one_source_and_many_epochs(config, tmp_path):
    """30 documents of 501 tokens are gone through several times; every token comes equally often, give or take one."""
    one = stage_of(config, tokens=3 * 15_000, mixture={"all": MixtureConfig(sources={"segments": 2.0})})
    data = StageData(one, "lccp", 7, tmp_path)
    assert data.weights == {"segments": 1.0} and 2 < data.epochs["segments"] < 4
    seen = Counter(all_samples(data)[:, :-1].ravel().tolist())
    there = Counter(token for document in stored(one, "train")["segments"] for token in document.tolist())
    for token, count in there.most_common(200):
        assert seen[token] == pytest.approx(count * data.epochs["segments"], rel=0.35)
    assert abs(seen[1] - there[1] * data.epochs["segments"]) < 12  # ends of documents


@pytest.mark.parametrize("shares", [(1, 1, 100, 0.01), (100, 3, 3, 1), (1, 1, 1, 1)])
def test_a_source_that_is_used_up_to_its_last_sample_is_not_overdrawn(config, tmp_path, shares):
    """Where an epoch just reaches, Megatron's own surplus of 0.005 ends in "oversamples the contributing datasets"."""
    sources = dict(zip(("packages", "people", "segments", "files"), shares, strict=True))
    heaviest = max(sources, key=lambda source: sources[source])
    epoch = (len(np.concatenate(stored(config, "train")[heaviest])) - 1) // CONTEXT
    about = int(epoch * sum(shares) / max(shares))
    for samples in (1, 2, *range(about - 6, about + 2)):
        single = {"global_batch_tok": CONTEXT, "micro_batch": 1, "tokens": samples * CONTEXT}
        data = StageData(
            stage_of(config, mixture={"all": MixtureConfig(sources=sources)}, **single), "lccp", 1, tmp_path
        )
        assert data.batch(samples - 1, 0, 0, 1)["tokens"].shape == (1, CONTEXT)


def one_sample_of(config: Config, source: str, context_tok: int) -> Config:
    sizes = {"context_tok": context_tok, "global_batch_tok": context_tok, "tokens": context_tok, "micro_batch": 1}
    return stage_of(config, mixture={"all": MixtureConfig(sources={source: 1.0})}, **sizes)


def test_a_source_of_one_sample_and_no_more(config, tmp_path):
    """One token more than the context is a sample, as many are not; calibration takes no next token."""
    text = np.concatenate(stored(config, "train")["people"])
    batch = StageData(one_sample_of(config, "people", len(text) - 1), "lccp", 7, tmp_path).batch(0, 0, 0, 1)
    assert batch["tokens"].shape == (1, len(text) - 1)
    exact, longer = (one_sample_of(config, "people", len(text) + more) for more in (0, 1))
    with pytest.raises(ValueError, match="are less than one sample"):
        StageData(exact, "lccp", 7, tmp_path)
    assert np.array_equal(calibration_sequences(exact, "lccp", 2), [text, text])
    either = calibration_sequences(one_sample_of(config, "people", len(text) - 1), "lccp", 30)
    assert {bytes(row) for row in either} == {bytes(text[:-1]), bytes(text[1:])}
    with pytest.raises(ValueError, match=f"people: {len(text)} training tokens are less than context_tok"):
        calibration_sequences(longer, "lccp", 1)


def test_calibration_is_training_text_in_the_shares_of_the_mixture(config):
    three = {"packages": 6.0, "segments": 3.0, "people": 1.0}
    chosen = stage_of(config, mixture={"all": MixtureConfig(sources=three)})
    texts = {source: as_text(documents) for source, documents in stored(chosen, "train").items()}
    sequences = calibration_sequences(chosen, "lccp", 600)
    assert sequences.shape == (600, CONTEXT) and sequences.dtype == np.int64
    owners = Counter(source for row in sequences for source, text in texts.items() if find(row, text))
    for source, weight in three.items():
        assert owners[source] / 600 == pytest.approx(weight / 10, abs=0.07)
    assert owners.total() == 600 and len({bytes(row) for row in sequences}) > 500
    assert np.array_equal(calibration_sequences(chosen, "lccp", 600), sequences)
    other = dataclasses.replace(chosen, seed=chosen.seed + 1)
    assert not np.array_equal(calibration_sequences(other, "lccp", 600), sequences)


def test_too_small_and_missing_sources_are_named(config, tmp_path):
    long = stage_of(config, context_tok=16384, global_batch_tok=32768, micro_batch=1)
    with pytest.raises(
        ValueError, match=r"\.train\.bin: \d+ tokens are less than one sample of context_tok \+ 1 = 16385"
    ):
        StageData(stage_of(long, mixture={"all": MixtureConfig(sources={"segments": 1.0})}), "lccp", 7, tmp_path)
    with pytest.raises(ValueError, match="manifest.json: has no source 'books'; run `lccp prepare CONFIG`"):
        StageData(stage_of(config, mixture={"all": MixtureConfig(sources={"books": 1.0})}), "lccp", 7, tmp_path)
    with pytest.raises(ValueError, match="has no source 'books'"):
        heldout_tokens(config, "books")


def test_heldout_sequences_are_windows_that_share_one_token(config):
    joined = np.concatenate(stored(config, "heldout")["people"])
    assert np.array_equal(heldout_tokens(config, "people"), joined)
    windows = sequences_of(joined, source="people", length_tok=100, count=5)
    assert windows.shape == (5, 101) and windows.dtype == np.int64
    assert np.array_equal(np.concatenate([windows[:, :-1].ravel(), windows[-1, -1:]]), joined[:501])
    assert np.array_equal(windows[1:, 0], windows[:-1, -1])
    most = sequences_of(joined, source="people", length_tok=100, count=10**6)
    assert len(most) == (len(joined) - 1) // 100
    assert sequences_of(joined, length_tok=len(joined) - 1, count=3, source="people").shape == (1, len(joined))
    with pytest.raises(ValueError, match=rf"people: {len(joined)} held-out tokens are less than one window of"):
        sequences_of(joined, source="people", length_tok=len(joined), count=1)


def test_heldout_sequences_with_a_begin_token_share_none():
    """Each begins with it, and a token that would stand there twice is left out once."""
    tokens = np.array([7, 1, 2, 3, 7, 4, 5, 6, 8, 9], np.uint16)
    windows = sequences_of(tokens, source="people", length_tok=3, count=9, bos=7)
    assert windows.tolist() == [[7, 1, 2, 3], [7, 4, 5, 6]] and windows.dtype == np.int64
    assert sequences_of(tokens[5:], source="people", length_tok=5, count=9, bos=7).tolist() == [[7, 4, 5, 6, 8, 9]]
    with pytest.raises(ValueError, match="people: 5 held-out tokens are less than one window of 6"):
        sequences_of(tokens[5:], source="people", length_tok=6, count=9, bos=7)


def _rank(rank: int, ranks: int, config: Config, folder: str) -> None:
    store = torch.distributed.FileStore(f"{folder}/store", ranks)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    data = StageData(config, "lccp", 7, Path(folder, "indices"))
    rows = []
    for step in range(data.steps):
        for index in range(PER_STEP // (2 * ranks)):
            batch = data.batch(step, index, rank, ranks)
            rows.append(torch.cat([batch["tokens"], batch["labels"][:, -1:]], dim=1).numpy())
    np.save(f"{folder}/rank{rank}.npy", np.array(rows).reshape(data.steps, -1, 2, CONTEXT + 1))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_ranks_of_a_group_share_the_samples_of_one_process(config, samples, tmp_path):
    ranks = 2
    torch.multiprocessing.spawn(_rank, (ranks, config, str(tmp_path)), nprocs=ranks)
    of_rank = [np.load(tmp_path / f"rank{rank}.npy") for rank in range(ranks)]  # [steps, micro-batches, 2, s + 1]
    together = np.stack(of_rank, axis=2).reshape(-1, CONTEXT + 1)
    assert np.array_equal(together, samples)


def test_an_order_that_changed_in_the_middle_is_refused(config, tmp_path):
    """Such as of a stage that is made longer: the steps left would be of another draw of the same documents."""
    data = StageData(config, "lccp", 7, tmp_path)
    taken = data.taken(9)
    longer = stage_of(config, tokens=2 * config.stages["lccp"].tokens)
    with pytest.raises(ValueError, match=r"stages.lccp.tokens: 37888 -> 75776; .*set back .* and add a stage"):
        StageData(longer, "lccp", 7, tmp_path, taken, at_step=9)
    other = stage_of(config, mixture={"all": MixtureConfig(sources={"files": 1.0})})
    with pytest.raises(ValueError, match=r"stages.lccp.mixture: "):
        StageData(other, "lccp", 7, tmp_path, taken, at_step=9)
    changed = {**taken, "order": {**taken["order"], "documents": {**taken["order"]["documents"], "people": "0"}}}
    with pytest.raises(ValueError, match=r"data.sources: people holds other documents than when stage lccp began"):
        StageData(config, "lccp", 7, tmp_path, changed, at_step=9)
    for begun in (
        StageData(longer, "lccp", 7, tmp_path, taken),
        StageData(config, "lccp", 7, tmp_path, None, at_step=9),
    ):
        assert begun.steps  # a stage that begins, and a checkpoint that does not say
