"""The doctor on the device itself: backward ops have their names there, and findings are those of the emulation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from halfstep.doctor import examine
from halfstep.observe.ops import OpObserver
from halfstep.policy import parse

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class Net(nn.Module):
    """A residual branch, recomputed in the backward pass or not."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.enter, self.leave = nn.Linear(32, 64), nn.Linear(64, 16)
        self.inner = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        if self.how == "plain":
            inner = self.inner(x)
        else:
            inner = checkpoint(self.inner, x, use_reentrant=self.how == "reentrant")
        out: Tensor = self.leave(x + inner)
        return out


def seen(how: str, device: str) -> tuple[dict[str, set[str]], int, list[str], dict[str, bool]]:
    """Modules by phase, ops that nobody owns, failures, and by place whether an op would be 16-bit."""
    net = Net(how).to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, foreach=False)
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(1)).to(device)
    with OpObserver("profile", parse("fp16-mixed:rules=cuda")) as observer:
        for _ in range(2):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    modules: dict[str, set[str]] = {}
    lowered = {}
    for record in observer.profile.records.values():
        place = record.place
        modules.setdefault(place.phase, set()).add(place.module)
        lowered[f"{place.phase} {place.module} {place.op}"] = record.lowered
    return modules, observer.attribution.unknown, [*observer.failures], lowered


@pytest.mark.parametrize("how", ["plain", "checkpointed", "reentrant"])
def test_ops_have_the_modules_and_formats_that_they_have_on_the_cpu(how: str) -> None:
    modules, unknown, failures, lowered = seen(how, "cuda")
    expected, _, _, lowered_there = seen(how, "cpu")
    assert modules == expected
    assert (unknown, failures) == (0, [])
    both = lowered.keys() & lowered_there.keys()
    assert {place: lowered[place] for place in both} == {place: lowered_there[place] for place in both}


def channel(device: str) -> Callable[[], Any]:
    """A weight that makes activations overflow fp16."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).to(device)
    with torch.no_grad():
        model[2].weight[3] = 4e4
    x = torch.ones(8, 16, device=device)
    return lambda: (model.zero_grad(), model(x).float().square().mean().backward())


class Attending(nn.Module):
    """The same behind attention, which on a GPU is one fused kernel that takes 16 bits only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
        with torch.no_grad():
            self.out.weight[5] = 6e4

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(2, 32, 3, 2, 32).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(y.transpose(1, 2).reshape(2, 32, 64))
        return out


def attention(device: str) -> Callable[[], Any]:
    model = Attending().to(device)
    x = torch.randn(2, 32, 64, generator=torch.Generator().manual_seed(1)).mul(50).to(device)
    return lambda: (model.zero_grad(), model(x).float().square().mean().backward())


@pytest.mark.parametrize("make", [channel, attention], ids=["linear", "attention"])
def test_findings_are_those_of_the_emulation_on_the_cpu(make: Callable[[str], Callable[[], Any]]) -> None:
    here = examine(make("cuda"), policy="fp16-mixed", device_type="cuda")
    there = examine(make("cpu"), policy="fp16-mixed:emulate:rules=cuda", device_type="cpu")
    # Which ops FP32 could not follow is told by findings of their own; on a GPU there have to be none.
    assert [finding.what for finding in here if finding.code in ("HS506", "HS507")] == []

    def told(findings: Any) -> set[tuple[str, str]]:
        return {(finding.code, finding.place.module if finding.place else "") for finding in findings}

    assert told(here) == told(there) != set()
