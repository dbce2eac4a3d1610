"""Run as one of two processes: DDP and FSDP2 training under examination. Prints what the rank found, and its losses."""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from halfstep.doctor import Examination


def train(kind: str, planted: bool, context: Any) -> list[float]:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    if planted:
        with torch.no_grad():
            model[2].weight[1] = 6e4
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    torch.manual_seed(dist.get_rank() + 1)
    with context:
        for _ in range(3):
            with torch.autocast("cpu", dtype=torch.float16 if planted else torch.bfloat16):
                loss = model(torch.randn(6, 8)).float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


def main(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=Path(store).as_uri(), rank=rank, world_size=2)
    result = {}
    for kind in ("ddp", "fsdp"):
        examination, planted = Examination(), Examination()
        same = train(kind, False, nullcontext()) == train(kind, False, examination)
        train(kind, True, planted)
        named = [(f.code, "" if f.place is None else f.place.module) for f in planted.findings()]
        result[kind] = {"same": same, "clean": [str(f) for f in examination.findings()], "named": named}
    print(json.dumps(result), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main(int(sys.argv[1]), sys.argv[2])
