"""What ranks do in test_attach.py: examples/attach_plain_mcore.py's own model and loop, with and without monitors."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch

from megatron_lccp.schema import Every, Metric, Monitor

ROOT = Path(__file__).parents[2]


def example():
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("attach_plain_mcore", ROOT / "examples/attach_plain_mcore.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hugging_face():
    """A tokenizer of another library: byte-level BPE, trained here."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    found = Tokenizer(models.BPE())
    found.pre_tokenizer, found.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=["<end>"], initial_alphabet=alphabet)
    found.train_from_iterator([(ROOT / "README.md").read_text()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=found, eos_token="<end>")


def foreign(
    base: str, monitors: str, tensor: int = 1, pipeline: int = 1, steps: int = 0, watch: bool = True,
    tokenizer: str = "ours", explicit: bool = False, further: bool = False,
) -> dict:  # fmt: skip
    """Rows before and after some steps of the example's loop, and a digest of the weights; `base` holds the weights.

    `explicit` gives the process groups and takes global ones away before anything is measured. In the end the
    last rank cannot read its text any more, and then has a layer without core attention: what is measured and said.
    `further` measures `tied_models` too.
    """
    from megatron.core import parallel_state
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_lccp import attach
    from megatron_lccp.model.build import bare
    from megatron_lccp.weights.whole import load_whole, save_whole
    from tests.distributed.jobs import digest_of

    loop = example()
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor, pipeline)
    model_parallel_cuda_manual_seed(1234)
    model = loop.build_model(tensor, pipeline)
    if not Path(base).exists():
        save_whole([model], base, {})
    load_whole([model], base)
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=1e-3, optimizer="adam", clip_grad=1.0), [model])
    optimizer.reload_model_params()
    chosen = hugging_face() if tokenizer == "hf" else ROOT / "examples/tiny_moe/tokenizer.model"
    groups = ProcessGroupCollection.use_mpu_process_groups(["tp", "pp", "dp", "cp"]) if explicit else None
    suite = attach([model], monitors, chosen, process_groups=groups)
    if explicit:  # what the schedules would take; Megatron-Core's own attention needs the rest
        parallel_state._PIPELINE_MODEL_PARALLEL_GROUP = parallel_state._CONTEXT_PARALLEL_GROUP = None
    tokens = torch.as_tensor(suite.text("bundled/stdlib", 50_000)).long()
    rows: list[Any] = []
    for step in range(steps + 1):
        if watch:
            rows += suite.measure(step, step * 100)
        if step < steps:
            loop.train_step(model, optimizer, loop.batches(tokens, step))
    found = {"rows": [dataclasses.asdict(row) for row in rows], "digest": digest_of([model])}
    if further:
        found["tied"], found["further"] = (
            [dataclasses.asdict(row) for row in attach([tied], monitors, chosen).measure(0)]
            for tied in tied_models(model)
        )
    text_of = suite.text
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        suite.text = unreadable
    said: list[str] = []
    suite.cache, suite.say = {}, said.append
    found["lost"] = [len(suite.measure(steps + 1)), *(text for text in said if "error" in text)]
    suite.text, suite.monitors = text_of, [m for m in suite.monitors if m.name == "RetrievalHeads"]
    said.clear()
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        del bare(model).decoder.layers[0].self_attention.core_attention
    found["blind"] = [len(suite.measure(steps + 2)), *(text for text in said if "error" in text)]
    return found


def small_chunks(
    tensor: int, pipeline: int, virtual: int | None, context: int, bf16: bool, positions: str = "rope",
    longest: int = 256,
) -> list[torch.nn.Module]:  # fmt: skip
    """This rank's chunks of a small dense model, in Float16Module if they are BF16.

    Core attention is ours, for Megatron-Core's own knows no context parallelism.
    """
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_lccp.model.attention import PortableAttention

    dtype = torch.bfloat16 if bf16 else torch.float32
    config = TransformerConfig(
        num_layers=4, hidden_size=64, num_attention_heads=4, num_query_groups=2, kv_channels=16, ffn_hidden_size=96,
        normalization="RMSNorm", activation_func=torch.nn.functional.silu, gated_linear_unit=True,
        add_bias_linear=False, hidden_dropout=0.1, attention_dropout=0.0, tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline, virtual_pipeline_model_parallel_size=virtual,
        context_parallel_size=context, pipeline_dtype=dtype, params_dtype=dtype, bf16=bf16,
        gradient_accumulation_fusion=False, masked_softmax_fusion=False, init_method_std=0.1,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = PortableAttention
    chunks = []
    for vp_stage in range(virtual) if virtual else [None]:
        gpt = GPTModel(
            config=config, transformer_layer_spec=spec, vocab_size=2048, max_sequence_length=longest,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            position_embedding_type=positions, vp_stage=vp_stage,
        )  # fmt: skip
        chunks.append(Float16Module(config, gpt) if bf16 else gpt)
    return chunks


def wrapped(
    base: str, monitors: str, tensor: int = 1, pipeline: int = 1, virtual: int | None = None, context: int = 1,
    bf16: bool = False, wrap: bool = True,
) -> dict:  # fmt: skip
    """Rows of a hook as Megatron-LM calls it (`non_loss_data_func(model)`: evaluation mode, no gradients), of chunks in
    DDP whose distributed optimizer gathers parameters as layers want them."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_lccp import attach
    from megatron_lccp.parallel import cpu
    from megatron_lccp.weights.whole import load_whole, save_whole

    cpu.install()
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor, pipeline, virtual, context_parallel_size=context)
    model_parallel_cuda_manual_seed(1234)
    chunks = small_chunks(tensor, pipeline, virtual, context, bf16)
    if not Path(base).exists():
        save_whole(chunks, base, {})
    load_whole(chunks, base)
    if wrap:
        overlap = {"overlap_grad_reduce": True, "overlap_param_gather": True}
        config, gathers = chunks[0].config, DistributedDataParallelConfig(use_distributed_optimizer=True, **overlap)
        chunks = [DistributedDataParallel(config, gathers, c, disable_bucketing=k > 0) for k, c in enumerate(chunks)]
        precision = OptimizerConfig(lr=1e-3, optimizer="adam", bf16=bf16, use_distributed_optimizer=True)
        get_megatron_optimizer(precision, chunks)
    told: list[str] = []
    suite = attach(chunks, monitors, ROOT / "examples/tiny_moe/tokenizer.model", say=told.append)

    def non_loss_data_func(model):
        return suite.measure(7, 700)

    for chunk in chunks:
        chunk.eval()
    hooks = [len(m._forward_pre_hooks) for c in chunks for m in c.modules()]
    with torch.no_grad():
        rows, measured = non_loss_data_func(chunks), len(told)
        for _ in range(2):  # Megatron-LM calls it three times at its last step
            assert non_loss_data_func(chunks) == rows and len(told) == measured
    assert hooks == [len(m._forward_pre_hooks) for c in chunks for m in c.modules()]
    assert not any(module.training for chunk in chunks for module in chunk.modules())
    wraps, module = [type(chunks[0]).__name__], chunks[0]
    while (module := getattr(module, "module", None)) is not None:
        wraps.append(type(module).__name__)
    return {"rows": [dataclasses.asdict(row) for row in rows], "wraps": wraps}


def tied_models(model) -> Iterator[Any]:
    """The model with the embedding's weights as output layer's, without and with layers that predict further tokens."""
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.models.gpt.gpt_model import GPTModel

    from megatron_lccp.model.build import bare

    gpt = bare(model)
    state = {name: value for name, value in gpt.state_dict().items() if value is not None}
    for layers in (None, 1):
        config = dataclasses.replace(gpt.config, mtp_num_layers=layers)
        spec = gpt_layer_specs.get_gpt_layer_local_spec(normalization="RMSNorm")
        mtp = gpt_layer_specs.get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False) if layers else None
        tied = GPTModel(
            config=config, transformer_layer_spec=spec, vocab_size=gpt.vocab_size, max_sequence_length=256,
            pre_process=gpt.pre_process, post_process=gpt.post_process, position_embedding_type="rope",
            share_embeddings_and_output_weights=True, mtp_block_spec=mtp,
        )  # fmt: skip
        tied.load_state_dict(state, strict=False)
        if tied.post_process and not tied.pre_process:  # with further layers, an embedding is what counts there
            if layers:
                tied.embedding.word_embeddings.weight.data.copy_(state["output_layer.weight"])
                tied.output_layer.weight.data.zero_()
        if tied.mtp_process:
            tied.mtp.forward = None  # not to be called
        yield tied


def unreadable(name: str, at_least_tok: int):
    raise OSError(f"{name}: gone")


@dataclasses.dataclass(frozen=True)
class Draws(Monitor):
    """Draws random numbers of all kinds, switches things over, and fails if it is told to."""

    metrics = (Metric(name="drawn", unit="count", about="Always 1."),)
    every: Every = Every(steps=3)
    on_error: Literal["skip", "stop"] = "skip"
    fail: bool = False

    def measure(self, window):
        from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

        torch.rand(3)
        with get_cuda_rng_tracker().fork():
            torch.rand(3)
        if self.fail:
            raise RuntimeError("on purpose")
        yield window.row(self, "drawn", 1, 1)


def state_of(model, config) -> dict[str, Any]:
    """Everything that a measurement could leave changed, by name."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    found: dict[str, Any] = {"random": torch.get_rng_state().tolist(), "grad": torch.is_grad_enabled()}
    found |= {f"random {k}": v.tolist() for k, v in get_cuda_rng_tracker().get_states().items()}
    found |= {f"config {k}": str(v) for k, v in vars(config).items()}
    for name, module in model.named_modules():
        found[f"{name} attributes"] = {
            k: len(v) if isinstance(v, dict) else id(v) if callable(v) else str(v)
            for k, v in vars(module).items()
            if k != "current_microbatch"  # which Megatron-Core's schedules set before every forward
            and (isinstance(v, (dict, bool, int, type(None))) or callable(v))
        }
    for name, parameter in model.named_parameters():
        found[f"{name} gradient"] = parameter.main_grad.sum().item()
    return found


def undisturbed(tokenizer: str, texts: dict[str, list[int]]) -> dict[str, Any]:
    """What differs after measurements that end well or not, of a model with gradients and things of others on it."""
    from megatron.core import parallel_state
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_lccp import attach
    from megatron_lccp.measuring.megatron_engine import MegatronEngine
    from megatron_lccp.measuring.needles import can_share
    from megatron_lccp.model.build import bare
    from megatron_lccp.monitors import HeadAblation, NeedleGrid, RetrievalHeads

    loop = example()
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    model = loop.build_model(1, 1)
    gpt = bare(model)
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=1e-3, optimizer="adam", clip_grad=1.0), [model])
    core = gpt.decoder.layers[1].self_attention.core_attention
    core.forward = functools.partial(core.forward)  # another tool's, and a layer that is not trained
    gpt.decoder.layers[0].mlp.eval()
    tokens = torch.arange(2000) % 700
    loop.train_step(model, optimizer, loop.batches(tokens, 0))

    def say(text: str) -> None:
        told.append(text)
        if "%, " in text and ("Retrieval" in text or "without" in text):
            raise RuntimeError("in the middle of a forward")

    told: list[str] = []
    sizes = {"lengths_tok": (130,), "depths": (0.5, 1.0), "samples": 1, "haystacks": ("mine",), "every": Every(steps=2)}
    chosen = [
        NeedleGrid(**sizes),
        RetrievalHeads(**sizes),
        HeadAblation(**sizes, top=(1,)),
        Draws(every=Every(tokens=100)),
        Draws(fail=True),
    ]
    suite = attach(model, chosen, tokenizer, texts={k: np.array(v) for k, v in texts.items()}, say=say)
    before = state_of(model, gpt.config)
    results: dict[str, Any] = {"measured": sorted({row.monitor for row in suite.measure(0)})}
    results["errors"] = [text.partition(": ")[2] for text in told if text.startswith("monitor_error")]
    calls = ((1, 50), (3, 120), (5, 150))  # due by steps at the second, by tokens there too and not once more
    results["due"] = [sorted({row.monitor for row in suite.measure(*call, due_only=True)}) for call in calls]
    suite.monitors = [Draws(fail=True, on_error="stop")]
    try:
        suite.measure(4)
    except RuntimeError as error:
        results["stopped"] = str(error)
    after = state_of(model, gpt.config)
    results["same"] = len(before)
    results["changed"] = {k: (v, after.get(k)) for k, v in before.items() if after.get(k) != v}
    results["new"] = sorted(after.keys() - before.keys())
    other = loop.build_model(1, 1)
    del bare(other).decoder.layers[0].self_attention.core_attention
    results["share"] = [
        can_share(SimpleNamespace(cache={}, engine=MegatronEngine(c, suite.groups, 700)))
        for c in ([model], [model, other])
    ]
    return results


def wrong(base: str) -> list[str]:
    """What attach says of what does not fit."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_lccp import attach
    from megatron_lccp.monitors import CopyBack, HeadAblation, NeedleGrid
    from megatron_lccp.parallel import cpu

    cpu.install()
    loop = example()
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    model = loop.build_model(1, 1)
    tokenizer, monitors = ROOT / "examples/tiny_moe/tokenizer.model", ROOT / "examples/attach_monitors.yaml"
    learned, axes = (small_chunks(1, 1, None, 1, False, "learned_absolute", longest=96) for _ in range(2))
    axes[0].position_embedding_type = "mrope"
    grid = {"depths": (0.5,), "samples": 1, "haystacks": ("bundled/stdlib",)}
    fits = [NeedleGrid(lengths_tok=(90,), **grid), CopyBack(longest_tok=96)]
    assert len(attach(learned, fits, tokenizer).measure(0)) > 8
    said = []
    for arguments in (
        dict(model=learned, monitors=[NeedleGrid(lengths_tok=(90, 97), **grid)], tokenizer=tokenizer),
        dict(model=axes, monitors=monitors, tokenizer=tokenizer),
        dict(model=torch.nn.Linear(2, 2), monitors=monitors, tokenizer=tokenizer),
        dict(model=model, monitors="absent.yaml", tokenizer=tokenizer),
        dict(model=model, monitors=monitors, tokenizer=object()),
        dict(model=model, monitors=monitors, tokenizer=tokenizer, texts={"mine": "absent.txt"}),
        dict(model=model, monitors=monitors, tokenizer=tokenizer, texts={"mine": np.array([1, 2048])}),
        dict(model=model, monitors=monitors, tokenizer=tokenizer, texts={"mine": np.array([0.5])}),
        dict(model=model, monitors=monitors, tokenizer=tokenizer, texts={"a\u202eb": np.array([1])}),
        dict(model=model, monitors=monitors, tokenizer=tokenizer, run="a\x1bb"),
        dict(model=model, monitors=[HeadAblation(top=(99,), haystacks=("mine",))], tokenizer=tokenizer),
        dict(model=model, monitors=[CopyBack(longest_tok=200), CopyBack(longest_tok=2**20)], tokenizer=tokenizer),
        dict(model=model, monitors=monitors, tokenizer=tokenizer, process_groups=object()),
    ):
        try:
            attach(**arguments)
            said.append("")
        except ValueError as error:
            said.append(str(error))
    return said
