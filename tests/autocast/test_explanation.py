"""What `explain` says ran is what ran, and the model is as it was."""

from __future__ import annotations

import copy
import io
import random

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import halfstep
from halfstep.autocast.explanation import Explanation, OpUse


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        h = self.body(x)
        if twice:
            h = checkpoint(self.body, h, use_reentrant=False)
        random.random()
        return torch.softmax(self.head(h), -1)


def wrapped(policy: str) -> tuple[Net, halfstep.MixedPrecision]:
    torch.manual_seed(0)
    net = Net()
    return net, halfstep.MixedPrecision(net, torch.optim.SGD(net.parameters(), 0.1), policy)


@pytest.mark.parametrize(
    ("policy", "addmm", "softmax", "casts"),
    [
        ("fp32", {"fp32": 3}, {"fp32": 1}, set()),
        ("bf16-mixed", {"bf16": 3}, {"bf16": 1}, {"fp32 → bf16"}),
        ("bf16-mixed:rules=cuda", {"bf16": 3}, {"fp32": 1}, {"fp32 → bf16", "bf16 → fp32"}),
        ("bf16-mixed:fp32_ops=softmax+linear", {"fp32": 3}, {"fp32": 1}, set()),
        ("bf16-mixed:keep_fp32=head", {"bf16": 2, "fp32": 1}, {"fp32": 1}, {"fp32 → bf16", "bf16 → fp32"}),
        ("fp16-mixed:emulate", {"fp16 emulated": 3}, {"fp16": 1}, {"fp32 → fp16"}),
        ("fp16-mixed:emulate:rules=cuda:low_ops=softmax", {"fp16 emulated": 3}, {"fp16": 1}, {"fp32 → fp16"}),
        ("bf16-master:rules=cuda", {"bf16": 3}, {"fp32": 1}, {"fp32 → bf16", "bf16 → fp32"}),
    ],
)
def test_formats_are_those_of_the_policy(policy: str, addmm: object, softmax: object, casts: set[str]) -> None:
    _, mp = wrapped(policy)
    seen = mp.explain(torch.randn(6, 8))
    assert seen.policy == policy == str(mp.policy) or parse_equal(policy, seen.policy)
    assert seen.formats("addmm") == addmm and seen.formats("softmax") == softmax
    assert set(seen.formats("cast")) == casts
    assert {use.module for use in seen.uses if use.op == "addmm"} == {"body.0", "body.3", "head"}
    assert {use.module for use in seen.uses if use.op == "softmax"} == {""}
    assert {use.module for use in seen.uses if use.op == "native_batch_norm"} == {"body.1"}


def parse_equal(one: str, other: str) -> bool:
    return halfstep.parse_policy(one) == halfstep.parse_policy(other)


def test_uses_are_counted_per_module_also_under_checkpointing() -> None:
    _, mp = wrapped("bf16-mixed")
    seen = mp.explain(torch.randn(6, 8), twice=True)
    counts = {use.module: use.count for use in seen.uses if use.op == "addmm"}
    assert counts == {"body.0": 2, "body.3": 2, "head": 1}


def test_it_leaves_the_model_and_every_generator_as_they_were() -> None:
    net, mp = wrapped("bf16-mixed:rules=cuda")
    x = torch.randn(6, 8)
    with mp.autocast():
        loss = net(x).sum()
    mp.backward(loss)
    before = copy.deepcopy(net.state_dict())
    gradients = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    generators = torch.get_rng_state(), random.getstate()
    hooks = len(torch.nn.modules.module._global_forward_hooks), len(torch.nn.modules.module._global_forward_pre_hooks)
    mp.explain(x)
    after = net.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert after["body.1.num_batches_tracked"] == 1
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), gradients, strict=True) if p.grad is not None)
    assert torch.equal(torch.get_rng_state(), generators[0]) and random.getstate() == generators[1]
    with pytest.raises(TypeError):
        mp.explain(x, wrong=1)
    assert hooks == (
        len(torch.nn.modules.module._global_forward_hooks),
        len(torch.nn.modules.module._global_forward_pre_hooks),
    )
    assert mp.step().applied


def test_text_and_rich_table_hold_every_row() -> None:
    seen = Explanation("bf16-mixed", (OpUse("addmm", "bf16", 2, "a[0]"), OpUse("cast", "fp32 → bf16", 3, "")))
    lines = str(seen).splitlines()
    assert lines[0] == "One forward pass under bf16-mixed"
    assert [line.split() for line in lines[2:]] == [
        ["module", "op", "format", "count"],
        ["a[0]", "addmm", "bf16", "2"],
        ["cast", "fp32", "→", "bf16", "3"],
    ]
    screen = io.StringIO()
    Console(file=screen, width=80).print(seen)
    for word in ("a[0]", "addmm", "fp32 → bf16", "3"):
        assert word in screen.getvalue()


def test_a_skipped_step_still_goes_back_to_before_its_own_forward_pass() -> None:
    net, mp = wrapped("fp16-mixed:emulate")
    before = copy.deepcopy(dict(net.named_buffers()))
    with mp.autocast():
        loss = net(torch.randn(6, 8)).sum() * torch.inf
    mp.explain(torch.randn(6, 8))
    mp.backward(loss)
    assert not mp.step().applied
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())


class Counting(nn.Module):
    """Draws from every generator, assigns a buffer anew, registers one, and drops one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("gone", torch.ones(2))
        self.register_buffer("later", None)

    def forward(self, x: Tensor) -> Tensor:
        np.random.rand()
        random.random()
        torch.rand(())
        self.count = self.count + 1
        self.later = self.count * 2
        del self.gone
        self.register_buffer("new", self.count)
        return self.linear(x)


def test_generators_of_numpy_and_buffers_that_forward_assigns_anew_are_put_back() -> None:
    net = Counting()
    mp = halfstep.MixedPrecision(net, torch.optim.SGD(net.parameters(), lr=0.1), "bf16-mixed")
    np.random.seed(0)
    buffers = dict(net._buffers)
    states = np.random.get_state()[2], random.getstate(), torch.get_rng_state()
    mp.explain(torch.randn(5, 4, generator=torch.Generator()))
    assert list(net._buffers) == list(buffers) and all(net._buffers[name] is buffers[name] for name in buffers)
    assert net.count == 0 and net.later is None
    assert np.random.get_state()[2] == states[0] and random.getstate() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
