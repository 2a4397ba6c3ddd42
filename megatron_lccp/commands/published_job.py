"""A published model that is to be measured: what is known of it from its files, and what its run directory holds.

In: the model's files, and what is wanted of all models alike. Out: a Job, without the weights. ValueError in one line for
what cannot be measured, or was measured otherwise.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import transformers
import yaml

import megatron_lccp
from megatron_lccp.commands.measured import Record
from megatron_lccp.commands.published_suite import CORPORA
from megatron_lccp.config.load import as_tree, read_yaml
from megatron_lccp.data.given_texts import GivenTexts
from megatron_lccp.data.tokenizers.base import Tokenizer
from megatron_lccp.data.tokenizers.load import load_tokenizer
from megatron_lccp.measuring.beforehand import monitor_problems
from megatron_lccp.measuring.engine import Engine, Sizes
from megatron_lccp.measuring.window import EvalWindow
from megatron_lccp.planning.published import Needs, PublishedSizes, needs_of, sizes_of
from megatron_lccp.records.store import RunStore
from megatron_lccp.schema import PUBLISHED, Monitor
from megatron_lccp.weights.published import Published

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Wanted:
    """What is measured, of each model alike."""

    monitors: Sequence[Monitor]
    texts: GivenTexts
    precision: str
    """fp32 or bf16."""
    bos: str = "auto"
    """The token that samples begin with, as data.tokenizer.bos."""
    tensor: int = 1
    """Ranks that share a model."""

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]

    @property
    def longest_tok(self) -> int:
        """Of the samples whose length a monitor says."""
        fields = ("lengths_tok", "length_tok", "longest_tok")
        given = (getattr(monitor, name, 0) for monitor in self.monitors for name in fields)
        return max((max(value, default=0) if isinstance(value, (tuple, list)) else value for value in given), default=0)

    @property
    def config_hash(self) -> str:
        """12 hex digits that are equal for models that were measured alike."""
        return hashlib.sha256(json.dumps(self.tree(), sort_keys=True).encode()).hexdigest()[:12]

    def tree(self) -> dict[str, Any]:
        """What decides what is measured, for a file."""
        return {
            "precision": self.precision, "bos": self.bos, "texts": self.texts.sha256(),
            "monitors": [as_tree(monitor) for monitor in self.monitors],
        }  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One model, and what is known of it before it is loaded."""

    published: Published
    directory: Path
    config: Any
    """As transformers reads it."""
    sizes: PublishedSizes
    tokenizer: Tokenizer
    window: EvalWindow
    """Without a model: what monitors are asked before it is loaded."""
    record: Record
    identity: str
    """Tells its weights and its tokenizer from others."""

    @property
    def is_done(self) -> bool:
        return bool(self.record.done)

    def needs(self, wanted: Wanted, shared: bool = True) -> Needs:
        """What the monitors take on it; where prefills are not shared, each sample alone."""
        works = [work for monitor in wanted.monitors if (work := monitor.work(self.window)) is not None]
        trees = [(work.times, work.planned if shared else work.alone) for work in works]
        return needs_of(self.sizes, trees, wanted.dtype.itemsize)


def make_job(published: Published, directory: Path, wanted: Wanted) -> Job:
    """What is known of a model from its files. Raises ValueError for what does not fit, or was measured otherwise."""
    config = read_config(published)
    sizes = sizes_of(config)
    tokenizer = read_tokenizer(published, wanted.bos)
    if tokenizer.vocab_size > sizes.vocab:
        raise ValueError(
            f"--hf: {published.folder}: its tokenizer has {tokenizer.vocab_size:,} ids, the model {sizes.vocab:,} rows; "
            "they do not belong together"
        )
    shape = Sizes(sizes.layers, sizes.heads, max(sizes.context_tok, wanted.longest_tok), sizes.vocab)
    window = EvalWindow(
        engine=cast(Engine, SimpleNamespace(sizes=shape, why_not_shared=lambda: None)), run=published.name,
        tokenizer=tokenizer, config_hash=wanted.config_hash, stage=PUBLISHED, step=0, tokens=0, corpora=wanted.texts.names or CORPORA,
        text=lambda name, at_least: wanted.texts.tokens(tokenizer, name, at_least),
    )  # fmt: skip
    if problems := monitor_problems(wanted.monitors, window):
        raise ValueError("\n".join(f"{published.name}: {text}" for text in problems))
    identity = hashlib.sha256(f"{published.sha256} {tokenizer.sha256}".encode()).hexdigest()[:16]
    record = _record(published, directory, wanted, identity)
    return Job(published, directory, config, sizes, tokenizer, window, record, identity)


def _record(published: Published, directory: Path, wanted: Wanted, identity: str) -> Record:
    """What the directory holds of this model. Raises ValueError if it holds another, or one that was measured otherwise."""
    record = Record(RunStore(directory), wanted.config_hash, {})
    if (before := record.before()) is not None:
        record.done, hashed = before
        if hashed != record.config_hash:
            raise ValueError(f"--out: {directory} was measured with other monitors, texts or precision; name another")
        about = read_yaml(record.store.config_path).get("model", {})
        if about.get("identity") != identity:
            raise ValueError(f"--out: {directory} holds another model ({about.get('folder')}); name another")
    return record


def write_record(job: Job, wanted: Wanted) -> None:
    """Write down what is measured, and of what."""
    published = job.published
    about = {
        "name": published.name, "architecture": (job.config.architectures or [job.config.model_type])[0],
        "parameters": f"{job.sizes.parameters:,}", "precision": wanted.precision,
        "folder": str(published.folder.absolute()), "files": [path.name for path in published.weights],
        "weights_sha256": published.sha256, "tokenizer_sha256": job.tokenizer.sha256, "identity": job.identity,
        "transformers": transformers.__version__, "torch": str(torch.__version__),
        "megatron_lccp": megatron_lccp.__version__,
    }  # fmt: skip
    text = yaml.safe_dump({"model": about, **wanted.tree()}, sort_keys=False, width=120)
    job.record.store.write_config(text)
    job.record.store.write_metrics(wanted.monitors)
    job.record.save()


def read_config(published: Published) -> Any:
    """A model's configuration, as transformers reads it. ValueError in one line for what it cannot."""
    try:
        return transformers.AutoConfig.from_pretrained(
            published.folder, gguf_file=published.gguf, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # of many kinds, by what is wrong in the file
        reason = " ".join(str(error).split())
        raise ValueError(f"--hf: {published.folder}: transformers cannot read its configuration: {reason}") from error


def read_tokenizer(published: Published, bos: str) -> Tokenizer:
    """The model's own; that of a GGUF file as transformers writes it down."""
    if published.gguf is None:
        return load_tokenizer(published.folder, bos=bos)
    with tempfile.TemporaryDirectory() as folder:
        found = transformers.AutoTokenizer.from_pretrained(published.folder, gguf_file=published.gguf)
        found.save_pretrained(folder)
        return load_tokenizer(folder, bos=bos)
