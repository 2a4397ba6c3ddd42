"""What a user gets wrong is answered in one line that names it; nothing is half-written."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.distributed.ranks import ROOT, free_port, lccp, start_lccp, tool


def refused(found: subprocess.CompletedProcess, *words: str) -> None:
    lines = [line for line in found.stderr.splitlines() if line]
    assert found.returncode == 2, found.stderr
    assert len(lines) == 1 and lines[0].startswith("lccp: "), found.stderr
    for word in words:
        assert word in lines[0], lines[0]


@pytest.fixture
def copy(tiny_yaml: Path, tmp_path: Path) -> Path:
    """The tiny configuration with data of its own, to damage."""
    tree = yaml.safe_load(tiny_yaml.read_text())
    shutil.copytree(tiny_yaml.parent / "tokens", tmp_path / "tokens")
    shutil.copy(tiny_yaml.parent / "tokenizer.model", tmp_path)
    tree["data"]["dir"] = str(tmp_path / "tokens")
    tree["data"]["tokenizer"]["path"] = str(tmp_path / "tokenizer.model")
    tree["dir"] = str(tmp_path / "run")
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--training.stepz=4", ["stepz"]),
        ("--stages.lccp.context=9", ["context"]),
        ("--parallel.tensor=3", ["parallel.tensor", "3"]),
        ("--parallel.tensor=2", ["parallel", "1 rank"]),
        ("--megatron.transformer.num_leyers=4", ["megatron.transformer.num_leyers", "TransformerConfig"]),
        ("--model.family=tiny_mo", ["model.family", "tiny_moe"]),
        ("--stages.base.mixture.short.sources.books=1.0", ["books", "data.sources"]),
        ("--monitors.0.class_path=megatron_lccp.monitors.CorpusPPP", ["CorpusPPP"]),
        ("--monitors.1.init_args.depths=[1.5]", ["depths", "1.5"]),
        ("--monitors.1.init_args.haystacks=[cod]", ["monitors.1.init_args.haystacks", "'cod'", "bundled/stdlib"]),
        ("--model.attention=transformer_engine", ["model.attention", "auto or portable"]),
        ("--stages.base.tokens", ["should look like"]),
    ],
)
def test_bad_field(override: str, words: list[str], tiny_yaml: Path, tmp_path: Path) -> None:
    found = lccp("train", str(tiny_yaml), f"--dir={tmp_path / 'run'}", override)
    lines = [line for line in found.stderr.splitlines() if line]
    assert found.returncode == 2 and all(line.startswith(("lccp: ", str(tiny_yaml))) for line in lines), found.stderr
    for word in words:
        assert any(word in line for line in lines), found.stderr
    assert not (tmp_path / "run").exists()


def test_ranks_that_cannot_connect_say_what_to_set(
    tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch")
    refused(lccp("train", str(tiny_yaml), f"--dir={tmp_path / 'run'}"), "GLOO_SOCKET_IFNAME", "nosuch", "MASTER_ADDR")
    assert not (tmp_path / "run").exists()


def test_a_rank_that_ended_is_not_looked_for_elsewhere(tiny_yaml: Path, tmp_path: Path) -> None:
    """What is missing on rank 0's node alone is rank 0's line; the other rank says that one ended, and no more."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        start_lccp(
            "train", str(tiny_yaml), "--parallel.expert=2", *more, out=tmp_path / "out", err=tmp_path / f"err{rank}",
            environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""},
        )
        for rank, more in enumerate(([f"--data.dir={tmp_path / 'absent'}"], [f"--dir={tmp_path / 'run'}"]))
    ]  # fmt: skip
    for process in processes:
        process.join(120)
    said = [(tmp_path / f"err{rank}").read_text().splitlines() for rank in (0, 1)]
    assert [process.exitcode for process in processes] == [2, 1], said
    assert len(said[0]) == 1 and "absent" in said[0][0] and "lccp prepare" in said[0][0]
    assert len(said[1]) == 1 and said[1][0].startswith("lccp: rank 1: another rank ended")
    assert "MASTER_ADDR" not in said[1][0]


def test_every_problem_is_listed_at_once(tiny_yaml: Path) -> None:
    found = lccp("train", str(tiny_yaml), "--parallel.pipeline=3", "--parallel.expert=3", "--megatron.ddp.nope=1")
    for word in ("parallel.pipeline: 3", "parallel.expert: 3", "megatron.ddp.nope"):
        assert word in found.stderr


def test_data_missing_or_damaged(copy: Path) -> None:
    index = copy.parent / "tokens" / "code.train.idx"
    index.write_bytes(index.read_bytes()[:-9])
    refused(lccp("train", str(copy)), "code.train.idx", "prepare")
    environment = {**os.environ, "MASTER_PORT": str(free_port()), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "megatron_lccp.cli", "train", str(copy)]  # with all that is said at import
    alone = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120, check=False)
    refused(alone, "code.train.idx", "prepare")
    index.unlink()
    refused(lccp("train", str(copy)), "code.train.idx", "prepare")
    shutil.rmtree(copy.parent / "tokens")
    refused(lccp("train", str(copy)), "tokens", "prepare")
    assert not (copy.parent / "run").exists()


def test_wrong_tokenizer_for_the_data(copy: Path) -> None:
    other = copy.parent / "other"
    made = lccp(
        "prepare",
        str(copy),
        f"--data.dir={other}",
        f"--data.tokenizer.path={other}.model",
        "--data.tokenizer.vocab_size=600",
    )
    assert made.returncode == 0, made.stderr
    refused(lccp("train", str(copy), f"--data.tokenizer.path={other}.model"), "other.model", "wrong tokenizer")


def test_checkpoint_of_another_model(copy: Path) -> None:
    assert lccp("train", str(copy), "--training.steps=1", "--monitors=[]").returncode == 0
    found = lccp("train", str(copy), "--megatron.transformer.moe_ffn_hidden_size=32", "--monitors=[]")
    assert found.returncode == 1 and "another run" in found.stderr and "moe_ffn_hidden_size" in found.stderr
    exported = tool("export_weights.py", str(copy), str(copy.parent / "base.safetensors"), "--monitors=[]")
    assert exported.returncode == 0 and "base.safetensors: step 1, " in exported.stdout, exported.stderr
    damaged = next((copy.parent / "run" / "checkpoints" / "step-00000001").glob("*.distcp"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    found = lccp("train", str(copy), "--monitors=[]")
    assert found.returncode == 1 and damaged.name in found.stderr and "altered" in found.stderr
    (damaged.parent / "checkpoint.json").unlink()
    found = lccp("train", str(copy), "--monitors=[]")  # and does not begin anew beside it
    assert found.returncode == 1 and f"{damaged.parent}: has no checkpoint.json" in found.stderr, found.stderr


def test_weights_to_start_from_are_looked_at_first(copy: Path) -> None:
    (copy.parent / "w.safetensors").write_bytes(b"x")
    found = lccp("train", str(copy), f"--model.init_from={copy.parent}/w.safetensors")
    refused(found, "model.init_from: ", "w.safetensors: cannot be read as safetensors")
    assert not (copy.parent / "run").exists()


class _Touch:
    """What a pickle does that is more than data."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_files_with_code_in_them_are_refused(copy: Path) -> None:
    """A checkpoint and dataset indices that somebody else made, digests and all."""
    trap = copy.parent / "sprung"
    assert lccp("train", str(copy), "--training.steps=1", "--monitors=[]").returncode == 0
    checkpoint = copy.parent / "run/checkpoints/step-00000001"
    (checkpoint / ".metadata").write_bytes(pickle.dumps(_Touch(trap)))
    about = json.loads((checkpoint / "checkpoint.json").read_text())
    about["sha256"][".metadata"] = hashlib.sha256((checkpoint / ".metadata").read_bytes()).hexdigest()
    (checkpoint / "checkpoint.json").write_text(json.dumps(about))
    found = lccp("train", str(copy), "--monitors=[]")
    (line,) = found.stderr.splitlines()
    assert found.returncode == 1 and f"{checkpoint / '.metadata'}: cannot be read: it is more than data" in line
    shutil.rmtree(checkpoint)
    indices = sorted((copy.parent / "run").rglob("*shuffle_index.npy"))
    for index in indices:
        index.write_bytes(pickle.dumps(_Touch(trap)))
    found = lccp("train", str(copy), "--monitors=[]")
    refused(found, "a file there is more than data")
    assert indices and not trap.exists()
    pickle.loads(pickle.dumps(_Touch(trap)))
    assert trap.exists()  # so it works where pickles may do what they like


def test_report_of_nothing(tmp_path: Path) -> None:
    refused(lccp("report", str(tmp_path)), str(tmp_path))


def test_of_two_ranks_only_our_lines_are_left(tiny_yaml: Path, tmp_path: Path) -> None:
    """As the launcher starts them: no trace of torchrun's own after the line."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [
        sys.executable, "tools/torchrun.py", "--nproc-per-node", "2", "--master-port", str(free_port()),
        "-m", "megatron_lccp.cli", "train", str(tiny_yaml), f"--dir={tmp_path / 'run'}", "--parallel.tensor=3",
    ]  # fmt: skip
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120, check=False)
    said = [line for line in found.stderr.splitlines() if line]
    assert found.returncode == 2 and said[0].startswith("lccp: ")
    assert all(f"{tiny_yaml}: parallel" in line for line in said), said  # every problem once, and nothing else
    assert len(said) == len(set(said))


def test_an_order_of_samples_that_cannot_be_kept_is_one_line(tiny_yaml: Path, tmp_path: Path) -> None:
    """Megatron-Core raises an Exception there, whose reason is in its trace."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "cache").touch()
    found = lccp("train", str(tiny_yaml), f"--dir={tmp_path / 'run'}", "--monitors=[]")
    refused(found, "the order of samples cannot be kept: Not a directory", "run/cache/base-")


def test_a_directory_that_is_gone_ends_the_run(tiny_yaml: Path, tmp_path: Path) -> None:
    """Not a new one with what came after it, and exit code 0. The weights are saved, though."""
    run, err = tmp_path / "run", tmp_path / "err"
    more = ["--monitors=[]", "--stages.base.tokens=512000"]  # 1,000 steps
    process = start_lccp("train", str(tiny_yaml), f"--dir={run}", *more, out=tmp_path / "out", err=err)
    deadline = time.monotonic() + 100
    while not (run / "steps.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    run.rename(tmp_path / "moved")
    process.join(60)
    assert process.exitcode == 1
    assert err.read_text() == f"lccp: {run}: was removed or moved while it was written to; what it held is not here\n"
    assert [path.name for path in run.iterdir()] == ["checkpoints"] and list((run / "checkpoints").iterdir())


def test_a_training_outlives_the_reader_of_its_lines(tiny_yaml: Path, tmp_path: Path) -> None:
    """`lccp train ... 2>&1 | head -1`: it goes on to its end, for its results are in files."""
    run, pipe = tmp_path / "run", tmp_path / "pipe"
    os.mkfifo(pipe)
    with os.fdopen(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK), "rb") as reader:
        process = start_lccp("train", str(tiny_yaml), f"--dir={run}", out=pipe, err=pipe)
        select.select([reader], [], [], 100)
        assert reader.readline()
    process.join(100)
    assert process.exitcode == 0
    assert len((run / "steps.jsonl").read_text().splitlines()) == 10 and (run / "report.html").is_file()


def test_closed_streams_are_no_errors(tmp_path: Path) -> None:
    """As `lccp ... >&-`, or a service that has none."""
    command = f"{sys.executable} -m megatron_lccp.cli verdict {tmp_path} >&-"
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 2 and "not a run directory" in done.stderr and len(done.stderr.splitlines()) == 1


def test_nothing_is_said_to_a_reader_who_has_left() -> None:
    """`lccp ... | head -1`, whose pipe is closed before the first word: no trace, and the shell's code for it."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "megatron_lccp.cli", "plan", "examples/tiny_moe.yaml"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=120)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
