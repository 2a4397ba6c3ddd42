"""`lccp correlate`: the paper's numbers from r and n, the columns of a file, and what it refuses."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from scipy import stats

from megatron_lccp.analysis.report.correlate import as_text, of_file, of_numbers
from megatron_lccp.cli import main

ROOT = Path(__file__).resolve().parents[3]
PAPER = {0.8552: 0.0299, -0.9115: 0.0114, 0.4977: 0.3151, -0.6283: 0.1816, 0.8243: 0.0436, 0.8956: 0.0158}
"""r and p of its tables 6 and 7, n = 6."""


def table(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "series.csv"
    path.write_text(text)
    return path


def test_the_papers_p_from_its_r_and_n(capsys: pytest.CaptureFixture) -> None:
    assert main(["correlate", "--n", "6", *(word for r in PAPER for word in ("--r", str(r)))]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["r", "n", "p", "95", "%", "interval"]
    assert [line.split()[:3] for line in lines] == [[f"{r:+.4f}", "6", f"{p:.4f}"] for r, p in PAPER.items()]


def test_the_page_shows_what_the_command_prints(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs/compare.md").read_text()
    shown = re.findall(r"```bash\n\.venv/bin/lccp (correlate [^\n]*)\n```\n\n```text\n(.*?)```", page, flags=re.DOTALL)
    assert len(shown) == 2
    for command, text in shown:
        assert main(shlex.split(command)) == 0
        assert capsys.readouterr().out == text


def test_columns_of_a_file_are_scipys(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A missing number takes its pair away; a column tokens orders the lines and gives the noise floor."""
    path = table(
        tmp_path,
        "tokens,ppl,niah,ruler\n50,4,.8,77\n0,9,.5,68.68\n20,5,.7,72\n100,3,,79.4\n150,2.5,.9,79\n200,2,.91,79.1\n",
    )
    assert main(["correlate", str(path), "--y", "ruler", "--json"]) == 0
    ppl, niah = json.loads(capsys.readouterr().out)
    assert (ppl["x"], ppl["y"], ppl["n"], niah["n"]) == ("ppl", "ruler", 6, 5)
    theirs = stats.pearsonr([0.5, 0.7, 0.8, 0.9, 0.91], [68.68, 72, 77, 79, 79.1])
    assert (niah["r"], niah["p"]) == pytest.approx((theirs.statistic, theirs.pvalue))
    assert (niah["low"], niah["high"]) == pytest.approx(tuple(theirs.confidence_interval(0.95)))
    assert 0.5 < ppl["floor"] < 1
    every = of_file(path)
    assert [(line["x"], line["y"]) for line in every] == [("ppl", "niah"), ("ppl", "ruler"), ("niah", "ruler")]
    assert every[1]["r"] == ppl["r"] and "noise floor" in as_text(every)
    without = table(tmp_path, "a,b\n1,2\n2,3.5\n3,5\n")
    assert as_text(of_file(without)).splitlines()[1].endswith("takes more than 3 pairs")


def test_a_perfect_r_and_a_flat_series(tmp_path: Path) -> None:
    assert "<0.0001" in as_text(of_numbers([-1.0], 6))
    flat = as_text(of_file(table(tmp_path, "a,b\n1,2\n1,3\n1,5\n1,4\n")))
    assert flat.splitlines()[1].split() == ["a", "b", "-", "4", "-", "-"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "correlate: give either a CSV file, or --r with --n"),
        (["--r", "0.5"], "--r: needs --n, the number of pairs that it is of"),
        (["--r", "0.5", "--n", "2"], "--n: should be at least 3 pairs, is 2"),
        (["--r", "-1.5", "--n", "6"], "--r: should be from -1 to 1, is -1.5"),
        (["--r", "nan", "--n", "6"], "--r: should be from -1 to 1, is nan"),
        (["--r", "0.5", "--n", "6", "--x", "a"], "--x and --y: choose columns of a CSV"),
        (["{path}", "--n", "6"], "--n: belongs to --r"),
        (["{path}", "--x", "c"], "--x: {path} has no column 'c'; there are a, b, name"),
        (["{path}"], "{path}:2: name is no number but 'x'; choose columns by --x and --y"),
        (["{path}.none"], "{path}.none: cannot be read: No such file"),
        (["{path}", "--x", "a", "--y", "a"], "needs two columns of numbers besides tokens"),
    ],
)  # fmt: skip
def test_what_cannot_be_correlated_is_one_line(arguments: list[str], problem: str, tmp_path: Path, capsys) -> None:
    path = str(table(tmp_path, "a,b,name\n1,2,x\n2,3,y\n3,5,z\n"))
    assert main(["correlate", *(word.format(path=path) for word in arguments)]) == 2
    said = capsys.readouterr()
    assert problem.format(path=path) in said.err and said.err.count("\n") == 1 and not said.out


def test_tokens_that_repeat_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokens: should be a number of its own in every line"):
        of_file(table(tmp_path, "tokens,a,b\n1,2,3\n1,3,4\n2,5,6\n"))
