"""Run as one of two processes: gradients that differ by rank, under the scaler. Prints what the rank saw, as JSON."""

from __future__ import annotations

import json
import math
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from halfstep import optim
from halfstep.scale import GradScaler

NAMES = ("foreach", "fused", "surveying")


def plain(scaler: Any, bad_rank: int, name: str) -> tuple[list[bool], list[float], float]:
    """No replication: each rank's gradients are its own."""
    weight = nn.Parameter(torch.ones(2))
    optimizer: torch.optim.Optimizer
    if name == "surveying":
        optimizer = optim.AdamW([weight], lr=0.5, weight_decay=0.0, backend="eager")
    else:
        optimizer = torch.optim.AdamW([weight], lr=0.5, fused=name == "fused", weight_decay=0.0)
    applied, scales = [], []
    for step in range(3):
        optimizer.zero_grad()
        factor = math.inf if step == 1 and dist.get_rank() == bad_rank else 1.0
        scaler.scale((weight * factor).sum()).backward()
        before = weight.detach().clone()
        scaler.step(optimizer)
        applied.append(not torch.equal(before, weight))
        scaler.update()
        scales.append(scaler.get_scale())
    return applied, scales, weight.sum().item()


def one_rank_without_gradients(scaler: Any) -> tuple[list[bool], float]:
    """Rank 1 has none in this step, and must not be missed in the exchange."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    if dist.get_rank() == 0:
        weight.grad = torch.full((2,), math.inf)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    scaler.update()
    return [scaler.step_was_applied], scaler.get_scale()


def several_losses(scaler: Any) -> tuple[float, float, float]:
    """Rank 0's adversarial loss overflows: all ranks lower its scale, and no other."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    for name in ("fit", "adversarial"):
        factor = math.inf if name == "adversarial" and dist.get_rank() == 0 else 1.0
        with scaler.scaled_loss((weight * factor).sum(), optimizer, name) as scaled:
            scaled.backward()
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale(), scaler.get_scale("fit"), scaler.get_scale("adversarial")


def replicated(collectives: list[int]) -> tuple[list[bool], list[float]]:
    """DistributedDataParallel, watched: inf reaches all ranks with the gradients, and nothing more is exchanged."""
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scaler = GradScaler("cpu", 2.0**10)
    scaler.watch(model)
    applied, scales = [], []
    for step in range(3):
        optimizer.zero_grad()
        loss = model(torch.ones(2, 3)).sum() * (math.inf if step == 1 and dist.get_rank() == 0 else 1.0)
        scaler.scale(loss).backward()
        before = sum(collectives)
        scaler.step(optimizer)
        assert sum(collectives) == before
        applied.append(scaler.step_was_applied)
        scaler.update()
        scales.append(scaler.get_scale())
    return applied, scales


def sharded(make: Any) -> tuple[list[bool], list[float]]:
    """FSDP2: DTensor gradients, the inf in rank 0's shard only."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = make(model.parameters())
    scaler = GradScaler("cpu", 2.0**10)
    applied, scales = [], []
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(2, 4)).sum()).backward()
        gradient = model.weight.grad
        assert type(gradient).__name__ == "DTensor"
        if step == 1 and dist.get_rank() == 0:
            gradient.to_local()[0, 0] = math.inf
        scaler.step(optimizer)
        applied.append(scaler.step_was_applied)
        scaler.update()
        scales.append(scaler.get_scale())
    return applied, scales


def placements() -> tuple[bool, float]:
    """A replicated DTensor before a sharded one, whose shard on rank 0 overflows; nothing agrees but the kernel."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weights = [nn.Parameter(distribute_tensor(torch.ones(4), mesh, [p])) for p in (Replicate(), Shard(0))]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    if dist.get_rank() == 0:
        weights[1].grad.to_local()[0] = math.inf
    plain_weight = nn.Parameter(torch.ones(2))
    plain_weight.grad = torch.ones(2)
    optimizer = torch.optim.SGD([*weights, plain_weight], lr=0.5, foreach=False)
    scaler = GradScaler("cpu", 2.0**10, process_group=None)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    scaler.update()
    return scaler.step_was_applied, scaler.get_scale()


def measured() -> float:
    weight = nn.Parameter(torch.ones(1))
    scaler = GradScaler("cpu", "auto")
    size = 2.0 ** (3 + 3 * dist.get_rank())
    scaler.scale((weight * size).sum() * (math.inf if size == 0 else 1.0))
    return scaler.get_scale()


def main() -> None:
    rank = int(sys.argv[1])
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    collectives: list[int] = []
    original = dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        collectives.append(1)
        return original(*args, **kwargs)

    dist.all_reduce = counted
    seen = {
        "ours": [plain(GradScaler("cpu", 2.0**10), bad, name) for bad in (0, 1) for name in NAMES],
        "exchanges": len(collectives),
        "group": plain(GradScaler("cpu", 2.0**10, process_group=dist.group.WORLD), 1, "foreach"),
        "alone": plain(GradScaler("cpu", 2.0**10, process_group=None), 0, "foreach"),
        "pytorch": plain(torch.amp.GradScaler("cpu", 2.0**10), 0, "foreach"),
        "without": one_rank_without_gradients(GradScaler("cpu", 2.0**10)),
        "several": several_losses(GradScaler("cpu", 2.0**10)),
        "replicated": replicated(collectives),
        "sharded": sharded(lambda parameters: torch.optim.AdamW(parameters, lr=0.5)),
        "sharded and surveyed": sharded(lambda parameters: optim.AdamW(parameters, lr=0.5, backend="eager")),
        "placements": placements(),
        "measured": measured(),
    }
    print(json.dumps(seen), flush=True)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort an interpreter that takes its time to end


if __name__ == "__main__":
    main()
