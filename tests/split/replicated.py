"""Run as one of two processes: parameters in planes under DDP, beside FP32 ones. Prints what was seen, as JSON."""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

import halfstep
from halfstep.split import SplitTensor, split_parameters


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 4))


def trained(split: bool, fused: bool) -> tuple[list[torch.Tensor], bool]:
    """Ranks begin with weights of their own, which DDP makes those of the first, and have their own data."""
    net = model(dist.get_rank())
    if split:
        assert split_parameters(net) == {}
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2, fused=fused)
    replicated = nn.parallel.DistributedDataParallel(net)
    for step in range(20):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(2 * step + dist.get_rank()))
        with torch.autocast("cpu", torch.bfloat16):
            loss = functional.cross_entropy(replicated(x), x[:, :4].argmax(1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    kept = all(isinstance(net[i].weight, SplitTensor) for i in (0, 3))
    return [p.detach().clone() for p in net.parameters()], kept


def same_on_all(weights: list[torch.Tensor]) -> bool:
    flat = torch.cat([w.flatten() for w in weights])
    parts = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, flat)
    return all(torch.equal(parts[0], part) for part in parts)


def main() -> None:
    dist.init_process_group("gloo")
    plain, _ = trained(split=False, fused=False)
    seen: dict[str, object] = {}
    for fused in (False, True):
        ours, kept = trained(split=True, fused=fused)
        apart = torch.cat([(a - b).abs().flatten() for a, b in zip(ours, plain, strict=True)])
        seen[f"fused={fused}"] = {"kept": kept, "same": same_on_all(ours), "apart": apart.max().item()}
    wrapped = nn.parallel.DistributedDataParallel(model(0))
    optimizer = torch.optim.AdamW(wrapped.parameters())
    late = halfstep.MixedPrecision(wrapped, optimizer, "bf16-mixed:storage=split")
    seen["late"] = late.left_plain
    print(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
