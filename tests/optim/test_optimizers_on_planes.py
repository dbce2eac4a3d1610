"""Optimizers on parameters in planes: both planes in one pass, with the bits of plain FP32 parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import halfstep
from halfstep import optim
from halfstep.optim import backends
from halfstep.optim.fused_on_planes import in_one_pass
from halfstep.split import SplitTensor, split_parameters
from halfstep.split import tensor as split_tensor

Build = Callable[[Any], torch.optim.Optimizer]

native = pytest.mark.skipif(bool(backends.lacking("cpu")), reason=backends.lacking("cpu") or "-")


def model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 64), nn.Linear(64, 65))
    net[0] = net[0].to(memory_format=torch.channels_last)  # strides that are not the usual ones
    return net


def trained(net: nn.Module, build: Build, steps: int = 30) -> tuple[list[Tensor], dict[str, Any]]:
    """Weights and optimizer state after steps with gradients that do not depend on the weights."""
    optimizer = build(net.parameters())
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for p in net.parameters():
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()], copy.deepcopy(optimizer.state_dict())


OURS: dict[str, Build] = {
    "adamw": lambda p: optim.AdamW(p, lr=1e-3),
    "adam amsgrad": lambda p: optim.Adam(p, lr=1e-3, amsgrad=True, weight_decay=0.1),
    "adamw bf16 state": lambda p: optim.AdamW(p, lr=1e-3, state="bf16"),
    "sgd": lambda p: optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "lion": lambda p: optim.Lion(p, lr=1e-4),
    "eager": lambda p: optim.AdamW(p, lr=1e-3, backend="eager"),
}


@pytest.mark.parametrize("name", OURS)
def test_ours_step_planes_with_the_bits_of_fp32_parameters(name: str) -> None:
    plain, split = model(), model()
    split_parameters(split)
    weights, state = trained(plain, OURS[name])
    ours, our_state = trained(split, OURS[name])
    assert sum(isinstance(p, SplitTensor) for p in split.parameters()) == 3
    assert all(torch.equal(a, b) for a, b in zip(ours, weights, strict=True))
    for index, entries in state["state"].items():  # and their state is that of FP32 parameters: no remainder in it
        assert entries.keys() == our_state["state"][index].keys()
        assert all(torch.equal(entries[n], our_state["state"][index][n]) for n in entries)


def test_a_step_of_ours_moves_the_version_and_the_graph_that_saved_the_weight_says_so() -> None:
    layer = nn.Linear(4, 4)
    split_parameters(layer)
    optimizer = optim.SGD(layer.parameters(), lr=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(torch.ones(1, 4, requires_grad=True))
    layer.weight.grad, version = torch.ones(4, 4), layer.weight._version
    optimizer.step()
    assert layer.weight._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    assert torch.equal(optimizer.master(layer.weight), layer.weight.detach().clone())


FUSED: dict[str, Build] = {
    "adamw": lambda p: torch.optim.AdamW(p, 1e-3, fused=True),
    "adamw amsgrad maximize": lambda p: torch.optim.AdamW(p, 1e-3, fused=True, amsgrad=True, maximize=True),
    "adam decay": lambda p: torch.optim.Adam(p, 1e-3, fused=True, weight_decay=0.1),
    "adamw tensor lr": lambda p: torch.optim.AdamW(p, torch.tensor(1e-3), fused=True),
    "sgd": lambda p: torch.optim.SGD(p, 1e-2, fused=True),
    "sgd momentum": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, dampening=0.1, weight_decay=0.1, fused=True),
    "sgd nesterov": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, nesterov=True, fused=True),
}


@native
@pytest.mark.parametrize("name", FUSED)
def test_pytorchs_fused_optimizers_go_to_the_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their bits but for one element in thousands: PyTorch contracts products and sums elsewhere on some processors."""
    plain, split = model(), model()
    split_parameters(split)
    weights, state = trained(plain, FUSED[name])
    monkeypatch.setattr(split_tensor, "_on_joined", lambda op, *_: pytest.fail(f"{op} joined a parameter"))

    def joined(p: Tensor) -> Tensor:
        return p.joined() if isinstance(p, SplitTensor) else p.detach().clone()

    optimizer = FUSED[name](split.parameters())
    for step in range(30):
        generator = torch.Generator().manual_seed(step)
        for p in split.parameters():
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
        optimizer.step()
    for ours, theirs in zip(split.parameters(), weights, strict=True):
        apart = joined(ours) != theirs
        assert apart.float().mean() < 1e-3 and torch.allclose(joined(ours), theirs, rtol=0, atol=1e-6)
    for index, entries in optimizer.state_dict()["state"].items():
        for entry, value in entries.items():
            if isinstance(value, Tensor):
                assert torch.allclose(value, state["state"][index][entry], rtol=1e-6, atol=1e-7)


@native
def test_a_skip_of_pytorchs_scaler_leaves_planes_as_they_were() -> None:
    """Its fused optimizers get the flag of infinities, and the scale, as tensors."""
    layer = nn.Linear(8, 8)
    split_parameters(layer)
    before = layer.weight.detach().clone()
    optimizer = torch.optim.AdamW(layer.parameters(), 1e-2, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for bad in (True, False):
        scaler.scale(layer(torch.ones(1, 8)).sum() * (float("inf") if bad else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(layer.weight.detach().clone(), before) == bad
    assert isinstance(layer.weight, SplitTensor)


def test_the_policy_option_trains_as_bf16_mixed_and_says_what_stays_plain() -> None:
    losses = []
    for policy in ("bf16-mixed", "bf16-mixed:storage=split", "bf16-mixed:rules=cuda:storage=split"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 32), nn.Linear(32, 4))
        net[3].weight.requires_grad_(False)
        mp = halfstep.MixedPrecision(net, torch.optim.AdamW(net.parameters(), 1e-2), policy)
        run: list[float] = []
        for step in range(40):
            x = torch.randn(16, 16, generator=torch.Generator().manual_seed(step))
            with mp.autocast():
                loss = nn.functional.cross_entropy(net(x), x[:, :4].argmax(1))
            mp.backward(loss)
            mp.step(max_grad_norm=1.0)
            run.append(loss.item())
        losses.append(run)
        assert mp.left_plain == {}
        assert isinstance(net[0].weight, SplitTensor) == ("split" in policy)
        assert not isinstance(net[1].weight, SplitTensor)
    assert torch.allclose(torch.tensor(losses[0]), torch.tensor(losses[1]), atol=2e-2)  # ties
    assert losses[1][-1] < losses[1][0] * 0.8
    held = nn.Linear(4, 4)
    graph = held(torch.ones(1, 4))
    mp = halfstep.MixedPrecision(held, torch.optim.SGD(held.parameters(), 0.1), "bf16-mixed:storage=split")
    assert mp.left_plain == {"weight": "a graph or a weak reference holds it"}
    graph.sum().backward()


def test_islands_stay_plain() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    mp = halfstep.MixedPrecision(net, torch.optim.SGD(net.parameters(), 0.1), "bf16-mixed:keep_fp32=1:storage=split")
    assert isinstance(net[0].weight, SplitTensor) and type(net[1].weight) is nn.Parameter
    assert mp.left_plain == {}


FORMS: dict[str, dict[str, Any]] = {"the default": {}, "foreach": {"foreach": True}, "a loop": {"foreach": False}}


@native
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FUSED)
def test_pytorchs_other_forms_are_stepped_in_one_pass_with_the_bits_of_the_fused_one(
    name: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (name, form) == ("adamw tensor lr", "foreach"):
        pytest.skip("PyTorch has no such form")

    def other(parameters: Any) -> torch.optim.Optimizer:
        optimizer = FUSED[name](parameters)
        options = {key: value for key, value in optimizer.defaults.items() if key not in ("fused", "foreach")}
        options = {key: value for key, value in options.items() if key != "decoupled_weight_decay"}
        return type(optimizer)(parameters, **options, **FORMS[form])

    fused, split = model(), model()
    for net in (fused, split):
        split_parameters(net)
    weights, state = trained(fused, FUSED[name])
    optimizer = other(list(split.parameters()))
    own = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
    with monkeypatch.context() as patched:
        patched.setattr(split_tensor, "_on_joined", lambda op, *_: pytest.fail(f"{op} joined a parameter"))
        for step in range(30):
            generator = torch.Generator().manual_seed(step)
            for p in split.parameters():
                p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
            with in_one_pass(optimizer):
                optimizer.step()
    assert all(torch.equal(a.detach().clone(), b) for a, b in zip(split.parameters(), weights, strict=True))
    assert own == [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    for index, entries in optimizer.state_dict()["state"].items():
        assert all(
            torch.equal(value, state["state"][index][entry]) for entry, value in entries.items() if value is not None
        )


def test_what_has_no_fused_form_is_stepped_as_it_is() -> None:
    class Mine(torch.optim.AdamW):
        pass

    layer = nn.Linear(4, 4)
    split_parameters(layer)
    layer.weight.grad = torch.ones(4, 4)
    for optimizer in (Mine(layer.parameters()), torch.optim.RMSprop(layer.parameters())):
        with in_one_pass(optimizer):
            assert not optimizer.param_groups[0].get("fused")
    plain = torch.optim.AdamW(nn.Linear(4, 4).parameters())
    with in_one_pass(plain):
        assert not plain.param_groups[0]["fused"]


@native
def test_a_state_of_another_layout_is_stepped_too() -> None:
    """As after a load from a run that was not channels-last."""
    plain, split = (nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last) for _ in range(2))
    split.load_state_dict(plain.state_dict())
    split_parameters(split)
    # PyTorch's own fused kernel takes the one's elements for the other's.
    optimizers = [torch.optim.AdamW(net.parameters(), 1e-3, fused=net is split) for net in (plain, split)]
    for step in range(4):
        for net, optimizer in zip((plain, split), optimizers, strict=True):
            if step == 2:
                for entries in optimizer.state.values():
                    entries.update({k: v.contiguous() for k, v in entries.items() if v.dim() == 4})
            for p in net.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).to(
                    memory_format=torch.channels_last if p.dim() == 4 else torch.contiguous_format
                )
            optimizer.step()
    for ours, theirs in zip(split.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)
    for one, other in zip(optimizers[1].state.values(), optimizers[0].state.values(), strict=True):
        assert all(torch.allclose(value, other[name], rtol=1e-6, atol=1e-9) for name, value in one.items())
