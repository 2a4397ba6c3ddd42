"""`lccp measure --hf`: models from their folders to one page, without a configuration; what is refused; what is kept."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_lccp.config.load import load_monitors
from megatron_lccp.data.sources.stdlib import PythonStdlib
from megatron_lccp.data.tokenizers.files import THREE_DIGITS
from tests.data.tokenizers.hub_files import write_tokenizer_json
from tests.distributed.ranks import lccp, start_lccp
from tests.functional.test_main_job import rows

pytest.importorskip("transformers")

SUITE = {
    "NeedleGrid": {"lengths_tok": [400], "depths": [0.5, 1], "samples": 2, "scores": ["retrieval_score"], "haystacks": ["a"]},
    "CorpusPPL": {"corpora": ["a", "bundled/biographies"], "length_tok": 64, "sequences": 2},
    "HeadAblation": {"lengths_tok": [400], "depths": [0.5], "samples": 1, "top": [2], "haystacks": ["a"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of two small random models, as transformers saves them; a text `a.txt` and monitors beside them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("models")
    sizes = dict(
        vocab_size=600, hidden_size=96, intermediate_size=64, num_hidden_layers=2, num_attention_heads=12,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=4096,
    )  # fmt: skip
    documents = list(PythonStdlib(max_bytes=200_000).documents(0))
    torch.manual_seed(0)
    for name, kind, config in (("one", LlamaForCausalLM, LlamaConfig), ("two", Qwen3ForCausalLM, Qwen3Config)):
        kind(config(**sizes)).save_pretrained(folder / name)
        write_tokenizer_json(folder / name, documents, THREE_DIGITS, 600)
    (folder / "a.txt").write_text("".join(documents[:20]))
    monitors = [{"class_path": f"megatron_lccp.monitors.{name}", "init_args": args} for name, args in SUITE.items()]
    (folder / "suite.yaml").write_text(yaml.safe_dump({"monitors": monitors}))
    return folder


def command(models: Path, *names: str, out: Path) -> list[str]:
    return [
        "measure", "--hf", *(str(models / name) for name in names), "--text", str(models / "a.txt"), "--suite",
        str(models / "suite.yaml"), "--out", str(out),
    ]  # fmt: skip


def test_two_models_make_one_page_and_are_measured_once(models: Path, tmp_path: Path) -> None:
    found = lccp(*command(models, "one", "two", out=tmp_path))
    assert found.returncode == 0, found.stderr
    said = found.stdout
    assert said.index("\ntwo: ") < said.index("one: loading"), "what all of it takes comes first"
    assert "one: about " in said and "then about " in said and "one: measuring NeedleGrid" in said
    assert "2 models measured" in said and "2 models side by side" in (tmp_path / "report.html").read_text()
    for name in ("one", "two"):
        found_rows = rows(tmp_path / name)
        assert (
            {*found_rows.monitor} == {*SUITE} and {*found_rows.run} == {name} and {*found_rows.stage} == {"published"}
        )
        assert len(found_rows[found_rows.metric == "retrieval_score"]) == 4 * 2 * 12  # samples, layers, heads
        nll = found_rows[(found_rows.metric == "nll")].value
        assert np.allclose(nll, np.log(600), rtol=0.05), "a random model knows nothing"
        assert not list((tmp_path / name).glob(".journal*"))
        model = yaml.safe_load((tmp_path / name / "config.yaml").read_text())["model"]
        assert model["name"] == name and len(model["weights_sha256"]) == 64 and model["transformers"]
    assert rows(tmp_path / "one").config_hash.iloc[0] == rows(tmp_path / "two").config_hash.iloc[0]
    again = lccp(*command(models, "one", "two", out=tmp_path))
    assert again.returncode == 0 and "loading" not in again.stdout and "one: was measured before" in again.stdout
    other = lccp(*command(models, "two", out=tmp_path / "one"))
    assert (other.returncode, other.stderr.count("\n")) == (2, 1) and "holds another model" in other.stderr
    longer = lccp("measure", "--hf", str(models / "one"), "--lengths", "300", "--out", str(tmp_path / "one"))
    assert longer.returncode == 2 and "was measured with other monitors, texts or precision" in longer.stderr


def test_stopped_it_goes_on_with_what_is_left(models: Path, tmp_path: Path) -> None:
    out, err = tmp_path / "out", tmp_path / "err"
    process = start_lccp(*command(models, "one", out=out), out=tmp_path / "said", err=err)
    deadline = time.monotonic() + 120
    while not (kept := list(out.glob(".journal/*/*.safetensors"))) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130 and kept and not list(out.glob("rows/*"))
    assert f"what was measured is kept in {out}" in err.read_text()
    found = lccp(*command(models, "one", out=out))
    assert found.returncode == 0 and len(list(out.glob("rows/*.parquet"))) == 1, found.stderr


def test_the_suite_can_be_edited_and_given_back(models: Path, tmp_path: Path) -> None:
    printed = lccp("measure", "--print-suite", "--lengths", "512", "2048", "--text", str(models / "a.txt"))
    (tmp_path / "suite.yaml").write_text(printed.stdout)
    grid, *_ = load_monitors(tmp_path / "suite.yaml")
    assert (grid.name, grid.lengths_tok, grid.haystacks) == ("NeedleGrid", (512, 2048), ("text",))
    planned = lccp(
        "measure", "--hf", str(models / "one"), "--dry-run", "--lengths", "512", "--out", str(tmp_path / "o")
    )
    assert planned.returncode == 0 and "tokens in" in planned.stdout and "of memory" in planned.stdout, planned.stderr
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--hf", "absent"], "--hf: absent is neither a folder"),
        (["--hf", "{one}", "{one}"], "two models are called one"),
        (["--hf", "{one}", "--lengths", "20"], "--lengths: 20 has no room"),
        (["--hf", "{one}", "--text", "absent.txt"], "--text: absent.txt is no file"),
        (["--hf", "{one}", "--suite", "absent.yaml"], "absent.yaml: cannot be read"),
        (["{one}", "--hf", "{one}"], "--hf: takes neither a configuration"),
        (["--hf", "{one}", "--training.steps=3"], "does not know --training.steps=3"),
        (["examples/tiny_moe.yaml", "--lengths", "512"], "--lengths: is for models that --hf names"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(models: Path, tmp_path: Path, options: list[str], said: str) -> None:
    found = lccp("measure", *(option.format(one=models / "one") for option in options), cwd=tmp_path)
    assert found.returncode == 2 and said in found.stderr and found.stderr.count("\n") == 1, found.stderr


def test_a_tokenizer_of_another_model_is_refused(models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    for path in (models / "one").iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "config.json").unlink()
    config = json.loads((models / "one/config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 500}))
    found = lccp(*command(tmp_path, "one", out=tmp_path / "out")[:3])
    assert found.returncode == 2 and "has 600 ids, the model 500 rows" in found.stderr
