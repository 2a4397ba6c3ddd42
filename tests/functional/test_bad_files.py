"""Sixty ways to get it wrong, over all commands: each is one line with file, field and remedy, and nothing is written.

Commands run in this process; what needs ranks is in test_bad_input.py, and what a monitor in a loop of others is asked
in tests/distributed/test_attach.py.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from megatron_lccp.cli import main
from megatron_lccp.parallel.groups import environment_problem
from tests.distributed.ranks import ROOT

Said = Callable[..., str]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """Runs a command that should fail, and returns the one line that it says."""

    def call(*argv: str | Path, run: Callable[[list[str]], int] = main, codes: tuple[int, ...] = (2,)) -> str:
        capsys.readouterr()
        try:
            code = run([str(each) for each in argv])
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        found = capsys.readouterr()
        lines = found.err.splitlines()
        assert code in codes and len(lines) == 1 and lines[0].isprintable(), (code, found.err)
        return lines[0]

    return call


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def spoil(name: str, content: bytes = b"") -> Callable[[Path], None]:
    """Puts this in place of a file, or of all files of a pattern."""
    return lambda run: [path.write_bytes(content) for path in list(run.glob(name)) or [run / name]] and None


def foreign(run: Path) -> None:
    for path in run.glob("rows/*.parquet"):
        pq.write_table(pa.table({"layer": [1], "head": [0], "monitor": ["health"], "metric": ["nll"]}), path)


def in_place_of(name: str, make: Callable[[Path], None]) -> Callable[[Path], None]:
    """Something else under the name of a file or folder of the run."""

    def damage(run: Path) -> None:
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        make(path)

    return damage


RUNS: dict[str, tuple[Callable[[Path], None], str]] = {
    "Parquet of others": (foreign, "step-00000000.parquet: not a file of rows (it has no column run)"),
    "torn Parquet": (spoil("rows/*.parquet", b"PAR1"), "no rows can be read of 9 files in rows/; copy them"),
    "empty Parquet": (spoil("rows/*.parquet"), "Parquet file size is 0 bytes"),
    "no rows": (lambda run: [path.unlink() for path in run.glob("rows/*")] and None, "if its `monitors` name any"),
    "rows a file": (in_place_of("rows", Path.touch), "no rows in rows/"),
    "format of a newer version": (spoil("format.json", b'{"format": 99}'), "update megatron_lccp"),
    "format a text": (spoil("format.json", b'{"format": "x"}'), "format 'x', which is none"),
    "format binary": (spoil("format.json", b"\xff\xfe"), "format.json: cannot be read"),
    "metrics cut": (spoil("metrics.json", b'{"NeedleGrid": ['), "metrics.json: does not hold metrics"),
}
"""What may have happened to a run: how, and what is said of it."""


@pytest.mark.parametrize("what", RUNS)
def test_a_run_that_cannot_be_read(what: str, small_run: SimpleNamespace, said: Said) -> None:
    damage, words = RUNS[what]
    damage(small_run.dir)
    before = files_in(small_run.dir)
    for command in ("verdict", "report", "export"):
        line = said(command, small_run.dir)
        assert line.startswith(f"lccp: {small_run.dir}") and words in line, line
    assert files_in(small_run.dir) == before


PARTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a Parquet file of others": (
        lambda run: pq.write_table(pa.table({"a": [1]}), run / "rows/step-00000005.parquet"),
        "step-00000005.parquet: skipped, not a file of rows (it has no column run)",
    ),
    "a column of texts": (
        lambda run: pq.read_table(file := run / "rows/step-00000005.parquet").to_pandas().assign(step="x").to_parquet(file),
        "step-00000005.parquet: skipped, not a readable Parquet file (Failed to parse string: 'x'",
    ),
    "a folder": (in_place_of("rows/step-00000005.parquet", Path.mkdir), "is a directory"),
    "a link to itself": (
        in_place_of("rows/step-00000005.parquet", lambda path: path.symlink_to(path)), "step-00000005.parquet: skipped",
    ),
    "lines cut": (
        lambda run: os.truncate(run / "steps.jsonl", (run / "steps.jsonl").stat().st_size // 2),
        "dropped, not a whole JSON object",
    ),
    "a loss that is a text": (
        lambda run: append(run, '{"step": 3, "tokens": 4, "loss": "abc"}'), "loss is no number but 'abc'",
    ),
    "a stage that is a list": (
        lambda run: append(run, '{"step": 3, "tokens": 4, "stage": ["a"]}'), "stage is no text but ['a']",
    ),
    "a step beyond all numbers": (lambda run: append(run, '{"step": 1e300, "tokens": 4}'), "step is no whole number"),
    "brackets without end": (lambda run: append(run, "[" * 100_000), "not a whole JSON object"),
    "UTF-16": (
        lambda run: (run / "steps.jsonl").write_text((run / "steps.jsonl").read_text(), "utf-16"), "; and ",
    ),
}  # fmt: skip
"""What may have happened to a part of a run, which the rest outlives: how, and the line that is said."""


def append(run: Path, line: str) -> None:
    with (run / "steps.jsonl").open("a") as file:
        file.write(line + "\n")


@pytest.mark.parametrize("what", PARTS)
def test_a_run_of_which_a_part_cannot_be_read(what: str, small_run: SimpleNamespace, said: Said) -> None:
    damage, words = PARTS[what]
    damage(small_run.dir)
    line = said("verdict", small_run.dir, codes=(0, 10, 11, 12))
    assert words in line and str(small_run.dir) in line, line


def test_a_row_whose_own_coordinates_are_no_json(small_run: SimpleNamespace, said: Said) -> None:
    file = small_run.dir / "rows/step-00000005.parquet"
    pq.read_table(file).to_pandas().assign(own="{bad").to_parquet(file)
    assert f"{file}: not a file of rows (its column own holds '{{bad'" in said("verdict", small_run.dir)


PLACES = {
    "nosuch": "nosuch: not a run directory", "{file}": "{file}: not a run directory", "": "is empty; name a path",
    "/dev/null": "/dev/null: not a run directory", "{loop}": "{loop}: not a run directory",
    "a\nb": "a\\nb: not a run directory", "x" * 300: "File name too long; give it a shorter",
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES, ids=repr)
def test_what_is_no_run(place: str, tmp_path: Path, said: Said) -> None:
    paths = {"file": str(tmp_path / "file"), "loop": str(tmp_path / "loop")}
    Path(paths["file"]).touch()
    Path(paths["loop"]).symlink_to(paths["loop"])
    for command in ("verdict", "report", "export"):
        assert PLACES[place].format(**paths) in said(command, place.format(**paths))


OUTS = {
    "{file}/page": "cannot be written: ", "{folder}": "Is a directory", "/proc/nosuch/page": "No such file or directory",
    "/dev/null": "is a device or a pipe; name a file", "{folder}/" + "x" * 300: "File name too long; give it a shorter",
    "": "argument --out: is empty", "{notes}": "is no page; name another file, or move it away",
}  # fmt: skip


@pytest.mark.parametrize("out", OUTS)
def test_an_out_that_cannot_be_written(out: str, small_run: SimpleNamespace, tmp_path: Path, said: Said) -> None:
    paths = {"file": str(tmp_path / "file"), "folder": str(tmp_path / "folder")}
    paths["notes"] = str(tmp_path / "notes.md")
    Path(paths["file"]).touch()
    Path(paths["folder"]).mkdir()
    Path(paths["notes"]).write_text("# years of work\n")
    before = files_in(tmp_path)
    commands = [["report"]] if out in ("{folder}", "{notes}", "") else [["export", "--only", "heads"]]
    for command, *more in [*commands, *([["report"]] if out == "/dev/null" else [])]:  # which takes seconds to draw
        line = said(command, small_run.dir, "--out", out.format(**paths), *more)
        assert "--out: " in line and (OUTS[out] in line or command == "export"), line
    assert files_in(tmp_path) == before and not Path("/dev/null").is_file()


SCORES = {
    "": "not a CSV file", "tokens,benchmark,score\n": "has no scores", "tokens,benchmark\n1,a\n": "no column score",
    "tokens;benchmark;score\n1;a;2\n": "no column tokens", "tokens,benchmark,score\n1,a,2,3,4\n": "not a CSV file",
    "tokens,benchmark,score\n1,a\n": "score should be a number, is 'nan'",
    "tokens,benchmark,score\n1,a,inf\n": "score should be a number, is 'inf'",
    "tokens,benchmark,score\n-1,a,2\n": "tokens should be a number of tokens",
    "tokens,benchmark,score\n1e300,a,2\n": "tokens should be a number of tokens",
    "tokens,benchmark,score\n1,,2\n": "benchmark is empty", "tokens,tokens,benchmark,score\n1,2,a,3\n": "two columns tokens",
    'tokens,benchmark,score\n1,"a,2\n': "not a CSV file", "tokens,benchmark,score,run\n1,a,2,b\n": "run 'b' is not among",
    "\x01\n\x02\n": "no column tokens",
}  # fmt: skip


@pytest.mark.parametrize("text", SCORES)
def test_scores_that_are_none(text: str, small_run: SimpleNamespace, tmp_path: Path, said: Said) -> None:
    path, page = tmp_path / "scores.csv", tmp_path / "page.html"
    path.write_text(text, encoding="utf-8")
    line = said("report", small_run.dir, "--out", page, "--scores", path)
    assert str(path) in line and SCORES[text] in line and not page.exists(), line


def test_scores_of_another_kind_of_file(small_run: SimpleNamespace, tmp_path: Path, said: Said) -> None:
    (tmp_path / "utf16.csv").write_text("tokens,benchmark,score\n1,a,2\n", encoding="utf-16")
    (tmp_path / "not.csv.gz").write_bytes(b"x")
    for path in ("utf16.csv", "not.csv.gz", "nosuch.csv", "."):
        assert str(tmp_path / path) in said("report", small_run.dir, "--scores", tmp_path / path)
    for seconds in ("0", "nan", "inf", "x", "-1"):
        assert "--every" in said("watch", small_run.dir, "--every", seconds)


@pytest.fixture
def config(tiny_yaml: Path, tmp_path: Path) -> Path:
    """The tiny configuration, whose run directory is not there yet."""
    tree = yaml.safe_load(tiny_yaml.read_text()) | {"dir": str(tmp_path / "run")}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


TEXTS: dict[str, tuple[bytes | None, str]] = {
    "empty": (b"", "should hold `field: value` lines"), "a list": (b"- a\n", "should hold `field: value` lines"),
    "binary": (bytes(range(200, 256)), "is not UTF-8 text"), "UTF-16": ("name: a\n".encode("utf-16"), "is not UTF-8"),
    "tabs": (b"name: a\nmodel:\n\tfamily: tiny_moe\n", "is not YAML"),
    "twice": (b"name: a\nname: b\n", "name is given twice"), "two documents": (b"name: a\n---\nname: b\n", "is not YAML"),
    "cut": (b"name: a\nmodel: {family: tiny", "is not YAML"), "its own anchor": (b"name: &a [*a]\n", "name: should be a"),
    "a date that is none": (b"name: 2026-13-45\n", "is not YAML"),
    "a class of Python": (b"name: !!python/object/apply:os.system [true]\n", "is not YAML"),
    "brackets without end": (b"name: " + b"[" * 2000, "is not YAML"),
    "too large": (b"#" * (1 << 25), "as no configuration has"), "a folder": (None, "cannot be read: Is a directory"),
}  # fmt: skip


@pytest.mark.parametrize("what", TEXTS)
def test_a_configuration_that_is_none(what: str, tmp_path: Path, said: Said) -> None:
    content, words = TEXTS[what]
    path = tmp_path / "it.yaml"
    path.mkdir() if content is None else path.write_bytes(content)
    for command in ("plan", "prepare", "measure"):
        line = said(command, path)
        assert line.startswith(f"lccp: {path}: ") and words in line, line
    assert files_in(tmp_path) == {"it.yaml"}


FIELDS = {
    "--training.steps=1.5": "training.steps", "--seed=1e300": "seed: should fit in 64 bits",
    "--stages.base.tokens=1e30": "stages.base.tokens", "--stages.base.lr=.nan": "stages.base.rope_base and lr",
    "--optimizer.weight_decay=.nan": "optimizer.weight_decay", "--parallel.pipeline=1e9": "parallel.pipeline",
    "--stages.base.mixture.short.share=.inf": "stages.base.mixture.short", "--monitors=3": "monitors: should be a list",
    "--monitors.0.init_args.length_tok=1e18": "length_tok", "--monitors.1.init_args.lengths_tok=[1000000000]": "lengths_tok",
    "--monitors.1.init_args.samples=1e12": "samples", "--monitors.1.init_args.every={steps: 0}": "every",
    "--monitors.9.init_args.samples=1": "monitors.9.init_args.samples", "--data.sources=[]": "data.sources",
    "--data.sources.people.init_args.count=1e18": "data.sources.people: count",
    "--data.sources.code.init_args.max_bytes=-1": "data.sources.code: max_bytes",
    "--data.sources.code.class_path=os.system": "data.sources.code", "--data.dir=a\0b": "--data.dir",
    '--dir="a\\nb"': "dir: 'a\\nb' has a character that cannot be seen", "--data.tokenizer.vocab_size=0": "vocab_size",
    "--model.vocab_multiple=1e12": "model.vocab_multiple", "--stages.base.tokens=[1": "--stages.base.tokens",
    "--megatron.transformer.num_layers=1e9": "num_layers: should be at most 10,000",
    "--megatron.transformer.layernorm_epsilon=.nan": "layernorm_epsilon: should be a number",
    "--megatron.transformer.moe_router_topk=x": "moe_router_topk: should be a whole number",
    "--megatron.transformer.moe_aux_loss_coeff=[x]": "moe_aux_loss_coeff",
    "--megatron.transformer.init_method_std=-1": "init_method_std: should be at least 0",
    "--megatron.optimizer.adam_eps=x": "megatron.optimizer.adam_eps", "--megatron.ddp.bucket_size=-1": "bucket_size",
}  # fmt: skip


@pytest.mark.parametrize("override", FIELDS)
def test_a_field_that_is_none(override: str, config: Path, said: Said) -> None:
    before = files_in(config.parent)
    assert FIELDS[override] in said("plan", config, override)
    assert files_in(config.parent) == before


@pytest.fixture
def own_data(tiny_yaml: Path, config: Path) -> Path:
    """Prepared data to damage."""
    shutil.copytree(tiny_yaml.parent / "tokens", config.parent / "tokens")
    return config.parent / "tokens"


def edited(source: dict) -> Callable[[Path], None]:
    def damage(tokens: Path) -> None:
        tree = json.loads((tokens / "manifest.json").read_text())
        tree["sources"]["code"] |= source
        (tokens / "manifest.json").write_text(json.dumps(tree))

    return damage


def overwritten(name: str) -> Callable[[Path], None]:
    def damage(tokens: Path) -> None:
        content = (tokens / name).read_bytes()
        (tokens / name).write_bytes(b"x" * 34 + content[34:])

    return damage


DATA: dict[str, tuple[Callable[[Path], None], str]] = {
    "no manifest": (lambda tokens: (tokens / "manifest.json").unlink(), "manifest.json: is missing; run"),
    "a list": (lambda tokens: (tokens / "manifest.json").write_text("[]") and None, "is not a manifest of"),
    "binary": (lambda tokens: (tokens / "manifest.json").write_bytes(b"\xff\0") and None, "is not a manifest of"),
    "files that are a text": (edited({"files": "x"}), "is not a manifest of"),
    "no tokens": (edited({"tokens": {}}), "is not a manifest of"),
    "bytes that are a text": (edited({"files": {"a": {"bytes": "x", "sha256": ""}}}), "is not a manifest of"),
    "a folder": (in_place_of("manifest.json", Path.mkdir), "data.dir: "),
    "an index of others": (overwritten("code.train.idx"), "code.train.idx: is no index of Megatron-Core"),
    "a heldout index of others": (overwritten("code.heldout.idx"), "code.heldout.idx: is no index of Megatron-Core"),
}


@pytest.mark.parametrize("what", DATA)
def test_data_that_are_none(what: str, config: Path, own_data: Path, said: Said) -> None:
    damage, words = DATA[what]
    damage(own_data)
    line = said("measure", config, "--dry-run", f"--data.dir={own_data}")
    assert words in line and str(own_data) in line, line


@pytest.mark.parametrize("place", ["{file}", "{file}/x", "/proc/nosuch", "{folder}/" + "x" * 300])
def test_a_data_dir_that_cannot_be_made(place: str, config: Path, said: Said) -> None:
    place = place.format(file=config, folder=config.parent)
    before = files_in(config.parent)
    line = said("prepare", config, f"--data.dir={place}")
    assert line.startswith(f"lccp: data.dir: {place}") and "; " in line, line
    assert files_in(config.parent) == before


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "{config}", "{folder}"])
def test_a_tokenizer_that_is_none(path: str, config: Path, said: Said) -> None:
    path = path.format(config=config, folder=config.parent)
    assert path in said("prepare", config, f"--data.tokenizer.path={path}")


LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 100, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu", "max_position_embeddings": 128,
}  # fmt: skip


def safetensors(header: object) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


MODELS: dict[str, tuple[dict[str, bytes], str]] = {
    "nothing": ({}, "config.json: cannot be read"),
    "a config that is cut": ({"config.json": b"{"}, "config.json: "),
    "a config that is a list": ({"config.json": b"[]"}, "config.json: is no object of JSON"),
    "a size that is none": ({"config.json": json.dumps(LLAMA | {"num_attention_heads": "x"}).encode()}, "num_attention_heads"),
    "no weights": ({"config.json": json.dumps(LLAMA).encode()}, "expected model.safetensors or"),
    **{
        what: ({"config.json": json.dumps(LLAMA).encode(), "model.safetensors": content}, words)
        for what, content, words in (
            ("empty weights", b"", "its header is cut short"), ("no tensors", safetensors({}), "tensors are missing"),
            ("a header that is a list", safetensors([1]), "cannot be read as safetensors"),
            ("a shape of texts", safetensors({"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}), "cannot be"),
        )
    },
    **{
        what: ({"config.json": json.dumps(LLAMA).encode(), "model.safetensors.index.json": content}, "is no index of")
        for what, content in (("an index that is a list", b'{"weight_map": []}'), ("of numbers", b'{"weight_map": {"a": 3}}'))
    },
}  # fmt: skip


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Callable[[list[str]], int]]:
    monkeypatch.syspath_prepend(ROOT / "tools")
    return lambda name: importlib.import_module(name).main


@pytest.mark.parametrize("what", MODELS)
def test_a_model_that_cannot_be_converted(what: str, tmp_path: Path, said: Said, tools: Callable) -> None:
    files, words = MODELS[what]
    (tmp_path / "model").mkdir()
    for name, content in files.items():
        (tmp_path / "model" / name).write_bytes(content)
    for out in ("out", "out.safetensors"):
        line = said("to-megatron", tmp_path / "model", tmp_path / out, run=tools("convert_checkpoint"))
        assert line.startswith(f"convert_checkpoint: {tmp_path / 'model'}") and words in line, line
    assert files_in(tmp_path) == {"model", *(f"model/{name}" for name in files)}


TOOLS = {
    "convert_checkpoint to-megatron . out --file-gb nan": "--file-gb", "convert_checkpoint": "required: direction",
    "convert_checkpoint to-megatron . out --vocab-multiple 0": "--vocab-multiple",
    "convert_checkpoint to-hf /nosuch out": "/nosuch", "convert_checkpoint to-hf /dev/null out": "/dev/null",
    "export_weights {config}": "needs CONFIG and OUT.safetensors", "export_weights /nosuch out": "/nosuch",
    "quantize_checkpoint {config}": "required: --out", "quantize_checkpoint {config} --out q": "--checkpoint: {folder}/run/checkpoints is neither",
    "quantize_checkpoint {config} --out q --calibrate 0": "--calibrate",
    "quantize_checkpoint {config} --out q --checkpoint /nosuch": "--checkpoint: /nosuch",
}  # fmt: skip


@pytest.mark.parametrize("line", TOOLS)
def test_a_tool_that_is_called_wrongly(
    line: str, config: Path, said: Said, tools: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(config.parent)
    before = files_in(config.parent)
    name, *argv = (part.format(config=config) for part in line.split())
    found = said(*argv, run=tools(name))
    assert found.startswith(f"{name}: ") and TOOLS[line].format(config=config, folder=config.parent) in found, found
    assert files_in(config.parent) == before


ENVIRONMENTS = {
    "WORLD_SIZE=abc": "WORLD_SIZE: should be", "WORLD_SIZE=0": "WORLD_SIZE: should be", "RANK=-1": "RANK: should be",
    "WORLD_SIZE=2": "RANK: is not set", "WORLD_SIZE=2 RANK=0": "MASTER_ADDR: is not set", "RANK=1": "RANK: 1 is none of",
    "WORLD_SIZE=2 RANK=2 MASTER_ADDR=a": "RANK: 2 is none of the 2", "MASTER_PORT=x": "MASTER_PORT: should be",
    "MASTER_PORT=99999": "MASTER_PORT: should be at most 65535", "LOCAL_RANK=one": "LOCAL_RANK: should be",
}  # fmt: skip


@pytest.mark.parametrize("given", ENVIRONMENTS)
def test_an_environment_that_contradicts_itself(given: str) -> None:
    """Or a rank would wait for others that never come."""
    found = environment_problem(dict(part.split("=") for part in given.split()))
    assert found is not None and found.startswith(ENVIRONMENTS[given]) and ";" in found


def test_environments_of_launchers_are_taken() -> None:
    whole = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
    assert environment_problem({}) is None and environment_problem(whole) is None
    assert environment_problem({"WORLD_SIZE": "1"}) is None


ON_A_SMALL_DISK = """
mount -t tmpfs -o size=16k t {disk} && cd {root} && {python} - <<'END'
import contextlib, io, subprocess
from pathlib import Path
from megatron_lccp.cli import main
for state in ("rw", "ro"):
    subprocess.run(["mount", "-o", "remount," + state, {disk!r}], check=True)
    for argv in {calls}:
        err = io.StringIO()
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            code = main(argv)
        left = [path.name for path in Path({disk!r}).rglob("*") if path.is_file()]
        print(code, left, err.getvalue().strip())
END
"""


def test_a_disk_without_room_and_one_that_cannot_be_written(
    small_run: SimpleNamespace, tiny_yaml: Path, tmp_path: Path
) -> None:
    """A small one of memory, in a mount namespace of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["unshare", "-Urm", "mount", "-t", "tmpfs", "t", str(disk)], capture_output=True).returncode:
        pytest.skip("needs unshare and the right to mount a tmpfs in a namespace")
    calls = [
        ["report", str(small_run.dir), "--out", f"{disk}/page.html"],
        ["export", str(small_run.dir), "--out", f"{disk}/export", "--only", "rows"],
        ["prepare", str(tiny_yaml), f"--data.dir={disk}/tokens"],
    ]
    script = ON_A_SMALL_DISK.format(disk=str(disk), root=ROOT, python=sys.executable, calls=calls)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = ["unshare", "-Urm", "bash", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    lines = done.stdout.splitlines()
    assert len(lines) == 6, (done.stdout, done.stderr)
    for number, line in enumerate(lines):
        assert line.startswith(f"2 [] lccp: {('--out', '--out', 'data.dir')[number % 3]}: {disk}"), line
        assert ("No space left on device", "Read-only file system")[number // 3] in line, line
