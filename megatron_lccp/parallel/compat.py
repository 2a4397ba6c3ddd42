"""What differs between installed versions of Megatron-Core, and what is missing without Transformer Engine.

In: an imported Megatron-Core. Out: one behaviour for the rest of the package. Tested versions: 0.16.1 and 0.19.2.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import signal
import warnings
from multiprocessing import resource_tracker
from types import SimpleNamespace
from typing import Any

MEGATRON_VERSION = importlib.metadata.version("megatron-core")


def quiet() -> None:
    """Silence what every import and step of Megatron-Core would repeat; call it before the first of them."""
    warnings.filterwarnings("ignore", message="(Transformer Engine and )?Apex (is|are) not installed")
    warnings.filterwarnings("ignore", message="full scope is deprecated")  # a default of TransformerConfig itself
    warnings.filterwarnings("ignore", message=".*megatron.core.transformer.custom_layers.transformer_engine")
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message="`load_state_dict` is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Please use DTensor instead", category=FutureWarning)
    warnings.filterwarnings("ignore", message="`sequence_parallel` is set to")  # experts of one rank in a TP layout
    warnings.filterwarnings("ignore", message="absl.logging is not installed")  # 0.19.2 does not declare it
    warnings.filterwarnings("ignore", message=r"Mimo\w+ is experimental")
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # 0.19.2 reads a checkpoint's plan alone
    warnings.filterwarnings("ignore", message="The argument order of load has been changed")
    warnings.filterwarnings("ignore", message="Could not determine rank from torch.distributed")  # 0.19.2, one process
    for name in _LOUD:
        logging.getLogger(name).addFilter(_is_news)


# Logger -> how the lines begin that 0.19.2 logs whatever a caller does.
_LOUD = {
    "torch.utils.cpp_extension": "No CUDA runtime is found",  # tensor_parallel/random.py:17 imports it
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided",
    "megatron.core.dist_checkpointing.strategies.torch": "MCore's async save is deprecated",  # in a plain save
    "megatron.core.dist_checkpointing.strategies.filesystem_async": "Local process",  # the error comes back as well
}


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_LOUD[record.name])


def one_a_layer(entries: list) -> list:
    """A list with an entry for each layer, to be read by a layer's number; that is from 1 on.

    0.19.2 takes one off (transformer/transformer_layer.py:364); 0.16.1 (:297) does not, and finds none for the last.
    """
    return [entries[0], *entries] if MEGATRON_VERSION.startswith("0.16.") else entries


def apply() -> None:
    """Repair what an installed Megatron-Core gets wrong on every platform; safe to call twice."""
    import torch
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils

    if random.HAVE_TE and torch.cuda.is_available():
        return
    # What needs Transformer Engine is asked of it wherever it can be imported, also on a machine without a GPU, where
    # it raises. transformer/moe/moe_utils.py:1192,1225 of 0.16.1 reads this name also where it cannot be imported.
    moe_utils.te_general_gemm = None
    # tensor_parallel/random.py:588-592,683-687 of 0.16.1 (692-696,787-791 of 0.19.2): whether FP8 is on, when
    # `layernorm` or `moe_act` is recomputed, in BF16 too.
    random.FP8GlobalStateManager = SimpleNamespace(is_fp8_enabled=lambda: False)
    random.activation_recompute_forward = random.fp8_autocast = lambda **_: contextlib.nullcontext()


def start_result_server() -> None:
    """Start the process that Megatron-Core keeps for the results of saves, so that signals to all processes of a job do
    not end it: after Slurm's or torchrun's SIGTERM, the last checkpoint is still to be saved.

    It is started once, by the first save (dist_checkpointing/strategies/filesystem_async.py: 0.16.1 :51, 0.19.2 :53).
    What is blocked when a process starts stays blocked in it; it ends when this one says so.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    old, new = "_get_write_results_queue", "get_write_results_queue"
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGHUP,))
    try:
        resource_tracker.ensure_running()  # it ignores SIGTERM and SIGINT, and its start takes them off the mask
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
        getattr(filesystem_async, old if hasattr(filesystem_async, old) else new)()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def scaled_logits(model: Any, logits: Any) -> Any:
    """Logits as the model scales them, which 0.19.2 does for MuP (models/common/language_module/language_module.py)."""
    scale = getattr(model, "_scale_logits", None)  # 0.16.1 knows no MuP
    return logits if scale is None else scale(logits)
