"""torchrun as the launcher starts it: when a rank fails, the rank's own words are the last ones.

    python tools/torchrun.py [torchrun's arguments]

In: what torchrun takes. Out: the exit code of the first rank that failed, 130 after Ctrl-C, 143 after a SIGTERM, else 0.
"""

from __future__ import annotations

import logging
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

from megatron_lccp.processes import name_launcher

if __name__ == "__main__":
    name_launcher()  # without it the ranks save and leave
    logging.disable(logging.ERROR)  # its loggers set levels of their own
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # under nohup, which it would undo
        sys.argv.insert(1, "--signals-to-handle=SIGTERM,SIGINT,SIGQUIT")
    try:
        main()
    except ChildFailedError as error:
        first = min(error.failures.values(), key=lambda failure: failure.timestamp)
        sys.exit(first.exitcode if first.exitcode > 0 else 128 - first.exitcode)
    except SignalException as stop:
        sys.exit(128 + stop.sigval)
