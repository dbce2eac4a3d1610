"""Run as one of two processes: a master policy and what replicates or shards, in each order. Prints JSON."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn import functional

import halfstep
from halfstep.split import SplitTensor, split_parameters

STEPS = 10
AdamW = Callable[..., torch.optim.Optimizer]
Losses = list[float]
Weights = list[Tensor]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 33), nn.GELU(), nn.LayerNorm(33), nn.Linear(33, 5))  # 2 does not divide 33


def batch(step: int, rank: int) -> Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(2 * step + rank))


def loss_of(out: Tensor, x: Tensor) -> Tensor:
    return functional.cross_entropy(out.float(), x[:, :5].argmax(1))


def whole(parameters: Iterable[Tensor]) -> Weights:
    return [(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for p in parameters]


def by_hand() -> tuple[Losses, Weights]:
    """Plain PyTorch in one process, which takes both halves of each batch: what all else is compared with."""
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    losses = []
    for step in range(STEPS):
        for rank in range(2):
            x = batch(step, rank)
            with torch.autocast("cpu", torch.bfloat16):
                out = net(x)
            loss = loss_of(out, x)
            (loss / 2).backward()
            if rank == dist.get_rank():
                losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, whole(net.parameters())


def with_policy(net: nn.Module, run: nn.Module, optimizer: Any, mp: halfstep.MixedPrecision) -> tuple[Losses, Weights]:
    losses = []
    for step in range(STEPS):
        x = batch(step, dist.get_rank())
        with mp.autocast():
            out = run(x)
        loss = loss_of(out, x)
        mp.backward(loss)
        mp.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, whole(net.parameters())


def without(run: nn.Module, optimizer: Any, autocast: bool) -> tuple[Losses, Weights]:
    losses = []
    for step in range(STEPS):
        x = batch(step, dist.get_rank())
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = run(x)
        loss = loss_of(out, x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, whole(run.parameters())


def replica_first(policy: str, adamw: AdamW) -> tuple[tuple[Losses, Weights], dict[str, str]]:
    net = model()
    replica = nn.parallel.DistributedDataParallel(net)
    optimizer = adamw(replica.parameters(), lr=1e-2)
    mp = halfstep.MixedPrecision(replica, optimizer, policy)
    return with_policy(net, replica, optimizer, mp), mp.left_plain


class Inside(nn.Module):
    """A model whose part is replicated, and not it."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = nn.parallel.DistributedDataParallel(part)

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)  # type: ignore[no-any-return]


def policy_first(adamw: AdamW, wrap: Callable[[nn.Module], nn.Module]) -> tuple[tuple[Losses, Weights], bool]:
    net = model()
    optimizer = adamw(net.parameters(), lr=1e-2)
    mp = halfstep.MixedPrecision(net, optimizer, "bf16-master")
    trained = with_policy(net, wrap(net), optimizer, mp)
    return trained, all(isinstance(p, SplitTensor) for p in net.parameters() if p.dim() >= 2)


def zero(adamw: type, split: bool) -> tuple[Losses, Weights]:
    net = model()
    if split:
        assert split_parameters(net) == {}
    replica = nn.parallel.DistributedDataParallel(net)
    return without(replica, ZeroRedundancyOptimizer(replica.parameters(), adamw, lr=1e-2), autocast=True)


def collectives() -> dict[str, bool]:
    """What scripts do to weights by hand, waiting at once and later: rank 1 has 2, 4, 6 ..., rank 0 1, 2, 3 ..."""
    counted = torch.arange(1.0, 4097).reshape(64, 64) + 2**-12  # needs the lower plane
    found = {}
    for later in (False, True):
        for name, call, expected in (
            ("broadcast", lambda x, later: dist.broadcast(x, 1, async_op=later), 2 * counted),
            ("all_reduce", lambda x, later: dist.all_reduce(x, async_op=later), 3 * counted),
        ):
            layer = nn.Linear(64, 64)
            assert split_parameters(layer) == {}
            with torch.no_grad():
                layer.weight.copy_(counted * (dist.get_rank() + 1))
            work = call(layer.weight.data, later)
            if later:
                work.wait()
            kept = isinstance(layer.weight, SplitTensor)
            found[f"{name}, later={later}"] = kept and torch.equal(layer.weight.detach().clone(), expected)
    return found


def sharded(adamw: AdamW, split: bool) -> tuple[tuple[Losses, Weights], dict[str, Any]]:
    """FSDP2's own mixed precision, on plain parameters or on split ones."""
    net = model()
    if split:
        assert split_parameters(net) == {}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fully_shard(net, mesh=init_device_mesh("cpu", (2,)), mp_policy=MixedPrecisionPolicy(torch.bfloat16))
    found = {
        "told": [str(each.message) for each in told if "planes" in str(each.message)],
        "plain": all(type(p.to_local()) is Tensor for p in net.parameters()),  # type: ignore[operator]  # DTensor's
    }
    return without(net, adamw(net.parameters(), lr=1e-2), autocast=False), found


def sharded_first(policy: str, adamw: AdamW) -> tuple[tuple[Losses, Weights], dict[str, str]]:
    net = model()
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    optimizer = adamw(net.parameters(), lr=1e-2)
    mp = halfstep.MixedPrecision(net, optimizer, policy)
    return with_policy(net, net, optimizer, mp), mp.left_plain


def compared(ours: tuple[Losses, Weights], other: tuple[Losses, Weights]) -> dict[str, Any]:
    """How far the losses are apart, whether all bits are equal, and whether both ranks have the same weights."""
    flat = torch.cat([w.flatten() for w in ours[1]])
    parts = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(parts, flat)
    return {
        "apart": max(abs(a - b) for a, b in zip(ours[0], other[0], strict=True)),
        "equal": ours[0] == other[0] and all(map(torch.equal, ours[1], other[1])),
        "same": torch.equal(parts[0], parts[1]),
    }


def main() -> None:
    dist.init_process_group("gloo")
    reference = by_hand()
    seen: dict[str, dict[str, Any]] = {}
    wraps: dict[str, Callable[[nn.Module], nn.Module]] = {
        "replica": nn.parallel.DistributedDataParallel,
        "inside": Inside,
        "compiled": lambda net: torch.compile(  # type: ignore[dict-item, return-value]
            nn.parallel.DistributedDataParallel(net), backend="aot_eager"
        ),
    }
    for name, adamw in (("torch", torch.optim.AdamW), ("halfstep", halfstep.optim.AdamW)):
        mixed, none = replica_first("bf16-mixed", adamw)
        master, left = replica_first("bf16-master", adamw)
        seen[f"replica first, {name}"] = compared(master, mixed) | {"left": left, "none": none}
        seen[f"mixed, {name}"] = compared(mixed, reference)
        for kind, wrap in wraps.items():
            ours, kept = policy_first(adamw, wrap)
            seen[f"policy first, {kind}, {name}"] = compared(ours, reference) | {"kept": kept}
        seen[f"zero, {name}"] = compared(zero(adamw, split=True), zero(adamw, split=False))
        plain, _ = sharded(adamw, split=False)
        ours, found = sharded(adamw, split=True)
        seen[f"split, then sharded, {name}"] = compared(ours, plain) | found
        mixed, _ = sharded_first("bf16-mixed", adamw)
        master, left = sharded_first("bf16-master", adamw)
        seen[f"sharded, then policy, {name}"] = compared(master, mixed) | {"left": left}
        seen[f"sharded mixed, {name}"] = compared(mixed, reference)
    seen["collectives"] = collectives()
    print(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
