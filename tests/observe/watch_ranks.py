"""Run as one of two processes: gradients watched under DDP and FSDP2. Prints what the rank saw, as JSON."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import halfstep
from halfstep.doctor.replay import replay
from halfstep.observe.watch import GradientWatch


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def true_amax(model: nn.Module) -> dict[str, float]:
    return {
        name: float(local(p.grad).abs().max())
        for name, p in model.named_parameters()
        if p.grad is not None and local(p.grad).numel()
    }


def seen(model: nn.Module, named: Any, when: Any) -> dict[str, dict[str, float]]:
    watch = GradientWatch(named.named_parameters(), when=when)
    for seed in (1, 2):  # twice: what was queued for the first pass is gone
        torch.manual_seed(seed + 10 * dist.get_rank())
        model.zero_grad()
        watch.take()
        model(torch.randn(4, 6)).square().sum().backward()
    return {"read": dict(sorted(watch.read().amax.items())), "true": dict(sorted(true_amax(named).items()))}


def steps(model: nn.Module, folder: Path) -> tuple[list[bool], list[Path], dict[str, Tensor]]:
    """Three steps, the second with a gradient that overflows on rank 1."""
    mp = halfstep.MixedPrecision(model, torch.optim.SGD(model.parameters(), lr=0.1), policy="fp32")
    applied, gradients = [], {}
    with mp.watch(folder) as watch:
        for step, x in enumerate(watch([torch.ones(2, 6)] * 3)):
            with mp.autocast():
                loss = model(x).sum()
            if step == 1 and dist.get_rank() == 1:
                loss = loss * math.inf
            mp.backward(loss)
            if step == 1:
                gradients = {name: local(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}
            applied.append(mp.step().applied)
        return applied, list(watch.saved), gradients


def main(store: str, rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    result: dict[str, Any] = {}
    ddp = nn.parallel.DistributedDataParallel(build())
    result["ddp"] = seen(ddp, ddp.module, "backward")
    ddp = nn.parallel.DistributedDataParallel(build(), gradient_as_bucket_view=True, bucket_cap_mb=1e-4)
    result["ddp_bucket_view"] = seen(ddp, ddp.module, "backward")
    ddp = nn.parallel.DistributedDataParallel(build())
    result["ddp_too_early"] = seen(ddp, ddp.module, "accumulated")
    sharded = build()
    fully_shard(sharded)
    result["fsdp2"] = seen(sharded, sharded, "accumulated")

    model = build()
    applied, saved, _ = steps(model, folder / "agreed")
    result["agreed"] = {
        "applied": applied,
        "weights": [p.tolist() for p in model.parameters()],
        "saved": [path.name for path in saved],
    }

    sharded = build()
    fully_shard(sharded)
    applied, saved, gradients = steps(sharded, folder / "fsdp2")
    again = build()
    fully_shard(again)
    mp = halfstep.MixedPrecision(again, torch.optim.SGD(again.parameters(), lr=0.1), policy="fp32")
    step = replay(saved[0])
    step.restore(mp)
    for x in step:
        mp.backward(again(x).sum() * (math.inf if rank == 1 else 1.0))
    same = all(
        torch.equal(local(p.grad).view(torch.int32), gradients[name].view(torch.int32))
        for name, p in again.named_parameters()
        if p.grad is not None
    )
    result["fsdp2_step"] = {"applied": applied, "same_gradients": same and bool(gradients)}
    dist.barrier()
    dist.destroy_process_group()
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
