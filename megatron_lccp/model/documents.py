"""Documents packed into one sequence, as attention is told of them.

In: where documents begin (parallel/zigzag.py). Out: Megatron-Core's own record of packed sequences, which rotary
embeddings and Transformer Engine read, with the bounds as plain numbers for attention of ours.

A document's padding belongs to it: nothing but more padding sees it, and its loss is masked. So padded and real lengths
are one tensor, and Transformer Engine never drops keys of a padded tail (TransformerEngine#3331), nor takes its slow
path for lengths that are equal but not the same object (#3487).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams


@dataclass
class Documents(PackedSeqParams):
    """`qkv_format` "thd": attention gets [t, heads, width], t over all documents on this context-parallel rank."""

    bounds: tuple[int, ...] = ()
    """Where each document begins in the whole sequence, and the end of the last one."""


def documents(bounds: Sequence[int], device: torch.device) -> Documents:
    """What a model's forward pass takes as `packed_seq_params`."""
    ends = torch.tensor(bounds, dtype=torch.int32, device=device)
    longest = max(end - start for start, end in pairwise(bounds))
    newer: dict[str, Any] = {"pad_between_seqs": False}  # 0.19.2
    known = {field.name for field in dataclasses.fields(PackedSeqParams)}
    return Documents(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, cu_seqlens_q_padded=ends, cu_seqlens_kv_padded=ends,
        max_seqlen_q=longest, max_seqlen_kv=longest, bounds=tuple(bounds),
        **{name: value for name, value in newer.items() if name in known},
    )  # fmt: skip
