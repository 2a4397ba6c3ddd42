"""`lccp init --hf` on a random small model: what it writes trains on one and on two ranks; what is wrong is said first."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.distributed.ranks import run_ranks

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from megatron_lccp.cli import main  # noqa: E402
from megatron_lccp.commands.starting import as_yaml, stdlib_tree  # noqa: E402
from megatron_lccp.config.load import parse_config  # noqa: E402
from megatron_lccp.data.prepare import prepare  # noqa: E402
from megatron_lccp.data.tokenizers.load import load_tokenizer  # noqa: E402
from megatron_lccp.weights.hf_files import hf_to_megatron  # noqa: E402

VOCAB = 700


@pytest.fixture(scope="module")
def folder(tiny_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a tokenizer, and texts beside it."""
    root = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(root / "small")
    shutil.copy(tiny_yaml.parent / "tokenizer.model", root / "small")
    (root / "text").mkdir()
    for number, path in enumerate(sorted(Path(json.__file__).parent.glob("*.py"))):
        (root / "text" / f"{number}.txt").write_text(path.read_text())
    return root


def init(folder: Path, out: Path, *options: object) -> int:
    text = [str(path) for path in sorted((folder / "text").glob("*.txt"))]
    return main(["init", "--hf", str(folder / "small"), "--text", *text, "--out", str(out), *map(str, options)])


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_written_trains(
    ranks: int, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "it.yaml"
    assert init(folder, out, "--context", 192, "--ranks", ranks, *(["--yarn"] if ranks == 2 else [])) == 0
    assert f"lccp prepare {out}" in capsys.readouterr().out
    places = [f"--dir={tmp_path / 'run'}", f"--data.dir={tmp_path / 'data'}", "--training.precision=fp32"]
    config = parse_config(out, places)
    stage = config.stages["long"]
    if ranks == 1:
        assert stage.rope_base == pytest.approx(10000 * 3 ** (4 / 3), rel=0.1) and stage.yarn is None
    else:
        assert stage.rope_base is None and (stage.yarn.factor, stage.yarn.original_tok) == (3.0, 64)
    assert [type(monitor).__name__ for monitor in config.monitors] == ["CorpusPPL", "NeedleGrid", "RetrievalHeads"]
    prepare(config, say=lambda text: None)
    found = run_ranks(ranks, "jobs.train", path=out, overrides=[*places, "--training.steps=2"])[0]
    assert len(found["losses"]) == 2


def test_what_a_conversion_prints_can_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of it is taken by a dry run; tests of conversion load what it names."""
    monkeypatch.chdir(tmp_path)
    printed = tmp_path / "printed.yaml"
    tokenizer, said = load_tokenizer(folder / "small"), []
    printed.write_text(as_yaml(stdlib_tree(folder / "small", tmp_path / "weights", 64, tokenizer, said.append)))
    assert [text.partition(":")[0] for text in said] == ["RetrievalHeads is left out", "NeedleGrid is left out"]
    hf_to_megatron(folder / "small", tmp_path / "weights", 64, lambda done, total: None)
    less = "--data.sources.code.init_args.max_bytes=200000"
    prepare(parse_config(printed, [less]), say=lambda text: None)
    assert main(["train", str(printed), "--dry-run", less]) == 0


@pytest.mark.parametrize(
    ("change", "options", "problem"),
    [
        ("", ["--context", "1000000"], "--text: has about"), ("exists", [], "exists; remove it, or name another"),
        ("tokens", [], "its tokenizer has 700 tokens, its weights 650; it is of another model"),
        ("none", [], "expected a tokenizer.json"), ("one", [], "is one document; give several files"),
        ("windows", [], "sliding_window: 4096 cannot be converted"), ("", ["--text", "nothing.txt"], "is no file"),
    ],
)  # fmt: skip
def test_what_is_missing_is_said_before_anything_is_written(
    change: str, options: list[str], problem: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder, tmp_path / "of")
    config = json.loads((folder / "small" / "config.json").read_text())
    if change in ("tokens", "windows"):
        changed = {"vocab_size": 650} if change == "tokens" else {"architectures": ["MistralForCausalLM"]}
        config = {key: value for key, value in config.items() if key != "model_type"} | changed
        (tmp_path / "of" / "small" / "config.json").write_text(json.dumps(config))
    if change == "none":
        (tmp_path / "of" / "small" / "tokenizer.model").unlink()
    if change == "exists":
        (tmp_path / "it.yaml").touch()
    if change == "one":
        for path in sorted((tmp_path / "of" / "text").iterdir())[1:]:
            path.unlink()
    assert init(tmp_path / "of", tmp_path / "it.yaml", "--context", 128, "--ranks", 1, *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert problem in line
    assert not (tmp_path / "weights").exists() and (tmp_path / "it.yaml").exists() == (change == "exists")
