"""Samples and models of bench_monitors.py: our model, and transformers' with the same weights.

In: the sizes of its command line. Out: needle samples of drawn token ids, `Ours` and `theirs`.
"""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_lccp.data.needles import Cell, NeedleSample, NeedleSetSpec
from megatron_lccp.measuring.prefills import Prefill
from megatron_lccp.planning.bench_samples import FIXED_TOK, samples_for

WARM_UP_TOK = 128


def depths_of(length_tok: int, o: argparse.Namespace) -> list[NeedleSample]:
    """A sample of this length at each depth, evenly from 0 to 1, on a lattice of 1/16 of the length."""
    depths = tuple(np.linspace(0, 1, o.depths).tolist())
    return samples_for(grid_cells((length_tok,), depths, length_tok // 16), o)


def grid_cells(lengths_tok: tuple[int, ...], depths: tuple[float, ...], lattice_tok: int) -> list[Cell]:
    """Lengths x depths as a needle monitor lays them out."""
    spec = NeedleSetSpec(lengths_tok=lengths_tok, depths=depths, lattice_tok=lattice_tok, haystacks=("drawn",))
    return spec.cells(FIXED_TOK)


def flat(trees: Sequence[Sequence[Prefill]]) -> list[Prefill]:
    """All prefills in order."""
    return [prefill for tree in trees for prefill in tree]


class Ours:
    """Megatron-Core's model as the package builds and measures it."""

    def __init__(self, o: argparse.Namespace):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            os.environ.setdefault("MASTER_PORT", str(s.getsockname()[1]))
        from megatron_lccp.config.tree import Config, MegatronConfig, ModelConfig, StageConfig, TrainingConfig
        from megatron_lccp.parallel.groups import make_groups, start_ranks

        device = start_ranks(timeout_s=60)
        import torch

        from megatron_lccp.model.build import build_chunks
        from megatron_lccp.model.resolved import resolve

        torch.set_num_threads(o.threads)
        transformer = dict(
            num_layers=o.layers, hidden_size=o.hidden, num_attention_heads=o.heads, num_query_groups=o.groups,
            kv_channels=o.width, ffn_hidden_size=o.ffn, moe_ffn_hidden_size=o.ffn, num_moe_experts=o.experts,
            moe_shared_expert_intermediate_size=o.ffn, moe_router_topk=o.topk,
        )  # fmt: skip
        config = Config(
            seed=o.seed, model=ModelConfig(vocab_multiple=1), megatron=MegatronConfig(transformer=transformer),
            training=TrainingConfig(precision=o.dtype), stages={"only": StageConfig(rope_base=10000.0)},
        )  # fmt: skip
        self.groups = make_groups(config.parallel, device, o.seed)
        self.chunks = build_chunks(config, resolve(config).of_vocabulary(o.vocab), self.groups)
        self.vocab = o.vocab
        for chunk in self.chunks:
            chunk.eval()
            for name, parameter in chunk.named_parameters():
                if "layernorm" in name:  # learned ones matter on which side of RoPE the QK-norm stands
                    parameter.data += 0.3 * torch.randn_like(parameter)
            if o.dtype == "bf16":
                chunk.bfloat16()

    def predict(self, prefills: Sequence[Prefill], look=False, questions=False, done=None) -> dict[int, Any]:
        """What a monitor gets for these prefills."""
        import torch

        from megatron_lccp.measuring.forward import predict

        with torch.no_grad():
            return predict(self.chunks, self.groups, [prefills], self.vocab, look, questions, done)

    def hunyuan_state(self) -> dict[str, Any]:
        """The weights under the names of transformers' HunYuanMoEV1; a group of qkv is [q.. k v], fc1 is [gate; up]."""
        import torch

        (model,) = self.chunks
        c, w = model.config, model.state_dict()
        experts = range(c.num_moe_experts)
        state = {
            "model.embed_tokens.weight": w["embedding.word_embeddings.weight"],
            "model.norm.weight": w["decoder.final_layernorm.weight"],
        }
        for layer in range(c.num_layers):
            of, to = f"decoder.layers.{layer}.", f"model.layers.{layer}."
            qkv = w[of + "self_attention.linear_qkv.weight"]
            qkv = qkv.view(c.num_query_groups, -1, c.kv_channels, c.hidden_size)
            for name, part in {"q": qkv[:, :-2], "k": qkv[:, -2], "v": qkv[:, -1]}.items():
                state[f"{to}self_attn.{name}_proj.weight"] = part.reshape(-1, c.hidden_size)
            mlp = of + "mlp.experts.local_experts."
            state |= {
                to + "self_attn.o_proj.weight": w[of + "self_attention.linear_proj.weight"],
                to + "self_attn.query_layernorm.weight": w[of + "self_attention.core_attention.q_layernorm.weight"],
                to + "self_attn.key_layernorm.weight": w[of + "self_attention.core_attention.k_layernorm.weight"],
                to + "input_layernorm.weight": w[of + "input_layernorm.weight"],
                to + "post_attention_layernorm.weight": w[of + "pre_mlp_layernorm.weight"],
                to + "mlp.gate.wg.weight": w[of + "mlp.router.weight"],
                to + "mlp.shared_mlp.down_proj.weight": w[of + "mlp.shared_experts.linear_fc2.weight"],
                to + "mlp.experts.gate_up_proj": torch.stack([w[f"{mlp}{e}.linear_fc1.weight"] for e in experts]),
                to + "mlp.experts.down_proj": torch.stack([w[f"{mlp}{e}.linear_fc2.weight"] for e in experts]),
            }
            shared_fc1 = w[of + "mlp.shared_experts.linear_fc1.weight"].chunk(2)
            for name, part in zip(("gate", "up"), shared_fc1):
                state[f"{to}mlp.shared_mlp.{name}_proj.weight"] = part
        return {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}


def theirs(o: argparse.Namespace):
    """transformers' model with the weights that `point` wrote, its attention eager."""
    import torch
    from safetensors.torch import load_file
    from transformers.models import hunyuan_v1_moe as hunyuan

    torch.set_num_threads(o.threads)
    fields: dict[str, Any] = dict(
        vocab_size=o.vocab, hidden_size=o.hidden, num_hidden_layers=o.layers, num_attention_heads=o.heads,
        num_key_value_heads=o.groups, head_dim=o.width, intermediate_size=o.ffn, num_experts=o.experts,
        moe_intermediate_size=[o.ffn] * o.layers, moe_topk=[o.topk] * o.layers, num_shared_expert=[1] * o.layers,
        rms_norm_eps=1e-5, tie_word_embeddings=True, attention_dropout=0.0, pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, attn_implementation="eager",
        max_position_embeddings=2**20,
    )  # fmt: skip
    config = hunyuan.HunYuanMoEV1Config(**fields)
    model = hunyuan.HunYuanMoEV1ForCausalLM(config).eval()
    missing, unexpected = model.load_state_dict(load_file(o.weights), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    return model
