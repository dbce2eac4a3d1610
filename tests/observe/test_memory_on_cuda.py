"""Counted memory beside that of the allocator."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from halfstep.observe import PeakMemory

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16-autocast"])
def test_the_counted_peak_is_the_allocators(low: bool) -> None:
    """Within a tenth: the allocator also rounds sizes up, and lends cuBLAS its workspace (some 32 MiB)."""
    gc.collect()
    torch.manual_seed(0)
    width = 2048
    layers = [layer for _ in range(6) for layer in (nn.Linear(width, width), nn.LayerNorm(width), nn.GELU())]
    model = nn.Sequential(*layers).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    x = torch.randn(8192, width, device="cuda")

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=low):
            loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    allocated = torch.cuda.max_memory_allocated()
    memory = PeakMemory()
    memory.start()
    memory.name("parameters", model.parameters())
    step()
    counted = memory.finish(1).peak_bytes
    assert allocated > 5e8
    assert abs(counted / allocated - 1) < 0.1
