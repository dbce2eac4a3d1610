"""Run as one of two processes: gradient release under FSDP2, DDP and FSDP1. Prints what was seen, as JSON."""

from __future__ import annotations

import json
import math
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import halfstep
from halfstep.optim import SGD, AdamW
from halfstep.optim.layout import local

RANKS = 2


class Model(nn.Module):
    """Layers whose first dimensions do not divide by the ranks, and one element that can be made to overflow."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(3, 1)])
        for layer in self.layers:
            fully_shard(layer, mesh=init_device_mesh("cpu", (RANKS,)))
        self.corner = nn.Parameter(torch.ones(4, 2))

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean() + self.corner[0, 0] * factor + self.corner.sum()


def sharded() -> Model:
    return fully_shard(Model(), mesh=init_device_mesh("cpu", (RANKS,)))


def data(n: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    return [torch.randn(2, 4, generator=generator) for _ in range(n)]


def left(model: nn.Module) -> int:
    return sum(p.grad is not None for p in model.parameters())


def same(model: Model, optimizer: Any, other: Model, expected: Any) -> bool:
    def numbers(net: Model, each: Any) -> list[Tensor]:
        return [t for p in net.parameters() for t in (local(p), *(local(s) for s in each.state[p].values()))]

    pairs = list(zip(numbers(model, optimizer), numbers(other, expected), strict=True))
    return len(pairs) > 20 and all(torch.equal(a, b) for a, b in pairs)


def as_without_release() -> dict[str, Any]:
    """Three steps, each of two micro-batches; gradients of the first exchanged at once, or kept whole."""
    seen = {}
    for sync in (True, False):
        models = sharded(), sharded()
        optimizers = [
            AdamW(model.parameters(), lr=0.05, release_gradients=release, backend="eager", master="24bit", state="8bit")
            for model, release in zip(models, (True, False), strict=True)
        ]
        leftovers = []
        for first, second in zip(data(3), data(6)[3:], strict=True):
            for model, optimizer in zip(models, optimizers, strict=True):
                model.set_requires_gradient_sync(sync)
                with optimizer.accumulating():
                    model(first).backward()
                model.set_requires_gradient_sync(True)
                model(second).backward()
                leftovers.append(left(model))
                optimizer.step()
                optimizer.zero_grad()
        same_numbers = same(models[0], optimizers[0], models[1], optimizers[1])
        seen[str(sync)] = (same_numbers, leftovers)
    return seen


def overflow() -> dict[str, Any]:
    """One element of one shard overflows: the whole parameter stays as it is on both ranks, and the scale falls."""
    model = sharded()
    optimizer = SGD(model.parameters(), lr=0.1, release_gradients=True, backend="eager")
    scaler = halfstep.GradScaler("cpu", 2.0**10)
    assert optimizer.release is not None
    optimizer.release.scale_with(scaler)
    steps, scales, applied = [], [], []
    for x, factor in zip(data(3), (1.0, math.inf, 1.0), strict=True):
        scaler.scale(model(x, factor)).backward()
        scaler.step(optimizer)
        applied.append(scaler.step_was_applied)
        scaler.update()
        scales.append(scaler.get_scale())
        steps.append([int(optimizer.state[p]["step"]) for p in (model.corner, model.layers[0].weight)])
    finite = all(bool(local(p).isfinite().all()) for p in model.parameters())
    return {"steps": steps, "scales": scales, "applied": applied, "finite": finite}


def own() -> float:
    """A plain parameter on each rank, of which rank 0's overflows: the scale falls on both."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = SGD([weight], lr=0.1, release_gradients=True, backend="eager")
    scaler = halfstep.GradScaler("cpu", 2.0**10)
    assert optimizer.release is not None
    optimizer.release.scale_with(scaler)
    scaler.scale((weight * (math.inf if dist.get_rank() == 0 else 1.0)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale()


def norm() -> tuple[float, float]:
    """The norm that clipping goes by, and that of all ranks' gradients."""
    model, other = sharded(), sharded()
    optimizer = SGD(model.parameters(), lr=0.1, release_gradients=True, backend="eager")
    assert optimizer.release is not None
    optimizer.release.max_grad_norm = 0.1
    (x,) = data(1)
    model(x).backward()
    optimizer.step()
    other(x).backward()
    expected = nn.utils.clip_grad_norm_(other.parameters(), 1.0)
    assert optimizer.release.grad_norm is not None
    return optimizer.release.grad_norm.item(), expected.full_tensor().item()


def message(run: Any) -> str:
    try:
        run()
    except RuntimeError as error:
        return str(error)
    return ""


def replicated() -> dict[str, Any]:
    """DistributedDataParallel is refused, before anything was stepped; wrapped after the first step, at step()."""
    model = nn.Linear(3, 3)
    optimizer = SGD(model.parameters(), lr=0.1, release_gradients=True, backend="eager")
    ddp = nn.parallel.DistributedDataParallel(model)
    before = [p.detach().clone() for p in model.parameters()]
    first = message(lambda: ddp(torch.ones(1, 3)).sum().backward())
    assert optimizer.release is not None  # it is alive
    untouched = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    late = nn.Linear(3, 3)
    other = SGD(late.parameters(), lr=0.1, release_gradients=True, backend="eager")
    late(torch.ones(1, 3)).sum().backward()
    other.step()
    wrapped = nn.parallel.DistributedDataParallel(late)
    wrapped(torch.ones(1, 3)).sum().backward()
    added = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
    third = SGD([nn.Parameter(torch.ones(1))], lr=0.1, release_gradients=True, backend="eager")
    third.param_groups[0]["params"][0].sum().backward()
    third.add_param_group({"params": list(added.parameters())})
    again = message(lambda: added(torch.ones(1, 2)).sum().backward())
    return {"again": again, "first": first, "untouched": untouched, "late": message(other.step), "flat": message(flat)}


def flat() -> None:
    """FSDP1, whose parameters are pieces of a flat one."""
    model = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))
    SGD(model.parameters(), lr=0.1, release_gradients=True, backend="eager")


def main() -> None:
    rank = int(sys.argv[1])
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=RANKS)
    torch.set_num_threads(1)
    seen = {
        "same": as_without_release(),
        "overflow": overflow(),
        "own": own(),
        "norm": norm(),
        "replicated": replicated(),
    }
    print(json.dumps(seen), flush=True)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort an interpreter that takes its time to end


if __name__ == "__main__":
    main()
