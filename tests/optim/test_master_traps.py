"""Eight traps of an optimizer around an optimizer; each of them silently corrupts a run or crashes it."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from cases import feed, fp32_copy, groups_of, make_parameters, tensors_of
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from halfstep.optim import MasterWeights


def make_model(seed: int = 0) -> nn.Sequential:
    """BF16 layers around an FP32 one."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 4).bfloat16(), nn.LayerNorm(4), nn.Linear(4, 2).bfloat16())


def feed_model(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).bfloat16().to(parameter.dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        feed_model(model, step)
        optimizer.step()
        optimizer.zero_grad()


def assert_same(one: Any, other: Any) -> None:
    pairs = list(zip(tensors_of(one), tensors_of(other), strict=True))
    assert pairs
    for a, b in pairs:
        assert a.dtype == b.dtype and torch.equal(a, b)


INNER = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}


# ---------------------------------------------------------------------- 1. state must look non-empty


@pytest.mark.parametrize("name", INNER)
def test_trap_1_saving_does_not_step(name: str) -> None:
    """PyTorch makes a hidden step on an optimizer whose ``state`` looks empty, at every save."""
    model = make_model()
    optimizer = MasterWeights(INNER[name](model.parameters()))
    train(model, optimizer, range(3))
    steps: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: steps.append(1))
    before = copy.deepcopy([optimizer.state_dict(), model.state_dict()])
    saved = get_optimizer_state_dict(model, optimizer)
    assert not steps
    assert_same(before, [optimizer.state_dict(), model.state_dict()])
    assert torch.equal(saved["state"]["0.weight"]["master"], optimizer.of(model[0].weight))


@pytest.mark.parametrize("name", INNER)
def test_trap_1_the_hidden_step_before_the_first_is_that_of_fp32_parameters(name: str) -> None:
    """There it has to be made, so that there is state to load into; what it does is PyTorch's affair."""
    model = make_model()
    reference = copy.deepcopy(model).float()
    values = [torch.randn(p.shape) for p in model.parameters()]
    optimizer, plain = MasterWeights(INNER[name](model.parameters())), INNER[name](reference.parameters())
    with torch.no_grad():
        for value, parameter, twin in zip(values, model.parameters(), reference.parameters(), strict=True):
            parameter.copy_(value)
            twin.copy_(value)
            if parameter.dtype is torch.bfloat16:
                optimizer.adopt(parameter, value.clone())
    assert not optimizer.state and len(optimizer.state) == 0 and list(optimizer.state) == []
    before = copy.deepcopy(model.state_dict())
    saved, expected = get_optimizer_state_dict(model, optimizer), get_optimizer_state_dict(reference, plain)
    assert optimizer.state
    assert saved["param_groups"] == expected["param_groups"]  # the learning rate is back
    assert_same(before, model.state_dict())
    for key, values in expected["state"].items():
        for name_of_state in values:
            assert_same(saved["state"][key][name_of_state], values[name_of_state])
    train(model, optimizer, range(3))
    train(reference, plain, range(3))
    for parameter, twin in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(optimizer.of(parameter), twin)


@pytest.mark.parametrize("name", INNER)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("optimizer_first", [False, True])
def test_trap_1_a_distributed_checkpoint_continues_in_new_objects(
    name: str, flat: bool, optimizer_first: bool, tmp_path: Path
) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model = make_model()
    optimizer = MasterWeights(INNER[name](model.parameters()))
    train(model, optimizer, range(3))
    saved = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    if flat:
        saved["optimizer"] = get_optimizer_state_dict(model, optimizer, options=options)
    dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)
    resumed_model = make_model(seed=1)
    resumed = MasterWeights(INNER[name](resumed_model.parameters()))
    there = {
        "model": get_model_state_dict(resumed_model),
        "optimizer": get_optimizer_state_dict(resumed_model, resumed, options=options),
    }
    # Each is read in place, into masters and moments too, while the other is still the old one: no master may follow
    # an old parameter then, whichever comes first.
    for part in ("optimizer", "model") if optimizer_first else ("model", "optimizer"):
        dcp.load({part: there[part]}, checkpoint_id=tmp_path, no_dist=True)
        if part == "optimizer":
            set_optimizer_state_dict(resumed_model, resumed, there[part], options=options)
        else:
            set_model_state_dict(resumed_model, there[part])
    assert_same([optimizer.state_dict(), model.state_dict()], [resumed.state_dict(), resumed_model.state_dict()])
    for each, its in ((model, optimizer), (resumed_model, resumed)):
        train(each, its, range(3, 6))
    assert_same([optimizer.state_dict(), model.state_dict()], [resumed.state_dict(), resumed_model.state_dict()])


def test_trap_1_masters_that_were_only_looked_at_do_not_count_as_state() -> None:
    model = make_model()
    optimizer = MasterWeights(torch.optim.AdamW(model.parameters(), lr=0.01))
    assert len(optimizer.masters()) == 0 and optimizer.of(model[0].weight) is not None and len(optimizer) == 1
    template = get_optimizer_state_dict(model, optimizer)
    assert "exp_avg" in template["state"]["0.weight"]  # else a load would leave the moments out


# ---------------------------------------------------------------------- 2. load_state_dict(state_dict=...)


def test_trap_2_states_are_loaded_by_keyword() -> None:
    model = make_model()
    optimizer = MasterWeights(torch.optim.AdamW(model.parameters(), lr=0.01))
    assert list(inspect.signature(optimizer.load_state_dict).parameters) == ["state_dict"]
    train(model, optimizer, range(2))
    state, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    train(model, optimizer, range(2, 4))
    optimizer.load_state_dict(state_dict=state)
    model.load_state_dict(weights)
    assert_same(state, optimizer.state_dict())


def test_trap_2_states_are_loaded_by_name() -> None:
    """A distributed checkpoint names parameters, where `Optimizer.state_dict` counts them."""
    model = make_model()
    optimizer = MasterWeights(torch.optim.AdamW(model.parameters(), lr=0.01))
    train(model, optimizer, range(2))
    named = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    other_model = make_model(seed=1)
    other = MasterWeights(torch.optim.AdamW(other_model.parameters(), lr=0.3))
    other.load_state_dict(state_dict=named)
    other_model.load_state_dict(model.state_dict())
    assert_same(other.state_dict(), optimizer.state_dict())


# ---------------------------------------------------------------------- 3. lr has one home


@pytest.mark.parametrize("inside", [False, True], ids=["on-the-wrapper", "on-the-optimizer-within"])
def test_trap_3_a_scheduler_moves_the_only_learning_rate(inside: bool) -> None:
    parameters = make_parameters(torch.bfloat16)
    reference = fp32_copy(parameters)
    within, plain = (torch.optim.AdamW(groups_of(p), lr=0.01) for p in (parameters, reference))
    optimizer = MasterWeights(within)
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(each, max_lr=0.1, total_steps=8)
        for each in (within if inside else optimizer, plain)
    ]
    for step in range(6):
        feed(parameters, step)
        feed(reference, step)
        optimizer.step()
        plain.step()
        for schedule in schedules:
            schedule.step()
        assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in within.param_groups]
        assert [g["lr"] for g in optimizer.state_dict()["param_groups"]] == [g["lr"] for g in plain.param_groups]
        for parameter, twin in zip(parameters, reference, strict=True):
            assert torch.equal(optimizer.of(parameter), twin)


def test_trap_3_groups_and_defaults_are_those_of_the_optimizer_within_also_after_a_load() -> None:
    parameters = make_parameters(torch.bfloat16)
    within = torch.optim.AdamW(parameters, lr=0.01)
    optimizer = MasterWeights(within)
    before = optimizer.param_groups
    optimizer.load_state_dict(optimizer.state_dict())
    assert within.param_groups is not before  # torch's load puts new objects there
    assert optimizer.param_groups is within.param_groups and optimizer.defaults is within.defaults
    optimizer.param_groups = [{**within.param_groups[0], "lr": 0.5}]
    optimizer.defaults = {**within.defaults, "lr": 0.25}
    assert within.param_groups[0]["lr"] == 0.5 and within.defaults["lr"] == 0.25


# ---------------------------------------------------------------------- 4. stale masters


def loaded_by_the_next_step(optimizer: MasterWeights, model: nn.Module) -> None:
    feed_model(model, 7)


def loaded_by_a_checkpoint(optimizer: MasterWeights, model: nn.Module) -> None:
    """Saved and loaded before any step: the masters in it must be those of the loaded weights."""
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    feed_model(model, 7)


@pytest.mark.parametrize("then", [loaded_by_the_next_step, loaded_by_a_checkpoint])
def test_trap_4_loaded_weights_win_over_stale_masters(then: Any) -> None:
    model, better = make_model(), make_model(seed=1)
    optimizer = MasterWeights(torch.optim.SGD(model.parameters(), lr=0.1))
    train(model, optimizer, range(3))
    model.load_state_dict(better.state_dict())
    then(optimizer, model)
    expected = [p.detach().float() - 0.1 * g.grad.float() for p, g in zip(better.parameters(), model.parameters())]  # noqa: B905
    assert all(torch.equal(p, q) for p, q in zip(model.state_dict().values(), better.state_dict().values()))  # noqa: B905
    optimizer.step()
    for parameter, value in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(optimizer.of(parameter), value, rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------------- 5. pickle and deepcopy


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_trap_5_copies_have_the_optimizer_within_and_the_masters(copied: Any, name: str) -> None:
    model = make_model()
    optimizer = MasterWeights(INNER[name](model.parameters()))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)  # replaces `step` by what cannot be pickled
    optimizer.register_step_post_hook(lambda *_: None)
    train(model, optimizer, range(3))
    schedule.step()
    twin_model, twin = copied((model, optimizer))
    assert type(twin) is MasterWeights and type(twin.optimizer) is type(optimizer.optimizer)
    assert twin.masters() and {id(m) for m in twin.masters()}.isdisjoint(id(m) for m in optimizer.masters())
    assert twin.state  # so that saving the copy does not step
    assert all(any(p is q for q in twin_model.parameters()) for g in twin.param_groups for p in g["params"])
    assert_same([optimizer.state_dict(), model.state_dict()], [twin.state_dict(), twin_model.state_dict()])
    for each, its in ((model, optimizer), (twin_model, twin)):
        train(each, its, range(3, 6))
    assert_same([optimizer.state_dict(), model.state_dict()], [twin.state_dict(), twin_model.state_dict()])


def test_trap_5_a_pickle_holds_plain_values_and_names_no_function_of_ours() -> None:
    """Loading runs torch's own code, and sets attributes: no reducer of this package."""
    import pickletools

    model = make_model()
    optimizer = MasterWeights(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5))
    train(model, optimizer, range(1))
    assert "__reduce__" not in vars(MasterWeights) and "__reduce_ex__" not in vars(MasterWeights)
    strings = [argument for _, argument, _ in pickletools.genops(pickle.dumps(optimizer)) if isinstance(argument, str)]
    ours = [s for s in strings if s.startswith("halfstep")]
    assert ours == ["halfstep.optim.master_weights.wrapper"]  # the class alone


# ---------------------------------------------------------------------- 6. add_param_group


@pytest.mark.parametrize("inside", [False, True], ids=["on-the-wrapper", "on-the-optimizer-within"])
def test_trap_6_a_group_added_reaches_the_optimizer_within(inside: bool) -> None:
    parameters = make_parameters(torch.bfloat16)
    reference = fp32_copy(parameters)
    within, plain = (torch.optim.AdamW(p[:3], lr=0.01) for p in (parameters, reference))
    optimizer = MasterWeights(within)
    for step in range(4):
        if step == 2:
            (within if inside else optimizer).add_param_group({"params": parameters[3:], "lr": 0.1})
            plain.add_param_group({"params": reference[3:], "lr": 0.1})
        feed(parameters, step)
        feed(reference, step)
        optimizer.step()
        plain.step()
    assert len(within.param_groups) == len(optimizer.param_groups) == 2
    for parameter, twin in zip(parameters, reference, strict=True):
        assert torch.equal(optimizer.of(parameter), twin)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": parameters[:1]})


# ---------------------------------------------------------------------- 7. .grad after step()


def test_trap_7_gradients_are_readable_after_a_step() -> None:
    model = make_model()
    optimizer = MasterWeights(torch.optim.SGD(model.parameters(), lr=0.1))
    feed_model(model, 0)
    held = [(p.grad, p.grad.clone()) for p in model.parameters() if p.grad is not None]
    assert len(held) == 6
    optimizer.step()
    for parameter, (gradient, value) in zip(model.parameters(), held, strict=True):
        assert parameter.grad is gradient and torch.equal(gradient, value)
    assert all(master.grad is None for master in optimizer.masters())


# ---------------------------------------------------------------------- 8. clipping


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
@pytest.mark.parametrize("max_norm", [0.5, 1e4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trap_8_clipping_sees_unscaled_fp32_gradients(dtype: torch.dtype, max_norm: float, norm_type: float) -> None:
    scale = 2.0**10
    parameters = make_parameters(dtype)
    reference = fp32_copy(parameters)
    optimizer = MasterWeights(torch.optim.SGD(parameters, lr=0.1, momentum=0.9))
    plain = torch.optim.SGD(reference, lr=0.1, momentum=0.9)
    for step in range(3):
        feed(parameters, step)
        feed(reference, step)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad *= scale
        before = [None if p.grad is None else p.grad.clone() for p in parameters]
        expected = nn.utils.clip_grad_norm_([p for p in reference if p.numel()], max_norm, norm_type)
        norm = optimizer.clip_grad_norm_(max_norm, norm_type, loss_scale=scale)
        assert norm.dtype is torch.float32 and norm.dim() == 0
        assert torch.allclose(norm, expected, rtol=1e-6)
        for parameter, gradient in zip(parameters, before, strict=True):
            assert gradient is None or torch.equal(parameter.grad, gradient)
        optimizer.grad_scale = torch.tensor(scale)  # as a scaler leaves it
        optimizer.step()
        del optimizer.grad_scale
        plain.step()
        for parameter, twin in zip(parameters, reference, strict=True):
            assert torch.allclose(optimizer.of(parameter), twin, rtol=1e-6, atol=1e-7)


def one_clipped_step(optimizer: MasterWeights, weight: Tensor) -> float:
    weight.grad = torch.full_like(weight, 3.0)
    before = optimizer.of(weight).clone()
    optimizer.step()
    return float((before - optimizer.of(weight)).norm())


def test_trap_8_a_clipping_counts_for_one_step() -> None:
    weight = nn.Parameter(torch.zeros(4).bfloat16())
    optimizer = MasterWeights(torch.optim.SGD([weight], lr=1.0))
    weight.grad = torch.full_like(weight, 3.0)
    assert float(optimizer.clip_grad_norm_(1.5)) == 6.0
    assert one_clipped_step(optimizer, weight) == pytest.approx(1.5)
    assert one_clipped_step(optimizer, weight) == 6.0
    for forgets in (
        optimizer.zero_grad,
        lambda: optimizer.load_state_dict(optimizer.state_dict()),
        lambda: (setattr(optimizer, "found_inf", torch.ones(())), optimizer.step(), delattr(optimizer, "found_inf")),
    ):
        weight.grad = torch.full_like(weight, 3.0)
        optimizer.clip_grad_norm_(1.5)
        forgets()
        assert one_clipped_step(optimizer, weight) == 6.0


def test_trap_8_within_an_exchange_masters_gradients_are_clipped_at_once() -> None:
    weight = nn.Parameter(torch.zeros(4).half())
    optimizer = MasterWeights(torch.optim.SGD([weight], lr=1.0))
    weight.grad = torch.full_like(weight, 3.0)
    with optimizer.exchanged():
        (master,) = optimizer.param_groups[0]["params"]
        assert float(optimizer.clip_grad_norm_(1.5)) == 6.0
        assert float(master.grad.norm()) == pytest.approx(1.5)
        optimizer.step()
    assert float(optimizer.of(weight).norm()) == pytest.approx(1.5)
    assert torch.equal(weight, optimizer.of(weight).half())


def test_trap_8_sparse_gradients_count_with_their_sums() -> None:
    table = nn.Embedding(5, 3, sparse=True).bfloat16()
    optimizer = MasterWeights(torch.optim.SGD(table.parameters(), lr=1.0))
    table(torch.tensor([1, 3, 3])).sum().backward()
    before = optimizer.of(table.weight).clone()
    assert torch.allclose(optimizer.clip_grad_norm_(1.0), torch.tensor(3 * 1.0 + 3 * 4.0).sqrt())
    optimizer.step()
    assert float((before - optimizer.of(table.weight)).norm()) == pytest.approx(1.0, rel=1e-5)
    table.weight.grad = None
    assert float(optimizer.clip_grad_norm_(1.0)) == 0.0  # no gradients at all
