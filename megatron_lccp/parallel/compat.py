"""What differs between installed versions of Megatron-Core, and what is missing without Transformer Engine.

In: an imported Megatron-Core. Out: one behaviour for the rest of the package. Tested versions: 0.16.1 and 0.19.2.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import math
import os
import pickle
import queue
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
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


def scale_rotary(model: Any, factor: float) -> None:
    """Have a GPTModel multiply queries and keys by `factor` where its rotary embedding turns them.

    By what Megatron-Core does for YaRN: 0.16.1 asks the configuration in each forward (transformer/attention.py:1102),
    0.19.2 once, in the constructor (:326). There the factor is (0.1 mscale ln(stretching) + 1) / (the same of another).
    """
    config = model.config
    if factor == 1.0 and not hasattr(config, "yarn_rotary_scaling_factor"):
        return
    config.yarn_rotary_scaling_factor, config.yarn_mscale, config.yarn_mscale_all_dim = math.e, (factor - 1) * 10, 0.0
    for module in model.modules():
        if hasattr(module, "_yarn_concentration_factor"):
            module._yarn_concentration_factor = factor


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


def save_without_helpers() -> None:
    """Have Megatron-Core's saves start no helper processes, which could outlive this one, or have it wait for ever.

    It would keep a server of 280 MB for the results alone (dist_checkpointing/strategies/filesystem_async.py: 0.16.1
    :51, 0.19.2 :53), and 0.16.1 forks a writer for each file and waits for all of them without a limit (:299): killed
    by the system for want of memory, say, one never answers. 0.19.2 writes in threads, and so does 0.16.1 with this.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if not isinstance(filesystem_async._results_queue, _Results):
        filesystem_async._results_queue = _Results()  # both take what is there
    if MEGATRON_VERSION.startswith("0.16."):
        filesystem_async.FileSystemWriterAsync.write_preloaded_data_multiproc = staticmethod(_write_in_threads)


class _Results:
    """A queue for what one save says, from this process or from a fork of it, in memory that both share: nothing has
    to run beside them, and no pipe fills up while nobody reads."""

    def __init__(self) -> None:
        self._file = os.fdopen(os.memfd_create("lccp-results"), "w+b")

    def put(self, results: Any) -> None:
        """Replace what is there."""
        self._file.seek(0)
        self._file.truncate()
        pickle.dump(results, self._file)
        self._file.flush()

    def get(self) -> Any:
        """Take what is there; queue.Empty if that is nothing."""
        if self.empty():
            raise queue.Empty
        found = pickle.loads(os.pread(self._file.fileno(), os.fstat(self._file.fileno()).st_size, 0))  # our own
        os.ftruncate(self._file.fileno(), 0)
        return found

    get_nowait = get

    def empty(self) -> bool:
        """True until something is put, and after it was taken."""
        return os.fstat(self._file.fileno()).st_size == 0


def _write_in_threads(transforms: list, use_msc: bool, rank: int, buckets: list, results: _Results) -> None:
    """Stands in for write_preloaded_data_multiproc of 0.16.1: all files of a rank, each in a thread of its own."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    counted: queue.Queue[int] = queue.Queue()
    written: queue.Queue[tuple[int, list | Exception]] = queue.Queue()
    for number in range(len(buckets)):
        counted.put(number)
    more = {"use_msc": True} if use_msc else {}
    write = partial(FileSystemWriterAsync.write_preloaded_data, transforms, use_fsync=True, **more)
    with ThreadPoolExecutor(max(1, len(buckets))) as threads:
        for number, bucket in enumerate(buckets):
            threads.submit(
                write, local_proc_idx=number, write_bucket=bucket, results_queue=written, count_queue=counted
            )
    found = dict(written.get_nowait() for _ in range(written.qsize()))
    failed = next((result for result in found.values() if isinstance(result, Exception)), None)
    results.put(failed or dict(sorted(found.items())))


OWN_ASYNC: dict[str, Any] = {} if MEGATRON_VERSION.startswith("0.16.") else {"async_strategy": "mcore"}
"""Arguments of dist_checkpointing.save for Megatron-Core's own asynchronous save; the default of 0.19.2 needs
nvidia-resiliency-ext."""


def scaled_logits(model: Any, logits: Any) -> Any:
    """Logits as the model scales them, which 0.19.2 does for MuP (models/common/language_module/language_module.py)."""
    scale = getattr(model, "_scale_logits", None)  # 0.16.1 knows no MuP
    return logits if scale is None else scale(logits)
