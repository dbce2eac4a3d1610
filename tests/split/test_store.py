"""A model's parameters put into planes and taken out: the same objects, the same training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from halfstep.split import SplitTensor, plain_parameters, split, split_parameters


class HalfAway(torch.autograd.Function):
    """Autocast's cast with ties away from zero, which is how planes are rounded."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return split(weight)[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient.float()


class RoundedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, HalfAway.apply(self.weight), self.bias)


def models() -> tuple[nn.Sequential, nn.Sequential]:
    """A model in planes, and FP32 parameters under autocast that differ from it on no tie."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 8))
    theirs = nn.Sequential(RoundedLinear(32, 64), nn.GELU(), nn.LayerNorm(64), RoundedLinear(64, 8))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2),
    "adamw foreach": lambda p: torch.optim.AdamW(p, 1e-2, foreach=True),
    "adam amsgrad": lambda p: torch.optim.Adam(p, 1e-2, amsgrad=True, weight_decay=0.01),
    "sgd": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, nesterov=True),
    "sgd foreach": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, 1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_has_the_bits_of_fp32_parameters_under_autocast(name: str) -> None:
    """Two hundred steps, clipped, with a learning rate that moves; only ties are rounded otherwise."""
    losses, weights = [], []
    for model, keep in zip(models(), (split_parameters, lambda _: {}), strict=True):
        optimizer = OPTIMIZERS[name](model.parameters())
        held = [p for group in optimizer.param_groups for p in group["params"]]
        assert keep(model) == {}
        assert all(a is b for a, b in zip(held, model.parameters(), strict=True))
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
        for step in range(200):
            x = torch.randn(16, 32, generator=torch.Generator().manual_seed(step))
            with torch.autocast("cpu", torch.bfloat16):
                loss = functional.mse_loss(model(x).float(), x[:, :8])
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            losses.append(loss.item())
        weights.append([p.detach().clone() for p in model.parameters()])
        assert sum(isinstance(p, SplitTensor) for p in model.parameters()) == (2 if keep is split_parameters else 0)
    assert losses[:200] == losses[200:]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_only_matrices_are_stored_so_and_the_rest_is_named() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "norm": nn.LayerNorm(4), "low": nn.Linear(4, 4).half()})
    flat = torch.zeros(32)
    model["a"].register_parameter("piece", nn.Parameter(flat[:16].view(4, 4)))
    left = split_parameters(model)
    assert left == {"a.piece": "it is a piece of a larger tensor", "low.weight": "it is float16"}
    assert split_parameters(nn.LazyLinear(4)) == {}  # no values yet, so nothing to store
    assert isinstance(model["a"].weight, SplitTensor) and type(model["a"].bias) is nn.Parameter
    assert split_parameters(model) == left  # again changes nothing
    out = model["a"](torch.ones(1, 4))
    fresh = nn.Linear(4, 4)
    graph = fresh(torch.ones(1, 4))
    assert split_parameters(fresh) == {"weight": "a graph or a weak reference holds it"}
    assert type(fresh.weight) is nn.Parameter
    (out.sum() + graph.sum()).backward()
    assert fresh.weight.grad is not None


def test_tied_weights_stay_one_parameter_and_plain_ones_come_back() -> None:
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 10, bias=False))
    model[1].weight = model[0].weight
    values, weight = model[0].weight.detach().clone(), model[0].weight
    weight.grad = torch.ones_like(weight)
    assert split_parameters(model) == {}
    assert model[0].weight is model[1].weight is weight and isinstance(weight, SplitTensor)
    assert torch.equal(weight.grad, torch.ones(10, 8))
    copied = copy.deepcopy(model)
    assert copied[0].weight is copied[1].weight and type(copied[0].weight) is nn.Parameter
    plain_parameters(model)
    assert model[0].weight is model[1].weight is weight and type(weight) is nn.Parameter
    assert torch.equal(weight, values)


def test_hooks_and_attributes_stay_with_a_parameter() -> None:
    model = nn.Linear(4, 3)
    seen: list[str] = []

    def doubled(gradient: Tensor) -> Tensor:
        seen.append("hook")
        return gradient * 2

    first = model.weight.register_hook(doubled)
    model.weight.register_post_accumulate_grad_hook(lambda _: seen.append("after"))
    model.weight.rank = 7  # type: ignore[assignment]  # as Megatron and others mark theirs
    for to in (split_parameters, plain_parameters):
        to(model)
        model.zero_grad()
        model(torch.ones(1, 4)).sum().backward()
        assert seen == ["hook", "after"] and model.weight.rank == 7
        assert torch.equal(model.weight.grad, torch.full((3, 4), 2.0))  # type: ignore[arg-type]
        seen.clear()
    first.remove()
    model(torch.ones(1, 4)).sum().backward()
    assert seen == ["after"]
