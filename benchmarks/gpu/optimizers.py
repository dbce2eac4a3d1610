"""A step alone: bytes that it moves in a second, as a share of what a copy moves, beside PyTorch's fused AdamW.

Rows are those of ``benchmarks/optimizer_rows.py``, on the 0.9 billion parameters of a GPT in 196 tensors. Weights and
state are read and written once, gradients read once; how many bytes these are is counted, not computed.
"""

from __future__ import annotations

import time
from typing import Any

import optimizer_rows
import torch
from optimizer_memory import live_storages
from optimizer_rows import BASELINE, TORCH_WHOLE, Row, gradients
from torch import Tensor, nn

from gpu import timing
from gpu.section import Section
from halfstep import optim

MODEL = {"width": 2048, "layers": 16, "vocabulary": 50304, "positions": 1024}
#: The order is that of running.
ROWS = (
    BASELINE,
    "halfstep exact + fp32",
    "halfstep 24bit + 8bit",
    "halfstep exact + bf16",
    TORCH_WHOLE,
    "halfstep exact + fp32: unscale + clip + step",
    "halfstep fp32 parameters",
    "torch fused pure bf16",
    "flashoptim FlashAdamW",
    "torch foreach fp32",
    "halfstep exact + 8bit",
    "halfstep none + bf16",
    "halfstep exact + fp32, fp16 parameters",
    "halfstep.MasterWeights, torch fused",
    "halfstep Lion exact + bf16",
    "halfstep SGD exact + fp32",
)


def optimizers(s: Section) -> None:
    with s.part("bits"):
        bits(s)
    copied = _copy(s)
    by_name = {row.name: row for row in optimizer_rows.rows(s.device)}
    baseline = None
    for name, called in [*((name, name) for name in ROWS), (BASELINE, f"{BASELINE}, again")]:
        if s.has_time(called, 3):
            with s.part(called):
                median = _measure(s, by_name[name], called, copied, baseline)
                baseline = median if name == BASELINE and baseline is None else baseline


def _measure(s: Section, row: Row, called: str, copied: float, baseline: float | None) -> float:
    """Measure a row; returns the milliseconds of its step."""
    before = live_storages(s.device)
    parameters = _parameters(s, row.dtype)
    began = time.monotonic()
    try:
        step = row.start(parameters)
        step()
    except ImportError as error:
        s.note(called, status=optimizer_rows.refusal(error))
        return 0.0
    timing.synchronize(s.device)
    first = time.monotonic() - began
    count = sum(p.numel() for p in parameters)
    live = sum(size for address, size in live_storages(s.device).items() if address not in before) / count
    of_gradients = sum(g.untyped_storage().nbytes() for g in gradients(parameters)) / count
    moved = row.moved if row.moved is not None else 2 * (live - of_gradients) + of_gradients
    found = timing.times(s.device, step, warm=2, steps=10, most_seconds=2)
    rate = moved * count / found.median / 1e6
    s.measure(
        called,
        **found.values(),
        gb_per_s=round(rate, 1),
        of_copy=round(rate / copied, 3),
        against_torch_fused=None if baseline is None else round(found.median / baseline, 3),
        bytes_moved=round(moved, 2),
        bytes_held=round(live, 2),
        **{f"step_{name}": value for name, value in timing.profiled(s.device, step).items()},
        first_step_s=round(first, 2),
        parameters=count,
    )
    return found.median


def _parameters(s: Section, dtype: torch.dtype) -> list[nn.Parameter]:
    """Made on the device, with gradients."""
    torch.manual_seed(0)
    model = optimizer_rows.SIZES["smoke"] if s.tiny else MODEL
    shapes = optimizer_rows.shapes(**model)
    parameters = [nn.Parameter(torch.randn(shape, device=s.device).mul_(0.02).to(dtype)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, device=s.device).mul_(1e-3).to(dtype)
    return parameters


def _copy(s: Section) -> float:
    """GB/s of a copy: the ceiling."""
    size = 2**22 if s.tiny else 2**32
    source = torch.zeros(size // 4, device=s.device)
    target = torch.empty_like(source)
    found = timing.times(s.device, lambda: target.copy_(source), warm=3, steps=10)
    rate = 2 * size / found.median / 1e6
    s.measure("copy", **found.values(), gb_per_s=round(rate, 1))
    return rate


def bits(s: Section) -> None:
    """How many bits our FP32 AdamW shares with each of PyTorch's three, which differ among themselves on a GPU."""
    settings: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1}

    def trained(make: Any) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        parameters = [nn.Parameter(torch.randn(n, generator=generator).to(s.device)) for n in (77_100, 64, 1)]
        optimizer = make(parameters)
        for step in range(20):
            for parameter in parameters:
                gradient = torch.randn(parameter.shape, generator=generator) * 10.0 ** -(step % 7)
                parameter.grad = gradient.to(s.device)
            optimizer.step()
        return torch.cat([p.detach() for p in parameters])

    ours = trained(lambda p: optim.AdamW(p, **settings))
    theirs: dict[str, dict[str, Any]] = {
        "for-loop": {"foreach": False, "fused": False},
        "foreach": {"foreach": True},
        "fused": {"fused": True},
    }
    found = {name: trained(lambda p, how=how: torch.optim.AdamW(p, **settings, **how)) for name, how in theirs.items()}
    equal = {name: round(float((ours == other).double().mean()), 6) for name, other in found.items()}
    largest = {name: float(((ours - other).abs() / other.abs().clamp(min=1e-3)).max()) for name, other in found.items()}
    among = round(float((found["fused"] == found["for-loop"]).double().mean()), 6)
    s.measure("bits", equal=equal, largest_relative_difference=largest, pytorchs_fused_equal_to_its_for_loop=among)
    s.check("FP32 AdamW agrees with PyTorch's fused one", largest["fused"] < 1e-5, **largest)
