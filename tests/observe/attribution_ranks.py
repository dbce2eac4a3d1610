"""Run as one of two processes: every op of a DDP step, with its place. Prints what the rank saw."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from halfstep.observe.attribution import Attribution


class Places(TorchDispatchMode):
    def __init__(self, attribution: Attribution) -> None:
        super().__init__()
        self.attribution = attribution
        self.seen: list[tuple[str, str, str, str | None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        place = self.attribution.place(func, args)
        self.seen.append((place.op, place.phase, place.module, place.parameter))
        return func(*args, **(kwargs or {}))


def main(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=Path(store).as_uri(), rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 7))
    model = nn.parallel.DistributedDataParallel(model)
    with Attribution() as attribution, Places(attribution) as places:
        for _ in range(2):
            model(torch.randn(4, 3)).square().mean().backward()
    names = [attribution.parameter_name(parameter) for parameter in model.parameters()]
    result = {"seen": places.seen, "names": names, "unknown": attribution.unknown, "failures": attribution.failures}
    print(json.dumps(result), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main(int(sys.argv[1]), sys.argv[2])
