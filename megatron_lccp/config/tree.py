"""The configuration of a run as frozen dataclasses; the string under a field is its `--help` text.

In: values from YAML and the command line (see `load`). Out: one `Config`. No torch, no Megatron.
Token counts are `*_tok` for one sequence or step and `tokens` for budgets; shares and weights are normalised on use.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from megatron_lccp.schema import Every, Monitor

Document = str | list[int]
"""Text, or token ids."""


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and from which weights."""

    family: str = "tiny_moe"
    """Name of a function in megatron_lccp/model/families.py: a shorthand for the config.json of a known model."""
    config: str | None = None
    """A config.json of Hugging Face's, or a folder that has one: says what the model is, in place of `family`. Its
    weights are converted by tools/convert_checkpoint.py, and named in `init_from`."""
    init_from: str | None = None
    """Weights to start from: a .safetensors file of this model, or the checkpoint directory of a conversion or of a
    training (its weights alone). null: they are drawn from the seed."""
    layers: Literal["auto", "portable", "transformer_engine"] = "auto"
    """Whose linear layers, norms and experts. transformer_engine: grouped experts, and FP8 if training.fp8 asks for it.
    portable: Megatron-Core's own, which run anywhere. auto: the former on GPUs that have it. Checkpoints fit both."""
    attention: Literal["auto", "portable", "transformer_engine"] = "auto"
    """Whose core attention. transformer_engine: context parallelism by megatron.transformer.cp_comm_type. portable:
    PyTorch's fused kernels; keys and values are gathered over context-parallel ranks. auto: as `layers`."""
    vocab_multiple: int = 128
    """The vocabulary is padded to a multiple of this; parallel.tensor has to divide it."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the model and the batch are laid out over ranks; what is left over is data parallel."""

    tensor: int = 1
    """Tensor-parallel ranks (TP). Above 1 sequence parallelism is on: a MoE cannot train without it."""
    pipeline: int = 1
    """Pipeline stages (PP)."""
    virtual_pipeline: int | None = None
    """Model chunks per pipeline stage, for the interleaved schedule. null: one."""
    expert: int = 1
    """Expert-parallel ranks (EP)."""
    expert_tensor: int | None = None
    """Tensor-parallel ranks inside an expert (ETP). null: as `tensor`."""
    context: int = 1
    """Context-parallel ranks (CP)."""
    context_levels: tuple[int, ...] | None = None
    """The two factors of `context` for megatron.transformer.cp_comm_type a2a+p2p. First: ranks that exchange heads, on
    one node. Second: groups of such ranks, which pass keys and values on."""


@dataclass(frozen=True)
class MegatronConfig:
    """Fields passed to Megatron-Core by their own names, checked against the installed version; they win over ours."""

    transformer: dict[str, Any] = field(default_factory=dict)
    """Fields of TransformerConfig."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    """Fields of OptimizerConfig."""
    ddp: dict[str, Any] = field(default_factory=dict)
    """Fields of DistributedDataParallelConfig."""


class Source(ABC):
    """Where documents come from. Write a frozen dataclass with `documents`; the others have defaults.

    The concrete sources are in megatron_lccp/data/sources/. A package ships one of its own by an entry point in the
    group megatron_lccp.sources (see `classes`).
    """

    @abstractmethod
    def documents(self, vocab_size: int) -> Iterable[Document]:
        """The documents, the same ones in the same order every time.

        A document is text (str) or, where text would make no sense, token ids (list of int, each below `vocab_size`).
        """

    def split_key(self, document: Document) -> Document:
        """Documents with equal keys stay on one side of the held-out split; by default equal documents alone do."""
        return document

    def inputs(self) -> str:
        """Changes when what the source reads has changed, so that it is tokenized anew; empty if it reads nothing."""
        return ""


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer; `lccp prepare` trains a sentencepiece model where the file is missing."""

    path: str = "data/tokenizer.model"
    """A sentencepiece model, a Hugging Face tokenizer.json, a tiktoken file, or a folder that holds one of them."""
    end_token: str | None = None
    """Text of the token that ends documents. null: the eos_token named beside a tokenizer.json or tiktoken file; of a
    sentencepiece model <eod>, or else its own, mostly </s>."""
    bos: str = "none"
    """The token that needle samples, copies and windows of a corpus begin with. auto: the one that the tokenizer's own
    files add, or else as eod. eod: the token that ends documents. none: nothing. Or the text of a token. Heads look at
    the first token where they look for nothing, so set auto for a published model."""
    bos_in_documents: bool = False
    """Whether each document that `lccp prepare` writes begins with that token too."""
    train_on: tuple[str, ...] = ()
    """Sources it is trained on if the file does not exist. Empty: the file must exist."""
    vocab_size: int = 4096
    """Pieces to train, special tokens included."""


@dataclass(frozen=True)
class DataConfig:
    """Where documents come from and where their tokens are kept."""

    dir: str = "data/tokens"
    """Directory of the tokenized documents (Megatron indexed format) and their manifest.json."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """The tokenizer."""
    sources: dict[str, Source] = field(default_factory=dict)
    """Name -> source that `lccp prepare` tokenizes. Empty: `dir` was prepared elsewhere."""
    heldout_share: float = 0.03
    """Share of each source's documents (at least one) that training never sees."""


@dataclass(frozen=True)
class MixtureConfig:
    """One part of a stage's data: a share of the stage's tokens, spread over named sources."""

    share: float = 1.0
    """Share of the stage's tokens."""
    sources: dict[str, float] = field(default_factory=dict)
    """Source name -> weight inside this part."""


@dataclass(frozen=True)
class YarnConfig:
    """YaRN (arXiv 2309.00071), by the names of config.json; frequencies and attention equal transformers'."""

    factor: float = 4.0
    """The new context over the original one."""
    original_tok: int = 4096
    """Tokens of the context that the frequencies were trained at: original_max_position_embeddings."""
    beta_fast: float = 32.0
    """Frequencies with more turns than this in the original context stay."""
    beta_slow: float = 1.0
    """Frequencies with fewer turns than this are divided by `factor`; those between by a part of it."""
    attention_factor: float | None = None
    """Queries and keys are multiplied by this. null: 1 + 0.1 ln(factor), as the paper has it."""


@dataclass(frozen=True)
class PackConfig:
    """How documents are put together in training sequences. The same samples on every layout."""

    how: Literal["best_fit", "concat"] = "best_fit"
    """best_fit: a document stays whole if it fits, over the whole mixture at once; short ones fill the room that long
    ones leave, and what is left over is padding. concat: documents end to end, cut where a sequence is full."""
    long: Literal["fragment", "truncate", "exact"] = "fragment"
    """Of a document longer than context_tok, with best_fit. fragment: every piece is trained on. truncate: the rest is
    thrown away. exact: only whole pieces of context_tok are trained on, of documents that have one."""
    align_tok: int = 32
    """A document is padded to a multiple of it, which 2 x parallel.context must divide."""
    window_steps: int = 4
    """Steps that are packed together. More leave less padding."""


@dataclass(frozen=True)
class StageConfig:
    """A stretch of training at one context length, RoPE base and learning-rate schedule."""

    tokens: int = 0
    """Training tokens of this stage."""
    context_tok: int = 4096
    """Tokens of a training sequence."""
    rope_base: float | None = None
    """Base of the rotary position embedding. null: with `model.config` the model's own, else 10,000."""
    yarn: YarnConfig | None = None
    """Stretches the rotary frequencies by YaRN in this stage, in place of what the model itself stretches. null: as the
    model has it."""
    global_batch_tok: int = 65536
    """Tokens of one optimizer step; a multiple of context_tok x micro_batch x data-parallel ranks."""
    micro_batch: int = 1
    """Sequences of one forward pass on one data-parallel rank."""
    lr: float = 1e-4
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of a decay. A constant lr_schedule does not use it."""
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    """What follows the warm-up."""
    warmup_tokens: int = 0
    """Tokens of linear warm-up from 0."""
    goes_on_from: str | None = None
    """A stage before this one with the same mixture, context_tok and global_batch_tok: its order of samples goes on here
    where it ended; None draws an order of this stage's own. `lccp branch` sets it."""
    mixture: dict[str, MixtureConfig] = field(default_factory=dict)
    """Name -> part of the data, for instance `short` and `long`. Shares are of tokens."""
    pack: PackConfig | None = None
    """How documents are put together. null: each source's are laid end to end and cut into sequences, which are mixed,
    by Megatron-Core's own data sets; with `masks: documents`, as `how: concat` does it."""
    masks: Literal["none", "documents"] = "none"
    """documents: attention ends at the document. In a stage with `pack` or masks no label lies in another document, and
    padding counts for nothing."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW; everything else by `megatron.optimizer`."""

    weight_decay: float = 0.1
    """Decoupled weight decay (not on norms and biases)."""
    beta1: float = 0.9
    """First-moment decay."""
    beta2: float = 0.95
    """Second-moment decay."""
    eps: float = 1e-8
    """Adam epsilon."""
    clip_grad: float = 1.0
    """Global gradient norm is clipped to this; 0 turns it off."""


@dataclass(frozen=True)
class TrainingConfig:
    """The loop."""

    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of parameters and activations. auto: bf16 on hardware that has it. Master weights, gradient sums and optimizer
    state are always fp32."""
    fp8: Literal["none", "delayed", "tensorwise", "blockwise"] = "none"
    """The recipe that scales the layers' matrix products in FP8. delayed: by the largest value of earlier steps.
    tensorwise: by the largest of the tensor. blockwise: by the largest of each block. The first two take E4M3 forward
    and E5M2 backward, the last E4M3. FP8 needs `precision: bf16` and Transformer Engine's layers; attention, router and
    output layer stay in BF16. megatron.transformer takes the details."""
    measure_in: Literal["bf16", "fp8"] = "bf16"
    """Matrix products while monitors measure a model that trains in FP8. bf16: nothing depends on what else is in a
    batch, so prefills can be shared, and checkpoints of all recipes are measured alike. fp8: as it trains."""
    loss_chunk_tok: int | None = None
    """Tokens whose logits the last pipeline stage holds at a time; the backward pass computes them again. null: all of
    the sequence, which at 64K tokens and a vocabulary of 128K takes 67 GB over the tensor-parallel ranks."""
    steps: int | None = None
    """Stop after this many optimizer steps over all stages, though the stages plan more: for trying things out. null:
    train all stages."""
    max_bad_steps: int = 5
    """Stop after this many steps in a row whose loss or gradient is not finite. All ranks skip such a step."""
    log_every: int = 10
    """Steps between progress lines where there is no terminal."""
    health_every: int = 1
    """Steps between rows of training health (expert load, router entropy, dropped tokens, gradient norms by part,
    largest attention logit; megatron_lccp/training/health.py has them all). 0: none."""
    stop_within_s: float = 120.0
    """Seconds from a signal (SIGTERM, SIGINT, SIGHUP) to the start of the save, at most. Windows are measured in pieces
    that are shorter, and a window is given up after the running piece. A step or a piece that takes longer is named."""
    stall_steps: float = 20.0
    """A line says which rank has not arrived once nothing has moved for this many times the usual step ..."""
    stall_s: float = 60.0
    """... and for this many seconds. It comes again after twice the time, four times the time, and so on."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Saved atomically as <run dir>/checkpoints/step-*, resumed on any layout."""

    every: Every | None = None
    """When to save, besides at the end. null: every 500 steps."""
    keep: int = 2
    """How many to keep; fewer where the disk is full: the oldest goes first, never the newest."""
    asynchronous: bool = False
    """Write while the training goes on, which waits for the copy to host memory alone (lccp plan says how much). The
    last save of a run, and one that a signal asks for, are waited for."""
    any_layout_every: int = 1
    """Every so many saves, the first and the last of a run among them, one fits any layout. Those between keep the
    optimizer's state as this layout holds it, which gathers nothing, and resume on this layout alone; the newest that
    fits any is kept beside them."""
    fall_back: bool = False
    """Where the newest checkpoint is damaged, set it aside and go on from the one before, rather than refuse."""


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases as a second sink of the same rows."""

    mode: Literal["offline", "online", "disabled"] = "offline"
    """offline writes into the run directory, for `wandb sync`."""
    project: str = "megatron_lccp"
    """Project name."""
    entity: str | None = None
    """Team or user. null: the account's default."""


EventKind = Literal[
    "verdict", "skipped_step", "stall", "checkpoint_error", "checkpoint_dropped", "checkpoint_set_aside",
    "monitor_error", "resume", "stop_when", "failed", "epoch", "stop_late",
]  # fmt: skip
"""Kinds of events that a user's own command hears of."""


@dataclass(frozen=True)
class EventsConfig:
    """Who hears of events besides events.jsonl. Called from the main rank, apart from the training: what fails or takes
    too long is one line, and the training goes on."""

    command: str | None = None
    """A command line for /bin/sh. It gets LCCP_EVENT_KIND, LCCP_EVENT_TEXT, LCCP_EVENT_STEP, LCCP_RUN and LCCP_RUN_DIR in
    its environment, and the same as one JSON object on its standard input."""
    webhook: str | None = None
    """An http or https address. It gets a POST of the JSON object: kind, text, step, run, run_dir, time."""
    wandb_alert: bool = False
    """An alert of the run at W&B, if `wandb.mode` is not disabled."""
    kinds: tuple[EventKind, ...] = get_args(EventKind)
    """What they hear of: a verdict that changed, a step whose loss or gradient was not finite, a stall, a failed save, a
    checkpoint that a full disk took or that was damaged, a failed monitor, a resume, an end by `stop_when`, an end by an
    error, a save that began too late after a signal, a source of packed documents that begins again."""
    timeout_s: float = 20.0
    """Seconds that a call may take; then the command is ended."""


@dataclass(frozen=True)
class StopRule:
    """A rule that ends the run. Asked after each window."""

    states: dict[str, str] = field(default_factory=dict)
    """Signal -> state, as `lccp verdict` prints both: `answer_nll: saturated`. All of them must hold. A name without a
    bracket means all signals that begin so; `verdict` is the verdict as a whole."""
    at_least_tokens: int = 0
    """Training tokens of all stages, before which the rule is not asked."""
    margins: dict[str, float] = field(default_factory=dict)
    """Gain per +25 % tokens that is no longer worth them, as `lccp verdict --margin` takes it."""


@dataclass(frozen=True)
class Config:
    """One run."""

    name: str = "run"
    """Name, as it appears in rows and plots."""
    dir: str = "runs/run"
    """Run directory: resolved configuration, checkpoints, rows, report. The same command resumes an unfinished run."""
    seed: int = 1234
    """Seed of weights, sample order and everything else that is drawn."""
    model: ModelConfig = ModelConfig()
    """The model."""
    parallel: ParallelConfig = ParallelConfig()
    """The layout."""
    megatron: MegatronConfig = field(default_factory=MegatronConfig)
    """Pass-through to Megatron-Core."""
    data: DataConfig = field(default_factory=DataConfig)
    """Documents and tokenizer."""
    stages: dict[str, StageConfig] = field(default_factory=dict)
    """Name -> stage, in order."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer."""
    training: TrainingConfig = TrainingConfig()
    """The loop."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    monitors: list[Monitor] = field(default_factory=list)
    """What is measured while it trains: class_path and init_args of each monitor."""
    wandb: WandbConfig = WandbConfig()
    """Weights & Biases."""
    events: EventsConfig = EventsConfig()
    """Who hears of events: a command, a webhook, a W&B alert."""
    stop_when: list[StopRule] = field(default_factory=list)
    """Rules that end the run, each enough by itself. Empty: nothing ends it but its stages."""
