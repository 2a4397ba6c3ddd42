"""Tokens on disk -> the batches of a stage, and held-out token ids.

In: a configuration whose data is prepared. Out: `StageData.batch`, the same samples for a step on any layout and after
any restart, and `heldout_tokens`. Sampling, shuffling and blending are Megatron-Core's own GPTDataset; its indices
are kept in a directory of ours and read as data alone: 0.16.1 allows pickles there (datasets/gpt_dataset.py:579).
Shapes: b sequences of a micro-batch, s tokens of a sequence.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets import blended_dataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_lccp.config.tree import Config, StageConfig
from megatron_lccp.data.haystacks import bundled_tokens
from megatron_lccp.data.manifest import Manifest, Part, TokenizerEntry, load_manifest, prefix
from megatron_lccp.data.packed import PackedData, is_packed
from megatron_lccp.data.stages import mixture_weights, order_of, stage_steps
from megatron_lccp.data.tokenizers.base import Tokenizer
from megatron_lccp.parallel.unpickle import data_only


@dataclass
class _TokenizerStandIn:
    """What GPTDataset asks of a tokenizer; without `pad` it pads with -1, and training samples are never padded."""

    entry: TokenizerEntry

    @property
    def vocab_size(self) -> int:
        return self.entry.vocab_size

    @property
    def eod(self) -> int:
        return self.entry.eod

    @property
    def unique_identifiers(self) -> dict[str, str]:
        return {"sha256": self.entry.sha256}


@dataclass
class _DatasetConfig(GPTDatasetConfig):
    index_dir: str = ""


class _Dataset(GPTDataset):
    """GPTDataset that keeps its indices in `index_dir`. The blend's own, which are quick to draw, are not kept:
    0.16.1 asks for the rank there even if there is no process group (datasets/blended_dataset.py:153)."""

    def __init__(self, *args: Any):
        *rest, config = args
        super().__init__(*rest, replace(config, path_to_cache=config.index_dir))


def stage_data(
    config: Config, stage: str, cache_dir: str | Path, taken: Mapping[str, Any] | None = None, at_step: int = 0
) -> StageData | PackedData:
    """The training samples of a stage, of which `at_step` comes next; make it on every rank at once.

    `taken` is what its `taken` said of that step, or of the end of the stage before; `cache_dir` is a directory of this
    run that all ranks see. Raises ValueError if a source is not prepared or holds less than one sample.
    """
    plan = config.stages[stage]
    if not is_packed(plan):
        return StageData(config, stage, config.seed, cache_dir, taken, at_step)
    manifest, shares = load_manifest(config.data.dir), mixture_weights(plan)
    for source in shares:
        manifest.entry(source, config.data.dir)
    return PackedData(config, plan, shares, manifest, Path(cache_dir), taken, at_step, stage_steps(plan))


class StageData:
    """The training samples of one stage, drawn by seed alone; make it on every rank at once (it uses barriers).

    `cache_dir` is a directory of this run that all ranks see. Raises ValueError if a source is not prepared or holds
    less than one sample.
    """

    def __init__(
        self, config: Config, stage: str, seed: int, cache_dir: str | Path, taken: Mapping[str, Any] | None = None,
        at_step: int = 0,
    ):  # fmt: skip
        plan = config.stages[stage]
        manifest = load_manifest(config.data.dir)
        root, self._done = order_of(config.stages, stage)
        self.steps = stage_steps(plan)
        """Optimizer steps of the stage."""
        self.samples_per_step = plan.global_batch_tok // plan.context_tok
        """Sequences of one optimizer step, over all ranks."""
        self.weights = mixture_weights(plan)
        """Source -> share of the tokens."""
        self.epochs = self._epochs(config, plan, manifest)
        """Source -> how often its training tokens are gone through, by the stages whose order this one goes on with too."""
        self._micro_batch, self._taken = plan.micro_batch, taken
        self._order: dict[str, Any] = {
            "tokens": (self._done + self.steps) * plan.global_batch_tok,
            "mixture": self.weights,
            "documents": {name: _content(manifest, name) for name in self.weights},
        }
        if at_step:
            self._require_order((taken or {}).get("order"), stage)
        stage_seed = _stage_seed(seed, root)
        index_dir = Path(cache_dir) / f"{root}-{self._key(config, plan, manifest, stage_seed)}"
        self._dataset = self._build(config, plan, manifest, stage_seed, index_dir)

    def batch(self, step: int, micro_batch_index: int, data_rank: int, data_ranks: int) -> dict[str, torch.Tensor]:
        """One micro-batch of a data-parallel rank: tokens [b, s] and labels [b, s], the next tokens; int64, on the CPU.

        `step` counts from 0 within the stage. All micro-batches of all data ranks together are the samples of the step.
        """
        in_step = (micro_batch_index * data_ranks + data_rank) * self._micro_batch
        assert 0 <= step < self.steps and 0 <= data_rank < data_ranks, (step, self.steps, data_rank, data_ranks)
        assert 0 <= in_step <= self.samples_per_step - self._micro_batch, (micro_batch_index, data_ranks)
        first = (self._done + step) * self.samples_per_step + in_step
        samples = [self._dataset[first + j] for j in range(self._micro_batch)]
        return {name: torch.stack([sample[name] for sample in samples]) for name in ("tokens", "labels")}

    def taken(self, step: int) -> Mapping[str, Any] | None:
        """What a checkpoint keeps: what the order of these samples is of, and what packed stages took before."""
        return {**(self._taken or {}), "order": self._order}

    def _require_order(self, before: Mapping[str, Any] | None, stage: str) -> None:
        """Raises ValueError if the samples so far were of another order, of which these steps are no rest.

        Checkpoints of versions before 0.2 do not say what theirs was of.
        """
        for what, was in (before or {}).items():
            if was != (now := self._order[what]):
                changed = f"stages.{stage}.{what}: {was} -> {now}"
                if what == "documents":
                    names = sorted(name for name in now if was.get(name) != now[name])
                    changed = f"data.sources: {', '.join(names)} holds other documents than when stage {stage} began"
                raise ValueError(
                    f"{changed}; the order of samples of a stage without pack is drawn as a whole, and documents would "
                    "come again while others never do; set back what was, and add a stage (one with pack takes what is "
                    "left of each source)"
                )

    def news(self) -> list[str]:
        """Nothing: the order of samples was drawn as a whole."""
        return []

    def _epochs(self, config: Config, plan: StageConfig, manifest: Manifest) -> dict[str, float]:
        epochs = {}
        for source, weight in self.weights.items():
            tokens = manifest.entry(source, config.data.dir).tokens["train"]
            if tokens <= plan.context_tok:
                raise ValueError(
                    f"{prefix(config.data.dir, source, 'train')}.bin: {tokens} tokens are less than one sample of "
                    f"context_tok + 1 = {plan.context_tok + 1}; give source {source!r} more documents"
                )
            epochs[source] = weight * (self._done + self.steps) * self.samples_per_step * plan.context_tok / tokens
        return epochs

    def _key(self, config: Config, plan: StageConfig, manifest: Manifest, stage_seed: int) -> str:
        """Hash of everything the indices depend on; Megatron's own leaves out what is in the files."""
        files = {source: manifest.sources[source].files for source in self.weights}
        steps = self._done + self.steps
        what = [self.weights, files, config.data.dir, plan.context_tok, steps, self.samples_per_step, stage_seed]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]

    def _build(self, config: Config, plan: StageConfig, manifest: Manifest, stage_seed: int, index_dir: Path) -> Any:
        first_rank = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        complete = index_dir / "complete"
        if first_rank and not complete.exists():
            shutil.rmtree(index_dir, ignore_errors=True)  # the indices of a build that was cut off may be cut off too
        # Its warning that the indices of the blend are not kept is meant for others.
        logging.getLogger(blended_dataset.__name__).setLevel(logging.ERROR)
        samples = (self._done + self.steps) * self.samples_per_step
        sources, weights = list(self.weights), list(self.weights.values())
        dataset_config = _DatasetConfig(
            random_seed=stage_seed,
            sequence_length=plan.context_tok,
            blend=([prefix(config.data.dir, source, "train") for source in sources], weights),
            split="1,0,0",
            # Of a source of weight w Megatron builds w samples (1 + surplus), draws up to w (samples + sources) + 1
            mid_level_dataset_surplus=0.005 + len(sources) / samples + 1 / (samples * min(weights)),
            tokenizer=_TokenizerStandIn(manifest.tokenizer),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            index_dir=str(index_dir),
        )
        # on rank 0 first, then, from its indices, on the others
        try:
            with data_only(index_dir):
                builder = BlendedMegatronDatasetBuilder(_Dataset, [samples, 0, 0], lambda: True, dataset_config)
                train, _, _ = builder.build()
            if first_rank:
                complete.touch()
        except Exception as error:  # so does Megatron-Core call what it could not write
            cause = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(cause, OSError):
                raise
            text = f"the order of samples cannot be kept: {cause.strerror or cause}"
            raise OSError(cause.errno or 0, text, str(index_dir)) from error
        return train


def _content(manifest: Manifest, source: str) -> str:
    """A digest of a source's training documents."""
    return next(
        about["sha256"] for name, about in manifest.sources[source].files.items() if name.endswith(".train.bin")
    )


def heldout_tokens(config: Config, source: str) -> np.ndarray:
    """All held-out tokens of a source, its documents joined, each with its end token: [tokens], on disk, read-only.

    Raises ValueError if the source is not prepared.
    """
    return _tokens(config, source, "heldout")


def _tokens(config: Config, source: str, part: Part) -> np.ndarray:
    load_manifest(config.data.dir).entry(source, config.data.dir)
    path = prefix(config.data.dir, source, part)
    return np.memmap(f"{path}.bin", dtype=IndexedDataset(path).index.dtype, mode="r")


def calibration_sequences(config: Config, stage: str, count: int) -> np.ndarray:
    """Training text of a stage's mixture, at places that `seed` draws: [count, context_tok], int64.

    Apart from the order of training, so it needs no index; and what monitors measure stays unseen. Raises ValueError
    if a source is not prepared or holds less than one sequence.
    """
    plan = config.stages[stage]
    shares = mixture_weights(plan)
    rng = np.random.default_rng(_stage_seed(config.seed, stage))
    sequences = []
    for source in rng.choice(list(shares), size=count, p=list(shares.values())):
        tokens = _tokens(config, source, "train")
        if len(tokens) < plan.context_tok:
            raise ValueError(f"{source}: {len(tokens)} training tokens are less than context_tok = {plan.context_tok}")
        start = rng.integers(len(tokens) - plan.context_tok + 1)
        sequences.append(tokens[start : start + plan.context_tok])
    return np.stack(sequences).astype(np.int64)


def _stage_seed(seed: int, stage: str) -> int:
    return int(hashlib.sha256(f"{seed}/{stage}".encode()).hexdigest()[:7], 16)


def text_of(config: Config, tokenizer: Tokenizer, source: str, at_least_tok: int) -> np.ndarray:
    """Held-out tokens of a source, or with a name like bundled/stdlib a text that comes with this package."""
    if source.startswith("bundled/"):
        return bundled_tokens(source, tokenizer, at_least_tok)
    return heldout_tokens(config, source)


def sequences_of(tokens: np.ndarray, length_tok: int, count: int, source: str, bos: int | None = None) -> np.ndarray:
    """Consecutive windows over the tokens of a source: [count, length_tok + 1], int64.

    A window begins with the begin token `bos`, or without one with the last token of the window before, so each token is
    predicted once. Fewer windows if there are no more; ValueError if there is not even one.
    """
    windows: list[np.ndarray] = []
    own_tok, at = length_tok + (bos is None), 0
    while len(windows) < count:
        at += bool(bos is not None and at < len(tokens) and tokens[at] == bos)  # it is not to stand there twice
        window = tokens[at : at + own_tok]
        if len(window) < own_tok:
            break
        windows.append(window)
        at += length_tok
    if not windows:
        raise ValueError(
            f"{source}: {len(tokens)} held-out tokens are less than one window of {own_tok}; raise "
            "data.heldout_share or give the source more documents"
        )
    found = np.stack(windows).astype(np.int64)
    return found if bos is None else np.insert(found, 0, bos, axis=1)
