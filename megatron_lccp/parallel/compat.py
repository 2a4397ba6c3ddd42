"""What differs between installed versions of Megatron-Core, and what is missing without Transformer Engine.

In: an imported Megatron-Core. Out: one behaviour for the rest of the package. Tested versions: 0.16.1.
"""

from __future__ import annotations

import importlib.metadata

MEGATRON_VERSION = importlib.metadata.version("megatron-core")


def apply() -> None:
    """Repair what an installed Megatron-Core gets wrong on every platform; safe to call twice."""
    from megatron.core.transformer.moe import moe_utils

    # transformer/moe/moe_utils.py:1192,1225 of 0.16.1 reads a name that exists only with Transformer Engine.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
