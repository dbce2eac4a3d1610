"""Master weights against the same optimizer on an FP32 copy that is fed the same gradients: equal bit for bit."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from halfstep.optim import MasterWeights

MakeOptimizer = Callable[[Any], Optimizer]
OPTIMIZERS: dict[str, MakeOptimizer] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, foreach=False),
    "adam-foreach": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}
LOW = [torch.bfloat16, torch.float16]


def make_parameters(dtype: torch.dtype, seed: int = 0) -> list[nn.Parameter]:
    """Matrix, vector, 0-d, empty, not contiguous, one FP32 among the 16-bit, frozen, and one that never has a gradient."""
    torch.manual_seed(seed)
    values = [torch.randn(4, 3), torch.randn(5), torch.randn(()), torch.randn(0, 2), torch.randn(3, 4).t()]
    parameters = [nn.Parameter(v.to(dtype)) for v in values]
    parameters.append(nn.Parameter(torch.randn(3)))
    parameters.append(nn.Parameter(torch.randn(2).to(dtype), requires_grad=False))
    parameters.append(nn.Parameter(torch.randn(2).to(dtype)))
    return parameters


def feed(parameters: list[nn.Parameter], step: int) -> None:
    """The gradients of one step, in each parameter's own format."""
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters[:6]:
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = gradient.bfloat16().half().to(parameter.dtype)  # the same value in every format


def fp32_copy(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().float().clone(), requires_grad=p.requires_grad) for p in parameters]


def groups_of(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": parameters[:3]}, {"params": parameters[3:], "lr": 0.05}]


def assert_follows(masters: MasterWeights, parameters: list[nn.Parameter], reference: list[nn.Parameter]) -> None:
    """Masters equal the reference, parameters the masters rounded to nearest."""
    for parameter, expected in zip(parameters, reference, strict=True):
        assert torch.equal(masters.of(parameter), expected)
        assert torch.equal(parameter, expected.to(parameter.dtype))


def tensors_of(state: Any) -> list[Tensor]:
    leaves, _ = torch.utils._pytree.tree_flatten(state)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


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


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_saved_run_continues_as_the_uninterrupted_one(name: str) -> None:
    def run(parameters: list[nn.Parameter], masters: MasterWeights, steps: range) -> None:
        for step in steps:
            feed(parameters, step)
            masters.step()

    whole = make_parameters(torch.bfloat16)
    whole_masters = MasterWeights(OPTIMIZERS[name](groups_of(whole)))
    run(whole, whole_masters, range(5))
    file = io.BytesIO()
    torch.save({"optimizer": whole_masters.state_dict(), "model": [p.detach() for p in whole]}, file)
    saved_copy = copy.deepcopy(whole_masters.state_dict())
    run(whole, whole_masters, range(5, 10))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = make_parameters(torch.bfloat16, seed=9)
    resumed_masters = MasterWeights(OPTIMIZERS[name](groups_of(resumed)))
    with torch.no_grad():
        for parameter, value in zip(resumed, saved["model"], strict=True):
            parameter.copy_(value)
    resumed_masters.load_state_dict(saved["optimizer"])
    for one, other in zip(tensors_of(resumed_masters.state_dict()), tensors_of(saved_copy), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    run(resumed, resumed_masters, range(5, 10))
    for a, b in zip(whole, resumed, strict=True):
        assert torch.equal(a, b) and torch.equal(whole_masters.of(a), resumed_masters.of(b))
    for one, other in zip(
        tensors_of(whole_masters.state_dict()), tensors_of(resumed_masters.state_dict()), strict=True
    ):
        assert torch.equal(one, other)


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


def test_a_plain_state_is_loaded_with_fp32_moments_and_masters_from_the_parameters() -> None:
    reference = fp32_copy(make_parameters(torch.bfloat16))
    plain = torch.optim.AdamW(groups_of(reference), lr=0.01)
    for step in range(3):
        feed(reference, step)
        plain.step()
    parameters = [nn.Parameter(p.detach().bfloat16()) for p in reference]
    optimizer = torch.optim.AdamW(groups_of(parameters), lr=0.3)
    masters = MasterWeights(optimizer)
    masters.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.01
    own, theirs = optimizer.state_dict()["state"], plain.state_dict()["state"]
    for index in theirs:
        assert all(torch.equal(own[index][k], theirs[index][k]) for k in theirs[index])
        assert own[index]["exp_avg"].dtype is torch.float32
    for parameter in parameters:
        assert torch.equal(masters.of(parameter), parameter.float())
    feed(parameters, 4)
    masters.step()
    assert all(any(key is p for p in parameters) for key in optimizer.state)


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    parameters = make_parameters(torch.bfloat16)
    masters = MasterWeights(torch.optim.SGD(parameters, lr=0.1, momentum=0.5))
    feed(parameters, 0)
    masters.step()
    state = copy.deepcopy(masters.state_dict())
    before = copy.deepcopy(state)
    state["state"][1]["master"] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"master of parameter 1 has shape \(2, 2\), the parameter \(5,\)"):
        masters.load_state_dict(state)
    with pytest.raises(ValueError, match="param"):
        masters.load_state_dict({**before, "param_groups": before["param_groups"] * 2})
    for one, other in zip(tensors_of(before), tensors_of(masters.state_dict()), strict=True):
        assert torch.equal(one, other)


def test_adopted_values_keep_what_rounding_cut_off() -> None:
    value = torch.tensor([1.001, -2.0003])
    weight = nn.Parameter(value.bfloat16())
    masters = MasterWeights(torch.optim.SGD([weight], lr=1.0))
    masters.adopt(weight, value.clone())
    weight.grad = torch.zeros_like(weight)
    masters.step()
    assert torch.equal(masters.of(weight), value)


def test_a_closure_is_evaluated_once_and_lbfgs_refused() -> None:
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
    with pytest.raises(TypeError, match="LBFGS re-evaluates"):
        MasterWeights(torch.optim.LBFGS([weight])).step(closure)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_go_on_as_the_original_would(copied: Any) -> None:
    parameters = make_parameters(torch.bfloat16)
    masters = MasterWeights(torch.optim.AdamW(parameters, lr=0.01))
    feed(parameters, 0)
    masters.step()
    twins, twin_masters = copied((parameters, masters))
    for step in (1, 2):
        for group, each in ((parameters, masters), (twins, twin_masters)):
            feed(group, step)
            each.step()
    for one, twin in zip(parameters, twins, strict=True):
        assert one is not twin and torch.equal(one, twin)
        assert torch.equal(masters.of(one), twin_masters.of(twin))
