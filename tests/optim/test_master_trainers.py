"""`MasterWeights` under Accelerate, and on two processes under DistributedDataParallel and FSDP2.

Run as a script, this file is one of the two processes, and prints what its rank saw.
"""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import halfstep
from halfstep.optim import MasterWeights

INNER: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


def make_model(dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)).to(dtype)


def batch(step: int, rank: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + rank)).to(dtype)


@pytest.mark.parametrize("name", INNER)
def test_accelerate_trains_and_resumes_as_the_loop_by_hand(name: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="Accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = make_model()
    optimizer = MasterWeights(INNER[name](model.parameters()))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    model, accelerated, schedule = accelerator.prepare(model, optimizer, schedule)
    assert accelerated.optimizer is optimizer

    twin = make_model()
    masters = [p.detach().float().clone() for p in twin.parameters()]
    plain = INNER[name](masters)
    plain_schedule = torch.optim.lr_scheduler.ExponentialLR(plain, 0.8)

    def run(steps: range) -> None:
        for step in steps:
            with accelerator.accumulate(model):
                accelerator.backward(model(batch(step, 0)).float().square().mean())
                accelerated.step()
                assert all(p.grad is not None for p in model.parameters())
                schedule.step()
                accelerated.zero_grad()
            assert not accelerated.step_was_skipped

    def run_by_hand(steps: range) -> None:
        for step in steps:
            (twin(batch(step, 0)).float().square().mean() / 2).backward()
            if step % 2:
                for master, parameter in zip(masters, twin.parameters(), strict=True):
                    assert parameter.grad is not None
                    master.grad = parameter.grad.float()
                plain.step()
                plain_schedule.step()
                twin.zero_grad()
                with torch.no_grad():
                    for master, parameter in zip(masters, twin.parameters(), strict=True):
                        parameter.copy_(master)

    def assert_by_hand() -> None:
        for parameter, low, master in zip(model.parameters(), twin.parameters(), masters, strict=True):
            assert torch.equal(optimizer.of(parameter), master) and torch.equal(parameter, low)
        assert accelerated.param_groups[0]["lr"] == plain.param_groups[0]["lr"]

    run(range(4))
    run_by_hand(range(4))
    assert_by_hand()
    accelerator.save_state(str(tmp_path / "state"))
    run(range(50, 54))  # and away
    accelerator.load_state(str(tmp_path / "state"))
    assert_by_hand()
    run(range(4, 10))
    run_by_hand(range(4, 10))
    assert_by_hand()
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerates_optimizer_is_pickled_with_the_masters() -> None:
    accelerate = pytest.importorskip("accelerate", reason="Accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True)
    model = make_model()
    accelerated = accelerator.prepare(MasterWeights(torch.optim.AdamW(model.parameters(), lr=0.01)))
    model(batch(0, 0)).sum().backward()
    accelerated.step()
    for twin in (pickle.loads(pickle.dumps(accelerated)), copy.deepcopy(accelerated)):
        for one, other in zip(accelerated.optimizer.masters(), twin.optimizer.masters(), strict=True):
            assert one is not other and torch.equal(one, other)
        assert accelerated.state_dict()["state"].keys() == twin.state_dict()["state"].keys()
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


# ---------------------------------------------------------------------- two processes


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes saw: see `main`."""
    if not dist.is_gloo_available():
        pytest.skip("PyTorch was built without gloo")
    meeting = tmp_path_factory.mktemp("ranks") / "meeting"
    environment = {**os.environ, "PYTHONPATH": str(Path(halfstep.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(meeting)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    except subprocess.TimeoutExpired:
        for process in processes:
            process.kill()
        raise
    assert [process.returncode for process in processes] == [0, 0], outputs
    return [json.loads(out) for out, _ in outputs]


@pytest.mark.parametrize("name", ["bf16", "fp16-torch", "fp16-halfstep"])
def test_ranks_of_ddp_agree_and_skip_together(ranks: list[dict[str, Any]], name: str) -> None:
    first, second = (rank[name] for rank in ranks)
    assert first == second
    if name != "bf16":
        assert first["scales"] == [2.0**10, 2.0**9, 2.0**9, 2.0**9]  # rank 1 overflowed in the second step


def test_ddp_steps_are_those_of_masters_fed_the_averaged_gradients(ranks: list[dict[str, Any]]) -> None:
    twin = make_model()
    masters = [p.detach().float().clone() for p in twin.parameters()]
    plain = INNER["adamw"](masters)
    for step in range(4):
        gradients = []
        for rank in range(2):
            twin.zero_grad()
            twin(batch(step, rank)).float().square().mean().backward()
            gradients.append([p.grad / 2 for p in twin.parameters() if p.grad is not None])
        for master, one, other in zip(masters, *gradients, strict=True):
            master.grad = (one + other).float()
        plain.step()
        with torch.no_grad():
            for master, parameter in zip(masters, twin.parameters(), strict=True):
                parameter.copy_(master)
    assert ranks[0]["bf16"]["masters"] == [master.tolist() for master in masters]


def test_sharded_masters_are_the_shards_of_unsharded_ones(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["sharded"] for rank in ranks)
    assert first == second
    assert first["is_sharded"] and first["equal"]
    assert first["norm"] == pytest.approx(first["expected_norm"], rel=1e-6)


def train_ddp(dtype: torch.dtype, scaler: Any = None) -> dict[str, Any]:
    model = nn.parallel.DistributedDataParallel(make_model(dtype))
    optimizer = MasterWeights(INNER["adamw"](model.parameters()))
    scales = []
    for step in range(4):
        optimizer.zero_grad()
        loss = model(batch(step, dist.get_rank(), dtype)).float().square().mean()
        if scaler is None:
            loss.backward()
            optimizer.step()
            continue
        factor = math.inf if step == 1 and dist.get_rank() == 1 else 1.0
        scaler.scale(loss * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    parameters = list(model.parameters())
    return {
        "masters": [optimizer.of(p).tolist() for p in parameters],
        "parameters": [p.tolist() for p in parameters],
        "scales": scales,
    }


def train_sharded() -> dict[str, Any]:
    """FSDP2 over layers that do not divide evenly, against the same model whole."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    def shard() -> tuple[nn.Module, MasterWeights]:
        model = make_model()
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        return model, MasterWeights(INNER["adamw"](model.parameters()))

    model, optimizer = shard()
    whole = make_model()
    unsharded = MasterWeights(INNER["adamw"](whole.parameters()))
    norms: list[list[float]] = [[], []]
    for step in range(4):
        for each, its, seen in ((model, optimizer, norms[0]), (whole, unsharded, norms[1])):
            its.zero_grad()
            each(batch(step, 0)).float().square().mean().backward()
            seen.append(float(its.clip_grad_norm_(1e4)))
            its.step()
        if step == 1:  # go on in new objects, loaded from what distributed checkpoints save
            saved, weights = get_optimizer_state_dict(model, optimizer), copy.deepcopy(model.state_dict())
            model, optimizer = shard()
            set_optimizer_state_dict(model, optimizer, saved)
            model.load_state_dict(weights)
    pairs = list(zip(model.parameters(), whole.parameters(), strict=True))
    masters = [(optimizer.of(p), unsharded.of(q)) for p, q in pairs]
    return {
        "is_sharded": all(isinstance(m, DTensor) and m.dtype is torch.float32 for m, _ in masters),
        "equal": all(torch.equal(m.full_tensor(), n) for m, n in masters)  # type: ignore[attr-defined]
        and all(torch.equal(p.full_tensor(), q) for p, q in pairs),  # type: ignore[attr-defined]
        "norm": norms[0],
        "expected_norm": norms[1],
    }


def main() -> None:
    rank = int(sys.argv[1])
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
    seen = {
        "bf16": train_ddp(torch.bfloat16),
        "fp16-torch": train_ddp(torch.float16, torch.amp.GradScaler("cpu", init_scale=2.0**10)),
        "fp16-halfstep": train_ddp(torch.float16, halfstep.GradScaler("cpu", 2.0**10)),
        "sharded": train_sharded(),
    }
    print(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
