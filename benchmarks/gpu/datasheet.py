"""What makers promise of their cards, to measure shares of: dense products in TFLOP/s, memory in GB/s.

NVIDIA's datasheets print twice these numbers, for matrices of which half is zero. Sources, read at the commits named:
stas00/ml-engineering at 744d01e18b79, compute/accelerator/README.md, lines 264, 265, 268 and 275 (products), 476, 484,
485 and 486 (memory); Lightning-AI/pytorch-lightning at 7f0c3436cd3f, src/lightning/fabric/utilities/throughput.py,
lines 351, 359 and 412. A card that is not here is unknown, and shares of what it could do are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Datasheet:
    """One card, by the name that PyTorch gives it."""

    tflops: Mapping[str, float]  #: by format that it multiplies in: fp32, tf32, bf16, fp16, fp8
    gb_per_s: float


_HOPPER = {"fp32": 67.0, "tf32": 494.5, "bf16": 989.0, "fp16": 989.0, "fp8": 1979.0}
_AMPERE = {"fp32": 19.5, "tf32": 156.0, "bf16": 312.0, "fp16": 312.0}
CARDS: Mapping[str, Datasheet] = {
    "NVIDIA H200": Datasheet(_HOPPER, 4800.0),
    "NVIDIA H100 80GB HBM3": Datasheet(_HOPPER, 3350.0),
    "NVIDIA H100 PCIe": Datasheet({"fp32": 51.2, "tf32": 378.0, "bf16": 756.0, "fp16": 756.0, "fp8": 1513.0}, 2000.0),
    "NVIDIA A100-SXM4-80GB": Datasheet(_AMPERE, 2039.0),
}

#: What a card sold with 80 GB reports, in MiB (H100 SXM and PCIe), and what CUDA and its libraries keep of it at most.
CARD_OF_80_GB, CONTEXT = 81_559, 1024


def peak(device: str, form: str) -> float | None:
    """Products of a format in FLOP/s; None where that is not known."""
    sheet = _card(device)
    tflops = None if sheet is None else sheet.tflops.get(form)
    return None if tflops is None else tflops * 1e12


def bandwidth(device: str) -> float | None:
    """Memory in GB/s; None where that is not known."""
    sheet = _card(device)
    return None if sheet is None else sheet.gb_per_s


def share(value: float, of: float | None) -> float | None:
    """``value`` as a share of the datasheet's, which may be unknown."""
    return None if of is None else round(value / of, 4)


def _card(device: str) -> Datasheet | None:
    if device != "cuda":
        return None
    import torch

    return CARDS.get(torch.cuda.get_device_name())
