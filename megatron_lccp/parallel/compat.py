"""What differs between installed versions of Megatron-Core, and what is missing without Transformer Engine.

In: an imported Megatron-Core. Out: one behaviour for the rest of the package. Tested versions: 0.16.1.
"""

from __future__ import annotations

import importlib.metadata
import warnings

MEGATRON_VERSION = importlib.metadata.version("megatron-core")


def quiet() -> None:
    """Silence what every import and step of Megatron-Core would repeat; call it before the first of them."""
    warnings.filterwarnings("ignore", message="(Transformer Engine and )?Apex (is|are) not installed")
    warnings.filterwarnings("ignore", message="full scope is deprecated")  # a default of TransformerConfig itself
    warnings.filterwarnings("ignore", message=".*megatron.core.transformer.custom_layers.transformer_engine")
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message="`load_state_dict` is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Please use DTensor instead", category=FutureWarning)


def apply() -> None:
    """Repair what an installed Megatron-Core gets wrong on every platform; safe to call twice."""
    from megatron.core.transformer.moe import moe_utils

    # transformer/moe/moe_utils.py:1192,1225 of 0.16.1 reads a name that exists only with Transformer Engine.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
