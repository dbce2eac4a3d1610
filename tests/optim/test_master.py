"""Master weights against the same optimizer on an FP32 copy that is fed the same gradients: equal bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import LOW, OPTIMIZERS, feed, fp32_copy, groups_of, make_parameters, tensors_of
from torch import Tensor, nn

from halfstep.optim import MasterWeights


def assert_follows(masters: MasterWeights, parameters: list[nn.Parameter], reference: list[nn.Parameter]) -> None:
    """Masters equal the reference, parameters the masters rounded to nearest."""
    for parameter, expected in zip(parameters, reference, strict=True):
        assert torch.equal(masters.of(parameter), expected)
        assert torch.equal(parameter, expected.to(parameter.dtype))


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_fp32_parameters_fed_the_same_gradients(name: str, dtype: torch.dtype) -> None:
    parameters = make_parameters(dtype)
    reference = fp32_copy(parameters)
    optimizer, plain = OPTIMIZERS[name](groups_of(parameters)), OPTIMIZERS[name](groups_of(reference))
    masters = MasterWeights(optimizer)
    groups, lists = list(optimizer.param_groups), [g["params"] for g in optimizer.param_groups]
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (optimizer, plain)]
    for step in range(12):
        feed(parameters, step)
        for theirs, ours in zip(reference, parameters, strict=True):
            theirs.grad = None if ours.grad is None else ours.grad.float().clone()
        before = [None if p.grad is None else p.grad.clone() for p in parameters]
        masters.step()
        plain.step()
        for schedule in schedules:
            schedule.step()
        assert_follows(masters, parameters, reference)
        assert all(g is h for g, h in zip(optimizer.param_groups, groups, strict=True))
        assert all(g["params"] is held for g, held in zip(optimizer.param_groups, lists, strict=True))
        assert [id(p) for held in lists for p in held] == [id(p) for p in parameters]
        for parameter, gradient in zip(parameters, before, strict=True):
            if gradient is not None and gradient.dtype is dtype:  # PyTorch's steps may change FP32 gradients
                assert parameter.grad is not None and torch.equal(parameter.grad, gradient)
    assert all(m.grad is None for m in masters.masters())
    # The user's own optimizer, looked at from outside a step: well-formed, moments in FP32, equal to the reference's.
    own, expected = optimizer.state_dict(), plain.state_dict()
    assert own["param_groups"] == expected["param_groups"]
    assert set(own["state"]) == set(expected["state"])
    assert all(any(key is p for p in parameters) for key in optimizer.state)
    for index in own["state"]:
        assert own["state"][index].keys() == expected["state"][index].keys()
        for key, value in own["state"][index].items():
            if isinstance(value, Tensor):
                assert value.dtype is torch.float32 and torch.equal(value, expected["state"][index][key])


def test_bf16_alone_stands_still_where_masters_move() -> None:
    alone, held = nn.Parameter(torch.ones(8).bfloat16()), nn.Parameter(torch.ones(8).bfloat16())
    plain, optimizer = torch.optim.SGD([alone], lr=1e-3), torch.optim.SGD([held], lr=1e-3)
    masters = MasterWeights(optimizer)
    for _ in range(1000):
        alone.grad, held.grad = torch.ones_like(alone), torch.ones_like(held)
        plain.step()
        masters.step()
    assert torch.equal(alone, torch.ones(8).bfloat16())  # 1e-3 is less than half an ulp of 1 in bf16: 2^-8
    value = torch.ones(8)
    for _ in range(1000):
        value -= 1e-3
    assert torch.equal(masters.of(held), value) and torch.equal(held, value.bfloat16())


def test_a_parameter_added_later_gets_a_master_and_a_scheduler_its_group() -> None:
    first, second = nn.Parameter(torch.ones(3).bfloat16()), nn.Parameter(torch.ones(3).half())
    optimizer = torch.optim.SGD([first], lr=0.5, momentum=0.5)
    masters = MasterWeights(optimizer)
    first.grad = torch.ones_like(first)
    masters.step()
    optimizer.add_param_group({"params": [second], "lr": 0.25})
    first.grad, second.grad = torch.ones_like(first), torch.ones_like(second)
    masters.step()
    assert torch.equal(masters.of(first), torch.full((3,), 1 - 0.5 - 0.75))
    assert torch.equal(masters.of(second), torch.full((3,), 0.75)) and second.dtype is torch.float16
    assert masters.holds(second) and len(masters) == 2
    optimizer.param_groups.pop()
    with torch.no_grad():
        second.fill_(5.0)
    masters.step()
    assert torch.equal(second, torch.full((3,), 5.0).half())  # no longer this optimizer's


def test_tied_parameters_have_one_master_and_are_stepped_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)).bfloat16()
    model[1].weight = model[0].weight
    masters = MasterWeights(torch.optim.SGD(model.parameters(), lr=0.1))
    reference = nn.Parameter(model[0].weight.detach().float())
    plain = torch.optim.SGD([reference], lr=0.1)
    for _ in range(3):
        model.zero_grad()
        model(torch.ones(2, 3).bfloat16()).sum().backward()
        reference.grad = model[0].weight.grad.float()
        masters.step()
        plain.step()
    assert len(masters) == 1 and torch.equal(masters.of(model[1].weight), reference)


def test_sparse_gradients_reach_the_master() -> None:
    table = nn.Embedding(5, 3, sparse=True).bfloat16()
    reference = nn.Parameter(table.weight.detach().float())
    masters = MasterWeights(torch.optim.SparseAdam(table.parameters(), lr=0.1))
    plain = torch.optim.SparseAdam([reference], lr=0.1)
    for _ in range(3):
        table.zero_grad()
        table(torch.tensor([1, 3, 3])).sum().backward()
        assert table.weight.grad is not None and table.weight.grad.is_sparse
        reference.grad = table.weight.grad.float()
        masters.step()
        plain.step()
    assert torch.equal(masters.of(table.weight), reference)


def test_an_exception_inside_the_step_leaves_groups_and_state_in_place() -> None:
    class Breaking(torch.optim.SGD):
        broken = False

        def step(self, closure: Any = None) -> Any:
            if self.broken:
                raise RuntimeError("broken")
            return super().step(closure)

    parameters = make_parameters(torch.bfloat16)
    optimizer = Breaking(parameters, lr=0.1, momentum=0.5)
    masters = MasterWeights(optimizer)
    feed(parameters, 0)
    masters.step()
    before = copy.deepcopy(masters.state_dict())
    optimizer.broken = True
    with pytest.raises(RuntimeError, match="broken"):
        masters.step()
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in parameters]
    assert all(any(key is p for p in parameters) for key in optimizer.state)
    assert all(m.grad is None for m in masters.masters())
    for one, other in zip(tensors_of(before), tensors_of(masters.state_dict()), strict=True):
        assert torch.equal(one, other)


def overwrite_in_place(parameter: nn.Parameter, value: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(value)


def overwrite_data(parameter: nn.Parameter, value: Tensor) -> None:
    parameter.data.copy_(value)  # unseen by version counters; weight clamping and many an EMA do this


def replace_data(parameter: nn.Parameter, value: Tensor) -> None:
    parameter.data = value.clone()


@pytest.mark.parametrize("change", [overwrite_in_place, overwrite_data, replace_data])
def test_what_changes_parameters_from_outside_wins_and_the_rest_keeps_its_low_bits(
    change: Callable[[nn.Parameter, Tensor], None],
) -> None:
    weight = nn.Parameter(torch.ones(4).bfloat16())
    optimizer = torch.optim.SGD([weight], lr=1e-3)
    masters = MasterWeights(optimizer)
    weight.grad = torch.ones_like(weight)
    masters.step()  # 0.999 in the master, 1 in bf16
    value = weight.detach().clone()
    value[2] = 7.0
    change(weight, value)
    weight.grad = torch.ones_like(weight)
    masters.step()
    expected = torch.ones(4) - 1e-3
    expected[2] = 7.0
    assert torch.equal(masters.of(weight), expected - 1e-3)
    assert torch.equal(weight, (expected - 1e-3).bfloat16())


def test_a_model_made_fp32_goes_on_without_masters() -> None:
    model = nn.Linear(2, 1, bias=False).bfloat16()
    masters = MasterWeights(torch.optim.SGD(model.parameters(), lr=0.5))
    model.weight.grad = torch.ones_like(model.weight)
    masters.step()
    model.float()
    before = model.weight.detach().clone()
    model.weight.grad = torch.ones_like(model.weight)
    masters.step()
    assert torch.equal(model.weight, before - 0.5) and len(masters) == 0


def test_adopted_values_keep_what_rounding_cut_off() -> None:
    value = torch.tensor([1.001, -2.0003])
    weight = nn.Parameter(value.bfloat16())
    masters = MasterWeights(torch.optim.SGD([weight], lr=1.0))
    masters.adopt(weight, value.clone())
    weight.grad = torch.zeros_like(weight)
    masters.step()
    assert torch.equal(masters.of(weight), value)


def test_a_closure_is_evaluated_once_by_sgd_and_follows_lbfgs() -> None:
    weight = nn.Parameter(torch.ones(2).bfloat16())
    masters = MasterWeights(torch.optim.SGD([weight], lr=0.5))
    calls = []

    def closure() -> Tensor:
        calls.append(weight.dtype)
        weight.grad = None
        loss = (weight.float() ** 2).sum()
        loss.backward()
        return loss

    assert masters.step(closure).item() == 2.0
    assert calls == [torch.bfloat16] and torch.equal(weight, torch.zeros(2).bfloat16())
    wanted = torch.tensor([0.3, -0.7])
    weight = nn.Parameter(torch.ones(2).bfloat16())
    masters = MasterWeights(torch.optim.LBFGS([weight], lr=0.5, max_iter=20))

    def distance() -> Tensor:
        weight.grad = None
        loss = ((weight.float() - wanted) ** 2).sum()
        loss.backward()
        return loss

    masters.step(distance)
    # its line search ends where bf16 cannot resolve a move
    assert torch.allclose(weight.float(), wanted, atol=0.7 * 2**-8)
    assert torch.equal(weight, masters.of(weight).bfloat16())
