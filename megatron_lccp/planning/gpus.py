"""Kinds of GPUs, by their data sheets.

In: nothing. Out: peak, memory and links of each kind.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU, by NVIDIA's data sheet of its SXM module."""

    peak_tflops: float
    """Dense BF16 peak: half of what the data sheet gives with sparsity (1,979, 1,979 and 4,500)."""
    memory_gib: float
    """Memory that a program finds: the driver keeps some (nvidia-smi shows 81,559, 143,771 and 183,359 MiB in all)."""
    inside_gbps: float = 450.0
    """To other GPUs of the node, one way: half of NVLink's bandwidth."""
    between_gbps: float = 50.0
    """To other nodes, one way: a network card of 400 Gb/s for each GPU, which is an assumption."""


GPUS = {
    "H100": Gpu(989.0, 79.0),  # H100 SXM5 data sheet
    "H200": Gpu(989.0, 140.0),  # H200 SXM5 data sheet
    "B200": Gpu(2250.0, 178.0, inside_gbps=900.0),  # HGX B200 data sheet, an eighth of a board of eight
    "H800": Gpu(989.0, 79.0, inside_gbps=200.0),  # as H100, with less NVLink
    "H20": Gpu(148.0, 95.0),
}
USUAL = ("H100", "H200", "B200")
"""Those that a plan shows unless one is named."""
