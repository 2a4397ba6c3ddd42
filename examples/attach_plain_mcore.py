"""The monitors in a Megatron-Core loop that is not ours: three lines, marked below.

    torchrun --nproc-per-node 2 examples/attach_plain_mcore.py --tensor 2 --steps 20 --dir runs/attached

A small dense model (Llama's parts, Megatron-Core's own local layers) learns Python's standard library. Nothing of
megatron_lccp trains it; without a GPU, megatron_lccp.parallel.cpu lets Megatron-Core run on gloo ranks.
`lccp report runs/attached` draws what was measured.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.nn.functional as F

from megatron_lccp.parallel import compat, cpu

compat.quiet()
cpu.install()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from megatron_lccp import attach  # noqa: E402  <- line 1 of 3

HERE = Path(__file__).parent
CONTEXT, SEQUENCES = 256, 8
HELD_OUT = 100_000
"""Tokens at the beginning of the text, where the monitors read, that training never sees."""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--tensor", type=int, default=1, help="tensor-parallel ranks")
    options.add_argument("--pipeline", type=int, default=1, help="pipeline stages")
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--every", type=int, default=10, help="steps between measurements")
    options.add_argument("--dir", default="runs/attached", help="run directory for `lccp report`")
    args = options.parse_args()

    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    parallel_state.initialize_model_parallel(args.tensor, args.pipeline)
    model_parallel_cuda_manual_seed(1234)
    model = build_model(args.tensor, args.pipeline)
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=1e-3, optimizer="adam", clip_grad=1.0), [model])

    suite = attach([model], HERE / "attach_monitors.yaml", HERE / "tiny_moe/tokenizer.model", dir=args.dir)  # <- line 2
    tokens = torch.as_tensor(suite.text("bundled/stdlib", 2_000_000)[HELD_OUT:]).long()
    for step in range(args.steps + 1):
        if step % args.every == 0:
            rows = suite.measure(step, step * SEQUENCES * CONTEXT)  # <- line 3 of 3
            tell(step, rows)
        if step < args.steps:
            train_step(model, optimizer, batches(tokens, step))
    torch.distributed.destroy_process_group()


def build_model(tensor: int, pipeline: int) -> DistributedDataParallel:
    config = TransformerConfig(
        num_layers=4, hidden_size=128, num_attention_heads=4, num_query_groups=2, kv_channels=32, ffn_hidden_size=352,
        normalization="RMSNorm", activation_func=F.silu, gated_linear_unit=True, add_bias_linear=False,
        hidden_dropout=0.0, attention_dropout=0.0, tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline, pipeline_dtype=torch.float32, gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
    )  # fmt: skip
    config.finalize_model_grads_func = finalize_model_grads
    gpt = GPTModel(
        config=config, transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"), vocab_size=2048,
        max_sequence_length=CONTEXT, pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(), position_embedding_type="rope",
    )  # fmt: skip
    gpt.to(torch.cuda.current_device())
    return DistributedDataParallel(config, DistributedDataParallelConfig(), gpt)


def batches(tokens: torch.Tensor, step: int):
    """This replica's sequences of a step, one at a time."""
    starts = torch.randint(len(tokens) - CONTEXT - 1, (SEQUENCES,), generator=torch.Generator().manual_seed(step))
    replicas, replica = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    device = torch.cuda.current_device()
    return iter([tokens[start : start + CONTEXT + 1].to(device)[None] for start in starts.tolist()[replica::replicas]])


def train_step(model: DistributedDataParallel, optimizer, data) -> None:
    model.zero_grad_buffer()
    optimizer.zero_grad()
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=data,
        model=model,
        num_microbatches=SEQUENCES // parallel_state.get_data_parallel_world_size(),
        seq_length=CONTEXT,
        micro_batch_size=1,
        forward_only=False,
    )
    optimizer.step()


def forward_step(data, model):
    tokens = next(data)
    positions = torch.arange(CONTEXT, device=tokens.device)[None]
    mask = torch.ones(CONTEXT, CONTEXT, dtype=torch.bool, device=tokens.device).triu(1)[None, None]
    losses = model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:])
    return losses, lambda out: (out.float().mean(), {})


def tell(step: int, rows) -> None:
    if torch.distributed.get_rank() == 0:
        answers = [row.value for row in rows if row.metric == "answer_nll"]
        heads = [row.value for row in rows if row.metric == "retrieval_score"]
        print(f"step {step}: answer NLL {sum(answers) / len(answers):.3f} nat, best head {max(heads):.2f}", flush=True)


if __name__ == "__main__":
    main()
