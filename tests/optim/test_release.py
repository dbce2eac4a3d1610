"""Gradient release against the same optimizer without it: equal bit for bit wherever single gradients are enough."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import math
import pickle
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import halfstep
from halfstep.optim import SGD, Adam, AdamW, Lion, MasterOptimizer
from halfstep.optim.release import GradientsKeptWarning
from halfstep.optim.update import Update

BF16, FP16 = torch.bfloat16, torch.float16
Make = Callable[..., MasterOptimizer]
RULES: dict[str, Make] = {
    "adamw": lambda p, **o: AdamW(p, lr=0.01, **o),
    "adam-amsgrad": lambda p, **o: Adam(p, lr=0.01, weight_decay=0.1, amsgrad=True, **o),
    "sgd": lambda p, **o: SGD(p, lr=0.1, **o),
    "sgd-nesterov": lambda p, **o: SGD(p, lr=0.1, momentum=0.9, nesterov=True, **o),
    "lion": lambda p, **o: Lion(p, lr=0.01, weight_decay=0.1, **o),
}


def adamw(parameters: Any, **options: Any) -> AdamW:
    return AdamW(parameters, lr=0.01, **{"backend": "eager", **options})


def sgd(parameters: Any, **options: Any) -> SGD:
    return SGD(parameters, lr=0.1, **{"backend": "eager", **options})


class Net(nn.Module):
    """Every way for a parameter to be used: tied, twice, in one branch only, frozen, never, 0-d, not contiguous."""

    def __init__(self, dtype: torch.dtype = BF16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8)
        self.twice = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.branch = nn.Linear(8, 8)
        self.last = nn.Linear(8, 6, bias=False)
        self.tied = self.first.weight
        self.frozen = nn.Parameter(torch.randn(8), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(3))
        self.gain = nn.Parameter(torch.ones(()))
        self.odd = nn.Parameter(torch.randn(8, 6).t())
        self.to(dtype)
        self.norm.float()

    def forward(self, x: Tensor, branch: bool = True, segment: Any = None) -> Tensor:
        segment = segment or (lambda function, h: function(h))
        h = self.first(x.to(self.first.weight.dtype)) * self.frozen
        h = segment(lambda h: self.twice(torch.tanh(self.twice(h))), h)
        h = self.norm(h.float()).to(h.dtype)
        if branch:
            h = segment(lambda h: h + self.branch(h), h)
        y = self.last(h) + h @ self.tied + h @ self.odd.t()
        return (y * self.gain).float().square().mean()


def batches(n: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(5, 6, generator=generator) for _ in range(n)]


def groups(model: nn.Module) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    return [{"params": parameters[:4]}, {"params": parameters[4:], "lr": 0.02}]


def pair(make: Make = adamw, dtype: torch.dtype = BF16, **options: Any) -> Any:
    """A model and optimizer that release, and the same ones that do not."""
    models = Net(dtype), Net(dtype)
    released = make(groups(models[0]), release_gradients=True, **options)
    return models[0], released, models[1], make(groups(models[1]), **options)


def numbers(model: nn.Module, optimizer: MasterOptimizer) -> list[Tensor]:
    """All that training changes: parameters, and the whole state of the optimizer in order."""
    found: list[Tensor] = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            found += [parameter.detach(), *(optimizer.state.get(parameter) or {}).values()]
    return found


def assert_same(model: nn.Module, optimizer: MasterOptimizer, other: nn.Module, expected: MasterOptimizer) -> None:
    ours, theirs = numbers(model, optimizer), numbers(other, expected)
    assert len(ours) == len(theirs) > 20
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype is b.dtype and torch.equal(a, b)


def assert_nothing_left(optimizer: MasterOptimizer) -> None:
    assert all(p.grad is None for group in optimizer.param_groups for p in group["params"])


def train(model: Any, optimizer: Any, data: Iterable[Tensor], **options: Any) -> None:
    for x in data:
        optimizer.zero_grad()
        model(x, **options).backward()
        optimizer.step()


STORAGE = [
    {"master": "exact", "state": "fp32"},
    {"master": "24bit", "state": "8bit"},
    {"master": "fp32", "state": "bf16"},
    {"master": "none", "state": "bf16"},
    {"master": "none", "state": "fp32", "rounding": "kahan"},
]


@pytest.mark.parametrize("storage", STORAGE, ids=lambda s: "-".join(s.values()))
@pytest.mark.parametrize("name", RULES)
def test_it_is_the_same_optimizer(name: str, storage: dict[str, Any]) -> None:
    make = RULES[name]
    model, optimizer, other, expected = pair(lambda p, **o: make(p, backend="eager", **o), **storage)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.7) for o in (optimizer, expected)]
    for i, x in enumerate(batches(4)):
        for net, each in ((model, optimizer), (other, expected)):
            net(x, branch=i != 1).backward()
            if each is optimizer:
                assert_nothing_left(optimizer)
            each.step()
            each.zero_grad()
        for schedule in schedules:
            schedule.step()
    assert_same(model, optimizer, other, expected)
    assert optimizer.state[model.twice.weight]["step"] == 4
    assert optimizer.state[model.branch.weight]["step"] == 3


@pytest.mark.parametrize("dtype", [torch.float32, FP16])
def test_other_formats(dtype: torch.dtype) -> None:
    model, optimizer, other, expected = pair(dtype=dtype)
    train(model, optimizer, batches(3))
    train(other, expected, batches(3))
    assert_same(model, optimizer, other, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    def segment(function: Any, h: Tensor) -> Any:
        return checkpoint(function, h, use_reentrant=reentrant)

    model, optimizer, other, expected = pair()
    train(model, optimizer, batches(3), segment=segment)
    train(other, expected, batches(3), segment=segment)
    assert_same(model, optimizer, other, expected)


def live_bytes(storages: list[StorageWeakRef], sizes: list[int]) -> int:
    return sum(size for storage, size in zip(storages, sizes, strict=True) if not storage.expired())


@pytest.mark.parametrize("release", [False, True])
def test_one_gradient_lives_at_a_time(release: bool) -> None:
    layers = [nn.Linear(32, 32) for _ in range(10)]
    model = nn.Sequential(*layers).to(BF16)
    storages: list[StorageWeakRef] = []
    sizes: list[int] = []
    peak = 0

    def look(parameter: Tensor) -> None:
        nonlocal peak
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        storages.append(StorageWeakRef(storage))
        sizes.append(storage.nbytes())
        peak = max(peak, live_bytes(storages, sizes))

    for parameter in model.parameters():  # before the optimizer's own hooks
        parameter.register_post_accumulate_grad_hook(look)
    optimizer = adamw(model.parameters(), release_gradients=release, state="8bit", master="24bit")
    for _ in range(2):
        model(torch.ones(4, 32, dtype=BF16)).float().square().mean().backward()
        after = live_bytes(storages, sizes)
        optimizer.step()
        optimizer.zero_grad()
    everything = sum(p.numel() * 2 for p in model.parameters())
    largest = 2 * 32 * 32
    assert len(sizes) == 40 and everything > 10 * largest
    assert (peak, after) == ((largest, 0) if release else (everything, everything))


@pytest.mark.parametrize("last_branch", [True, False])
def test_accumulation(last_branch: bool) -> None:
    """A parameter that the last micro-batch does not reach keeps its gradient until step()."""
    model, optimizer, other, expected = pair()
    for step in range(3):
        *early, last = batches(3, seed=step)
        for net, each in ((model, optimizer), (other, expected)):
            for x in early:
                with each.accumulating():
                    (net(x) / 3).backward()
            (net(last, branch=last_branch) / 3).backward()
            if each is optimizer:
                assert (model.branch.weight.grad is None) is last_branch
                assert model.twice.weight.grad is None
            each.step()
            if each is optimizer:
                assert_nothing_left(optimizer)
            each.zero_grad()
    assert_same(model, optimizer, other, expected)


def test_accumulation_that_never_ends_is_said_aloud() -> None:
    model, optimizer, other, expected = pair()
    x, y = batches(2)
    with optimizer.accumulating():
        model(x).backward()
        with optimizer.accumulating():
            model(y).backward()
        assert optimizer.release is not None and optimizer.release.is_accumulating
        with pytest.raises(RuntimeError, match=r"step\(\) was called inside `with optimizer.accumulating\(\):`"):
            optimizer.step()
    with pytest.warns(GradientsKeptWarning, match="all 11 gradients of this step were kept until step"):
        optimizer.step()
    for z in (x, y):
        other(z).backward()
    expected.step()
    assert_same(model, optimizer, other, expected)
    model.unused.grad = torch.ones_like(model.unused)
    optimizer.step()  # no warning: it was about that step


def test_gradients_that_were_assigned_are_stepped_by_step() -> None:
    weight, twin = (nn.Parameter(torch.ones(3, dtype=BF16)) for _ in range(2))
    optimizer, expected = adamw([weight], release_gradients=True), adamw([twin])
    assert optimizer.release is not None and not optimizer.release.arrived
    for parameter, each in ((weight, optimizer), (twin, expected)):
        parameter.grad = torch.full((3,), 0.5, dtype=BF16)
        each.step()
    assert torch.equal(weight, twin) and weight[0] != 1 and weight.grad is None


def test_a_closure_is_a_backward_pass_like_another() -> None:
    model, optimizer, other, expected = pair()

    def closure(net: Net, each: MasterOptimizer, x: Tensor) -> Tensor:
        each.zero_grad()
        loss = net(x)
        loss.backward()
        return loss

    for x in batches(2):
        losses = [
            each.step(lambda net=net, each=each, x=x: closure(net, each, x))
            for net, each in ((model, optimizer), (other, expected))
        ]
        assert torch.equal(*losses)
    assert_same(model, optimizer, other, expected)


def test_a_second_backward_pass_is_refused() -> None:
    weight = nn.Parameter(torch.ones(2, 3))
    optimizer = sgd([weight], release_gradients=True)
    loss = weight.sum()
    loss.backward(retain_graph=True)
    before = weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"second backward pass reached the parameter of shape \(2, 3\)"):
        loss.backward()
    assert torch.equal(weight, before)
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(weight, before)
    weight.sum().backward()
    assert not torch.equal(weight, before)
    with optimizer.accumulating():
        weight.sum().backward()
    with pytest.raises(RuntimeError, match="1 parameters got another gradient after"):
        optimizer.step()


def test_a_parameter_shared_by_reentrant_segments_is_refused() -> None:
    layer = nn.Linear(3, 3)
    optimizer = sgd(layer.parameters(), release_gradients=True)
    x = torch.ones(1, 3, requires_grad=True)
    h = checkpoint(layer, checkpoint(layer, x, use_reentrant=True), use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        h.sum().backward()
    del optimizer
    checkpoint(layer, checkpoint(layer, x, use_reentrant=True), use_reentrant=True).sum().backward()


def test_autograd_refuses_values_that_the_step_has_changed() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = sgd([weight], release_gradients=True)
    loss = ((torch.ones(3, requires_grad=True) * weight.detach()).exp() * weight).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    optimizer.step()


SCALERS: dict[str, Callable[..., Any]] = {
    "halfstep": lambda **o: halfstep.GradScaler("cpu", **o),
    "halfstep-low-floor": lambda **o: halfstep.GradScaler("cpu", min_scale=0.25, **o),
    "torch": lambda **o: torch.amp.GradScaler("cpu", **o),
}


@pytest.mark.parametrize("scaler", SCALERS)
def test_scaled_gradients_are_divided(scaler: str) -> None:
    model, optimizer, other, expected = pair(dtype=FP16)
    scalers = [SCALERS[scaler](init_scale=2.0**8, growth_interval=2) for _ in range(2)]
    assert optimizer.release is not None
    optimizer.release.scale_with(scalers[0])
    for x in batches(5):
        for net, each, scale in ((model, optimizer, scalers[0]), (other, expected, scalers[1])):
            scale.scale(net(x)).backward()
            if each is optimizer:
                assert_nothing_left(optimizer)
            scale.step(each)
            scale.update()
            each.zero_grad()
    assert scalers[0].get_scale() == scalers[1].get_scale() == 2.0**10
    assert_same(model, optimizer, other, expected)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("listened_to", [False, True])
@pytest.mark.parametrize("left", ["none", "finite", "inf"])
@pytest.mark.parametrize("scaler", SCALERS)
def test_an_overflow_leaves_only_its_own_parameter_alone(
    scaler: str, left: str, listened_to: bool, unscale: bool
) -> None:
    good, bad, late = (nn.Parameter(torch.ones(3)) for _ in range(3))
    optimizer = sgd([good, bad, late], release_gradients=True)
    if listened_to:
        step = optimizer.step
        optimizer.step = lambda *a, **k: step(*a, **k)  # type: ignore[method-assign]
    scale = SCALERS[scaler](init_scale=4.0)
    assert optimizer.release is not None
    optimizer.release.scale_with(scale)
    if left != "none":
        with optimizer.accumulating():
            scale.scale((late * (math.inf if left == "inf" else 2.0)).sum()).backward()
    scale.scale((good + bad * math.inf).sum()).backward()
    assert torch.equal(bad, torch.ones(3)) and optimizer.state[bad]["step"] == 0
    assert torch.equal(good, torch.full((3,), 1 - 0.1)) and optimizer.state[good]["step"] == 1
    if unscale:
        scale.unscale_(optimizer)
    scale.step(optimizer)
    scale.update()
    assert scale.get_scale() == 2.0
    assert_nothing_left(optimizer)
    assert torch.equal(late, torch.full((3,), 1 - 0.2 if left == "finite" else 1.0))
    if isinstance(scale, halfstep.GradScaler):
        assert not scale.step_was_applied and scale.skipped_steps == 1
    scale.scale((good + bad).sum()).backward()  # the next step is an ordinary one
    scale.step(optimizer)
    scale.update()
    assert scale.get_scale() == 2.0 and torch.equal(bad, torch.full((3,), 1 - 0.1))
    if isinstance(scale, halfstep.GradScaler):
        assert scale.step_was_applied and scale.skipped_steps == 1


def test_a_gradient_that_overflows_when_divided_by_a_scale_below_1() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = sgd([weight], release_gradients=True)
    scaler = halfstep.GradScaler("cpu", 0.25)
    assert optimizer.release is not None
    optimizer.release.scale_with(scaler)
    scaler.scale((weight * 3e38).sum()).backward()  # 3e38 / 4 is finite, and 3e38 too
    scaler.step(optimizer)
    scaler.update()
    assert scaler.step_was_applied
    weight.grad = torch.full((2,), 3e38)  # times 4 it is not
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    assert not scaler.step_was_applied and weight.isfinite().all()


def test_a_scaler_that_was_not_introduced_is_refused() -> None:
    for make in SCALERS.values():
        weight = nn.Parameter(torch.ones(2))
        optimizer = sgd([weight], release_gradients=True)
        scaler = make()
        scaler.scale(weight.sum()).backward()
        with pytest.raises(RuntimeError, match=r"optimizer.release.scale_with\(scaler\)"):
            scaler.step(optimizer)


def test_a_disabled_scaler_changes_nothing() -> None:
    model, optimizer, other, expected = pair()
    scaler = halfstep.GradScaler("cpu", enabled=False)
    assert optimizer.release is not None
    optimizer.release.scale_with(scaler)
    for x in batches(2):
        scaler.scale(model(x)).backward()
        scaler.step(optimizer)
        scaler.update()
    train(other, expected, batches(2))
    assert_same(model, optimizer, other, expected)


def test_losses_with_scales_of_their_own_have_to_accumulate() -> None:
    weight, twin = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer, expected = sgd([weight], release_gradients=True), sgd([twin])
    assert optimizer.release is not None
    for parameter, each in ((weight, optimizer), (twin, expected)):
        scaler = halfstep.GradScaler("cpu", 4.0)
        if each.release is not None:
            each.release.scale_with(scaler)
            with (
                pytest.raises(RuntimeError, match="not at the common scale"),
                scaler.scaled_loss(weight.sum(), each, "a"),
            ):
                pass
        for name in ("a", "b"):
            with each.accumulating(), scaler.scaled_loss(parameter.square().sum(), each, name) as loss:
                loss.backward()
        if each is optimizer:
            with pytest.warns(GradientsKeptWarning):
                scaler.step(each)
        else:
            scaler.step(each)
        scaler.update()
    assert torch.equal(weight, twin) and weight[0] != 1


class Oracle:
    """Clipping while gradients arrive, in plain numbers: by the previous step's norm or what came so far."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.before = 0.0

    def step(self, arriving: list[tuple[nn.Parameter, Tensor]], lr: float) -> None:
        squares = 0.0
        for parameter, gradient in arriving:
            squares += gradient.double().square().sum().item()
            norm = max(self.before, math.sqrt(squares))
            coefficient = torch.tensor(min(1.0, self.limit / (norm + 1e-6)), dtype=torch.float32)
            parameter.data -= lr * (gradient * coefficient)
        self.before = torch.tensor(math.sqrt(squares), dtype=torch.float32).item()


@pytest.mark.parametrize("scale", [None, 2.0**10])
def test_clipping_by_the_norm_of_the_step_before(scale: float | None) -> None:
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(n)) for n in (3, 4, 5)]
    twins = [nn.Parameter(w.detach().clone()) for w in weights]
    optimizer = sgd(weights, release_gradients=True)
    oracle = Oracle(2.0)
    assert optimizer.release is not None
    optimizer.release.max_grad_norm = 2.0
    assert optimizer.release.grad_norm is None
    scaler = halfstep.GradScaler("cpu", scale or 1.0, enabled=scale is not None)
    optimizer.release.scale_with(scaler)
    order: list[int] = []
    for i, weight in enumerate(weights):
        weight.register_post_accumulate_grad_hook(lambda _, i=i: order.append(i))
    lengths = []
    for step, size in enumerate((1.0, 1.0, 50.0, 0.1, 0.1)):  # the third one explodes; the fourth pays, then it is over
        gradients = [torch.randn(w.shape, generator=torch.Generator().manual_seed(step)) * size for w in weights]
        order.clear()
        before = [w.detach().clone() for w in weights]
        scaler.scale(sum((w * g).sum() for w, g in zip(weights, gradients, strict=True))).backward()
        scaler.step(optimizer)
        scaler.update()
        assert sorted(order) == [0, 1, 2]
        oracle.step([(twins[i], gradients[i]) for i in order], lr=0.1)
        for weight, twin in zip(weights, twins, strict=True):
            torch.testing.assert_close(weight, twin, rtol=1e-6, atol=1e-7)
        norm = torch.cat(gradients).norm()
        assert optimizer.release.grad_norm is not None
        torch.testing.assert_close(optimizer.release.grad_norm, norm)
        moved = torch.cat([w.detach() - b for w, b in zip(weights, before, strict=True)]).norm() / 0.1
        lengths.append((norm.item(), moved.item()))
    assert all(moved <= 2.0 * math.sqrt(3) + 1e-4 for _, moved in lengths)  # 2 for each of three, however large
    assert lengths[1][1] == pytest.approx(2.0 * lengths[1][0] / max(lengths[0][0], lengths[1][0]), rel=0.2)
    assert lengths[3][1] < 0.05 * lengths[3][0]
    assert lengths[4][1] == pytest.approx(lengths[4][0], rel=1e-5)


def test_an_overflow_does_not_count_as_a_norm() -> None:
    weight, bad = (nn.Parameter(torch.ones(1)) for _ in range(2))
    optimizer = sgd([weight, bad], release_gradients=True)
    scaler = halfstep.GradScaler("cpu", 4.0)
    assert optimizer.release is not None
    optimizer.release.scale_with(scaler)
    norms = []
    for a, b in ((3.0, 4.0), (1.0, math.inf), (6.0, 8.0), (1.0, math.nan)):
        scaler.scale((weight * a + bad * b).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert optimizer.release.grad_norm is not None
        norms.append(optimizer.release.grad_norm.item())
    assert norms == [5.0, 5.0, 10.0, 10.0]


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_an_overflow_does_not_clip_what_comes_after_it(value: float) -> None:
    bad, good = (nn.Parameter(torch.ones(1)) for _ in range(2))
    optimizer = sgd([bad, good], release_gradients=True)
    scaler = halfstep.GradScaler("cpu", 4.0)
    assert optimizer.release is not None
    optimizer.release.scale_with(scaler)
    optimizer.release.max_grad_norm = 10.0
    scaler.scale(torch.ones(()))
    bad.grad, good.grad = torch.tensor([value]), torch.tensor([4.0])  # stepped in this order
    scaler.step(optimizer)
    assert (bad.item(), good.item()) == (1.0, pytest.approx(1 - 0.1))


class Untouched(SGD):
    """Steps nothing: what is left is what release adds."""

    def updates(self, *args: Any, **kwargs: Any) -> list[Update]:
        return []


class Reads(TorchDispatchMode):
    """Counts how often the host reads a number off a tensor, which on a GPU is waiting for it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device() -> None:
    weights = [nn.Parameter(torch.randn(3)) for _ in range(3)]
    optimizer = Untouched(weights, release_gradients=True, backend="eager")
    scaler = torch.amp.GradScaler("cpu", 4.0)
    assert optimizer.release is not None
    optimizer.release.scale_with(scaler)
    optimizer.release.max_grad_norm = 1.0
    with Reads() as reads:
        for _ in range(2):
            with optimizer.accumulating():
                scaler.scale(weights[0].sum()).backward()
            scaler.scale(weights[1].sum() + weights[2].sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        assert reads.count == 0
        weights[0].sum().item()
    assert reads.count == 1


def test_what_clipping_does_not_take() -> None:
    weight = nn.Parameter(torch.ones(1))
    optimizer = sgd([weight], release_gradients=True)
    assert optimizer.release is not None
    for limit in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="max_grad_norm must be positive"):
            optimizer.release.max_grad_norm = limit
    with pytest.raises(RuntimeError, match=r"Set optimizer.release.max_grad_norm"):
        optimizer.clipped_step(1.0)


def test_resuming_goes_on_with_the_norm() -> None:
    data = batches(6)
    model, optimizer, other, _ = pair()
    assert optimizer.release is not None
    optimizer.release.max_grad_norm = 0.5
    train(model, optimizer, data[:3])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = adamw(groups(other), release_gradients=True)
    assert resumed.release is not None
    resumed.release.max_grad_norm = 0.5
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(model, optimizer, data[3:])
    train(other, resumed, data[3:])
    assert_same(model, optimizer, other, resumed)
    assert torch.equal(optimizer.release.grad_norm, resumed.release.grad_norm)  # type: ignore[arg-type]
    adamw(groups(Net())).load_state_dict(saved["optimizer"])  # the entry bothers nobody


def test_groups_may_change() -> None:
    """Added groups, loaded states, replaced and unfrozen parameters: hooks follow."""
    model, optimizer, other, expected = pair()
    for net, each in ((model, optimizer), (other, expected)):
        torch.manual_seed(3)
        net.extra = nn.Parameter(torch.randn(6, dtype=BF16))
        each.add_param_group({"params": [net.extra], "lr": 0.5})
    for net, each in ((model, optimizer), (other, expected)):
        (net(batches(1)[0]) * net.extra.float().sum()).backward()
        if each is optimizer:
            assert_nothing_left(optimizer)
        each.step()
        each.zero_grad()
        each.load_state_dict(copy.deepcopy(each.state_dict()))  # new group dicts
        each.param_groups[0]["lr"] = 0.123
        net.frozen.requires_grad_(True)
    train(model, optimizer, batches(2))
    train(other, expected, batches(2))
    assert_same(model, optimizer, other, expected)
    old, new = model.unused, nn.Parameter(torch.ones(3, dtype=BF16))
    optimizer.param_groups[0]["params"] = [new if p is old else p for p in optimizer.param_groups[0]["params"]]
    new.sum().backward()
    optimizer.step()
    assert optimizer.state[new]["step"] == 1
    new.sum().backward()
    assert new.grad is None and optimizer.state[new]["step"] == 2  # in the hook
    old.sum().backward()
    assert old.grad is not None and old not in optimizer.state
    assert not old._post_accumulate_grad_hooks


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_step_their_own_parameters(how: str) -> None:
    model, optimizer, _, expected = pair()
    assert optimizer.release is not None
    optimizer.release.max_grad_norm = 1.0
    train(model, optimizer, batches(2))
    both = (model, optimizer)
    net, again = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    assert again.release is not None and again.release.max_grad_norm == 1.0
    assert torch.equal(again.release.grad_norm, optimizer.release.grad_norm)
    before = [n.clone() for n in numbers(model, optimizer)]
    data = batches(2, seed=5)
    net(data[0]).backward()
    assert_nothing_left(again)
    assert all(torch.equal(a, b) for a, b in zip(before, numbers(model, optimizer), strict=True))
    again.step()
    train(net, again, data[1:])
    train(model, optimizer, data)
    assert_same(net, again, model, optimizer)
    assert copy.deepcopy(expected).release is None
    copied = copy.deepcopy(model)  # a model alone has no optimizer
    copied(data[0]).backward()
    assert copied.twice.weight.grad is not None


def test_hooks_go_with_the_optimizer() -> None:
    model = Net()
    optimizer = adamw(model.parameters(), release_gradients=True)
    train(model, optimizer, batches(1))
    assert model.twice.weight._post_accumulate_grad_hooks
    gone = weakref.ref(optimizer), weakref.ref(optimizer.release)
    gc.disable()
    try:
        del optimizer
        assert gone[0]() is None and gone[1]() is None  # without the garbage collector: no cycle holds them
    finally:
        gc.enable()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    model(batches(1)[0]).backward()
    assert model.twice.weight.grad is not None


def test_two_optimizers_share_a_backward_pass() -> None:
    model, other = Net(), Net()
    halves = [list(net.parameters()) for net in (model, other)]
    released = [adamw(halves[0][:5], release_gradients=True), sgd(halves[0][5:])]
    expected = [adamw(halves[1][:5]), sgd(halves[1][5:])]
    for x in batches(3):
        for net, optimizers in ((model, released), (other, expected)):
            net(x).backward()
            for each in optimizers:
                each.step()
                each.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("policy", ["fp32", "bf16-mixed", "bf16-master", "fp16-mixed", "fp16-master"])
def test_mixed_precision_steps_the_same(policy: str) -> None:
    models = Net(torch.float32), Net(torch.float32)
    results = []
    for model, release in zip(models, (True, False), strict=True):
        optimizer = adamw(groups(model), release_gradients=release)
        scaler = halfstep.GradScaler("cpu", 2.0**4) if policy.startswith("fp16") else None
        mp = halfstep.MixedPrecision(model, optimizer, policy, scaler=scaler)
        for x in batches(3):
            for part in x.split(3):
                with mp.autocast():
                    loss = model(part) / 2
                with optimizer.accumulating() if part.shape[0] == 3 else contextlib.nullcontext():
                    mp.backward(loss)
            if release:
                assert_nothing_left(optimizer)
            results.append(mp.step())
        with pytest.raises(RuntimeError, match="found no gradients"):
            mp.step()
        results[-1] = optimizer, results[-1]  # type: ignore[call-overload]
    (optimizer, last), (expected, other_last) = results[2], results[5]  # type: ignore[misc]
    assert_same(models[0], optimizer, models[1], expected)
    assert results[:2] == results[3:5] and last == other_last and last.applied
    assert optimizer.state[models[0].twice.weight]["step"] == 3


def test_mixed_precision_clips_by_the_limit_it_knew_before() -> None:
    model = Net(torch.float32)
    optimizer = adamw(groups(model), release_gradients=True)
    mp = halfstep.MixedPrecision(model, optimizer, "fp16-mixed", scaler=halfstep.GradScaler("cpu", 2.0**4))
    assert optimizer.release is not None
    optimizer.release.max_grad_norm = 0.5
    x = batches(1)[0]
    with mp.autocast():
        loss = model(x)
    expected = torch.autograd.grad(
        loss, [p for p in model.parameters() if p is not model.unused and p.requires_grad], retain_graph=True
    )
    mp.backward(loss)
    norm = torch.cat([g.flatten() for g in expected]).norm().item()
    assert mp.step(max_grad_norm=0.5).grad_norm == pytest.approx(norm, rel=0.01) != 0


def test_a_model_may_change_its_format_before_the_first_step() -> None:
    model, other = Net(torch.float32), Net(torch.float32)
    optimizer, expected = (sgd(net.parameters(), release_gradients=net is model) for net in (model, other))
    for net in (model, other):
        net.bfloat16()
        net.norm.float()
    model(batches(1)[0]).backward()
    assert_nothing_left(optimizer)
    optimizer.step()
    train(other, expected, batches(1))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
