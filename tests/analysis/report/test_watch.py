"""The report follows a run: it waits for the first window, is written again when there is more, and ends in peace."""

import pytest

from megatron_lccp.analysis.report.watch import watch
from megatron_lccp.records.store import RunStore
from tests.synthetic_run import make_run

SIZES = dict(
    steps=20, lccp_from=10, every=10, lengths=(1024,), depths=(0.0, 1.0), samples=2, layers=2, heads=3, skip=()
)


def test_it_is_written_again_when_the_run_has_measured_more(tmp_path, capsys):
    folder, said, pages, looks = tmp_path / "run", [], [], []

    def sleep(seconds):
        looks.append(seconds)
        page = folder / "report.html"
        pages.append(page.read_text(encoding="utf-8") if page.is_file() else None)
        if len(looks) == 2:
            make_run(folder, ends_at=10, **SIZES)
        elif len(looks) == 4:
            make_run(folder, **SIZES)
        elif len(looks) == 6:
            RunStore(folder).append_step({"step": 21, "tokens": 21, "stage": "lccp", "loss": 7.777})
        elif len(looks) == 7:
            raise KeyboardInterrupt

    watch([folder], None, None, {}, 2.5, said.append, sleep)
    assert capsys.readouterr().err == f"{folder} does not exist yet; waiting\n"
    assert looks == [2.5] * 7 and pages[:2] == [None, None]
    assert pages[2] == pages[3] != pages[4] == pages[5] != pages[6]  # nothing new, nothing written
    assert 'data-redraw="2.5"' in pages[5] and "waiting for the first window" in said[0] and len(said) == 5
    assert "2 windows, the last at step 10" in said[1] and "3 windows, the last at step 20" in said[2]
    assert "data-redraw=" not in (folder / "report.html").read_text(encoding="utf-8").split("<nav")[0]


def test_an_interval_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--every should be above 0"):
        watch([tmp_path], None, None, {}, 0, print)
