"""What ranks do in test_attach.py: examples/attach_plain_mcore.py's own model and loop, with and without monitors."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import torch

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
    tokenizer: str = "ours", explicit: bool = False,
) -> dict:  # fmt: skip
    """Rows before and after some steps of the example's loop, and a digest of the weights; `base` holds the weights.

    `explicit` hands the process groups over and takes global ones away before anything is measured.
    """
    from megatron.core import parallel_state
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_lccp import attach
    from megatron_lccp.model.weights import load_whole, save_whole
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
    return {"rows": [dataclasses.asdict(row) for row in rows], "digest": digest_of([model])}


def wrong(base: str) -> list[str]:
    """What attach says of what does not fit."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_lccp import attach

    loop = example()
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    model = loop.build_model(1, 1)
    tokenizer, monitors = ROOT / "examples/tiny_moe/tokenizer.model", ROOT / "examples/attach_monitors.yaml"
    said = []
    for arguments in (
        dict(model=torch.nn.Linear(2, 2), monitors=monitors, tokenizer=tokenizer),
        dict(model=model, monitors="absent.yaml", tokenizer=tokenizer),
        dict(model=model, monitors=monitors, tokenizer=object()),
        dict(model=model, monitors=monitors, tokenizer=tokenizer, texts={"mine": "absent.txt"}),
        dict(model=model, monitors=monitors, tokenizer=tokenizer, process_groups=object()),
    ):
        try:
            attach(**arguments)
            said.append("")
        except ValueError as error:
            said.append(str(error))
    return said
