"""What a rank imports, imported: ranks.py forks its processes off one that has done this and nothing else."""

import pytest  # noqa: F401

from megatron_lccp.parallel import compat, cpu

compat.quiet()
cpu.install()
compat.apply()

from megatron_lccp import cli, monitors  # noqa: E402,F401
from megatron_lccp.commands import measure  # noqa: E402,F401
from megatron_lccp.planning import plan  # noqa: E402,F401
from megatron_lccp.training import loop, setup  # noqa: E402,F401
from megatron_lccp.weights import checkpoint  # noqa: E402,F401
from tests.distributed import jobs  # noqa: E402,F401
