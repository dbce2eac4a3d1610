"""`MasterWeights` in the place of a torch optimizer: hooks, schedulers, ``state``, text, gradients, errors."""

from __future__ import annotations

import gc
import io
import math
import weakref
from collections import defaultdict
from typing import Any

import pytest
import torch
from cases import feed, make_parameters, tensors_of
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from halfstep.optim import MasterWeights


def make(count: int = 2, **options: Any) -> tuple[list[nn.Parameter], MasterWeights]:
    parameters = [nn.Parameter(torch.full((3,), 1.0 + i).bfloat16()) for i in range(count)]
    return parameters, MasterWeights(torch.optim.AdamW(parameters, **{"lr": 0.01, **options}))


def give_gradients(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)


def test_it_is_an_optimizer_and_says_around_which() -> None:
    parameters, optimizer = make()
    assert isinstance(optimizer, torch.optim.Optimizer) and len(optimizer) == 0 and optimizer
    assert repr(optimizer) == f"MasterWeights({optimizer.optimizer!r})" and "lr: 0.01" in repr(optimizer)
    for wrong in (optimizer, parameters, torch.optim.AdamW):
        with pytest.raises(TypeError, match=f"without masters, not {type(wrong).__name__}"):
            MasterWeights(wrong)  # type: ignore[arg-type]


def test_step_hooks_see_parameters_outside_and_masters_inside_and_global_ones_run_once() -> None:
    parameters, optimizer = make(1)
    seen: list[tuple[str, bool, torch.dtype]] = []

    def note(name: str) -> Any:
        def hook(given: Any, args: Any, kwargs: Any) -> None:
            assert args[0] is given
            seen.append((name, given is optimizer, given.param_groups[0]["params"][0].dtype))

        return hook

    handles = [
        optimizer.register_step_pre_hook(note("before")),
        optimizer.register_step_post_hook(note("after")),
        optimizer.optimizer.register_step_pre_hook(note("within")),
        register_optimizer_step_post_hook(note("global")),
    ]
    torch.optim.Optimizer.zero_grad(optimizer)  # makes PyTorch decorate the step of a class that it does not know yet
    give_gradients(parameters)
    optimizer.step()
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert seen == [
        ("before", True, torch.bfloat16),
        ("within", False, torch.float32),
        ("global", False, torch.float32),
        ("after", True, torch.bfloat16),
    ]


def test_a_step_hook_may_change_the_arguments() -> None:
    parameters, optimizer = make(1)

    def closure() -> float:
        return 3.0

    give_gradients(parameters)
    optimizer.register_step_pre_hook(lambda given, args, kwargs: ((given, closure), {}))
    assert optimizer.step() == 3.0


def test_state_dict_hooks_are_called_around_saving_and_loading() -> None:
    parameters, optimizer = make(1)
    give_gradients(parameters)
    optimizer.step()
    calls: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda given: calls.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda given, state: {**state, "note": "kept"})
    optimizer.register_load_state_dict_pre_hook(lambda given, state: {k: v for k, v in state.items() if k != "note"})
    optimizer.register_load_state_dict_post_hook(lambda given: calls.append("after loading"))
    state = optimizer.state_dict()
    assert state["note"] == "kept" and "master" in state["state"][0]
    optimizer.load_state_dict(state)
    assert calls == ["before saving", "after loading"]


def test_zero_grad_reaches_the_parameters() -> None:
    parameters, optimizer = make()
    give_gradients(parameters)
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in parameters)
    optimizer.zero_grad()
    assert all(p.grad is None for p in parameters)


SCHEDULERS: dict[str, Any] = {
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
    "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.001, 0.1, cycle_momentum=True),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.ConstantLR(o, 0.1), torch.optim.lr_scheduler.ExponentialLR(o, 0.5)], [2]
    ),
    "swa": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.05),
}


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_set_the_rates_and_momenta_they_set_on_the_optimizer_itself(name: str, tensor_lr: bool) -> None:
    """They replace ``step`` in the instance, by a function that holds the optimizer weakly, to see it called."""
    lr = torch.tensor(0.01) if tensor_lr else 0.01
    if tensor_lr and name in ("cyclic", "swa"):
        pytest.skip("PyTorch's own scheduler does not keep to tensors")
    (parameters, optimizer), (twins, plain) = make(lr=lr), make(lr=lr if not tensor_lr else lr.clone())
    bare = plain.optimizer
    schedules = [SCHEDULERS[name](each) for each in (optimizer, bare)]
    for _ in range(5):
        for each, its in ((parameters, optimizer), (twins, bare)):
            give_gradients(each)
            its.step()
        for schedule in schedules:
            schedule.step(1.0) if name == "plateau" else schedule.step()
        for group, other in zip(optimizer.param_groups, bare.param_groups, strict=True):
            assert group["lr"] == other["lr"] and group["betas"] == other["betas"]
    assert optimizer.masters()[0][0] < 1  # it stepped, through the scheduler's wrapper


def test_nothing_keeps_it_alive_when_it_is_dropped() -> None:
    _parameters, optimizer = make()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    gone = weakref.ref(optimizer)
    del optimizer, schedule
    gc.collect()
    assert gone() is None


def test_state_shows_each_parameter_with_its_master_and_writes_through() -> None:
    parameters, optimizer = make()
    within = optimizer.optimizer
    assert not optimizer.state and parameters[0] not in optimizer.state and optimizer.state.get(parameters[0]) is None
    assert not within.state  # looking made none
    give_gradients(parameters)
    optimizer.step()
    state = optimizer.state
    assert list(state) == parameters and len(state) == 2 and parameters[0] in state and 0 not in state
    first = state[parameters[0]]
    assert set(first) == {"step", "exp_avg", "exp_avg_sq", "master"} and len(first) == 4 and "exp_avg" in first
    assert first["master"] is optimizer.of(parameters[0]) and first["exp_avg"] is within.state[parameters[0]]["exp_avg"]
    assert "master" in repr(state) and "master" in repr(first) and state.get(parameters[0])["step"] == 1
    state[parameters[0]]["exp_avg"] = torch.full((3,), 7.0)
    assert within.state[parameters[0]]["exp_avg"][0] == 7
    state[parameters[0]]["master"] = torch.full((3,), 1.001)
    optimizer.zero_grad()
    assert torch.equal(parameters[0], torch.full((3,), 1.001).bfloat16())
    optimizer.step()  # no gradients: the master stays, and is not taken back to the parameter's value
    assert torch.equal(optimizer.of(parameters[0]), torch.full((3,), 1.001))
    del first["master"], first["exp_avg_sq"]
    assert set(first) == {"step", "exp_avg"} and len(optimizer) == 1
    with pytest.raises(KeyError):
        del first["master"]
    with pytest.raises(KeyError):
        first["nothing"]
    del state[parameters[1]]
    assert list(state) == [parameters[0]] and len(optimizer) == 0 and parameters[1] not in within.state
    with pytest.raises(KeyError):
        del state[parameters[1]]


def test_state_can_be_replaced_and_low_bits_of_the_weights_stay() -> None:
    parameters, optimizer = make()
    give_gradients(parameters)
    optimizer.step()
    masters = [m.clone() for m in optimizer.masters()]
    optimizer.state = optimizer.state  # a view of what it replaces
    assert set(optimizer.state[parameters[1]]) == {"step", "exp_avg", "exp_avg_sq", "master"}
    kept = optimizer.optimizer.state[parameters[0]]["exp_avg"]
    optimizer.state = {parameters[0]: {"exp_avg": kept, "master": torch.full((3,), 2.5)}, "note": 3}
    assert optimizer.state["note"] == 3 and parameters[1] not in optimizer.optimizer.state
    assert torch.equal(optimizer.of(parameters[0]), torch.full((3,), 2.5))
    optimizer.state = defaultdict(dict)
    assert not optimizer.optimizer.state and torch.equal(optimizer.of(parameters[1]), masters[1])
    optimizer.step()  # moments start anew
    assert optimizer.state[parameters[0]]["step"] == 1


def test_state_within_an_exchange_is_that_of_the_masters() -> None:
    parameters, optimizer = make(1)
    give_gradients(parameters)
    optimizer.step()
    with optimizer.exchanged():
        assert list(optimizer.state) == optimizer.masters() and "master" not in optimizer.state[optimizer.masters()[0]]
        assert optimizer.holds(parameters[0])
        saved = optimizer.state_dict()
        assert set(saved["state"][0]) == {"step", "exp_avg", "exp_avg_sq", "master"}
    assert list(optimizer.state) == parameters


def test_frozen_parameters_and_those_that_left_cost_no_master() -> None:
    parameters, optimizer = make(3)
    parameters[2].requires_grad_(False)
    give_gradients(parameters[:2])
    optimizer.step()
    assert len(optimizer) == 2
    parameters[2].requires_grad_()
    optimizer.param_groups[0]["params"].remove(parameters[0])
    give_gradients(parameters)
    optimizer.step()
    assert [id(m) for m in optimizer.masters()] == [id(optimizer.of(p)) for p in parameters[1:]]


def test_a_parameter_frozen_for_a_while_keeps_its_master_and_moments() -> None:
    parameters, optimizer = make(1)
    give_gradients(parameters)
    optimizer.step()
    before = [t.clone() for t in tensors_of([dict(s) for s in optimizer.state.values()])]
    parameters[0].requires_grad_(False)
    parameters[0].grad = None
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    _, other = make(1)
    other.param_groups[0]["params"][0].requires_grad_(False)
    other.load_state_dict(torch.load(file, weights_only=True))
    for each in (optimizer, other):
        after = tensors_of([dict(s) for s in each.state.values()])
        assert all(a.dtype is torch.float32 and torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_moments_that_a_load_into_the_optimizer_within_made_16_bit_become_fp32_again() -> None:
    parameters, optimizer = make(1)
    give_gradients(parameters)
    optimizer.step()
    within = optimizer.optimizer
    within.load_state_dict(within.state_dict())  # torch casts to the parameter's format
    assert within.state[parameters[0]]["exp_avg"].dtype is torch.bfloat16
    optimizer.step()
    assert within.state[parameters[0]]["exp_avg"].dtype is torch.float32


def test_a_group_added_by_a_hook_within_the_step_is_kept() -> None:
    parameters, optimizer = make(1)
    late = nn.Parameter(torch.ones(2).bfloat16())

    def add(within: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if len(within.param_groups) == 1:
            within.add_param_group({"params": [late]})

    optimizer.optimizer.register_step_post_hook(add)
    give_gradients([*parameters, late])
    optimizer.step()
    assert [p for g in optimizer.param_groups for p in g["params"]] == [*parameters, late]
    optimizer.step()
    assert len(optimizer) == 2 and optimizer.of(late)[0] < 1


def test_a_closure_sees_parameters_in_their_places_and_may_overflow() -> None:
    parameters, optimizer = make(1)
    places: list[Tensor] = []

    def closure() -> Tensor:
        places.append(optimizer.param_groups[0]["params"][0])
        optimizer.zero_grad()
        loss = (parameters[0].float() * 2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 6.0
    assert places == [parameters[0]] and optimizer.of(parameters[0])[0] < 1
    optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    assert optimizer.step(closure) is None and len(places) == 1


def test_states_hold_only_tensors_and_plain_values() -> None:
    parameters = make_parameters(torch.float16)
    optimizer = MasterWeights(torch.optim.AdamW(parameters, lr=0.01))
    feed(parameters, 0)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert type(state) is dict and all(type(values) is dict for values in state["state"].values())
    twins = make_parameters(torch.float16, seed=3)
    other = MasterWeights(torch.optim.AdamW(twins, lr=math.pi))
    before = [twin.detach().clone() for twin in twins]
    other.load_state_dict(state)
    for parameter, twin, value in zip(parameters, twins, before, strict=True):
        if parameter.dtype is torch.float16 and parameter.requires_grad:
            assert torch.equal(optimizer.of(parameter), other.of(twin))
        assert torch.equal(twin, value)  # a model is loaded as a model
    assert other.param_groups[0]["lr"] == 0.01
