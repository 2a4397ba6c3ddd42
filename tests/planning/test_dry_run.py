"""`lccp train --dry-run`: a sound layout passes, with Megatron-Core's own schedule; planted faults are found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_lccp.cli import main
from megatron_lccp.config.load import parse_config
from megatron_lccp.data.tokenizers.load import load_tokenizer
from megatron_lccp.model.resolved import resolve
from megatron_lccp.planning import dry_run
from megatron_lccp.planning.dry_run_rank import Findings, run_rank
from megatron_lccp.planning.memory import in_flight

ROOT = Path(__file__).resolve().parents[2]
MONITORS = "megatron_lccp.monitors"


@pytest.fixture
def dry(tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the command with overrides on so many ranks: (exit code, what it printed, findings)."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def run(ranks: int, *overrides: str) -> tuple[int, str, list[str]]:
        arguments = ["--dry-run", "--ranks", str(ranks), f"--dir={tmp_path / 'run'}", *overrides]
        code = main(["train", str(tiny_yaml), *arguments])
        said = capsys.readouterr()
        assert not (tmp_path / "run").exists() and not dist.is_initialized()
        found = [line for line in said.err.splitlines() if "/tiny.yaml: " in line]
        return code, said.out, [line.partition("/tiny.yaml: ")[2] for line in found]

    return run


def layout(**sizes: int) -> list[str]:
    return [f"--parallel.{name}={size}" for name, size in sizes.items()]


def test_a_sound_layout_passes_and_says_what_stages_do(dry) -> None:
    code, out, found = dry(8, *layout(tensor=2, pipeline=2, expert=2, expert_tensor=1))
    assert not found and code == 0
    assert "TP 2 x PP 2 x CP 1 x DP 2; experts EP 2 x ETP 1" in out
    # base: 512 tokens of 64 in micro-batches of 2 on 2 replicas; half of a sequence on a tensor rank, 64 wide
    assert "Stage base: each of 2 data-parallel replicas runs micro-batches of 2 x 64 tokens, 2 a step; 33.3% of" in out
    assert "0-3  1 + embedding             2  2 x [32, 2, 64] float32 to rank 4" in out
    assert "4-7  2 + output layer          1  2 x [32, 2, 64] float32 to rank 0" in out
    assert "[64, 1, 64] float32" in out and "Ran: 4 of 8 ranks" in out and "no findings" in out


def test_context_parallel_chunks_full_recomputation_and_allgather_pass(dry) -> None:
    more = json.dumps({
        "num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 16,
        "ffn_hidden_size": 64, "moe_ffn_hidden_size": 64, "moe_shared_expert_intermediate_size": 64,
        "num_moe_experts": 4, "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1,
        "moe_token_dispatcher_type": "allgather",
    })  # fmt: skip
    sizes = layout(tensor=2, pipeline=2, virtual_pipeline=2, context=2, expert=2, expert_tensor=2)
    code, out, found = dry(8, *sizes, f"--megatron.transformer={more}", "--megatron.ddp.overlap_grad_reduce=true")
    assert not found and code == 0
    assert "x 2 chunks" in out and "1, 3 + embedding" in out and "2, 4 + output layer" in out


CASES = {
    # refused before anything is built
    "heads": (3, ["--parallel.tensor=3"], "parallel.tensor: 3 does not divide the attention heads (4)"),
    "experts' width": (10, ["--parallel.expert_tensor=5"], "parallel.expert_tensor: 5 does not divide moe_ffn"),
    "sequence": (2, ["--stages.lccp.context_tok=130", "--stages.lccp.global_batch_tok=520", "--parallel.context=2"],
                 "stages.lccp.context_tok: 130 is not a multiple of 4"),
    "micro-batches of chunks": (
        2, [*layout(pipeline=2, virtual_pipeline=2), "--megatron.transformer.num_layers=4",
            "--stages.lccp.global_batch_tok=384"],
        "stages.lccp.global_batch_tok: its 3 micro-batches are not a multiple of 2 pipeline stages",
    ),
    "recomputed module": (
        1, ["--megatron.transformer.recompute_granularity=selective",
            "--megatron.transformer.recompute_modules=[attentoin]"],
        "megatron.transformer.recompute_modules: 'attentoin' is unknown",
    ),
    # Megatron-Core's configuration refuses
    "capacity": (1, ["--megatron.transformer.moe_pad_expert_input_to_capacity=true"],
                 "building the model: moe_expert_capacity_factor must be set"),
    # found in the schedule alone
    "group of micro-batches": (
        2, [*layout(pipeline=2, virtual_pipeline=2), "--megatron.transformer.num_layers=4",
            "--megatron.transformer.microbatch_group_size_per_vp_stage=1"],
        "stages.base: one step: The number of contiguous micro-batches in a virtual pipeline stage",
    ),
    # the start
    "weights": (1, [f"--model.init_from={ROOT / 'examples/tiny_moe/base.safetensors'}"],
                "model.init_from: "),
    "no weights": (1, ["--model.init_from=absent.safetensors"], "model.init_from: absent.safetensors is no file"),
    # the data
    "source": (1, ["--data.sources.code.init_args.max_bytes=5"], "source 'code' has changed since"),
    "too few tokens": (1, ["--stages.base.context_tok=262144", "--stages.base.global_batch_tok=524288"],
                       "stages.base: reading the first batch"),
    # monitors
    "haystack": (1, ["--monitors.1.init_args.haystacks=[bookz]"], "monitors.1.init_args.haystacks: 'bookz' is not in"),
    "no room for a needle": (1, ["--monitors.1.init_args.lengths_tok=[20]"], "lengths_tok: 20 has no room"),
    "heads of a monitor": (
        1, [f"--monitors.2={{class_path: {MONITORS}.HeadAblation, init_args: {{top: [99], haystacks: [code]}}}}"],
        "monitors.2 (HeadAblation): top: 99 is no number of heads of a model that has 8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_planted_fault_is_found(name: str, dry) -> None:
    ranks, overrides, text = CASES[name]
    code, _, found = dry(ranks, *overrides)
    assert code == 2 and any(text in line for line in found), found


def test_a_checkpoint_directory_to_start_from_is_checked(dry, tiny_yaml: Path, tmp_path: Path) -> None:
    """As a conversion writes it: names, shapes, and what it says of itself."""
    from megatron_lccp.config.tree import ParallelConfig
    from megatron_lccp.model.build import build_chunks
    from megatron_lccp.parallel import compat, cpu
    from megatron_lccp.parallel.fake import fake_rank
    from megatron_lccp.weights.sharded import write_sharded
    from megatron_lccp.weights.whole import model_shards

    cpu.install()
    compat.apply()
    config, _ = dry_run.without_gpu(parse_config(tiny_yaml, []), {})
    vocab = load_tokenizer(config.data.tokenizer.path).vocab_size
    with fake_rank(ParallelConfig(), 1, 0, 1) as (groups, _):
        chunks = build_chunks(config, resolve(config).of_vocabulary(vocab), groups)
        shapes = {shard.key: tuple(shard.global_shape) for shard in model_shards(chunks)}

    def found_in(name: str, shapes: dict[str, tuple[int, ...]], about: dict) -> list[str]:
        tensors = {key: (shape, torch.bfloat16) for key, shape in shapes.items()}
        read = lambda key, at: torch.zeros(shapes[key], dtype=torch.bfloat16)  # noqa: E731
        parts = [(key, ()) for key in shapes]
        write_sharded(tmp_path / name, tensors, parts, read, about, 1 << 30, lambda done, total: None)
        return dry(2, "--parallel.tensor=2", "--monitors=[]", f"--model.init_from={tmp_path / name}")[2]

    norm = "decoder.final_layernorm.weight"
    assert found_in("sound", shapes, {}) == []
    (line,) = found_in("shape", shapes | {norm: (7,)}, {})
    assert f"has {norm} of shape [7], where this model needs [64]; it belongs to another model" in line
    (line,) = found_in("absent", {key: shape for key, shape in shapes.items() if key != norm}, {})
    assert f"lacks 1 tensor ({norm}); it belongs to another model" in line
    (line,) = found_in("more", shapes | {"decoder.extra": (3,)}, {})
    assert "has 1 tensor (decoder.extra) too much; it belongs to another model" in line
    (line,) = found_in("model", shapes, {"family": "tiny_moe", "num_layers": 7})
    assert "model.init_from: " in line and "megatron.transformer.num_layers: 7 -> 2" in line


def test_stages_that_the_run_does_not_reach_are_not_walked(dry) -> None:
    _, out, found = dry(1, "--monitors=[]")
    assert not found and "Stage base: " in out and "Stage lccp: " in out
    _, out, found = dry(1, "--monitors=[]", "--training.steps=1")
    assert not found and "Stage base: " in out and "Stage lccp: " not in out


def test_every_finding_is_told_at_once_and_once(dry) -> None:
    code, out, found = dry(
        2, "--parallel.expert=2", "--monitors.0.init_args.corpora=[bundled/bookz]",
        "--monitors.1.init_args.lengths_tok=[20]",
        "--model.init_from=absent.safetensors",
    )  # fmt: skip
    assert code == 2 and len(found) == 4 and "4 findings" in out, found


def test_a_stage_that_sends_what_the_next_does_not_expect_is_found(dry, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.pipeline_parallel import schedules

    original = schedules.get_tensor_shapes

    def shapes(**arguments):  # the last stage expects twice the sequence
        if dist.get_rank() == 1:
            arguments["seq_length"] *= 2
        return original(**arguments)

    monkeypatch.setattr(schedules, "get_tensor_shapes", shapes)
    code, _, found = dry(2, "--parallel.pipeline=2", "--monitors=[]")
    assert code == 2
    assert any("rank 0 sends [64, 2, 64] float32 to rank 1, which expects [128, 2, 64]" in line for line in found), (
        found
    )


@pytest.mark.parametrize(("pipeline", "virtual", "batch"), [(4, None, 8), (4, None, 2), (4, 2, 8), (2, 4, 4)])
def test_in_flight_is_what_the_plan_counts(pipeline: int, virtual: int | None, batch: int, tiny_yaml: Path) -> None:
    """Activations of a plan are counted for as many micro-batches as Megatron-Core's schedule keeps."""
    sizes = [f"--parallel.pipeline={pipeline}", f"--parallel.virtual_pipeline={virtual or 'null'}"]
    more = ["--megatron.transformer.num_layers=8", f"--stages.lccp.global_batch_tok={128 * batch}", "--monitors=[]"]
    config = parse_config(tiny_yaml, [*sizes, *more])
    dry, _ = dry_run.without_gpu(config, {})
    for stage in range(pipeline):
        done = run_rank(dry, resolve(dry).of_vocabulary(700), stage, pipeline, {}, Findings())
        assert done.steps["lccp"].in_flight() == in_flight(config.parallel, stage, batch)


def test_what_only_gpus_run_is_left_out_and_said(dry) -> None:
    transformer = json.dumps({
        "moe_token_dispatcher_type": "flex", "recompute_granularity": "selective",
        "recompute_modules": ["moe_act", "layernorm"], "fp8_param": True,
        "fine_grained_activation_offloading": True, "offload_modules": ["expert_fc1"],
        "fp8_dot_product_attention": True, "first_last_layers_bf16": True, "cp_comm_type": "a2a+p2p",
    })  # fmt: skip
    fp8 = ["--training.fp8=tensorwise", "--training.precision=bf16", "--training.measure_in=fp8"]
    te = ["--model.layers=transformer_engine", *layout(expert=2, context=2), "--parallel.context_levels=[1, 2]"]
    more = [*te, "--training.loss_chunk_tok=16", "--monitors=[]", *fp8, f"--megatron.transformer={transformer}"]
    code, out, found = dry(2, *more)
    assert not found and code == 0
    left_out = [
        "fp8_param",
        "fp8_dot_product_attention",
        "first_last_layers_bf16",
        "cp_comm_type",
        "fine_grained_activation_offloading",
        "moe_token_dispatcher_type",
        "recompute_modules",
    ]
    names = [f"megatron.transformer.{name}" for name in sorted(left_out)]
    said = out.partition("kernels of GPUs; ")[2].splitlines()[0].split(", ")
    assert sorted(said) == sorted([*names, "training.fp8", "parallel.context_levels"])


def test_norms_are_recomputed(dry) -> None:
    """Of tensors without memory, whose place is taken by those of a second forward."""
    selective = json.dumps({"recompute_granularity": "selective", "recompute_modules": ["layernorm", "moe"]})
    code, _, found = dry(2, "--parallel.tensor=2", "--monitors=[]", f"--megatron.transformer={selective}")
    assert not found and code == 0


def test_fake_ranks_give_back_what_they_replace() -> None:
    from megatron.core.pipeline_parallel import p2p_communication, schedules

    from megatron_lccp.config.tree import ParallelConfig
    from megatron_lccp.parallel.fake import fake_rank

    places = [(dist, "all_gather_object"), (p2p_communication, "_p2p_ops"), (schedules, "forward_step")]
    before = [getattr(module, name) for module, name in places]
    with pytest.raises(ZeroDivisionError), fake_rank(ParallelConfig(pipeline=2), 1, 1, 4) as (groups, _):
        assert (groups.pp.rank(), groups.dp.rank(), groups.dp.size()) == (0, 1, 2)
        assert torch.empty(3, device="cuda").is_meta and torch.empty(3, dtype=torch.int64, device="cuda").is_cpu
        raise ZeroDivisionError
    assert [getattr(module, name) for module, name in places] == before and not dist.is_initialized()
    assert torch.empty(3, device="cpu").is_cpu


def test_options_that_do_not_go_together(tiny_yaml: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["train", str(tiny_yaml), "--ranks", "4"]) == 2
    assert "--ranks: is for --dry-run" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", str(tiny_yaml), "--dry-run"]) == 2
    assert "--dry-run: is one process" in capsys.readouterr().err
