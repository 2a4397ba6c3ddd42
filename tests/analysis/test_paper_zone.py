"""Records and analysis need neither torch nor Megatron-Core: a report is made on a laptop that has only the rows."""

import importlib
import subprocess
import sys
import textwrap

import pytest

SCRIPT = textwrap.dedent("""
    import sys

    class Refuse:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in ("torch", "megatron", "transformer_engine"):
                raise ImportError(f"{name} was imported")

    sys.meta_path.insert(0, Refuse())
    from megatron_lccp.analysis.report.report import write_report
    from megatron_lccp.commands.wandb_sink import WandbSink
    WandbSink("disabled", "p", None, "n", sys.argv[1], {}).close()
    print(write_report(sys.argv[1]))
    assert "wandb" not in sys.modules and "matplotlib.pyplot" not in sys.modules
""")


def test_a_report_is_written_where_torch_cannot_be_imported(small_run):
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(small_run.dir)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(small_run.dir / "report.html")


@pytest.mark.parametrize("name", ["torch", "megatron.core", "megatron_lccp.training.loop", "tests.distributed.ranks"])
def test_a_test_that_runs_once_cannot_import_it(name, request):
    """Nor a Python that it starts, whatever other tests have imported: CI's second run leaves these tests out."""
    assert request.node.get_closest_marker("once")
    with pytest.raises(ImportError, match="is not for a test in this folder"):
        importlib.import_module(name)
    result = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "is not for a test in this folder" in result.stderr
