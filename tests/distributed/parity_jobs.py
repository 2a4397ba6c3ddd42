"""What ranks do for tests/measuring: bring things together over small groups; measure models on given samples."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_lccp.parallel.groups import start_ranks


def gathers(chunk: int, width: int, logit_rv: np.ndarray, target_r: np.ndarray) -> dict[Any, dict[str, Any]]:
    """Sequences, row scores and columns of logits brought together over groups of 2 and 4; by size of the group.

    Under "all", what all ranks agree on.
    """
    from megatron_lccp.measuring.forward import _vocab_parallel
    from megatron_lccp.measuring.taps import over_context
    from megatron_lccp.parallel.zigzag import gather_sequence, local_chunks, local_positions
    from tests.measuring.test_taps import Problem

    start_ranks(timeout_s=120)
    torch.set_num_threads(1)
    found: dict[Any, dict[str, Any]] = {"all": _agreements()}
    for size in (2, 4):
        groups = [dist.new_group(list(range(first, first + size))) for first in range(0, 4, size)]
        group = groups[dist.get_rank() // size]
        rank, length = group.rank(), 2 * size * chunk
        whole = torch.arange(length * width, dtype=torch.float32).reshape(length, width)
        mine = whole[local_positions((0, length), rank, size)].requires_grad_()
        gathered = gather_sequence(mine, group)
        (gathered * torch.arange(1.0, length + 1)[:, None] * (rank + 1)).sum().backward()
        scores = {}
        for seed in range(first := dist.get_rank() // size * 6, first + 6):  # other ones in each group
            problem = Problem(seed, 5, 12 * size, 2, 2, 8, whole_numbers=seed % 2 == 0)
            over = over_context(problem.score(local_chunks((0, 12 * size), rank, size), [0.4]), group)
            scores[seed] = [x.numpy() for x in (over.best_rn, over.position_rn, over.lse_rn, over.lse_span_rn)]
        columns = 16 // size  # of a vocabulary padded to 16
        part = torch.tensor(logit_rv)[:, rank * columns : (rank + 1) * columns]
        targets = torch.tensor(target_r) - rank * columns
        nll, best = _vocab_parallel(part, targets, rank * columns, SimpleNamespace(tp=group))
        found[size] = {
            "gathered": gathered.detach().numpy(), "gradient": mine.grad.numpy(), "scores": scores,
            "nll": nll.numpy(), "best": best.numpy(), "attention": _attention(group),
        }  # fmt: skip
    return found


def _agreements() -> dict[str, Any]:
    """What every rank hears of what ranks 1 and 3 know."""
    from megatron_lccp.parallel.gather import agreed, any_rank, first_text, sum_over_ranks

    def raised(errors: dict[int, Exception]) -> tuple[str, str] | None:
        try:
            with agreed():
                if rank in errors:
                    raise errors[rank]
        except Exception as error:
            return type(error).__name__, str(error)
        return None

    rank, cpu = dist.get_rank(), torch.device("cpu")
    part = torch.zeros(4)
    part[rank] = -rank
    return {
        "sum": sum_over_ranks(part).tolist(),
        "part": part.tolist(),
        "any": [any_rank(rank in those, cpu) for those in ((), (1,), (1, 3), range(4))],
        "first": [first_text(texts.get(rank)) for texts in ({}, {1: "b", 3: "a"}, {1: "", 3: "a"})],
        "raised": [
            raised(errors)
            for errors in (
                {},
                {1: OSError("gone"), 3: ValueError("later")},
                {1: json.JSONDecodeError("bad", "{", 1), 3: OSError("later")},
            )
        ],
    }


def _attention(group: dist.ProcessGroup) -> float:
    """How far attention under context parallelism is from that of the whole, with a softmax scale of its own."""
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_lccp.model.attention import PortableAttention
    from megatron_lccp.parallel.zigzag import local_positions

    g, parts = torch.Generator().manual_seed(8), []
    q, k, v = (torch.randn(24, 1, heads, 8, generator=g) for heads in (4, 2, 2))
    mine = local_positions((0, 24), group.rank(), group.size())
    for size, at in ((1, slice(None)), (group.size(), mine)):
        config = TransformerConfig(
            num_layers=1, hidden_size=32, num_attention_heads=4, num_query_groups=2, kv_channels=8,
            attention_dropout=0.0, context_parallel_size=size,
        )  # fmt: skip
        core = PortableAttention(
            config, 1, AttnMaskType.causal, softmax_scale=0.7, pg_collection=SimpleNamespace(cp=group)
        )
        parts.append(core(q[at], k[at], v[at]))
    return (parts[0][mine] - parts[1]).abs().max().item()


Heads = list[tuple[int, int]]


def measure_models(path: Path, llama: dict[str, Any], samples: list, vocab_size: int, ablated: list[Heads]):
    """One rank: what a Hunyuan (drawn here) and a Llama (given) say of samples; by model and way of running."""
    from megatron_lccp.config.load import parse_config
    from megatron_lccp.config.tree import ParallelConfig
    from megatron_lccp.model.build import build_chunks
    from megatron_lccp.model.resolved import resolve
    from megatron_lccp.parallel.groups import make_groups
    from tests.distributed.jobs import learned_norms, shards_of

    device = start_ranks(timeout_s=120)
    torch.set_num_threads(1)
    groups = make_groups(ParallelConfig(), device, 3)
    config = parse_config(path, ["--megatron.transformer.init_method_std=0.2"])
    hunyuan = build_chunks(config, resolve(config).of_vocabulary(vocab_size), groups)
    learned_norms(hunyuan)
    models = {"hunyuan": hunyuan, "llama": [_llama(**llama, groups=groups)]}
    found: dict[str, Any] = {"weights": shards_of(hunyuan)}
    for name, chunks in models.items():
        for chunk in chunks:
            chunk.eval()
        found[name] = _measure(chunks, groups, samples, vocab_size, ablated)
    found["kept"] = _kept(models["llama"], groups, samples, vocab_size, path.parent / "journal")
    found["drawn"] = _drawn_prefills(models["llama"], groups, vocab_size)
    return found


@torch.no_grad()
def _drawn_prefills(chunks, groups, vocab_size: int) -> int:
    """Any cells in prefills of any length against a forward for every sample; how many of them were tried."""
    from hypothesis import given, settings
    from hypothesis import strategies as st

    from megatron_lccp.measuring import prefill_attention
    from megatron_lccp.measuring.forward import predict
    from megatron_lccp.measuring.prefills import deal, one_each, shared
    from megatron_lccp.measuring.taps import score_rows
    from tests.measuring.test_prefills import SIZES, TOK, lay_out

    tried: list[int] = []

    @settings(max_examples=25, deadline=None, database=None)
    @given(
        cells=st.lists(st.tuples(TOK, TOK), min_size=1, max_size=4), sizes=SIZES, seed=st.integers(0, 99),
        limit=st.integers(3, 60),
    )  # fmt: skip
    def small_prefills_change_nothing(cells, sizes, seed, limit):
        rng = np.random.default_rng(seed)
        parts = [rng.integers(0, vocab_size, size) for size in (50, *sizes)]
        samples = [lay_out(before, after, *parts) for before, after in cells]
        ours, alone = (
            predict(chunks, groups, deal(trees, 1), vocab_size, look=True, questions=True)
            for trees in (shared(samples, True, 1, limit), one_each(samples, True))
        )
        for k in range(len(samples)):
            np.testing.assert_allclose(ours[k].nll_r, alone[k].nll_r, atol=1e-4)
            np.testing.assert_allclose(ours[k].null_mass_LN, alone[k].null_mass_LN, atol=1e-5)
            for name in ("answer_mass_LN", "question_mass_LN"):
                np.testing.assert_allclose(getattr(ours[k].look, name), getattr(alone[k].look, name), atol=1e-5)
            assert (ours[k].look.position_LNr == alone[k].look.position_LNr).mean() > 0.98  # up to ties
        tried.append(len(samples))

    def in_order(query_rnh, keys, *arguments):
        """As `score_rows` wants its keys: of a tie the lowest position."""
        firsts = [first for _, first in keys]
        assert firsts == sorted(set(firsts)), firsts
        return score_rows(query_rnh, keys, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill_attention, "score_rows", in_order)
        small_prefills_change_nothing()
    return len(tried)


@torch.no_grad()
def _measure(chunks, groups, samples, vocab_size: int, ablated: list[Heads]) -> dict[str, Any]:
    from megatron_lccp.measuring import engine, forward
    from megatron_lccp.measuring.forward import predict
    from megatron_lccp.measuring.head_scores import chosen_scores
    from megatron_lccp.measuring.prefill_attention import why_not_shared
    from megatron_lccp.measuring.prefills import deal, one_each, shared
    from megatron_lccp.measuring.taps import zero_heads
    from tests.measuring.own_scores import OWN, NoRows

    own = chosen_scores(OWN)
    assert why_not_shared(chunks) is None
    ways = {
        "shared": shared(samples, null=True),
        "parts": shared(samples, True, 5),
        "small": shared(samples, True, 1, 24),
        "one_each": one_each(samples, True),
    }
    found: dict[Any, Any] = {}
    for way, trees in ways.items():
        found[way] = predict(chunks, groups, deal(trees, 1), vocab_size, look=True, questions=True, scores=own)
    found["answers"] = predict(chunks, groups, deal(shared(samples), 1), vocab_size, scores=own)
    found["refused"] = _refused(
        lambda: predict(chunks, groups, deal(shared(samples), 1), vocab_size, scores=[NoRows()])
    )
    dealt = deal(ways["shared"], 1)
    found["shapes"] = [
        (len(prefill.segments), len(prefill.taps), prefill.keep_to > prefill.end) for prefill in dealt[0]
    ]
    for heads in ablated:
        with zero_heads(chunks, groups.tp, heads):
            found[tuple(heads)] = predict(chunks, groups, dealt, vocab_size, look=True, questions=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "PREFILLS_AT_ONCE", 1)  # a shared prefix is kept from one round to the next
        patch.setattr(forward, "ROWS_AT_ONCE", 3)
        found["rounds"] = predict(chunks, groups, dealt, vocab_size, look=True, questions=True, scores=own)
    alone, (model,) = deal(one_each(samples), 1), chunks
    for way, dtypes in {"bf16": [torch.bfloat16], "rounded": [torch.bfloat16, torch.float32]}.items():

        def cast(module, args, out, dtypes=dtypes):
            return functools.reduce(torch.Tensor.to, dtypes, out[0]), out[1]

        handle = model.output_layer.register_forward_hook(cast)
        found[way] = predict(chunks, groups, alone, vocab_size)
        handle.remove()
    found["capped"], found["times"] = _capped(chunks, groups, samples, vocab_size)
    found["again"] = predict(chunks, groups, dealt, vocab_size, look=True, questions=True)
    return found


def _refused(call: Callable[[], Any]) -> str:
    """What a ValueError says."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


@torch.no_grad()
def _kept(chunks, groups, samples, vocab_size: int, directory: Path) -> list[tuple[list[str], dict[int, Any]]]:
    """(progress, results) of a measurement, of one that finds a batch of it missing, and of one that finds it all."""
    from megatron_lccp.measuring import runs
    from megatron_lccp.measuring.head_scores import chosen_scores
    from megatron_lccp.measuring.journal import FileJournal
    from megatron_lccp.measuring.megatron_engine import MegatronEngine
    from megatron_lccp.measuring.pace import Pace
    from megatron_lccp.measuring.prefills import one_each
    from tests.measuring.own_scores import OWN

    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "PREFILLS_AT_ONCE", 4)
        for lose in (0, 1, 0):
            for path in sorted(directory.glob("*.safetensors"))[:lose]:
                path.unlink()
            said: list[str] = []
            window = SimpleNamespace(
                journal=FileJournal(directory),
                groups=groups,
                engine=MegatronEngine(chunks, groups, vocab_size),
                say=said.append,
                pace=Pace(),
                pieces=None,
            )
            trees = one_each(samples, null=True)
            own = chosen_scores(OWN)
            found.append((said, runs.run_trees(window, trees, "name", "what", True, True, own)))
    return found


def _capped(chunks, groups, samples, vocab_size: int) -> tuple[Any, float]:
    """What a model says whose output layer caps its logits, as Gemma 2's does, and where the installed version can,
    scales them, as MuP does; and the scale."""
    from megatron_lccp.measuring.forward import predict
    from megatron_lccp.measuring.prefills import deal, one_each

    (model,) = chunks
    config, times = model.config, 0.5 if hasattr(model.config, "use_mup") else 1.0
    handle = model.output_layer.register_forward_hook(lambda module, args, out: (2 * (out[0] / 2).tanh(), out[1]))
    with pytest.MonkeyPatch.context() as patch:
        deferring = copy.copy(config)  # the portable linear layers cannot be told so
        deferring.defer_embedding_wgrad_compute = True
        patch.setattr(model.output_layer, "config", deferring)
        patch.setattr(model.output_layer, "embedding_activation_buffer", [])
        if times != 1.0:
            patch.setattr(config, "use_mup", True)
            patch.setattr(config, "mup_output_mult", times)
        found = predict(chunks, groups, deal(one_each(samples), 1), vocab_size)
        assert not model.output_layer.embedding_activation_buffer  # nothing waits for a backward pass
        assert deferring.defer_embedding_wgrad_compute  # and the field is as it was
    handle.remove()
    return found, times


@torch.no_grad()
def _llama(fields: dict[str, Any], state: dict[str, np.ndarray], scale: float, groups):
    """A plain Megatron-Core GPTModel, its local layers as they come, with a Llama's weights in it."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=fields["num_hidden_layers"], hidden_size=fields["hidden_size"], add_bias_linear=False,
        num_attention_heads=fields["num_attention_heads"], num_query_groups=fields["num_key_value_heads"],
        kv_channels=fields["head_dim"], ffn_hidden_size=fields["intermediate_size"], normalization="RMSNorm",
        layernorm_epsilon=fields["rms_norm_eps"], gated_linear_unit=True, activation_func=F.silu, hidden_dropout=0.0,
        softmax_scale=scale, attention_dropout=0.0, masked_softmax_fusion=False, persist_layer_norm=False,
        apply_rope_fusion=False, gradient_accumulation_fusion=False,
    )  # fmt: skip
    model = GPTModel(
        config=config, transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=fields["vocab_size"], max_sequence_length=256,
        share_embeddings_and_output_weights=bool(fields.get("tie_word_embeddings")),
        position_embedding_type="rope", rotary_base=10000, pg_collection=groups.collection,
    )  # fmt: skip
    w = {name: torch.tensor(value) for name, value in state.items()}
    ours = {
        "embedding.word_embeddings.weight": w["model.embed_tokens.weight"],
        **({} if fields.get("tie_word_embeddings") else {"output_layer.weight": w["lm_head.weight"]}),
        "decoder.final_layernorm.weight": w["model.norm.weight"],
    }  # fmt: skip
    groups_, width = config.num_query_groups, config.kv_channels
    for k in range(config.num_layers):
        of = {name.removeprefix(f"model.layers.{k}."): x for name, x in w.items() if f"layers.{k}." in name}
        qkv = [of[f"self_attn.{x}_proj.weight"].view(groups_, -1, width, config.hidden_size) for x in "qkv"]
        ours |= {
            f"decoder.layers.{k}.{name}": x
            for name, x in {
                "input_layernorm.weight": of["input_layernorm.weight"],
                "pre_mlp_layernorm.weight": of["post_attention_layernorm.weight"],
                "self_attention.linear_qkv.weight": torch.cat(qkv, 1).reshape(-1, config.hidden_size),
                "self_attention.linear_proj.weight": of["self_attn.o_proj.weight"],
                "mlp.linear_fc1.weight": torch.cat([of["mlp.gate_proj.weight"], of["mlp.up_proj.weight"]]),
                "mlp.linear_fc2.weight": of["mlp.down_proj.weight"],
            }.items()
        }
    missing, unexpected = model.load_state_dict(ours, strict=False)
    assert not unexpected and not [name for name in missing if "_extra_state" not in name], (missing, unexpected)
    return model
