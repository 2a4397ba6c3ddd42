"""Run directories as what the report is made from."""

from megatron_lccp.analysis import frames
from megatron_lccp.analysis.measured.corpora import corpus_ppl
from megatron_lccp.analysis.measured.heads import head_scores
from megatron_lccp.analysis.measured.interference import interference_cells
from megatron_lccp.analysis.measured.needles import needle_cells
from megatron_lccp.analysis.measured.training import thinned_health
from megatron_lccp.analysis.run import load_runs
from tests.synthetic_run import make_run


def test_runs_of_one_name_are_told_apart_and_a_folder_means_all_in_it(tmp_path):
    sizes = dict(steps=4, lccp_from=2, every=2, lengths=(1024,), depths=(0.5,), samples=1, layers=1, heads=2, skip=())
    for place, name in (("a", "same"), ("b", "same"), ("c", "third")):
        make_run(tmp_path / place, name=name, **sizes)
    runs = load_runs([tmp_path, tmp_path / "a"])
    assert [run.name for run in runs] == ["same (a)", "same (b)", "third"]
    for run in runs:
        for frame in (
            run.frame(needle_cells),
            run.derived(head_scores),
            run.frame(corpus_ppl),
            run.derived(thinned_health),
            run.frame(interference_cells),
            run.rows,
        ):
            assert set(frame["run"]) == {run.name}
    assert frames.checkpoints(runs[0].frame(needle_cells))["step"].tolist() == [0, 2, 4]
