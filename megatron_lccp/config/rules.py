"""What contradicts itself in a configuration.

In: a `Config` (and the number of ranks, and the model's shape, where they are known). Out: every problem, as one-line
texts that name the field and the remedy. Nothing is imported from torch or Megatron, so this runs before either loads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from megatron_lccp.config.tree import Config, ModelConfig, PackConfig, ParallelConfig, StageConfig
from megatron_lccp.text import count_text

STATES = ("saturated", "improving", "undecided", "worse")
"""What a verdict says of a signal."""
SIZES = (
    "num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "ffn_hidden_size",
    "num_moe_experts", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "moe_router_topk",
)  # fmt: skip
"""Fields of Megatron-Core's TransformerConfig that say how large a model is."""
MOST_LAYERS, MOST_OF_A_SIZE, MOST_STEPS = 10_000, 1 << 24, 1_000_000_000
"""What is larger is a slip, and would keep a plan busy for hours."""


def config_problems(config: Config) -> list[str]:
    """Problems that can be seen without knowing the number of ranks or the model."""
    problems = []
    if not config.name.strip() or not config.name.isprintable():
        problems.append(f"name: should be text of visible characters, is {config.name!r}")
    if not config.dir.strip():
        problems.append(f"dir: should be the path of the run directory, is {config.dir!r}")
    if abs(config.seed) >= 1 << 63:
        problems.append(f"seed: should fit in 64 bits, is {config.seed:.3g}")
    if not config.stages:
        problems.append("stages: none is given; add at least one with tokens, context_tok and mixture")
    for name, stage in config.stages.items():
        problems += [f"stages.{name}.{text}" for text in _stage_problems(stage, config)]
        problems += [f"stages.{name}.goes_on_from: {text}" for text in _order_problems(name, config.stages)]
    if not 0 < config.data.heldout_share < 0.5:
        problems.append(f"data.heldout_share: {config.data.heldout_share} should be above 0 and below 0.5")
    for name in ("tensor", "pipeline", "virtual_pipeline", "expert", "expert_tensor", "context"):
        if (size := getattr(config.parallel, name)) is not None and size < 1:
            problems.append(f"parallel.{name}: should be at least 1, is {size}")
    if config.parallel.virtual_pipeline is not None and config.parallel.pipeline < 2:
        problems.append("parallel.virtual_pipeline: needs pipeline of at least 2; leave it out")
    for block, name, least in (
        ("training", "max_bad_steps", 1), ("training", "log_every", 1), ("training", "health_every", 0),
        ("training", "steps", 1), ("training", "loss_chunk_tok", 1), ("checkpoint", "keep", 1),
        ("checkpoint", "any_layout_every", 1), ("model", "vocab_multiple", 1), ("optimizer", "weight_decay", 0), ("optimizer", "clip_grad", 0),
        ("training", "stop_within_s", 1), ("training", "stall_steps", 1), ("training", "stall_s", 1),
        ("events", "timeout_s", 1),
    ):  # fmt: skip
        if (value := getattr(getattr(config, block), name)) is not None and not value >= least:
            problems.append(f"{block}.{name}: should be at least {least}, is {value}")
    for block, name, value in (
        ("model", "vocab_multiple", config.model.vocab_multiple),
        ("data.tokenizer", "vocab_size", config.data.tokenizer.vocab_size),
    ):
        if value > MOST_OF_A_SIZE:
            problems.append(f"{block}.{name}: should be at most {MOST_OF_A_SIZE:,}, is {value:,}")
    if config.data.tokenizer.vocab_size < 1:
        problems.append(f"data.tokenizer.vocab_size: should be at least 1, is {config.data.tokenizer.vocab_size}")
    if not config.data.tokenizer.bos:
        problems.append("data.tokenizer.bos: is empty; give auto, none, eod or the text of a token")
    if config.data.tokenizer.bos_in_documents and config.data.tokenizer.bos == "none":
        problems.append("data.tokenizer.bos_in_documents: has no token; set data.tokenizer.bos, such as auto")
    for name, path in (
        ("dir", config.dir), ("data.dir", config.data.dir), ("data.tokenizer.path", config.data.tokenizer.path),
        ("model.init_from", config.model.init_from or ""), ("model.config", config.model.config or ""),
    ):  # fmt: skip
        if not path.isprintable():
            problems.append(f"{name}: {path!r} has a character that cannot be seen; give another path")
    if config.model.config is not None and config.model.family != ModelConfig.family:
        problems.append(f"model.family: {config.model.family} and model.config both say what the model is; drop one")
    o = config.optimizer
    if not (0 <= o.beta1 < 1 and 0 <= o.beta2 < 1 and o.eps > 0):
        problems.append(f"optimizer: needs beta1 and beta2 in [0, 1) and eps > 0, not {o.beta1}, {o.beta2}, {o.eps}")
    for number, monitor in enumerate(config.monitors):
        texts = [(field, name) for field in ("haystacks", "corpora") for name in getattr(monitor, field, ())]
        problems += [
            f"monitors.{number}.init_args.{field}: {name!r} is not in data.sources; name one, or bundled/stdlib"
            for field, name in texts
            if config.data.sources and name not in config.data.sources and not name.startswith("bundled/")
        ]
    problems += _stopping_problems(config)
    for name in config.data.tokenizer.train_on:
        if name not in config.data.sources:
            problems.append(f"data.tokenizer.train_on: {name!r} is not in data.sources")
    return problems


def _stopping_problems(config: Config) -> list[str]:
    """Of who hears of events, and of the rules that end a run."""
    problems, webhook = [], config.events.webhook
    if webhook is not None and not re.match(r"https?://[^/\s]", webhook):
        problems.append(f"events.webhook: should begin with http:// or https:// and a host, is {webhook!r}")
    if config.events.command is not None and not config.events.command.strip():
        problems.append("events.command: is empty; give a command line, or leave it out")
    if config.events.wandb_alert and config.wandb.mode == "disabled":
        problems.append("events.wandb_alert: needs W&B; set wandb.mode to offline or online, or leave it out")
    for number, rule in enumerate(config.stop_when):
        where = f"stop_when.{number}"
        if not rule.states:
            problems.append(f"{where}.states: is empty; name a signal and a state, such as answer_nll: saturated")
        for name, state in rule.states.items():
            if state not in STATES:
                problems.append(f"{where}.states.{name}: should be one of {', '.join(STATES)}, is {state!r}")
        if rule.at_least_tokens < 0:
            problems.append(f"{where}.at_least_tokens: should be at least 0, is {rule.at_least_tokens}")
        for name, gain in rule.margins.items():
            if not 0 < gain < math.inf:
                problems.append(f"{where}.margins.{name}: should be above 0, is {gain}")
    if config.stop_when and not config.monitors:
        problems.append("stop_when: needs monitors, whose signals it asks about; add some or leave it out")
    return problems


def _stage_problems(stage: StageConfig, config: Config) -> list[str]:
    problems = []
    for field in ("tokens", "context_tok", "global_batch_tok", "micro_batch"):
        if getattr(stage, field) < 1:
            problems.append(f"{field}: should be at least 1, is {getattr(stage, field)}")
    if not (1 < (2.0 if stage.rope_base is None else stage.rope_base) < math.inf and 0 < stage.lr < math.inf):
        problems.append(f"rope_base and lr: should be above 1 and above 0, are {stage.rope_base} and {stage.lr}")
    elif not 0 <= stage.min_lr <= stage.lr:
        problems.append(f"min_lr: {stage.min_lr} should be between 0 and lr ({stage.lr})")
    if (yarn := stage.yarn) is not None:
        if not (1 <= yarn.factor < math.inf and yarn.original_tok >= 1 and 0 < yarn.beta_slow < yarn.beta_fast):
            problems.append(
                "yarn: needs factor of at least 1, original_tok of at least 1 and 0 < beta_slow < beta_fast"
            )
        elif yarn.attention_factor is not None and not 0 < yarn.attention_factor < math.inf:
            problems.append(f"yarn.attention_factor: should be above 0, is {yarn.attention_factor}")
    if stage.warmup_tokens < 0:
        problems.append(f"warmup_tokens: should be at least 0, is {stage.warmup_tokens}")
    if stage.context_tok > 0 and stage.global_batch_tok % (stage.context_tok * stage.micro_batch or 1):
        problems.append(f"global_batch_tok: {stage.global_batch_tok} is not a multiple of context_tok x micro_batch")
    if stage.global_batch_tok > 0 and stage.tokens > MOST_STEPS * stage.global_batch_tok:
        problems.append(f"tokens: {stage.tokens:.3g} are more than {MOST_STEPS:,} steps of global_batch_tok; lower it")
    problems += _pack_problems(stage, config)
    if not stage.mixture:
        problems.append("mixture: is empty; name at least one part with its sources")
    for part, mixture in stage.mixture.items():
        if not mixture.sources or not all(0 < x < math.inf for x in (mixture.share, *mixture.sources.values())):
            problems.append(f"mixture.{part}: needs a share and source weights above 0")
        for source in mixture.sources if config.data.sources else ():
            if source not in config.data.sources:
                problems.append(f"mixture.{part}.sources: {source!r} is not in data.sources")
    return problems


def _pack_problems(stage: StageConfig, config: Config) -> list[str]:
    """What is wrong with how a stage packs documents."""
    if (pack := stage.pack) is None and stage.masks == "none":
        return []
    pack = pack or PackConfig(how="concat")
    if pack.align_tok < 1 or pack.window_steps < 1:
        return [f"pack: align_tok and window_steps should be at least 1, are {pack.align_tok} and {pack.window_steps}"]
    problems, cut = [], 2 * config.parallel.context if config.parallel.context > 1 else 1
    if stage.context_tok % pack.align_tok:
        problems.append(f"pack.align_tok: {pack.align_tok} does not divide context_tok ({stage.context_tok})")
    if pack.align_tok % cut:
        problems.append(
            f"pack.align_tok: {pack.align_tok} is not a multiple of 2 x parallel.context ({cut}), into which each "
            "document is cut; raise it"
        )
    if pack.how == "concat" and pack.long != "fragment":
        problems.append(f"pack.long: {pack.long} is for how: best_fit; leave it out")
    if stage.goes_on_from is not None:
        problems.append("goes_on_from: a stage with pack or masks goes on with what is left by itself; leave it out")
    return problems


def _order_problems(name: str, stages: Mapping[str, StageConfig]) -> list[str]:
    """What is wrong with the stage whose order of samples this one takes up."""
    stage, names = stages[name], list(stages)
    if (other := stage.goes_on_from) is None:
        return []
    if other not in names[: names.index(name)]:
        return [f"{other!r} is no stage before it; name one, or leave it out"]
    fields = ("mixture", "context_tok", "global_batch_tok")
    changed = [field for field in fields if getattr(stage, field) != getattr(stages[other], field)]
    if not changed:
        return []
    return [f"stages.{other} has another {' and '.join(changed)}; leave goes_on_from out, or take what that has"]


def layout_problems(config: Config, ranks: int, shape: Mapping[str, Any], megatron_version: str) -> list[str]:
    """Problems of the layout on `ranks` ranks for a model whose TransformerConfig fields are `shape`."""
    if size_problems(shape):  # field_problems says them
        return []
    p, problems = config.parallel, []
    etp = p.expert_tensor or p.tensor

    def divides(what: str, number: Any, by_name: str, by: int) -> None:
        if number is not None and number % by:
            problems.append(f"parallel.{by_name}: {by} does not divide {what} ({number})")

    divides("the attention heads", shape["num_attention_heads"], "tensor", p.tensor)
    groups = shape.get("num_query_groups") or shape["num_attention_heads"]
    if groups % p.tensor and p.tensor % groups:
        problems.append(f"parallel.tensor: {p.tensor} and the key/value heads ({groups}) do not divide each other")
    divides("model.vocab_multiple", config.model.vocab_multiple, "tensor", p.tensor)
    divides("the hidden size", shape["hidden_size"], "tensor", p.tensor)
    ends = {name: shape[name] for which in ("first", "last")
            if shape.get(name := f"num_layers_in_{which}_pipeline_stage") is not None}  # fmt: skip
    if ends:
        problems += _uneven_problems(p, shape["num_layers"], ends)
    else:
        divides("the layers", shape["num_layers"], "pipeline", p.pipeline * (p.virtual_pipeline or 1))
    experts = shape.get("num_moe_experts")
    ffn = shape.get("ffn_hidden_size") or 4 * shape["hidden_size"]
    if experts:
        divides("moe_ffn_hidden_size", shape.get("moe_ffn_hidden_size") or ffn, "expert_tensor", etp)
        shared = shape.get("moe_shared_expert_intermediate_size")
        divides("moe_shared_expert_intermediate_size", shared, "tensor", p.tensor)
    if not experts or shape.get("moe_layer_freq", 1) != 1:  # some layer has none
        divides("ffn_hidden_size", ffn, "tensor", p.tensor)
    if p.expert > 1 and experts is None:
        problems.append("parallel.expert: this model has no experts; set 1")
    divides("the experts", experts, "expert", p.expert)
    model_ranks = p.tensor * p.pipeline * p.context
    if ranks % model_ranks:
        problems.append(
            f"parallel: tensor x pipeline x context = {model_ranks} does not divide {count_text(ranks, 'rank')}"
        )
    elif ranks % (etp * p.expert * p.pipeline):
        problems.append(f"parallel: expert x expert_tensor x pipeline does not divide {count_text(ranks, 'rank')}")
    else:
        problems += _batch_problems(config, ranks // model_ranks)
    if experts and "seq_aux_loss" in str(shape.get("moe_router_load_balancing_type")):
        problems += [
            f"stages.{name}.masks: seq_aux_loss takes a row of documents for one sequence (Megatron-LM#6115); set "
            "megatron.transformer.moe_router_load_balancing_type: aux_loss"
            for name, stage in config.stages.items()
            if stage.masks != "none"
        ]
    if experts and silent_expert_defect(p, megatron_version):
        problems.append(
            f"parallel: Megatron-Core {megatron_version} does not reduce expert gradients with tensor {p.tensor}, "
            f"expert 1 and expert_tensor {etp}, and does not say so; set expert_tensor: {p.tensor} or use 0.19.2"
        )
    return problems


def _uneven_problems(p: ParallelConfig, layers: int, ends: Mapping[str, Any]) -> list[str]:
    """Problems of a pipeline whose first or last stage has as many layers as a field of its own says."""
    if wrong := [name for name, given in ends.items() if type(given) is not int or given < 1]:
        return [f"megatron.transformer.{wrong[0]}: should be a whole number of at least 1, is {ends[wrong[0]]!r}"]
    chunks, left, stages = p.virtual_pipeline or 1, layers - sum(ends.values()), p.pipeline - len(ends)
    names = " and ".join(ends)
    if stages < 0 or p.pipeline < 2:
        return [f"megatron.transformer.{names}: needs parallel.pipeline of at least 2; leave it out"]
    if left < 0 or (left % (stages * chunks) if stages else left) or any(given % chunks for given in ends.values()):
        return [
            f"megatron.transformer.{names}: leaves {left} of {layers} layers for {stages} pipeline stages of {chunks} "
            "chunks each, over which they should divide"
        ]
    if chunks > 1 and not stages:  # Megatron-Core divides by the stages in between (transformer_layer.py:138)
        return [f"megatron.transformer.{names}: both, with virtual_pipeline, need a stage in between; leave one out"]
    return []


def size_problems(shape: Mapping[str, Any]) -> list[str]:
    """Sizes of a model that are none."""
    found = []
    for name, value in ((name, shape[name]) for name in SIZES if shape.get(name) is not None):
        most = MOST_LAYERS if name in ("num_layers", "num_moe_experts") else MOST_OF_A_SIZE
        if type(value) is not int or value < 1:
            found.append(f"megatron.transformer.{name}: should be a whole number of at least 1, is {value!r}")
        elif value > most:
            found.append(f"megatron.transformer.{name}: should be at most {most:,}, is {value:,}")
    return found


def silent_expert_defect(p: ParallelConfig, megatron_version: str) -> bool:
    """0.16.1 reduces experts over the dense group if EP = 1 and ETP != TP (tensor_parallel/layers.py:829)."""
    etp = p.expert_tensor or p.tensor
    return megatron_version.startswith("0.16.") and p.expert == 1 and etp != p.tensor


def _batch_problems(config: Config, data_ranks: int) -> list[str]:
    problems = []
    for name, stage in config.stages.items():
        if stage.global_batch_tok % (stage.context_tok * stage.micro_batch * data_ranks):
            problems.append(
                f"stages.{name}.global_batch_tok: {stage.global_batch_tok} is not a multiple of context_tok x "
                f"micro_batch x {data_ranks} data-parallel ranks"
            )
        micro_batches = stage.global_batch_tok // (stage.context_tok * stage.micro_batch * data_ranks)
        if config.parallel.virtual_pipeline and micro_batches % config.parallel.pipeline:
            problems.append(
                f"stages.{name}.global_batch_tok: its {micro_batches} micro-batches are not a multiple of "
                f"{config.parallel.pipeline} pipeline stages, as virtual_pipeline wants"
            )
        p = config.parallel
        parts = p.tensor * (2 * p.context if p.context > 1 else 1)
        if stage.context_tok % parts:
            problems.append(
                f"stages.{name}.context_tok: {stage.context_tok} is not a multiple of {parts}: parallel.tensor "
                "(sequence parallelism) x 2 parallel.context (a rank holds an early and a late chunk)"
            )
    return problems
