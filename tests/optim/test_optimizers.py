"""AdamW, Adam, SGD and Lion as drop-ins: bit for bit the numbers of torch's own on FP32 parameters."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from storage_cases import (
    BACKENDS,
    LOW,
    MASTERS,
    all_same,
    assert_as_torch,
    everything,
    feed,
    made,
    references,
    same_bits,
)
from torch import Tensor, nn
from torch.optim import lr_scheduler

from halfstep import optim
from halfstep.optim import MasterOptimizer, rules

Make = Callable[..., Any]
FORMATS = [*LOW, torch.float32]


def grouped(parameters: list[nn.Parameter], **other: Any) -> list[dict[str, Any]]:
    return [{"params": parameters[:3]}, {"params": parameters[3:], **other}]


ADAM_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no decay": {"weight_decay": 0.0},
    "decay": {"weight_decay": 0.3, "betas": (0.8, 0.95), "eps": 1e-4},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "amsgrad maximize": {"amsgrad": True, "maximize": True, "betas": (0.0, 0.5)},
}
SGD_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
    "dampening": {"momentum": 0.7, "dampening": 0.4},
    "decay": {"weight_decay": 0.2},
    "maximize": {"momentum": 0.9, "maximize": True, "weight_decay": 0.1},
}
TWINS = [
    *((optim.AdamW, torch.optim.AdamW, name, options) for name, options in ADAM_OPTIONS.items()),
    *((optim.Adam, torch.optim.Adam, name, options) for name, options in ADAM_OPTIONS.items()),
    (optim.Adam, torch.optim.Adam, "decoupled", {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    *((optim.SGD, torch.optim.SGD, name, options) for name, options in SGD_OPTIONS.items()),
]


def assert_twins(
    ours: MasterOptimizer, theirs: torch.optim.Optimizer, steps: int, schedules: list[Any] | None = None
) -> None:
    """Feed both the same gradients; masters, parameters and states stay equal, bit for bit where backends are."""
    backend = "eager" if isinstance(theirs, MasterOptimizer) or isinstance(ours, optim.SGD) else ours.backend
    parameters = [p for group in ours.param_groups for p in group["params"]]
    reference = [p for group in theirs.param_groups for p in group["params"]]
    for step in range(steps):
        feed(parameters, step)
        for p, r in zip(parameters, reference, strict=True):
            r.grad = None if p.grad is None else torch.empty_like(r).copy_(p.grad)
        ours.step()
        theirs.step()
        for schedule in schedules or ():
            schedule.step()
    for p, r in zip(parameters, reference, strict=True):
        x = ours.master(p)
        assert_as_torch(x, r.detach(), backend)
        # A bf16 master's parameter is rounded half away from zero.
        away = (x.view(torch.int32) + 0x8000 & ~0xFFFF).view(torch.float32)
        assert torch.equal(p.float(), away if p.dtype is torch.bfloat16 else x.to(p.dtype).float())
        for name, value in theirs.state[r].items() if r in theirs.state else ():
            if value is not None:
                assert_as_torch(ours.state[p][name], value, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [(a, b, o) for a, b, _, o in TWINS],
    ids=[f"{a.__name__} {n}" for a, _, n, _ in TWINS],
)
def test_steps_are_those_of_torch_on_fp32_parameters(
    ours: Make, theirs: Make, options: dict[str, Any], dtype: torch.dtype, backend: str
) -> None:
    parameters = made(dtype)
    reference = references(parameters)
    first = ours(grouped(parameters, lr=0.02), lr=0.01, master="exact", backend=backend, **options)
    second = theirs(grouped(reference, lr=0.02), lr=0.01, foreach=False, **options)
    assert_twins(first, second, 12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("make", [optim.AdamW, optim.Adam, optim.SGD, optim.Lion])
def test_steps_are_those_of_the_same_optimizer_on_fp32_parameters(make: Make, dtype: torch.dtype, backend: str) -> None:
    parameters = made(dtype)
    options: dict[str, Any] = {"momentum": 0.9} if make is optim.SGD else {"betas": (0.8, 0.95)}
    optimizers = [
        make(p, lr=0.01, weight_decay=0.1, backend=backend, **options) for p in (parameters, references(parameters))
    ]
    assert_twins(*optimizers, 30)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("master", ["exact", "fp32"])
def test_300_steps_of_adamw(master: str, dtype: torch.dtype, backend: str) -> None:
    torch.manual_seed(1)
    p = nn.Parameter(torch.randn(37, 65).to(dtype))
    r = nn.Parameter(p.detach().float())
    ours = optim.AdamW([p], lr=1e-3, weight_decay=0.1, master=master, backend=backend)
    theirs = torch.optim.AdamW([r], lr=1e-3, weight_decay=0.1, foreach=False)
    generator = torch.Generator().manual_seed(2)
    for _ in range(300):
        p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        r.grad = p.grad.float()
        ours.step()
        theirs.step()
    assert_as_torch(ours.master(p), r.detach(), backend)
    assert same_bits(ours.state[p]["exp_avg_sq"], theirs.state[r]["exp_avg_sq"])
    assert not torch.equal(p.float(), r)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"maximize": True, "betas": (0.5, 0.9)}])
def test_lion_is_algorithm_2_of_its_paper(options: dict[str, Any], backend: str) -> None:
    parameters = made(torch.bfloat16)
    optimizer = optim.Lion(parameters, lr=0.01, backend=backend, **options)
    beta1, beta2 = options.get("betas", (0.9, 0.99))
    x = {p: p.detach().double() for p in parameters}
    m = {p: torch.zeros(p.shape, dtype=torch.float64) for p in parameters}
    for step in range(50):
        feed(parameters, step)
        optimizer.step()
        for p in parameters:
            if p.grad is None:
                continue
            g = p.grad.double() * (-1 if options.get("maximize") else 1)
            direction = torch.sign(beta1 * m[p] + (1 - beta1) * g)
            x[p] = x[p] - 0.01 * (direction + options.get("weight_decay", 0.0) * x[p])
            m[p] = beta2 * m[p] + (1 - beta2) * g
    for p in parameters:
        torch.testing.assert_close(optimizer.master(p).double(), x[p], rtol=1e-5, atol=1e-5)
        if p.grad is not None:
            torch.testing.assert_close(optimizer.state[p]["exp_avg"].double(), m[p], rtol=1e-4, atol=1e-6)


def test_a_step_counted_on_the_device_gives_the_same_numbers() -> None:
    """The form that captured and compiled steps take: the number of steps, and the learning rate, as tensors."""
    torch.manual_seed(0)
    adam = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "amsgrad": True, "maximize": False}
    sgd = {"momentum": 0.9, "dampening": 0.5, "nesterov": False, "weight_decay": 0.1, "maximize": True}
    for rule, states in (
        (rules.Adam(0.01, decoupled=True, **adam), 3),
        (rules.Adam(0.01, decoupled=False, **adam), 3),
        (rules.SGD(0.01, **sgd), 1),
        (rules.Lion(0.01, 0.9, 0.99, 0.1, False), 1),
    ):
        x, kept = torch.randn(100), [torch.zeros(100) for _ in range(states)]
        other, others = x.clone(), [torch.zeros(100) for _ in range(states)]
        for step in range(1, 6):
            g = torch.randn(100)
            rules.apply(rule, x, g.clone(), kept, step)
            rules.apply(rule, other, g.clone(), others, torch.tensor(float(step)))
        torch.testing.assert_close(other, x, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(others, kept, rtol=1e-6, atol=1e-7)


# Groups, learning rates, schedulers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_have_options_of_their_own(backend: str) -> None:
    parameters = [nn.Parameter(torch.randn(80, 64).bfloat16()) for _ in range(4)]
    groups: list[dict[str, Any]] = [
        {"params": parameters[:1], "master": "24bit", "state": "8bit", "rounding": "stochastic"},
        {"params": parameters[1:2], "master": "none", "state": "bf16"},
        {"params": parameters[2:3], "master": "none", "rounding": "kahan", "lr": 1.0},
        {"params": parameters[3:], "weight_decay": 0.5, "betas": (0.5, 0.5), "lr": 0.0},
    ]
    optimizer = optim.AdamW(groups, lr=0.1, backend=backend)
    before = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    moments = [["exp_avg_codes", "exp_avg_sq_codes"], *[["exp_avg", "exp_avg_sq"]] * 3]
    names = [set(optimizer.state[p]) - {"step", *ours} for p, ours in zip(parameters, moments, strict=True)]
    assert names == [{"remainder", "exp_avg_scale", "exp_avg_sq_scale"}, set(), {"compensation"}, {"remainder"}]
    dtypes = [[optimizer.state[p][n].dtype for n in ours] for p, ours in zip(parameters, moments, strict=True)]
    assert dtypes == [
        [torch.int8, torch.uint8],
        [torch.bfloat16, torch.bfloat16],
        [torch.float32, torch.float32],
        [torch.float32, torch.float32],
    ]
    moved = [
        (b.double() * (1 - lr * 0.01) - optimizer.master(p).double()).mean().item()
        for b, p, lr in zip(before, parameters, (0.1, 0.1, 1.0, 0.0), strict=True)
    ]
    for actual, expected in zip(moved[:3], (0.1, 0.1, 1.0), strict=True):
        assert abs(actual / expected - 1) < 0.02
    assert torch.equal(parameters[3], before[3])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [optim.AdamW, optim.SGD, optim.Lion])
def test_a_learning_rate_may_be_a_tensor_that_changes(make: Make, backend: str) -> None:
    first, second = made(torch.bfloat16), made(torch.bfloat16)
    lr = torch.tensor(0.1)
    ours, theirs = make(first, lr=lr, backend=backend), make(second, lr=lr.item(), backend=backend)
    for step in range(4):
        feed(first, step)
        feed(second, step)
        ours.step()
        theirs.step()
        lr.mul_(0.5)
        theirs.param_groups[0]["lr"] = lr.item()
    assert all_same(everything(ours), everything(theirs))


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=12),
    "warm-up": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.1, step_size_up=3),
}


@pytest.mark.filterwarnings("ignore:.*epoch parameter")  # torch's own SequentialLR makes it
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("pair", [(optim.AdamW, torch.optim.AdamW), (optim.SGD, torch.optim.SGD)])
def test_schedulers_drive_it_as_they_drive_torchs(name: str, pair: tuple[Make, Make]) -> None:
    parameters = made(torch.bfloat16)
    options = {"momentum": 0.9} if pair[0] is optim.SGD else {}
    ours = pair[0](parameters, lr=0.01, backend=BACKENDS[-1], **options)
    theirs = pair[1](references(parameters), lr=0.01, foreach=False, **options)
    assert_twins(ours, theirs, 10, [SCHEDULES[name](ours), SCHEDULES[name](theirs)])
    assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"] != 0.01


def test_a_plateau_lowers_the_learning_rate() -> None:
    parameters = made(torch.bfloat16)
    optimizer = optim.AdamW(parameters, lr=0.01)
    schedule = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for loss in (1.0, 1.0, 1.0):
        schedule.step(loss)
    assert optimizer.param_groups[0]["lr"] == 0.0025


@pytest.mark.parametrize("backend", BACKENDS)
def test_momentum_may_be_switched_on_later(backend: str) -> None:
    parameters = made(torch.bfloat16)
    ours = optim.SGD(parameters, lr=0.1, backend=backend)
    theirs = torch.optim.SGD(references(parameters), lr=0.1, foreach=False)
    assert_twins(ours, theirs, 2)
    ours.param_groups[0]["momentum"] = theirs.param_groups[0]["momentum"] = 0.9
    assert_twins(ours, theirs, 3)


# What torch's optimizers can do besides -------------------------------------------------------------------------------


def test_a_closure_is_called_with_gradients_enabled_and_its_value_returned() -> None:
    p = nn.Parameter(torch.ones(4).bfloat16())
    optimizer = optim.SGD([p], lr=0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (p * 2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 8
    assert torch.equal(p, torch.zeros(4).bfloat16())


def test_zero_grad() -> None:
    parameters = made(torch.bfloat16)
    optimizer = optim.AdamW(parameters)
    feed(parameters, 0)
    optimizer.zero_grad(set_to_none=False)
    assert parameters[0].grad is not None and not parameters[0].grad.any()
    optimizer.zero_grad()
    assert all(p.grad is None for p in parameters)


def test_a_group_may_be_added_after_steps() -> None:
    p, q = nn.Parameter(torch.ones(4).bfloat16()), nn.Parameter(torch.ones(4).half())
    optimizer = optim.AdamW([p], lr=0.1)
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    optimizer.step()
    optimizer.add_param_group({"params": [q], "lr": 0.5, "master": "24bit"})
    optimizer.step()
    assert optimizer.state[p]["step"] == 2 and optimizer.state[q]["step"] == 1
    assert optimizer.state[q]["fp16_remainder"].dtype is torch.int8 and q[0].item() == pytest.approx(0.5, abs=0.01)
    with pytest.raises(TypeError, match=r"shape \(2,\) is torch.float64"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2).double())]})
    with pytest.raises(ValueError, match="master must be one of"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "master": "16bit"})
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize(("master", "rounding"), MASTERS)
def test_a_copy_goes_on_as_the_original(how: Callable[[Any], Any], master: str, rounding: str | None) -> None:
    parameters = [nn.Parameter(torch.randn(70, 64).bfloat16())]
    optimizer = optim.AdamW(parameters, lr=0.01, master=master, rounding=rounding, state="8bit", seed=5)
    for step in range(3):
        feed(parameters, step)
        optimizer.step()
    other = how(optimizer)
    theirs = other.param_groups[0]["params"]
    assert theirs[0] is not parameters[0] and other.seed == 5
    for step in range(3, 6):
        for run in (parameters, theirs):
            feed(run, step)
        optimizer.step()
        other.step()
    assert all_same(everything(optimizer), everything(other))


def test_saving_an_optimizer_whole() -> None:
    optimizer = optim.AdamW(made(torch.bfloat16))
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert all_same(everything(optimizer), everything(again)) and isinstance(again, optim.AdamW)


def test_hooks_run() -> None:
    parameters = made(torch.bfloat16)
    optimizer = optim.AdamW(parameters)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("loading"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("loaded"))
    feed(parameters, 0)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["before", "after", "saved", "loading", "loaded"]


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"foreach": False, "fused": None}])
@pytest.mark.parametrize("make", [optim.AdamW, optim.Adam, optim.SGD, optim.Lion])
def test_torchs_words_for_speed_are_taken(make: Make, options: dict[str, Any]) -> None:
    optimizer = make(made(torch.bfloat16), lr=0.1, **options)
    assert all(optimizer.param_groups[0][name] == value for name, value in options.items())


def test_named_parameters() -> None:
    model = nn.Linear(3, 2).bfloat16()
    optimizer = optim.AdamW(model.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]


def test_an_empty_group() -> None:
    optimizer = optim.AdamW([{"params": []}])
    optimizer.step()
    with pytest.raises(ValueError, match="empty parameter list"):
        optim.AdamW([])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(4096, 16), (97, 63), (512, 1, 3, 3), (1 << 13, 1)])
def test_short_rows_are_8_bit_too_in_groups_across_them(shape: tuple[int, ...], backend: str) -> None:
    """LoRA's B, depthwise convolutions: the bits of the same numbers as one long row."""
    torch.manual_seed(0)
    rows = nn.Parameter(torch.randn(shape).bfloat16())
    line = nn.Parameter(rows.detach().flatten().clone())
    runs = [optim.AdamW([p], lr=0.01, state="8bit", amsgrad=True, backend=backend) for p in (rows, line)]
    for _ in range(4):
        rows.grad = torch.randn(shape).bfloat16()
        line.grad = rows.grad.flatten()
        for run in runs:
            run.step()
    assert same_bits(rows.detach().flatten(), line.detach())
    kept, expected = runs[0].state[rows], runs[1].state[line]
    assert kept["exp_avg_codes"].dtype is torch.int8 and kept["exp_avg_sq_codes"].dtype is torch.uint8
    assert kept.keys() == expected.keys()
    assert all(same_bits(kept[name].flatten(), expected[name].flatten()) for name in kept)
    size = sum(kept[name].nbytes for name in kept if name.startswith("exp_avg"))
    assert size <= (2 + 8 / 64) * rows.numel() + 8


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_file_with_fp32_state_of_short_rows_is_encoded(backend: str) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(4096, 16).bfloat16())
    old = optim.AdamW([weight], state="fp32", backend=backend)
    weight.grad = torch.randn_like(weight)
    old.step()
    new = optim.AdamW([nn.Parameter(weight.detach().clone())], state="8bit", backend=backend)
    new.load_state_dict(old.state_dict())
    looked_at = optim.AdamW([nn.Parameter(weight.detach().clone())], state="fp32", backend=backend)
    looked_at.load_state_dict(new.state_dict())
    first, second = (run.state[run.param_groups[0]["params"][0]] for run in (old, looked_at))
    for name in ("exp_avg", "exp_avg_sq"):
        before, after = first[name].double().abs().sqrt(), second[name].double().abs().sqrt()
        assert 0 < (after - before).norm() <= 0.01 * before.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_that_is_switched_on_later_begins_as_torchs(nesterov: bool, dtype: torch.dtype, backend: str) -> None:
    """With dampening the first buffer, which is the gradient itself, is another than those after."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(40).to(dtype))
    q = nn.Parameter(p.detach().float())
    options = {"lr": 0.5, "dampening": 0.0 if nesterov else 0.5, "weight_decay": 0.1}
    ours, theirs = optim.SGD([p], backend=backend, **options), torch.optim.SGD([q], foreach=False, **options)
    for step in range(9):
        momentum = 0.9 if step in (2, 3, 4, 7, 8) else 0.0  # on, off, and on again, with the old buffer
        for run in (ours, theirs):
            run.param_groups[0].update(momentum=momentum, nesterov=nesterov and momentum > 0)
        p.grad = torch.randn(40).to(dtype)
        q.grad = p.grad.float()
        ours.step()
        theirs.step()
        assert torch.equal(ours.master(p), q), step


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_momentum_that_was_put_there_before_the_first_step_is_used_as_by_torch(backend: str) -> None:
    results = []
    for kind, options in ((optim.SGD, {"backend": backend}), (torch.optim.SGD, {"foreach": False})):
        p = nn.Parameter(torch.zeros(4))
        optimizer: Any = kind([p], lr=1.0, momentum=0.5, **options)
        optimizer.state[p]["momentum_buffer"] = torch.full((4,), 3.0)
        p.grad = torch.ones(4)
        optimizer.step()
        results.append(p.detach())
    assert torch.equal(*results)
