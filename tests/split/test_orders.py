"""Master policies with DistributedDataParallel, ZeRO and FSDP2, in each order, on two real processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from two_ranks import on_two_ranks

OPTIMIZERS = ("torch", "halfstep")
TIES = 2e-3  # of losses: a weight half way between two bfloat16 is cast otherwise, and what follows from it


@pytest.fixture(scope="module")
def seen() -> list[dict[str, dict[str, object]]]:
    return on_two_ranks([str(Path(__file__).with_name("orders.py"))])


def test_each_order_trains_as_one_process_on_the_whole_batch(seen: list[dict[str, dict[str, object]]]) -> None:
    for rank in seen:
        for name in OPTIMIZERS:
            first = rank[f"replica first, {name}"]
            assert first["equal"] and first["same"] and first["none"] == {}
            assert first["left"] == dict.fromkeys(
                ("module.0.weight", "module.3.weight"), "a graph or a weak reference holds it"
            )
            for kind in ("replica", "inside", "compiled"):
                found = rank[f"policy first, {kind}, {name}"]
                assert found["same"] and found["kept"] and found["apart"] < TIES, (kind, name)  # type: ignore[operator]
            for kind in ("mixed", "sharded mixed"):
                found = rank[f"{kind}, {name}"]
                assert found["same"] and found["apart"] < TIES, (kind, name)  # type: ignore[operator]


def test_collectives_that_a_script_calls_on_weights_arrive(seen: list[dict[str, dict[str, object]]]) -> None:
    for rank in seen:
        assert len(rank["collectives"]) == 4 and all(rank["collectives"].values())
        for name in OPTIMIZERS:  # ZeRO hands each rank's weights to the others with such
            assert rank[f"zero, {name}"]["same"] and rank[f"zero, {name}"]["apart"] < TIES  # type: ignore[operator]


def test_what_is_sharded_is_plain_and_says_so(seen: list[dict[str, dict[str, object]]]) -> None:
    for rank in seen:
        for name in OPTIMIZERS:
            late = rank[f"split, then sharded, {name}"]
            assert late["equal"] and late["same"] and late["plain"]
            assert len(late["told"]) == 2  # type: ignore[arg-type]
            assert all("Call fully_shard first" in message for message in late["told"])  # type: ignore[attr-defined]
            first = rank[f"sharded, then policy, {name}"]
            assert first["equal"] and first["same"]
            assert first["left"] == dict.fromkeys(("0.weight", "3.weight"), "it is a DTensor")


SCRIPT = """
import json
import torch
import torch.distributed as dist
from torch import nn
dist.init_process_group("gloo")
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 5))
replica = nn.parallel.DistributedDataParallel(net)
optimizer = torch.optim.AdamW(replica.parameters(), 1e-2)
halves, losses = [dist.get_rank()], []
if MODE == "one":
    replica, halves = net, [0, 1]
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
for step in range(10):
    for half in halves:
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(2 * step + half))
        loss = nn.functional.cross_entropy(replica(x).float(), x[:, :5].argmax(1))
        (loss / len(halves)).backward()
        if half == dist.get_rank():
            losses.append(loss.item())
    optimizer.step()
    optimizer.zero_grad()
flat = torch.cat([p.detach().flatten() for p in net.parameters()])
parts = [torch.empty_like(flat), torch.empty_like(flat)]
dist.all_gather(parts, flat)
planes = hasattr(net[0].weight, "lo")
print(json.dumps({"same": torch.equal(*parts), "planes": planes, "losses": losses}), flush=True)
dist.destroy_process_group()
"""


def test_a_replicated_script_under_run(tmp_path: Path) -> None:
    found = {}
    for mode, policy in (("two", "bf16-master"), ("one", "bf16-mixed")):
        (tmp_path / f"{mode}.py").write_text(f"MODE = {mode!r}\n" + SCRIPT)
        arguments = ["-m", "halfstep", "run", "--policy", policy, "--no-record", f"{mode}.py"]
        found[mode] = on_two_ranks(arguments, cwd=str(tmp_path))
    for two, one in zip(found["two"], found["one"], strict=True):
        assert two["same"] and two["planes"] and not one["planes"]
        assert two["losses"] == pytest.approx(one["losses"], abs=TIES)
