"""What a rank does before it does anything of its own, done: ranks.py forks its processes off one that has imported
this and nothing else.

Imports that would follow later in each rank are here, and a configuration is read, whose parser keeps what it has found
out about our classes. And the process that Megatron-Core keeps for the results of saves is forked off its rank: as the
new interpreter that it is elsewhere (tests/functional/test_main_job.py, say), it imports torch for the first result.
"""

import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest  # noqa: F401
import torch._dynamo  # noqa: F401
import yaml
from torch import multiprocessing

from megatron_lccp.parallel import compat, cpu

compat.quiet()
cpu.install()
compat.apply()

from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402

from megatron_lccp import cli, monitors  # noqa: E402,F401
from megatron_lccp.commands import measure, sinks  # noqa: E402,F401
from megatron_lccp.config.load import parse_config  # noqa: E402
from megatron_lccp.planning import plan  # noqa: E402,F401
from megatron_lccp.training import loop, setup  # noqa: E402,F401
from megatron_lccp.weights import checkpoint  # noqa: E402,F401
from tests.distributed import jobs  # noqa: E402,F401
from tests.suite import suite  # noqa: E402
from tests.tiny import tiny_tree  # noqa: E402

filesystem_async.mp = SimpleNamespace(get_context=lambda method=None: multiprocessing.get_context("fork"))

with tempfile.TemporaryDirectory() as _directory:
    _path = Path(_directory, "tiny.yaml")
    _path.write_text(yaml.safe_dump(tiny_tree(Path(_directory))))
    parse_config(_path, [suite()])
