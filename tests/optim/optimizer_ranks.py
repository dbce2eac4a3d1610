"""Run as one of two processes: sharded and replicated parameters under our optimizers. Prints what the rank saw."""

from __future__ import annotations

import copy
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from halfstep import GradScaler, optim
from halfstep.optim import moments

PAIRS = [("exact", "fp32"), ("fp32", "fp32"), ("exact", "bf16"), ("24bit", "8bit"), ("none", "8bit")]


def make_model(dtype: torch.dtype, seed: int = 0) -> nn.Sequential:
    """97 rows on two ranks: 49 and 48. 130 to a row: three groups of 8-bit codes, the last with 2 elements."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 97), nn.GELU(), nn.Linear(97, 130), nn.GELU(), nn.Linear(130, 97)).to(dtype)


def shard(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def train(model: nn.Module, optimizer: Any, steps: range, clip: float | None = None) -> list[float]:
    """The same batch on both ranks, so that the averaged gradient is each one's own."""
    norms = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        batch = torch.randn(8, 64, generator=generator).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        model(batch).float().square().mean().backward()
        if clip is None:
            optimizer.step()
        else:
            norms.append(math.sqrt(optimizer.clipped_step(clip).sum_of_squares.item()))
    return norms


def mine(full: Tensor) -> Tensor:
    """This rank's rows, as FSDP2 cuts them."""
    return full.chunk(dist.get_world_size())[dist.get_rank()] if full.dim() else full


def as_unsharded(pair: tuple[str, str], clip: float | None) -> dict[str, Any]:
    """Sharded training against the same training of a whole model."""
    options: Any = {"lr": 1e-2, "master": pair[0], "state": pair[1]}
    whole, sharded = make_model(torch.bfloat16), shard(make_model(torch.bfloat16))
    theirs, ours = optim.AdamW(whole.parameters(), **options), optim.AdamW(sharded.parameters(), **options)
    norms = [train(model, o, range(4), clip) for model, o in ((whole, theirs), (sharded, ours))]
    masters = momenta = True
    for p, q in zip(whole.parameters(), sharded.parameters(), strict=True):
        masters &= torch.equal(mine(theirs.master(p)), ours.master(q))
        names = [moments.entry(run.state[r], "exp_avg") for run, r in ((theirs, p), (ours, q))]
        first, other = mine(theirs.state[p][names[0]]), ours.state[q][names[1]].to_local()
        momenta &= first.dtype is not other.dtype or torch.equal(first, other)
    formats = sorted({str(s[moments.entry(s, "exp_avg")].dtype) for s in ours.state.values()})
    close = max(abs(a - b) / a for a, b in zip(*norms, strict=True)) if clip is not None else 0.0
    return {"masters": masters, "momenta": momenta, "formats": formats, "norm_error": close}


def resumed(pair: tuple[str, str], folder: Path) -> bool:
    """Saved with torch.distributed.checkpoint, loaded into new objects, and gone on with: as if never stopped."""
    options: Any = {"lr": 1e-2, "master": pair[0], "state": pair[1]}
    model = shard(make_model(torch.bfloat16))
    optimizer = optim.AdamW(model.parameters(), **options)
    train(model, optimizer, range(3))
    weights, state = dcp_state.get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    train(model, optimizer, range(3, 6))

    again = shard(make_model(torch.bfloat16, seed=7))
    other = optim.AdamW(again.parameters(), **{**options, "lr": 0.5})
    weights, state = dcp_state.get_state_dict(again, other)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    dcp_state.set_state_dict(again, other, model_state_dict=weights, optim_state_dict=state)
    train(again, other, range(3, 6))
    same = other.param_groups[0]["lr"] == 1e-2
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        same &= torch.equal(optimizer.master(p), other.master(q))
        for key, value in optimizer.state[p].items():
            a, b = (v.to_local() if hasattr(v, "to_local") else v for v in (value, other.state[q][key]))
            same &= a.dtype is b.dtype and torch.equal(a, b)
    return same


def saving_before_the_first_step_changes_nothing() -> bool:
    model = shard(make_model(torch.bfloat16))
    optimizer = optim.AdamW(model.parameters(), lr=1e-2)
    before = [p.to_local().clone() for p in model.parameters()]
    dcp_state.get_optimizer_state_dict(model, optimizer)
    same = all(torch.equal(a, p.to_local()) for a, p in zip(before, model.parameters(), strict=True))
    return same and optimizer.param_groups[0]["lr"] == 1e-2


def overflow_in_one_shard() -> tuple[list[bool], list[float], list[bool]]:
    """FP16 parameters and gradients, scaled; an inf in rank 0's shard only."""
    model = shard(make_model(torch.float16))
    optimizer = optim.AdamW(model.parameters(), lr=1e-3)
    scaler = GradScaler("cpu", 2.0**10)
    applied, scales, unchanged = [], [], []
    for step in range(3):
        optimizer.zero_grad()
        loss = model(torch.ones(2, 64, dtype=torch.float16)).float().square().mean()
        scaler.scale(loss).backward()
        if step == 1 and dist.get_rank() == 0:
            next(model.parameters()).grad.to_local()[0, 0] = math.inf
        before = copy.deepcopy([optimizer.master(p) for p in model.parameters()])
        scaler.step(optimizer)
        applied.append(scaler.step_was_applied)
        after = [optimizer.master(p) for p in model.parameters()]
        unchanged.append(all(torch.equal(a, b) for a, b in zip(before, after, strict=True)))
        scaler.update()
        scales.append(scaler.get_scale())
    return applied, scales, unchanged


def replicated(pair: tuple[str, str]) -> float:
    """DistributedDataParallel, each rank on its own data: replicas stay the same bits. Returns a digest."""
    model = nn.parallel.DistributedDataParallel(make_model(torch.bfloat16))
    optimizer = optim.AdamW(model.parameters(), lr=1e-2, master=pair[0], state=pair[1])  # type: ignore[arg-type]
    for step in range(4):
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        optimizer.zero_grad()
        model(torch.randn(8, 64, generator=generator).bfloat16()).float().square().mean().backward()
        optimizer.step()
    return sum(optimizer.master(p).double().abs().sum().item() for p in model.parameters())


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    seen = {
        "as_unsharded": [as_unsharded(pair, None) for pair in PAIRS],
        "clipped": as_unsharded(("exact", "fp32"), 0.05),
        "resumed": [resumed(pair, folder / "-".join(pair)) for pair in PAIRS],
        "saving": saving_before_the_first_step_changes_nothing(),
        "overflow": overflow_in_one_shard(),
        "replicated": [replicated(pair) for pair in PAIRS],
    }
    print(json.dumps(seen), flush=True)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort an interpreter that takes its time to end


if __name__ == "__main__":
    main()
