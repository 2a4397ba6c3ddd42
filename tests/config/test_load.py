"""From YAML to Config: overrides, numbers, what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path

import pytest
import yaml

from megatron_lccp.config.fields import field_problems
from megatron_lccp.config.load import (
    ConfigError,
    _computed,
    as_tree,
    changed_fields,
    config_hash,
    dump_config,
    load_monitors,
    parse_config,
)
from megatron_lccp.config.rules import layout_problems
from megatron_lccp.config.tree import CheckpointConfig, MixtureConfig, ModelConfig, ParallelConfig, StageConfig
from megatron_lccp.data.sources.generated import Biographies
from megatron_lccp.monitors import NeedleGrid
from megatron_lccp.schema import Every
from tests.tiny import tiny_tree

SHAPE = {"num_attention_heads": 4, "num_query_groups": 2, "hidden_size": 64, "num_layers": 2, "num_moe_experts": 4}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_tree(tmp_path)))
    return tmp_path / "tiny.yaml"


def test_overrides_reach_any_depth(path: Path) -> None:
    config = parse_config(
        path,
        [
            "--stages.lccp.tokens=200e9", "--stages.lccp.lr=1.2e-5", "--stages.lccp.mixture.long.sources.people=0.5",
            "--monitors.1.init_args.samples=9", "--megatron.transformer.layernorm_epsilon=1e-6",
        ],
    )  # fmt: skip
    assert config.stages["lccp"].tokens == 200_000_000_000 and isinstance(config.stages["lccp"].tokens, int)
    assert config.stages["lccp"].lr == 1.2e-5
    assert config.stages["lccp"].mixture["long"].sources["people"] == 0.5
    assert config.monitors[1].samples == 9
    assert config.megatron.transformer["layernorm_epsilon"] == 1e-6


def test_hash_is_of_what_is_computed(path: Path) -> None:
    plain = config_hash(parse_config(path))
    assert plain == config_hash(parse_config(path, ["--dir=elsewhere", "--parallel.expert=2", "--wandb.mode=offline"]))
    assert plain != config_hash(parse_config(path, ["--seed=8"]))
    assert plain != config_hash(parse_config(path, ["--stages.lccp.rope_base=10000"]))


def test_a_field_that_came_later_leaves_the_hash_as_it_was(path: Path) -> None:
    """While it says what was always done."""
    plain = parse_config(path)
    tree = as_tree(plain)
    assert {tree["data"]["tokenizer"].pop(name) for name in ("bos", "bos_in_documents")} == {"none", False}
    expected = hashlib.sha256(json.dumps(_computed(tree), sort_keys=True).encode()).hexdigest()[:12]
    assert config_hash(plain) == config_hash(parse_config(path, ["--data.tokenizer.bos=none"])) == expected
    assert config_hash(parse_config(path, ["--data.tokenizer.bos=auto"])) != expected
    with pytest.raises(ConfigError, match="data.tokenizer.bos_in_documents: has no token; set data.tokenizer.bos"):
        parse_config(path, ["--data.tokenizer.bos_in_documents=true"])


def test_contradictions_are_listed_together(path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(
            path,
            ["--stages.base.micro_batch=3", "--stages.lccp.lr=0", "--data.heldout_share=0.9", "--training.steps=0"],
        )
    assert len(str(caught.value).splitlines()) == 4
    for field in (
        "training.steps",
        "stages.base.global_batch_tok",
        "stages.lccp.rope_base and lr",
        "data.heldout_share",
    ):
        assert field in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "training.log_every=0", "training.max_bad_steps=0", "training.health_every=-1", "training.steps=-1",
        "training.loss_chunk_tok=0", "checkpoint.keep=0", "model.vocab_multiple=0", "optimizer.weight_decay=-0.1",
        "optimizer.clip_grad=-1", "optimizer.beta1=1", "optimizer.beta2=-0.1", "optimizer.eps=0",
        "stages.base.lr=.nan", "stages.base.rope_base=.inf", "stages.base.min_lr=2e-3", "stages.base.min_lr=-1",
        "stages.base.warmup_tokens=-1", "stages.lccp.mixture.short.share=.nan", "stages.lccp.mixture.long.share=.inf",
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(override: str, path: Path) -> None:
    """Most would end in a trace of torch or Megatron-Core, a progress line of every 0 steps on one rank alone."""
    with pytest.raises(ConfigError) as caught:
        parse_config(path, [f"--{override}"])
    (line,) = str(caught.value).splitlines()
    block, name = override.partition("=")[0].rsplit(".", 1)
    assert f"{path}: {block}" in line and name in line, line


@pytest.mark.parametrize(
    ("overrides", "ranks", "field"),
    [
        (["--parallel.tensor=3"], 3, "parallel.tensor: 3 does not divide the attention heads"),
        (["--parallel.pipeline=4"], 4, "parallel.pipeline"),
        (["--parallel.expert=8"], 8, "parallel.expert"),
        (["--parallel.tensor=2"], 3, "does not divide 3 ranks"),
        (["--stages.base.micro_batch=8"], 4, "stages.base.global_batch_tok"),
        (["--parallel.tensor=2", "--parallel.expert_tensor=1"], 2, "does not reduce expert gradients"),
        (["--parallel.expert_tensor=2"], 2, "with tensor 1, expert 1 and expert_tensor 2"),
    ],
)
def test_layouts_that_cannot_run_are_refused(path: Path, overrides: list[str], ranks: int, field: str) -> None:
    assert any(field in problem for problem in layout_problems(parse_config(path, overrides), ranks, SHAPE, "0.16.1"))


@pytest.mark.parametrize(
    ("shape", "overrides", "text"),
    [
        ({"num_attention_heads": 6, "num_query_groups": 3}, ["tensor=2"], "tensor: 2 and the key/value heads (3)"),
        ({"hidden_size": 65}, ["tensor=2"], "parallel.tensor: 2 does not divide the hidden size (65)"),
        ({"moe_ffn_hidden_size": 33}, ["tensor=2"], "parallel.expert_tensor: 2 does not divide moe_ffn_hidden_size"),
        ({"moe_shared_expert_intermediate_size": 33}, ["tensor=2"], "tensor: 2 does not divide moe_shared_expert"),
        ({"num_moe_experts": None, "ffn_hidden_size": 33}, ["tensor=2"], "tensor: 2 does not divide ffn_hidden_size"),
        ({"num_moe_experts": None}, ["expert=2"], "parallel.expert: this model has no experts"),
        ({}, ["tensor=2", "expert=2"], "parallel: expert x expert_tensor x pipeline does not divide 2 ranks"),
        ({"num_layers": 6}, ["pipeline=2", "virtual_pipeline=2"], "pipeline: 4 does not divide the layers (6)"),
        ({"moe_layer_freq": [0, 1], "ffn_hidden_size": 33}, ["tensor=2"], "tensor: 2 does not divide ffn_hidden_size"),
        (
            {"num_layers": 6, "num_layers_in_first_pipeline_stage": 2, "num_layers_in_last_pipeline_stage": 3},
            ["pipeline=2"],
            "leaves 1 of 6 layers for 0 pipeline stages of 1 chunks",
        ),
        (
            {"num_layers": 6, "num_layers_in_first_pipeline_stage": 3},
            ["pipeline=2", "virtual_pipeline=2"],
            "num_layers_in_first_pipeline_stage: leaves 3 of 6 layers for 1 pipeline stages of 2 chunks",
        ),
        (
            {"num_layers": 6, "num_layers_in_first_pipeline_stage": 4, "num_layers_in_last_pipeline_stage": 2},
            ["pipeline=2", "virtual_pipeline=2"],
            "num_layers_in_last_pipeline_stage: both, with virtual_pipeline, need a stage in between",
        ),
        ({"num_layers_in_last_pipeline_stage": 0}, ["pipeline=2"], "num_layers_in_last_pipeline_stage: should be a"),
        ({"num_layers_in_first_pipeline_stage": 1}, [], "num_layers_in_first_pipeline_stage: needs parallel.pipeline"),
        ({"num_layers": 4}, ["pipeline=2", "virtual_pipeline=2"], "its 3 micro-batches are not a multiple of 2"),
        ({}, ["context=2"], "stages.odd.context_tok: 70 is not a multiple of 4"),
    ],
)
def test_what_does_not_divide_is_refused(path: Path, shape: dict, overrides: list[str], text: str) -> None:
    """On 2 ranks; the stage is there for the last two."""
    tree = yaml.safe_load(path.read_text())
    tree["stages"] = {"odd": {**tree["stages"]["base"], "context_tok": 70, "micro_batch": 1, "global_batch_tok": 210}}
    path.write_text(yaml.safe_dump(tree))
    config = parse_config(path, [f"--parallel.{override}" for override in overrides])
    problems = layout_problems(config, 2, {**SHAPE, **shape}, "0.19.2")
    assert any(text in problem for problem in problems), problems


def test_a_vocabulary_that_does_not_divide_is_refused(path: Path) -> None:
    config = parse_config(path, ["--parallel.tensor=2", "--model.vocab_multiple=3"])
    assert layout_problems(config, 2, SHAPE, "0.19.2") == [
        "parallel.tensor: 2 does not divide model.vocab_multiple (3)"
    ]


def test_silent_defect_is_refused_only_where_it_is(path: Path) -> None:
    config = parse_config(path, ["--parallel.tensor=2", "--parallel.expert_tensor=1"])
    assert not layout_problems(config, 2, SHAPE, "0.19.2")
    assert not layout_problems(parse_config(path, ["--parallel.tensor=2"]), 2, SHAPE, "0.16.1")


def test_every() -> None:
    assert [step for step in range(1, 10) if Every(steps=3).due(step, step * 10, step * 10 - 10)] == [3, 6, 9]
    assert [step for step in range(1, 10) if Every(tokens=25).due(step, step * 10, step * 10 - 10)] == [3, 5, 8]
    for bad in ({}, {"steps": 0}, {"tokens": -1}):
        with pytest.raises(ValueError, match="every"):
            Every(**bad)


def test_help_explains_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_lccp.cli import main

    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for kind in (ModelConfig, ParallelConfig, StageConfig, MixtureConfig, CheckpointConfig, NeedleGrid, Biographies):
        for field in dataclasses.fields(kind):
            found = re.search(rf"--\S*\b{field.name}\b", text)
            assert found, f"{kind.__name__}.{field.name} is not in --help"
    assert "What follows the warm-up" in text and "`answer_nll`, nat" in text
    assert text.count("usage:") == 1 and ".help" not in text and "Path to a configuration file" not in text


def test_fields_by_their_names_of_before_are_taken(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a user's file, with a line that says so, and of what an older run recorded, without one."""
    scores = ["retrieval_score", "wu2024"]
    old = parse_config(path, [f"--monitors.1.init_args.heads={scores}"])
    assert capsys.readouterr().err == "lccp: monitors.1.init_args.heads: is called scores now; taken as that\n"
    new = parse_config(path, [f"--monitors.1.init_args.scores={scores}"])
    assert capsys.readouterr().err == "" and old == new and config_hash(old) == config_hash(new)
    recorded = path.with_name("recorded.yaml")
    recorded.write_text(dump_config(new).replace("scores:", "heads:", 1))
    assert "heads:" in recorded.read_text() and changed_fields(recorded, new) == []
    assert parse_config(recorded) == new and len(capsys.readouterr().err.splitlines()) == 1
    both = [f"--monitors.1.init_args.{name}={scores}" for name in ("heads", "scores")]
    with pytest.raises(ConfigError, match="monitors.1.init_args.heads: is not a field of NeedleGrid"):
        parse_config(path, both)
    heads = parse_config(
        path,
        [
            "--monitors.1={class_path: megatron_lccp.monitors.HeadAblation, init_args: {heads: "
            "[[0, 1]], haystacks: [code]}}"
        ],
    )
    assert heads.monitors[1].heads == ((0, 1),) and capsys.readouterr().err == ""  # these are heads


def test_scores_of_others_by_their_path(path: Path) -> None:
    """A metric is declared by whoever measures it, and an unknown name is refused with what was meant."""
    own = "tests.measuring.own_scores.NeedleOutput"
    config = parse_config(path, [f"--monitors.1.init_args.scores=[wu2024, {own}]"])
    names = [metric.name for metric in config.monitors[1].metrics]
    assert names == ["answer_nll", "exact", "content_nll", "content_exact", "wu2024", "needle_output"]
    assert yaml.safe_load(dump_config(config))["monitors"][1]["init_args"]["scores"] == ["wu2024", own]
    for scores, said in {
        "[wu2042]": "scores: 'wu2042' is no score of heads; did you mean wu2024?",
        "[tests.measuring.own_scores.NeedleOutptu]": "did you mean NeedleOutput?",
        "[no_such_package.Score]": "scores: 'no_such_package.Score' cannot be imported: No module named",
        "[pathlib.Path]": "scores: pathlib.Path is no class of scores; derive it from",
        "[megatron_lccp.measuring.HeadScore]": "declares no `metric`",
        f"[{own}, {own}]": "scores: two of them measure 'needle_output'; leave one out",
    }.items():
        with pytest.raises(ConfigError) as caught:
            parse_config(path, [f"--monitors.1.init_args.scores={scores}"])
        (line,) = str(caught.value).splitlines()
        assert "tiny.yaml: monitors.1: " in line and said in line, line


def test_a_monitor_without_every_has_its_default() -> None:
    """And one with `every` has that and nothing of the default."""
    for given, every in (("", Every(steps=100)), (', "every": {"tokens": 5}', Every(tokens=5))):
        monitor = '{"class_path": "megatron_lccp.monitors.CorpusPPL", "init_args": {"length_tok": 64%s}}' % given
        path = Path(__file__).parents[2] / "examples/tiny_moe.yaml"
        (found,) = parse_config(path, [f"--monitors=[{monitor}]"]).monitors
        assert found.every == every and found.length_tok == 64


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("seed: 7", "seed: 7\nseed: 8", "is not YAML: seed is given twice"),
        ("    lr: 0.001", "    lr: 0.001\n    lr: 0.01", "is not YAML: lr is given twice"),
        ("seed: 7", "seed: " + "[" * 5000, "is not YAML: maximum recursion depth"),
        ("seed: 7", "seed: 7  # caf\xe9", "is not UTF-8 text"),
        ("seed: 7", f"seed: {1 << 70}", "seed: should fit in 64 bits"),
        ("    lr: 0.001", "    lr:", "stages.base.lr: is empty"),
        ("wandb:\n  mode: disabled", "wandb:", "wandb: is empty; give it a value, or leave the line out"),
        ("  base:\n    tokens", "  1:\n    tokens", "stages.1: is not text in YAML; put it in quotes"),
        ("name: tiny", "name: ' '", "name: should be text of visible"),
        ("seed: 7", 'dir: "a\\0b"', "dir: 'a\\x00b' has a character that cannot be seen"),
        ("name: tiny", 'name: "a\\u202Eb"', "name: should be text of visible characters, is 'a\\u202eb'"),
        ("name: tiny", 'name: "a\\nb"', "name: should be text of visible characters, is 'a\\nb'"),
        (
            "  base:\n    tokens",
            '  "b\\e[2J":\n    tokens',
            "stages: 'b\\x1b[2J' has a character that cannot be seen; give it",
        ),
        (
            "    people:\n",
            '    "\\u2066people":\n',
            "data.sources: '\\u2066people' has a character that cannot be seen; give it",
        ),
    ],
)
def test_what_yaml_lets_pass_is_refused(path: Path, old: str, new: str, said: str) -> None:
    text = yaml.safe_dump(tiny_tree(path.parent), sort_keys=False)
    assert text.count(old) == 1
    if new.startswith("dir"):
        text = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("dir"))
    path.write_bytes(text.replace(old, new).encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        parse_config(path)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{path}: {said}"), line


def test_an_anchor_may_be_merged_and_overridden(path: Path) -> None:
    tree = tiny_tree(path.parent)
    base = yaml.safe_dump({"base": tree["stages"].pop("base")}).replace("base:", "  base: &base", 1)
    text = yaml.safe_dump({k: v for k, v in tree.items() if k != "stages"}) + "stages:\n"
    text += base.replace("\n  ", "\n    ") + "  more: &more\n    <<: *base\n    lr: 1e-4\n"
    path.write_text(text + "  last:\n    <<: *more\n    tokens: 512\n")
    stages = parse_config(path).stages
    assert (stages["more"].lr, stages["last"].lr) == (1e-4, 1e-4)
    assert (stages["more"].tokens, stages["last"].tokens) == (6 * 512, 512)


@pytest.mark.parametrize("text", [b"", b"- 1\n", b"\xe9\xff", b"a: ["])
def test_a_damaged_record_of_the_configuration_changes_nothing(path: Path, text: bytes) -> None:
    config, recorded = parse_config(path), path.with_name("config.yaml")
    recorded.write_bytes(text)
    assert set(changed_fields(recorded, config)) <= {"name", "model", "megatron", "training", "optimizer"} | {
        "seed", "data", "stages", "monitors"
    }  # fmt: skip


@pytest.mark.parametrize("size", ["two", 0, -64, 2.0, True])
def test_a_size_that_is_none_is_refused(path: Path, size: object) -> None:
    config = parse_config(path)
    (said,) = field_problems(config, {**SHAPE, "num_layers": size}, te_layers=False)
    assert said == f"megatron.transformer.num_layers: should be a whole number of at least 1, is {size!r}"
    assert layout_problems(config, 1, {**SHAPE, "num_layers": size}, "0.16.1") == []


UNKNOWN = {
    "--trainig.steps=1": "trainig: is not a field of Config; did you mean training?",
    "--stages.lccp.learning_rate=1": "stages.lccp.learning_rate: is not a field of StageConfig; the",
    "--stages.lccp.mixture.long.shares=1": "stages.lccp.mixture.long.shares: is not a field of MixtureConfig; did",
    "--monitors.1.init_args.sample=9": "monitors.1.init_args.sample: is not a field of NeedleGrid; did you mean",
    "--monitors.1.samples=9": "monitors.1.samples: is not a field of Monitor; there are class_path, init_args",
    "--monitors.1.init_args.every={token: 5}": "monitors.1.init_args.every.token: is not a field of Every; did",
    "--monitors.1.class_path=megatron_lccp.monitors.NedleGrid": "monitors.1.class_path: module "
    "'megatron_lccp.monitors' has no attribute 'NedleGrid'; did you mean NeedleGrid?",
    "--monitors.1.class_path=nowhere.NeedleGrid": "monitors.1.class_path: 'nowhere.NeedleGrid' cannot be imported: "
    "No module named 'nowhere'; put its folder into PYTHONPATH",
    "--data.sources.people.init_args.number=1": "data.sources.people.init_args.number: is not a field of Bio",
    "--data.sources.more.init_args.count=1": "data.sources.more.class_path: should name a class as pack",
    "--checkpoint.every={toknes: 5}": "checkpoint.every.toknes: is not a field of Every; did you mean tokens?",
    "--data.tokenizer.pth=x": "data.tokenizer.pth: is not a field of TokenizerConfig; did you mean path?",
    "--stages.lccp=5": "stages.lccp: should hold `field: value` lines, is 5",
}


@pytest.mark.parametrize("override", UNKNOWN)
def test_an_unknown_field_says_where_and_what_was_meant(path: Path, override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(path, [override])
    assert str(caught.value).splitlines()[0].startswith(f"{path}: {UNKNOWN[override]}")


WRONG = {
    "--stages.lccp.tokens=many": "stages.lccp.tokens: should be a whole number, is 'many'",
    "--stages.lccp.lr=[1]": "stages.lccp.lr: should be a number, is [1]",
    "--stages.lccp.lr_schedule=linea": "stages.lccp.lr_schedule: should be one of constant, cosine, linear, is 'linea'",
    "--stages.lccp.mixture.long.sources.code=x": "stages.lccp.mixture.long.sources.code: should be a number, is 'x'",
    "--stages=[1]": "stages: should hold `field: value` lines, is [1]",
    "--data.sources.people.init_args.count=1.5": "data.sources.people.init_args.count: should be a whole number, is 1",
    "--data.sources.code.init_args.max_bytes=x": "data.sources.code.init_args.max_bytes: should be a whole number, is",
    "--training.steps=abc": "training.steps: should be a whole number, is 'abc'",
    "--monitors.1.init_args.lengths_tok=abc": "monitors.1.init_args.lengths_tok: should be a list, is 'abc'",
    "--monitors.1.init_args.lengths_tok=[1, x]": "monitors.1.init_args.lengths_tok.1: should be a whole number, is 'x'",
    "--monitors.1.init_args.share=5": "monitors.1.init_args.share: should be true or false, is 5",
    "--monitors.2.init_args.scores=[wu]": "monitors.2: scores: 'wu' is no score of heads; there are retrieval_score,",
    "--monitors.2.init_args.every={steps: x}": "monitors.2.init_args.every.steps: should be a whole number, is 'x'",
    "--monitors.2.init_args.every={steps: 0}": "monitors.2.init_args.every: `every` needs steps or tokens, at least 1",
    "--monitors.1.init_args.depths=[1.5]": "monitors.1: samples and depths: should be at least 1 and in [0, 1], are 2",
    "--checkpoint.every={steps: 0}": "checkpoint.every: `every` needs steps or tokens, at least 1, got steps=0",
}


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_value_says_where_and_what_was_expected(path: Path, override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(path, [override])
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{path}: {WRONG[override]}")


def test_wrong_values_are_listed_together(path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(path, ["--stages.base.lr=a", "--training.steps=b", "--monitors.0.init_args.sequences=c"])
    assert {line.split(": ")[1] for line in str(caught.value).splitlines()} == {
        "stages.base.lr", "training.steps", "monitors.0.init_args.sequences"
    }  # fmt: skip


def test_unknown_fields_are_listed_together(path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(path, ["--training.step=1", "--stages.base.lrs=1", "--monitors.0.init_args.length=1"])
    assert [line.split(": ")[1] for line in str(caught.value).splitlines()] == [
        "stages.base.lrs", "training.step", "monitors.0.init_args.length"
    ]  # fmt: skip


def test_a_loop_of_another_hears_the_same(tmp_path: Path) -> None:
    entry = "{class_path: megatron_lccp.monitors.CorpusPPL, init_args: {sequence: 3}}"
    (tmp_path / "m.yaml").write_text(f"monitors: [{entry}]")
    with pytest.raises(ConfigError, match=r"monitors\.0\.init_args\.sequence: .*; did you mean sequences\?"):
        load_monitors(tmp_path / "m.yaml")
    (tmp_path / "m.yaml").write_text(f"monitors: [{entry.replace('sequence: 3', 'sequences: x')}]")
    with pytest.raises(ConfigError, match=r"monitors\.0\.init_args\.sequences: should be a whole number, is 'x'"):
        load_monitors(tmp_path / "m.yaml")
