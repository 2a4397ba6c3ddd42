"""Long-context continual pre-training on Megatron-Core that says, while it runs, whether the model has converged.

Data flows one way, and imports point only left:
schema, text, processes, files, lock, config -> records -> analysis, and
the same -> parallel -> data -> model -> measuring -> weights -> monitors, training -> planning;
`suite`, `commands` and `cli` compose.
`records` and `analysis` need neither torch nor Megatron: a report needs only the rows of a run directory.
`from megatron_lccp import attach` puts the monitors into a loop of your own (see `suite`).
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`attach`, loaded only when asked for: a report must work without torch."""
    if name == "attach":
        from megatron_lccp.suite import attach

        return attach
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
