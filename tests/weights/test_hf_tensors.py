"""Hugging Face -> one file -> Megatron, and back, for a random model of each family made by transformers.

Logits equal transformers' eager ones to 1e-4 in FP32; the way back gives every tensor bit by bit under its name; what
is missing or unknown is refused by name, what was cut off goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.distributed.ranks import ROOT, run_ranks, tool

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from megatron_lccp.config.load import dump_config, parse_config  # noqa: E402
from megatron_lccp.model import hf_config  # noqa: E402
from megatron_lccp.model.families import FAMILIES  # noqa: E402
from megatron_lccp.model.rope import with_rope  # noqa: E402
from megatron_lccp.weights import hf_files, hf_tensors, sharded, streams  # noqa: E402

VOCAB, ROWS = 800, 832  # more than the 700 ids of the tokenizer: all rows take part in the softmax
SIZES = dict(
    vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=24,
    intermediate_size=96, initializer_range=0.1, attn_implementation="eager",
)  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 50000.0}
LLAMA31 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
ALPHA = {"rope_type": "dynamic", "type": "dynamic", "alpha": 50.0, "factor": 1.0, "rope_theta": 10000.0}
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48)
GLM = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, attention_bias=True, pad_token_id=0,
           routed_scaling_factor=2.5, rope_parameters={**PLAIN, "partial_rotary_factor": 0.5})  # fmt: skip
HY = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, rope_parameters=PLAIN)
LLAMA32 = {**LLAMA31, "factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 5.0,
           "original_max_position_embeddings": 32}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
TIED = dict(tie_word_embeddings=True)
MODELS = {
    "hunyuan": ("HunYuanMoEV1", dict(
        num_experts=4, moe_topk=[2, 2], moe_intermediate_size=[96, 96], num_shared_expert=[1, 1], pad_token_id=0,
        rope_parameters=ALPHA, rms_norm_eps=1e-5, **TIED,
    )),
    "hunyuan_dense": ("HunYuanDenseV1", dict(rope_parameters=ALPHA, rms_norm_eps=1e-5, pad_token_id=0, **TIED)),
    "llama2": ("Llama", dict(num_key_value_heads=4, head_dim=None, rope_parameters=LINEAR, rms_norm_eps=1e-5)),
    "llama3": ("Llama", dict(rope_parameters=PLAIN, rms_norm_eps=1e-5)),
    "llama31": ("Llama", dict(rope_parameters=LLAMA31, rms_norm_eps=1e-5)),
    "llama32": ("Llama", dict(rope_parameters=LLAMA32, rms_norm_eps=1e-5, **TIED)),
    "mistral": ("Mistral", dict(rope_parameters=PLAIN, sliding_window=None)),
    "qwen25": ("Qwen2", dict(rope_parameters=YARN, head_dim=16, **TIED)),
    "qwen3": ("Qwen3", dict(rope_parameters={**YARN, "attention_factor": 1.3, "truncate": False})),
    "qwen3_tied": ("Qwen3", dict(rope_parameters=PLAIN, **TIED)),
    "qwen3_moe": ("Qwen3Moe", dict(rope_parameters=PLAIN, norm_topk_prob=True, **MOE)),
    "qwen3_moe_raw": ("Qwen3Moe", dict(rope_parameters=PLAIN, norm_topk_prob=False, **MOE)),
    "glm4_moe": ("Glm4Moe", dict(use_qk_norm=True, **GLM)),
    "glm4_moe_air": ("Glm4Moe", dict(n_shared_experts=2, **GLM)),
    "glm4_moe_groups": ("Glm4Moe", dict(n_group=2, topk_group=1, first_k_dense_replace=0, **GLM)),
    "hy_v3": ("HYV3", dict(num_shared_experts=2, **HY)),
    "hy_v3_last": ("HYV3", dict(mlp_layer_types=["sparse", "dense"], **HY)),
}  # fmt: skip


def make(name: str, folder: Path) -> None:
    """A random model of the family, its norms other than one, saved in several files."""
    prefix, more = MODELS[name]
    torch.manual_seed(3)
    model = getattr(transformers, f"{prefix}ForCausalLM")(getattr(transformers, f"{prefix}Config")(**SIZES | more))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            elif parameter_name.endswith(".bias"):  # drawn as zeros
                parameter.copy_(0.3 * torch.randn_like(parameter))
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.copy_(5 + 0.3 * torch.randn_like(buffer))
    model.save_pretrained(folder, max_shard_size="200KB")


def tensors_in(folder: Path) -> dict:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def quiet(done: int, total: int) -> None:
    assert 0 < done <= total


def never(done: int, total: int) -> None:
    raise AssertionError("weights were read")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("convert")
    for name in MODELS:
        make(name, root / name)
        hf_files.hf_to_megatron(root / name, root / f"{name}.safetensors", 64, quiet)
        hf_files.hf_to_megatron(root / name, root / f"{name}.megatron", 64, quiet, file_bytes=60_000)
    return root


def overrides_for(name: str, folders: Path, kind: str = "safetensors") -> list[str]:
    return [
        f"--model.config={folders / name}", "--megatron.transformer={}", "--monitors=[]",
        "--stages.base.rope_base=null", f"--model.init_from={folders / name}.{kind}",
    ]  # fmt: skip


SAMPLES = [(np.random.default_rng(k).integers(4, VOCAB, 65), (1, 65), 0, (0, 0)) for k in range(4)]
"""(tokens, what is to be predicted, question, needle): every token after the first."""
PLANTED, MARK, AT = (1, 2), 5, (7, 30, 51)
"""The (layer, head) that looks for the token MARK, and where that stands in each sample."""


def plant(folder: Path) -> None:
    """Have one head of a Llama look for the token MARK, wherever the row stands.

    The embedding's first feature tells MARK from the other tokens, the second is the same for all. The head's queries
    are made of the second and the keys of its group of the first, both in the slowest rotary pair.
    """
    layer, head = PLANTED
    width, slow = SIZES["head_dim"], SIZES["head_dim"] // 2 - 1

    def change(name: str, tensor) -> None:
        if name == "model.embed_tokens.weight":
            tensor[:, 0], tensor[:, 1], tensor[MARK, 0] = 0.0, 1.0, 1.0
        if name in ("model.layers.0.self_attn.o_proj.weight", "model.layers.0.mlp.down_proj.weight"):
            tensor[:2] = 0.0  # what comes before the layer leaves the two alone
        of_layer = f"model.layers.{layer}.self_attn."
        if name in (f"{of_layer}q_proj.weight", f"{of_layer}k_proj.weight"):
            row = head * width if "q_proj" in name else head // 2 * width
            tensor[row : row + width] = 0.0
            tensor[row + slow, 1 if "q_proj" in name else 0] = 60.0

    edit(folder, change)


class Expected:
    """What transformers' eager model says of SAMPLES, or of the samples that hold MARK."""

    def __init__(self, folder: Path, samples: list[tuple]):
        kind = json.loads((folder / "config.json").read_text())["architectures"][0]
        model = getattr(transformers, kind).from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
        )
        self.samples, self.nll, self.looks = samples, [], []
        with torch.no_grad():
            for tokens, (start, end), *_ in samples:
                out = model.eval()(torch.as_tensor(tokens)[None], output_attentions=True)
                rows = out.logits[0, start - 1 : end - 1].double()
                wanted = torch.as_tensor(tokens[start:end])
                self.nll.append(torch.nn.functional.cross_entropy(rows, wanted, reduction="none").numpy())
                attention_LNrs = torch.stack(out.attentions)[:, 0, :, start - 1 : end - 1]
                self.looks.append(attention_LNrs.argmax(-1).numpy())
            self.logits = model(torch.as_tensor(np.stack([tokens[:-1] for tokens, *_ in samples]))).logits.numpy()


@pytest.fixture(scope="module")
def expected(folders: Path) -> dict[str, Expected]:
    """transformers' answers for each family, and for a Llama with a planted head."""
    shutil.copytree(folders / "llama3", folders / "planted")
    plant(folders / "planted")
    hf_files.hf_to_megatron(folders / "planted", folders / "planted.megatron", 64, quiet)
    hf_files.hf_to_megatron(folders / "planted", folders / "planted.safetensors", 64, quiet)
    marked = [(tokens.copy(), (64, 65), 60, (at, at + 1)) for at, (tokens, *_) in zip(AT, SAMPLES)]
    for tokens, *_, (at, _) in marked:
        tokens[[at, 64]] = MARK  # the answer, like the needle
    return {name: Expected(folders / name, SAMPLES if name in MODELS else marked) for name in (*MODELS, "planted")}


LAYOUTS = {
    "one rank": (1, []),
    "TP2": (2, ["tensor=2"]),
    "PP2": (2, ["pipeline=2"]),
    "EP2": (2, ["expert=2"]),
    "TP2xEP2": (2, ["tensor=2", "expert=2", "expert_tensor=1"]),
}


def asked_on(layout: str, folders: Path, expected: dict[str, Expected]) -> dict:
    """What the ranks of a layout are asked of which models: whole-model files on one rank, else sharded checkpoints."""
    names = [name for name in expected if "EP2" not in layout or "experts" in str(MODELS.get(name))]
    ranks, sizes = LAYOUTS[layout]
    kind, cases = "safetensors" if ranks == 1 else "megatron", {}
    for name in names:
        cases[name] = overrides_for("llama3" if name == "planted" else name, folders, kind)
        cases[name] += [f"--model.init_from={folders / name}.{kind}", *(f"--parallel.{size}" for size in sizes)]
    return {"cases": cases, "asked": {name: expected[name].samples for name in names}}


@pytest.fixture(scope="module")
def alone(folders: Path, tiny_yaml: Path, expected: dict[str, Expected]) -> dict:
    """Everything that one rank has to say, from one start."""
    saved = {"overrides": overrides_for("hunyuan", folders), "to": str(folders / "exported.safetensors")}
    in_bf16 = [*overrides_for("hy_v3", folders), "--training.precision=bf16"]
    router = {"overrides": in_bf16, "to": str(folders / "router.safetensors")}
    asked, refused = asked_on("one rank", folders, expected), of_another_model(folders)
    return run_ranks(1, "convert_jobs.alone", path=tiny_yaml, asked=asked, refused=refused, saved=saved,
                     router=router)[0]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_family_equals_transformers(
    layout: str, folders: Path, tiny_yaml: Path, expected: dict[str, Expected], alone: dict
) -> None:
    """All logits, the loss of every token, and where every head of every layer looks."""
    ranks, sizes = LAYOUTS[layout]
    asked = asked_on(layout, folders, expected)
    found = [alone["families"]] if ranks == 1 else run_ranks(ranks, "convert_jobs.families", path=tiny_yaml, **asked)
    names = list(asked["cases"])
    assert len(names) == (8 if "EP2" in layout else 18)
    for name in names:
        for rank in found:
            for k, said in rank[name]["said"].items():
                np.testing.assert_allclose(said.nll_r, expected[name].nll[k], atol=1e-4, err_msg=name)
                assert np.array_equal(said.look.position_LNr, expected[name].looks[k]), name
        logits = [rank[name]["logits"] for rank in found if rank[name]["logits"] is not None]
        assert len(logits) == (1 if "pipeline=2" in sizes else ranks) and expected[name].logits.std() > 0.1
        for logits_bsV in logits:
            assert logits_bsV.shape == (*expected[name].logits.shape[:2], ROWS)
            np.testing.assert_allclose(logits_bsV[..., :VOCAB], expected[name].logits, rtol=0, atol=1e-4, err_msg=name)
        if ranks == 1 and name in MODELS:
            written = load_file(folders / f"{name}.safetensors")
            assert set(written) == found[0][name]["names"]  # the model has no tensor that the file lacks
    if "planted" in names:
        it = expected["planted"]
        scores = [retrieval_scores(sample, found[0]["planted"]["said"][k]) for k, sample in enumerate(it.samples)]
        theirs = [look[..., 0] == sample[3][0] for look, sample in zip(it.looks, it.samples)]
        assert np.argwhere(np.min(scores, axis=0) == 1).tolist() == [list(PLANTED)]
        assert np.argwhere(np.all(theirs, axis=0)).tolist() == [list(PLANTED)]


def retrieval_scores(sample: tuple, said) -> np.ndarray:
    """Our retrieval score of every head [layers, heads]."""
    from megatron_lccp.measuring.head_scores import head_scores

    tokens, answer, question, needle = sample
    of = SimpleNamespace(tokens=tokens, answer=answer, question=question, needle=needle)
    return head_scores(of, said, ["retrieval_score"])["retrieval_score"]


@pytest.mark.parametrize("kind", ["safetensors", "megatron"])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_bitwise(name: str, kind: str, folders: Path, tmp_path: Path) -> None:
    files = hf_files.megatron_to_hf(folders / f"{name}.{kind}", tmp_path / "back", quiet, file_bytes=200_000)
    assert len(files) > 1
    before, after = tensors_in(folders / name), tensors_in(tmp_path / "back")
    assert set(before) == set(after)
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype and torch.equal(tensor, after[key]), key
    assert (tmp_path / "back" / "config.json").read_text() == (folders / name / "config.json").read_text()


def test_padding_of_the_vocabulary_is_zero(folders: Path) -> None:
    with safe_open(folders / "llama3.safetensors", "pt") as file:
        for key in (hf_tensors.EMBEDDING, hf_tensors.HEAD):
            whole = file.get_tensor(key)
            assert whole.shape[0] == ROWS and not whole[VOCAB:].any() and whole[:VOCAB].any(dim=1).all()


def test_bfloat16_weights_come_back(folders: Path, alone: dict, tmp_path: Path) -> None:
    """What a run exports has no config.json in its header, and is bfloat16."""
    exported, back = folders / "exported.safetensors", tmp_path / "back"
    with pytest.raises(ValueError, match="--config"):
        hf_files.megatron_to_hf(exported, back, quiet)
    config = folders / "hunyuan" / "config.json"
    hf_files.megatron_to_hf(exported, back, quiet, config, rope_base=2e6)
    before, after = tensors_in(folders / "hunyuan"), tensors_in(back)
    assert set(before) == set(after)
    assert all(torch.equal(tensor.bfloat16(), after[key]) for key, tensor in before.items())
    source, _ = hf_config.read_config(back / "config.json")
    assert source.rope.base == pytest.approx(2e6, rel=1e-9)
    assert json.loads((back / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_training_on_ranks_goes_back(folders: Path, tiny_yaml: Path, tmp_path: Path) -> None:
    """Converted -> two steps on TP2xEP2 -> its checkpoint -> Hugging Face, which says what one rank says of it."""
    run = tmp_path / "run"
    start = overrides_for("hunyuan", folders, "megatron") + [f"--dir={run}", "--training.steps=2"]
    start += ["--stages.base.yarn={factor: 4.0, original_tok: 16}"]
    layout = ["--parallel.tensor=2", "--parallel.expert=2", "--parallel.expert_tensor=1"]
    losses = run_ranks(2, "jobs.train", path=tiny_yaml, overrides=start + layout, monitors=False)[0]["losses"]
    assert len(losses) == 2
    step, config = run / "checkpoints" / "step-00000002", folders / "hunyuan" / "config.json"
    hf_files.megatron_to_hf(step, tmp_path / "new", quiet)  # its start kept the config.json
    own, rope = hf_config.read_config(config)[0].rope, hf_config.read_config(tmp_path / "new")[0].rope
    assert (rope.kind, rope.factor, rope.original_tok, rope.base) == ("yarn", 4.0, 16, pytest.approx(own.base))
    about = json.loads((step / "checkpoint.json").read_text())  # of an earlier version it says less
    (step / "checkpoint.json").write_text(
        json.dumps(about | {"about": {k: v for k, v in about["about"].items() if k not in ("hf_config", "ropes")}})
    )
    with pytest.raises(ValueError, match="keeps no config.json; give the model's with --config"):
        hf_files.megatron_to_hf(step, tmp_path / "back", quiet)
    with pytest.raises(ValueError, match="was trained with num_moe_experts 4, config.json says 8"):
        other = tmp_path / "other.json"
        other.write_text(json.dumps(json.loads(config.read_text()) | {"num_experts": 8}))
        hf_files.megatron_to_hf(step, tmp_path / "back", quiet, other)
    with pytest.raises(ValueError, match="no config.yaml in its run says the RoPE base; give it with --rope-base"):
        hf_files.megatron_to_hf(step, tmp_path / "back", quiet, config)
    short = tmp_path / "short.json"
    short.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 32}))

    def positions(said: list[str], **options: float) -> int:
        hf_files.megatron_to_hf(step, tmp_path / "short", quiet, short, say=said.append, **options)
        return json.loads((tmp_path / "short" / "config.json").read_text())["max_position_embeddings"]

    assert positions(said := [], rope_base=2e6) == 32 and "--max-positions changes it" in said[0]
    assert positions(said := [], rope_base=2e6, max_positions=48) == 48 and not said
    (run / "config.yaml").write_text(dump_config(parse_config(tiny_yaml, [*start, "--stages.base.rope_base=2e6"])))
    hf_files.megatron_to_hf(step, tmp_path / "back", quiet, config)
    assert hf_config.read_config(tmp_path / "back" / "config.json")[0].rope.base == pytest.approx(2e6)  # the stage's
    assert positions(said := []) == 64 and not said  # of the stage, for the second has not begun
    kept = json.loads((tmp_path / "back" / "config.json").read_text())["max_position_embeddings"]
    assert kept == json.loads(config.read_text())["max_position_embeddings"] > 64
    (step / "checkpoint.json").write_text(json.dumps(about))
    (tmp_path / "before").mkdir()
    shutil.copytree(folders / "hunyuan", tmp_path / "before", dirs_exist_ok=True)
    trained, before = (Expected(tmp_path / name, SAMPLES) for name in ("new", "before"))
    monitor = "{class_path: megatron_lccp.monitors.CorpusPPL, init_args: {length_tok: 64, sequences: 3}}"
    (found,) = run_ranks(
        1, "convert_jobs.from_checkpoints", path=tiny_yaml, overrides=[*start, f"--model.init_from={step}"],
        asked=SAMPLES, measured=[f"--monitors=[{monitor}]", f"--dir={tmp_path / 'out'}"],
        weights=str(folders / "hunyuan.megatron"),
    )  # fmt: skip
    for k, said in found["said"].items():
        np.testing.assert_allclose(said.nll_r, trained.nll[k], atol=1e-4)
    np.testing.assert_allclose(found["logits"][..., :VOCAB], trained.logits, rtol=0, atol=1e-4)
    assert abs(trained.nll[0] - before.nll[0]).max() > 1e-2  # two steps have moved it
    assert found["code"] == 0 and list((tmp_path / "out" / "measured").glob("rows/step-*.parquet"))


def of_another_model(folders: Path) -> dict[str, list[str]]:
    """Configurations that the weights they name do not fit; the last two are told, or fine."""
    llama = overrides_for("llama3", folders, "megatron")
    return {
        "epsilon": [*llama, "--megatron.transformer.layernorm_epsilon=1e-6"],
        "head_dim": [*llama, "--megatron.transformer.kv_channels=12", "--megatron.transformer.num_attention_heads=8",
                     "--megatron.transformer.num_query_groups=4"],
        "kind": [*llama, f"--model.init_from={folders / 'qwen3.megatron'}"],
        "file": [*llama, f"--model.init_from={folders / 'qwen3.safetensors'}"],
        "rows": [*llama, "--model.vocab_multiple=512"],
        "folder": [*llama, f"--model.init_from={folders / 'llama3'}"],
        "base": [*llama, "--stages.base.rope_base=2e6"],
        "step": [*llama, f"--dir={folders / 'nothing'}"],
    }  # fmt: skip


def test_weights_of_another_model_are_refused(alone: dict) -> None:
    said = alone["refusals"]
    assert "layernorm_epsilon is 1e-05, here 1e-06" in said["epsilon"] and "than LlamaForCausalLM" in said["epsilon"]
    assert "kv_channels is 24, here 12" in said["head_dim"]
    assert "QK-norm before_rope, here none" in said["kind"] and "QK-norm before_rope" in said["file"]
    assert "shape" not in said["rows"]  # the padding of the vocabulary may be of any length
    assert "its RoPE base is 50000, stages.base.rope_base is 2e+06" in said["base"]
    assert "is a Hugging Face folder; convert it by tools/convert_checkpoint.py" in said["folder"]
    assert "RoPE" not in said["step"]


def test_head_keeps_its_index(folders: Path, tmp_path: Path) -> None:
    """Head h of transformers is head h of Megatron's o_proj columns and of its grouped query rows."""
    shutil.copytree(folders / "qwen3", tmp_path / "planted")
    width, heads, groups, head = SIZES["head_dim"], 4, 2, 3

    def plant(name: str, tensor) -> None:
        if name == "model.layers.1.self_attn.o_proj.weight":
            tensor[:, head * width : (head + 1) * width] = 77.0
        if name == "model.layers.1.self_attn.q_proj.weight":
            tensor[head * width : (head + 1) * width] = 78.0
        if name == "model.layers.1.self_attn.k_proj.weight":
            tensor[width:] = 79.0

    edit(tmp_path / "planted", plant)
    hf_files.hf_to_megatron(tmp_path / "planted", tmp_path / "planted.safetensors", 64, quiet)
    whole = load_file(tmp_path / "planted.safetensors")
    projection = whole["decoder.layers.self_attention.linear_proj.weight"].view(2, 64, heads, width)
    assert (projection == 77.0).all(dim=(1, 3)).nonzero().tolist() == [[1, head]]
    qkv = whole["decoder.layers.self_attention.linear_qkv.weight"].view(2, groups, heads // groups + 2, width, 64)
    assert (qkv == 78.0).all(dim=(3, 4)).nonzero().tolist() == [[1, 1, 1]]  # group 1, its second query
    assert (qkv == 79.0).all(dim=(3, 4)).nonzero().tolist() == [[1, 1, 2]]


def edit(folder: Path, change) -> None:
    """Rewrite every file of a folder after `change(name, tensor)`, which edits in place or returns False to drop."""
    for file in folder.glob("*.safetensors"):
        kept = {name: tensor for name, tensor in load_file(file).items() if change(name, tensor) is not False}
        save_file(kept, file, metadata={"format": "pt"})


def merge(source: Path, folder: Path, **more) -> Path:
    """The folder's model in one file, with other or fewer tensors (None drops)."""
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    tensors = {name: t for name, t in {**tensors_in(source), **more}.items() if t is not None}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({EXPERT: None}, rf"1 tensors are missing: {EXPERT}"),
        ({"model.layers.1.mlp.bias": torch.zeros(3)}, r"1 tensors nothing takes: model\.layers\.1\.mlp\.bias"),
        ({EXPERT: torch.zeros(48, 65)}, rf"{EXPERT} is torch.float32 \[48, 65\], expected torch.float32 \[48, 64\]"),
        ({EXPERT: torch.zeros(48, 64).half()}, rf"{EXPERT} is torch.float16 \[48, 64\], expected torch.float32"),
        ({EXPERT: torch.zeros(48, 64, dtype=torch.int8)}, rf"model.safetensors: .*{EXPERT} has dtype I8"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(more: dict, problem: str, folders: Path, tmp_path: Path) -> None:
    folder = merge(folders / "qwen3_moe", tmp_path / "odd", **more)
    with pytest.raises(ValueError, match=problem):
        hf_files.hf_to_megatron(folder, tmp_path / "out.safetensors", 64, quiet)
    assert not list(tmp_path.glob("out*"))


def test_a_whole_file_that_does_not_fit_is_refused(folders: Path, tmp_path: Path) -> None:
    whole = load_file(folders / "qwen3_moe.safetensors")
    config = folders / "qwen3_moe" / "config.json"
    router = "decoder.layers.mlp.router.weight"
    for change, problem in (
        ({router: None}, f"missing: {router}"),
        ({"extra": torch.zeros(1)}, "nothing takes: extra"),
        ({router: torch.zeros(2, 5, 64)}, r"expected torch.float32 \[2, 4, 64\]"),
    ):
        odd = {name: tensor for name, tensor in {**whole, **change}.items() if tensor is not None}
        save_file(odd, tmp_path / "odd.safetensors")
        with pytest.raises(ValueError, match=problem):
            hf_files.megatron_to_hf(tmp_path / "odd.safetensors", tmp_path / "back", quiet, config)


def test_a_stored_tied_head_comes_back_if_it_is_the_embedding(folders: Path, tmp_path: Path) -> None:
    embedding = tensors_in(folders / "hunyuan")["model.embed_tokens.weight"]
    folder = merge(folders / "hunyuan", tmp_path / "twice", **{"lm_head.weight": embedding.clone()})
    hf_files.hf_to_megatron(folder, tmp_path / "twice.safetensors", 64, quiet)
    hf_files.megatron_to_hf(tmp_path / "twice.safetensors", tmp_path / "back", quiet)
    before, after = tensors_in(folder), tensors_in(tmp_path / "back")
    assert set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)
    other = merge(folders / "hunyuan", tmp_path / "other", **{"lm_head.weight": embedding + 1})
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
        hf_files.hf_to_megatron(other, tmp_path / "other.safetensors", 64, quiet)


def test_what_transformers_loads_means_the_same(folders: Path, tmp_path: Path) -> None:
    """Left-over buffers, a tied matrix under the head's name, files beside the index: all as transformers takes them."""
    tensors, said = tensors_in(folders / "llama32"), []
    odd = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(12) for layer in (0, 1)}
    odd |= {"model.embed_tokens.weight": None, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    folder = merge(folders / "llama32", tmp_path / "odd", **odd)
    (folder / "consolidated.safetensors").write_bytes(b"another copy, which nothing reads")
    hf_files.hf_to_megatron(folder, tmp_path / "odd.safetensors", 64, quiet, say=said.append)
    assert said == [f"{folder}: 2 buffers of rotary frequencies are left out, as transformers leaves them"]
    assert same_tensors(tmp_path / "odd.safetensors", folders / "llama32.safetensors")
    theirs, ours = Expected(folder, SAMPLES[:1]), Expected(folders / "llama32", SAMPLES[:1])
    assert np.array_equal(theirs.logits, ours.logits)
    several = tmp_path / "several"
    shutil.copytree(folders / "llama32", several)
    (several / "consolidated.safetensors").write_bytes(b"another copy, which nothing reads")
    hf_files.hf_to_megatron(several, tmp_path / "several.safetensors", 64, quiet)
    next(several.glob("model-00001*")).unlink()
    with pytest.raises(ValueError, match="model-00001-of-.* is in .*, but not in the folder"):
        hf_files.hf_to_megatron(several, tmp_path / "less.safetensors", 64, never)


OLD = dict(architectures=["LlamaForCausalLM"], model_type="llama", rope_theta=5e4, max_position_embeddings=64, **{
    key: value for key, value in SIZES.items() if key not in ("attn_implementation", "initializer_range")
}, rms_norm_eps=1e-5)  # fmt: skip
ROPES = {
    "none": {}, "old linear": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "both": {"rope_scaling": {**YARN, "rope_theta": 1e4}, "rope_parameters": PLAIN},
    "both, base above": {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "rope_parameters": PLAIN},
    "original above": {"rope_scaling": YARN, "original_max_position_embeddings": 24},
    "mscale": {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0, "beta_fast": 8, "beta_slow": 2}},
    "llama3": {"rope_scaling": LLAMA32}, "empty": {"rope_scaling": {}, "rope_parameters": {"rope_theta": 1e6}},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": None},
}  # fmt: skip


@pytest.mark.parametrize("name", ROPES)
def test_rotary_embeddings_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Frequencies and the factor of queries and keys; then with another base, which the key that is read gets."""
    from megatron_lccp.model.build import _frequencies

    config = {key: value for key, value in (OLD | ROPES[name]).items() if value is not None}
    for base in (None, 3e6):
        source = hf_config.describe(config)
        fields = SimpleNamespace(kv_channels=source.shape.width, use_cpu_initialization=True)
        model = SimpleNamespace(config=fields, rotary_percent=1.0, rotary_pos_emb=SimpleNamespace(cp_group=None))
        (tmp_path / "config.json").write_text(json.dumps(config))
        loaded = transformers.AutoConfig.from_pretrained(tmp_path)
        rotary = getattr(transformers.models, loaded.model_type)
        kind = next(value for key, value in vars(getattr(rotary, f"modeling_{loaded.model_type}")).items()
                    if key.endswith("RotaryEmbedding"))  # fmt: skip
        theirs = kind(loaded)
        assert torch.allclose(_frequencies(model, source.rope), theirs.inv_freq, rtol=1e-6, atol=0)
        assert source.rope.attention == pytest.approx(theirs.attention_scaling)
        assert base is None or source.rope.base == pytest.approx(base)
        config = with_rope(config, replace(source.rope, base=3e6), source.shape.width, source.rope)


def test_the_factor_of_a_stage_comes_and_goes() -> None:
    """What Megatron-Core multiplies queries and keys by, as 0.16.1 asks for it and as 0.19.2 keeps it."""
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
        _yarn_get_concentration_factor_from_config as asked,
    )

    from megatron_lccp.parallel.compat import scale_rotary

    attention = SimpleNamespace(_yarn_concentration_factor=1.0)
    model = SimpleNamespace(config=SimpleNamespace(), modules=lambda: [attention])
    scale_rotary(model, 1.0)
    assert not vars(model.config)  # a model that never had one is left alone
    for factor in (1.3, 1.0, 0.8):
        scale_rotary(model, factor)
        assert asked(model.config) == pytest.approx(factor) and attention._yarn_concentration_factor == factor


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"architectures": ["Olmo2ForCausalLM"]}, "architectures: Olmo2ForCausalLM cannot be converted; there are"),
        ({"architectures": ["MistralForCausalLM"], "model_type": "mistral"}, "sliding_window: 4096 cannot be converted"),
        ({"model_type": "mistral"}, "model_type: mistral is none of LlamaForCausalLM"),
        ({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window"),
        ({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2",
          "layer_types": ["full_attention", "sliding_attention"]}, "layer_types: layers differ"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0, "alpha": 2.0}}, "rope_scaling: dynamic cannot be converted"),
        ({"rope_parameters": {"full_attention": PLAIN}}, "rope_parameters: full_attention has a rotary embedding of"),
        ({"intermediate_size": None}, "intermediate_size: is missing"), ({"vocab_size": None}, "vocab_size: is missing"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' cannot be converted; expected 'silu'; `lccp measure --hf`"),
    ],
)  # fmt: skip
def test_what_megatron_cannot_express_names_the_other_engine(change: dict, problem: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in (OLD | change).items() if v is not None}))
    with pytest.raises(ValueError, match=problem) as caught:
        hf_config.read_config(tmp_path)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(tmp_path / "config.json"))


def test_fused_experts_come_apart(folders: Path, tmp_path: Path) -> None:
    """Newer files keep a layer's experts in two tensors; here they are built by hand from the single ones."""
    tensors, fused = tensors_in(folders / "qwen3_moe"), {}
    for layer in range(2):
        of = f"model.layers.{layer}.mlp.experts"
        one = {part: [tensors[f"{of}.{e}.{part}_proj.weight"] for e in range(4)] for part in ("gate", "up", "down")}
        pairs = zip(one["gate"], one["up"])
        fused[f"{of}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
        fused[f"{of}.down_proj"] = torch.stack(one["down"])
    single = {name: None for name in tensors if ".experts." in name}
    folder = merge(folders / "qwen3_moe", tmp_path / "fused", **single, **fused)
    hf_files.hf_to_megatron(folder, tmp_path / "fused.safetensors", 64, quiet)
    assert len(single) == 24 and same_tensors(tmp_path / "fused.safetensors", folders / "qwen3_moe.safetensors")
    turned = {name: tensor.transpose(1, 2).contiguous() for name, tensor in fused.items()}
    folder = merge(folders / "qwen3_moe", tmp_path / "turned", **single, **turned)
    with pytest.raises(ValueError, match=r"experts.0.gate_proj.weight is torch.float32 \[32, 96\], expected"):
        hf_files.hf_to_megatron(folder, tmp_path / "turned.safetensors", 64, quiet)


def same_tensors(one: Path, other: Path) -> bool:
    a, b = load_file(one), load_file(other)
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_the_tokenizer_goes_with_the_model(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    for name in ("tokenizer.json", "hy.tiktoken", "tokenizer_config.json", "model.safetensors.index.json"):
        (tmp_path / "from" / name).write_text(name)
    hf_files.megatron_to_hf(folders / "llama3.megatron", tmp_path / "back", quiet, tokenizer=tmp_path / "from")
    for name, problem, options in (
        ("no", "has no files of a tokenizer", {"tokenizer": tmp_path / "no"}),
        ("config", "nothing.json: cannot be read", {"config": tmp_path / "nothing.json"}),
        ("from", "is none of this model's files", {}),
    ):  # what is wrong with the request is said before a byte of the weights is read
        (tmp_path / "from" / "model-1.safetensors").touch()
        with pytest.raises(ValueError, match=problem):
            hf_files.megatron_to_hf(folders / "llama3.megatron", tmp_path / name, never, **options)
        assert name == "from" or not (tmp_path / name).exists()
    names = {path.name for path in (tmp_path / "back").iterdir()}
    assert names == {"model.safetensors", "config.json", "tokenizer.json", "hy.tiktoken", "tokenizer_config.json"}


def test_nothing_is_overwritten(folders: Path, tmp_path: Path) -> None:
    """What is there and is not the same conversion stays; the same again has nothing to do."""
    out, source = tmp_path / "out.safetensors", tmp_path / "source"
    out.write_bytes(b"mine")
    with pytest.raises(ValueError, match="out.safetensors: exists and is something else"):
        hf_files.hf_to_megatron(folders / "llama3", out, 64, quiet)
    assert out.read_bytes() == b"mine"
    out.unlink()
    hf_files.hf_to_megatron(folders / "llama3", out, 64, quiet)
    written = out.stat()
    hf_files.hf_to_megatron(folders / "llama3", out, 64, quiet)
    assert out.stat().st_mtime_ns == written.st_mtime_ns
    merge(folders / "llama3", source)
    with pytest.raises(ValueError, match="model.safetensors: exists and is something else"):
        hf_files.megatron_to_hf(out, source, quiet)
    with pytest.raises(ValueError, match="is none of this model's files"):
        hf_files.megatron_to_hf(out, folders / "llama3", quiet)


def test_a_checkpoint_directory_is_whole_or_absent(folders: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ValueError, match="out: exists and is something else"):
        hf_files.hf_to_megatron(folders / "llama3", out, 64, quiet)
    with pytest.raises(ValueError, match="llama3.megatron: exists and is something else"):
        hf_files.hf_to_megatron(folders / "qwen3", folders / "llama3.megatron", 64, quiet)
    with pytest.raises(ValueError, match="llama3.megatron: exists and is something else"):
        hf_files.hf_to_megatron(folders / "llama3", folders / "llama3.megatron", 512, quiet)
    before = (folders / "llama3.megatron" / "checkpoint.json").stat().st_mtime_ns
    hf_files.hf_to_megatron(folders / "llama3", folders / "llama3.megatron", 64, quiet)
    assert (folders / "llama3.megatron" / "checkpoint.json").stat().st_mtime_ns == before


def test_a_checkpoint_directory_that_was_changed_is_refused(folders: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"

    def refused(problem: str) -> None:
        with pytest.raises(sharded.CheckpointError, match=problem):
            hf_files.megatron_to_hf(copy, tmp_path / "back", quiet)
        assert not (tmp_path / "back").exists()
        shutil.rmtree(copy)
        shutil.copytree(folders / "llama3.megatron", copy)

    shutil.copytree(folders / "llama3.megatron", copy)
    (copy / "checkpoint.json").unlink()
    refused("copy: is not a complete checkpoint")
    (copy / "__1_0.distcp").unlink()
    refused("missing or extra since it was saved: __1_0.distcp")
    data = bytearray((copy / "__1_0.distcp").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "__1_0.distcp").write_bytes(data)
    refused("altered since it was saved: __1_0.distcp")
    # whoever makes a checkpoint can make its checkpoint.json too; what is unpickled must not run anything all the same
    (copy / ".metadata").write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
    about = json.loads((copy / "checkpoint.json").read_text())
    about["sha256"][".metadata"] = hashlib.sha256((copy / ".metadata").read_bytes()).hexdigest()
    (copy / "checkpoint.json").write_text(json.dumps(about))
    refused(r"\.metadata: cannot be read: it is more than data, .*mkdir")
    assert not (tmp_path / "ran").exists()


class Runs:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_directory_that_was_cut_off_goes_on(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, read = tmp_path / "out", []

    def counted(entry, at=()):
        if len(read) == stop:
            raise KeyboardInterrupt
        read.append(entry.start)
        return streams.read_part(entry, at)

    def convert_it() -> None:
        hf_files.hf_to_megatron(folders / "qwen3_moe", out, 64, quiet, file_bytes=60_000)

    monkeypatch.setattr(hf_files, "read_part", counted)
    draft = tmp_path / "out.partial"
    for stop in (15, 35):  # twice, the first time in the middle of a line of what is done
        with pytest.raises(KeyboardInterrupt):
            convert_it()
        if stop == 15:
            with (draft / sharded.JOURNAL).open("a") as journal:
                journal.write('{"number": 2, "fi')
    whole = {path.name: path.stat().st_mtime_ns for path in draft.glob("*.distcp")}
    assert len(whole) > 2 and not out.exists()
    (draft / "__0_0.distcp.tmp").write_bytes(b"left behind")
    stop = None
    convert_it()
    names = {path.name for path in out.iterdir()}
    reference = folders / "qwen3_moe.megatron"
    assert names == {path.name for path in reference.iterdir()} and not draft.exists()
    assert sum((out / name).stat().st_mtime_ns == time for name, time in whole.items()) >= len(whole) - 1
    source = json.loads((out / "checkpoint.json").read_text())["sha256"]
    written = json.loads((reference / "checkpoint.json").read_text())["sha256"]
    assert {n: d for n, d in source.items() if n != ".metadata"} == {
        n: d for n, d in written.items() if n != ".metadata"
    }
    hf_files.megatron_to_hf(out, tmp_path / "back", quiet)
    before, after = tensors_in(folders / "qwen3_moe"), tensors_in(tmp_path / "back")
    assert set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("back", [False, True])
def test_what_was_cut_off_goes_on(back: bool, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = folders / "qwen3_moe.safetensors"

    def convert_it() -> None:
        if back:
            hf_files.megatron_to_hf(whole, tmp_path / "back", quiet, file_bytes=200_000)
        else:
            hf_files.hf_to_megatron(folders / "qwen3_moe", tmp_path / "out.safetensors", 64, quiet)

    written: list[str] = []
    original = streams.PartWriter.write

    def counted(self, name, at, tensor):
        if cut and len(written) == 20:
            raise KeyboardInterrupt
        written.append(streams.part_label(name, at))
        original(self, name, at, tensor)

    monkeypatch.setattr(streams.PartWriter, "write", counted)
    cut = True
    with pytest.raises(KeyboardInterrupt):
        convert_it()
    assert list(tmp_path.rglob("*.partial")) and not (tmp_path / "out.safetensors").exists()
    cut = False
    convert_it()
    assert len(set(written)) == len(written)  # nothing was written twice
    assert not [path for path in tmp_path.rglob("*") if ".partial" in path.name]
    if back:
        before, after = tensors_in(folders / "qwen3_moe"), tensors_in(tmp_path / "back")
        assert set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)
    else:
        assert (tmp_path / "out.safetensors").read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "architectures: MambaForCausalLM cannot be converted"),
        ({"attention_bias": True}, "attention_bias: True cannot be converted"),
        ({"num_shared_expert": [2, 2]}, "num_shared_expert: 2 cannot be converted"),
        ({"moe_topk": [1, 2]}, "moe_topk: layers differ"),
        (
            {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}},
            "rope_parameters: longrope cannot be converted",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 cannot be converted"),
        ({"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}}, "partial_rotary_factor: 0.5 cannot be"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"hidden_size": None}, "hidden_size: is missing"),
    ],
)
def test_configurations_that_are_not_ours_are_refused(change: dict, problem: str, folders: Path) -> None:
    config = json.loads((folders / "hunyuan" / "config.json").read_text()) | change
    with pytest.raises(ValueError, match=problem):
        hf_config.describe({key: value for key, value in config.items() if value is not None})


def test_the_published_configuration_is_our_family() -> None:
    """Tencent's config.json says attention_head_dim and a static alpha."""
    hunyuan = {
        "architectures": ["HunYuanMoEV1ForCausalLM"], "num_hidden_layers": 32, "hidden_size": 4096,
        "num_attention_heads": 32, "num_key_value_heads": 8, "attention_head_dim": 128, "intermediate_size": 3072,
        "moe_intermediate_size": [3072] * 32, "num_experts": 64, "moe_topk": [8] * 32, "num_shared_expert": [1] * 32,
        "rms_norm_eps": 1e-5, "vocab_size": 128167, "tie_word_embeddings": True, "rope_theta": 10000.0,
        "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0, "beta_fast": 32, "beta_slow": 1},
        "hidden_act": "silu", "use_cla": False, "cla_share_factor": 2, "moe_layer_num_skipped": 0, "n_group": None,
        "norm_topk_prob": True, "routed_scaling_factor": 1.0, "use_qk_norm": True, "use_mixed_mlp_moe": True,
    }  # fmt: skip
    source = hf_config.describe(hunyuan)
    assert source == FAMILIES["hunyuan_a13b"]()
    assert round(source.rope.base) == 11_158_840  # llama.cpp's freq_base_train of the published weights
    alpha = with_rope(hunyuan, replace(source.rope, base=2e6), 128, source.rope)["rope_scaling"]["alpha"]
    assert alpha == pytest.approx(184.110, abs=1e-3)
    elements = sum(torch.Size(p.part_shape).numel() for p in hf_tensors.pieces_of(source, 128167))
    assert elements == 80_393_183_232


@pytest.mark.parametrize(
    ("name", "kind", "parameters"),
    [("llama3_8b", "Llama", 8_030_261_248), ("qwen3_8b", "Qwen3", 8_190_735_360),
     ("qwen3_30b_a3b", "Qwen3Moe", 30_532_122_624), ("glm45_air", "Glm4Moe", 106_852_245_504),
     ("glm45", "Glm4Moe", 352_797_814_784), ("hy3", "HYV3", 295_033_528_320)],
)  # fmt: skip
def test_sizes_of_the_families(name: str, kind: str, parameters: int) -> None:
    family = FAMILIES[name]()
    assert family.architecture == f"{kind}ForCausalLM"
    pieces = hf_tensors.pieces_of(family, family.vocabulary)
    biases = sum(torch.Size(p.part_shape).numel() for p in pieces if p.key.endswith("expert_bias"))  # no parameters
    assert sum(torch.Size(p.part_shape).numel() for p in pieces) - biases == parameters
    assert (biases > 0) == (kind in ("Glm4Moe", "HYV3"))


def test_sizes_that_transformers_takes_are_our_families() -> None:
    """What Glm4MoeConfig and HYV3Config leave unsaid is GLM-4.5-Air's and Hy3's, whose other values are given here."""
    air = transformers.Glm4MoeConfig(attention_bias=True, head_dim=128, rope_theta=1e6)
    whole = dict(hidden_size=5120, intermediate_size=12288, num_hidden_layers=92, moe_intermediate_size=1536,
                 n_routed_experts=160, first_k_dense_replace=3, use_qk_norm=True,
                 routed_scaling_factor=2.5)  # fmt: skip
    glm = transformers.Glm4MoeConfig(attention_bias=True, head_dim=128, rope_theta=1e6, **whole)
    for config, kind, family, base in (
        (air, "Glm4MoeForCausalLM", "glm45_air", 1e6),
        (glm, "Glm4MoeForCausalLM", "glm45", 1e6),
        (transformers.HYV3Config(), "HYV3ForCausalLM", "hy3", 11_158_840),
    ):
        source = hf_config.describe(config.to_dict() | {"architectures": [kind]})
        ours = FAMILIES[family]()
        assert (source.transformer, source.vocab_size) == (ours.transformer, ours.vocab_size)
        assert source.rope == ours.rope and source.rope.base == base


def test_layers_for_multi_token_prediction_are_left_out(folders: Path, tmp_path: Path) -> None:
    """As transformers leaves them; the config.json of the way back no longer promises them."""
    further = {f"model.layers.2.{name}.weight": torch.ones(64) for name in ("enorm", "hnorm", "shared_head.norm")}
    folder = merge(folders / "glm4_moe", tmp_path / "glm", **further)
    hf_files.hf_to_megatron(folder, tmp_path / "glm.safetensors", 64, quiet, say=(said := []).append)
    assert said == [f"{folder}: 3 tensors of layers for multi-token prediction are left out"]
    assert same_tensors(tmp_path / "glm.safetensors", folders / "glm4_moe.safetensors")
    hf_files.megatron_to_hf(tmp_path / "glm.safetensors", tmp_path / "back", quiet)
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "back"))
    assert before["num_nextn_predict_layers"] == 1 and after == before | {"num_nextn_predict_layers": 0}
    assert set(tensors_in(tmp_path / "back")) == set(tensors_in(folders / "glm4_moe"))
    folder = merge(folders / "glm4_moe", tmp_path / "more", **{"model.layers.3.enorm.weight": torch.ones(64)})
    with pytest.raises(ValueError, match=r"1 tensors nothing takes: model\.layers\.3\.enorm\.weight"):
        hf_files.hf_to_megatron(folder, tmp_path / "more.safetensors", 64, quiet)


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("glm4_moe", {"norm_topk_prob": False}, "norm_topk_prob: Megatron-Core renormalises the chosen experts"),
        ("glm4_moe", {"num_experts_per_tok": 1}, "norm_topk_prob: Megatron-Core renormalises .* here 1"),
        ("glm4_moe_groups", {"num_experts_per_tok": 3}, "topk_group: 1 of 3 experts cannot be converted"),
        ("glm4_moe", {"mlp_bias": True}, "mlp_bias: True cannot be converted"),
        ("hy_v3", {"attention_bias": True}, "attention_bias: True cannot be converted"),
        ("hy_v3", {"mlp_layer_types": ["dense"]}, "mlp_layer_types: .'dense'. cannot be converted; .* for 2 layers"),
        ("hy_v3", {"mlp_layer_types": ["dense", "linear"]}, "mlp_layer_types: .*'linear'. cannot be converted"),
        ("hy_v3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 cannot be converted"),
    ],
)
def test_routers_and_layers_that_are_not_ours_are_refused(name: str, change: dict, problem: str, folders: Path) -> None:
    config = json.loads((folders / name / "config.json").read_text()) | change
    with pytest.raises(ValueError, match=problem):
        hf_config.describe(config)


def test_router_biases_stay_fp32(folders: Path, alone: dict, tmp_path: Path) -> None:
    """In a model in BF16 that is trained from them, and in the file that a run exports."""
    (name,) = [key for key in tensors_in(folders / "hy_v3") if key.endswith("expert_bias")]
    bias = tensors_in(folders / "hy_v3")[name]
    assert not torch.equal(bias, bias.bfloat16().float())
    assert {kind: dtype for kind, (dtype, _) in alone["router"].items()} == {
        "expert_bias": "torch.float32", "local_tokens_per_expert": "torch.float32",
    }  # fmt: skip
    assert np.array_equal(alone["router"]["expert_bias"][1], bias.numpy())
    hf_files.megatron_to_hf(folders / "router.safetensors", tmp_path, quiet, folders / "hy_v3" / "config.json")
    back = tensors_in(tmp_path)
    assert torch.equal(back.pop(name), bias) and {tensor.dtype for tensor in back.values()} == {torch.bfloat16}


def test_peak_memory_is_a_few_tensors(folders: Path, tmp_path: Path) -> None:
    """A model of 300 MB, both ways, as a file and as a checkpoint, within 60 MB above what the imports take.

    Its largest tensor is 8 MB.
    """
    config = json.loads((folders / "llama3" / "config.json").read_text())
    config |= {"hidden_size": 512, "num_hidden_layers": 24, "intermediate_size": 2048, "head_dim": 128}
    source = hf_config.describe(config)
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "config.json").write_text(json.dumps(config))
    shapes = {n: s for p in hf_tensors.pieces_of(source, ROWS) for n, s in zip(p.names, p.shapes)}
    save_file({n: torch.full(s, 0.5) for n, s in shapes.items()}, tmp_path / "big" / "model.safetensors")
    assert (tmp_path / "big" / "model.safetensors").stat().st_size > 300e6
    code = f"""
import resource
from pathlib import Path
from megatron_lccp.weights import hf_files
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
root, before = Path({str(tmp_path)!r}), peak()
hf_files.hf_to_megatron(root / "big", root / "big.safetensors", 64, lambda done, total: None)
hf_files.megatron_to_hf(root / "big.safetensors", root / "back", lambda done, total: None, file_bytes=50 << 20)
hf_files.hf_to_megatron(root / "big", root / "big.megatron", 64, lambda done, total: None, file_bytes=50 << 20)
hf_files.megatron_to_hf(root / "big.megatron", root / "again", lambda done, total: None, file_bytes=50 << 20)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 60


def test_command(folders: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> subprocess.CompletedProcess:
        return tool("convert_checkpoint.py", *map(str, arguments))

    assert "to-megatron" in run("--help").stdout
    done = run("to-megatron", folders / "llama3", tmp_path / "out.safetensors", "--vocab-multiple", 64)
    assert done.returncode == 0 and f"config: {folders / 'llama3'}" in done.stdout, done.stderr
    assert "expected a tokenizer.json" in done.stderr.splitlines()[0]  # what is missing is said before it writes
    size = f"{(tmp_path / 'out.safetensors').stat().st_size / 2**10:.0f}"[:2]
    assert re.search(rf"{size}\d\.\d\d of {size}\d\.\d\d KiB, [\d.]+ KiB/s", done.stderr), done.stderr
    assert (tmp_path / "out.safetensors").stat().st_size == (folders / "llama3.safetensors").stat().st_size
    done = run("to-megatron", folders / "llama3", tmp_path / "sharded", "--vocab-multiple", 64)
    assert done.returncode == 0 and f"init_from: {tmp_path / 'sharded'}" in done.stdout, done.stderr
    done = run("to-hf", tmp_path / "sharded", tmp_path / "again")
    assert done.returncode == 0 and (tmp_path / "again" / "config.json").exists(), done.stderr
    done = run("to-megatron", tmp_path / "nothing", tmp_path / "x.safetensors")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "config.json" in done.stderr
