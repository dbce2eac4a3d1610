"""The recipes of PyTorch's AMP guide: with halfstep's scaler they give what PyTorch's gives, and what FP32 gives.

The scales are powers of two, and no gradient here is near an end of FP32's range: multiplying by the scale and
dividing by it again is exact, so runs are compared with ``==``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from halfstep.scale import GradScaler

OVERFLOW_AT = 2
STEPS = 6
Models = tuple[nn.Sequential, nn.Sequential]
Optimizers = tuple[torch.optim.Optimizer, torch.optim.Optimizer]
Recipe = Callable[[Any, Models, Optimizers, int], None]

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5, foreach=False),
    "sgd-foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5, foreach=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}


class NoScaler:
    """FP32 as it is written without a scaler, skipping a step whose gradients are not finite."""

    def scale(self, outputs: Any) -> Any:
        return outputs

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        pass

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        if all((g.coalesce().values() if g.is_sparse else g).isfinite().all() for g in gradients):
            optimizer.step()

    def update(self) -> None:
        pass

    def get_scale(self) -> float:
        return 1.0


def data(step: int, part: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + part)
    return torch.randn(4, 6, generator=generator), torch.randn(4, 2, generator=generator)


def poison(model: nn.Sequential, step: int) -> None:
    """One gradient overflows in one step."""
    if step == OVERFLOW_AT:
        gradient = model[0].weight.grad
        assert gradient is not None
        gradient.view(-1)[3] = math.inf


def parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def plain(scaler: Any, models: Models, optimizers: Optimizers, step: int) -> None:
    x, y = data(step)
    scaler.scale(nn.functional.mse_loss(models[0](x), y)).backward()
    poison(models[0], step)
    scaler.step(optimizers[0])


def clipping(scaler: Any, models: Models, optimizers: Optimizers, step: int) -> None:
    x, y = data(step)
    scaler.scale(nn.functional.mse_loss(models[0](x), y)).backward()
    poison(models[0], step)
    scaler.unscale_(optimizers[0])
    nn.utils.clip_grad_norm_(parameters(optimizers[0]), 0.25)
    scaler.step(optimizers[0])


def accumulation(scaler: Any, models: Models, optimizers: Optimizers, step: int) -> None:
    for part in range(3):
        x, y = data(step, part)
        scaler.scale(nn.functional.mse_loss(models[0](x), y) / 3).backward()
    poison(models[0], step)
    scaler.step(optimizers[0])


def penalty(scaler: Any, models: Models, optimizers: Optimizers, step: int) -> None:
    x, y = data(step)
    weights = parameters(optimizers[0])
    loss = nn.functional.mse_loss(models[0](x), y)
    scaled = torch.autograd.grad(scaler.scale(loss), weights, create_graph=True)
    gradients = [g * (1.0 / scaler.get_scale()) for g in scaled]
    norm = torch.stack([g.pow(2).sum() for g in gradients]).sum().sqrt()
    scaler.scale(loss + norm).backward()
    poison(models[0], step)
    scaler.step(optimizers[0])


def two_losses_and_optimizers(scaler: Any, models: Models, optimizers: Optimizers, step: int) -> None:
    x, y = data(step)
    a, b = models[0](x), models[1](x)
    first, second = (2 * a - 3 * b - y).pow(2).mean(), (a + b).pow(2).mean()
    scaler.scale(first).backward(retain_graph=True)
    scaler.scale(second).backward()
    poison(models[0], step)
    scaler.unscale_(optimizers[0])  # one of them only
    for optimizer in optimizers:
        scaler.step(optimizer)


RECIPES: tuple[Recipe, ...] = (plain, clipping, accumulation, penalty, two_losses_and_optimizers)


def train(scaler: Any, recipe: Recipe, optimizer: str) -> tuple[list[Tensor], list[float]]:
    """Final weights and moments, and the scale after each step."""
    torch.manual_seed(0)
    models = tuple(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)) for _ in range(2))
    optimizers = tuple(OPTIMIZERS[optimizer](model.parameters()) for model in models)
    scales = []
    for step in range(STEPS):
        for each in optimizers:
            each.zero_grad()
        recipe(scaler, models, optimizers, step)  # type: ignore[arg-type]
        scaler.update()
        scales.append(scaler.get_scale())
    state = [p.detach() for model in models for p in model.parameters()]
    for each in optimizers:
        for values in each.state.values():
            state += [v for v in values.values() if isinstance(v, Tensor)]
    return state, scales


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.__name__)
def test_recipes_give_what_pytorchs_scaler_and_fp32_give(recipe: Recipe, optimizer: str) -> None:
    ours, scales = train(GradScaler("cpu", 128.0, growth_interval=2), recipe, optimizer)
    theirs, their_scales = train(torch.amp.GradScaler("cpu", 128.0, growth_interval=2), recipe, optimizer)
    fp32, _ = train(NoScaler(), recipe, optimizer)
    assert scales == their_scales == [128.0, 256.0, 128.0, 128.0, 256.0, 256.0]
    assert len(ours) == len(theirs) == len(fp32)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(ours, fp32, strict=True))
    assert all(value.isfinite().all() for value in ours)


def test_only_the_optimizer_with_the_overflow_skips() -> None:
    """In each order: a peer that keeps one flag for all optimizers steps on inf, or does not lower the scale."""
    for overflowed in (0, 1):
        for unscale_first in (False, True):
            weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
            optimizers = [torch.optim.SGD([w], lr=0.5) for w in weights]
            scaler = GradScaler("cpu", 64.0)
            scaler.scale(weights[0].sum() + weights[1].sum()).backward()
            gradient = weights[overflowed].grad
            assert gradient is not None
            gradient[0] = math.nan
            if unscale_first:
                for optimizer in optimizers:
                    scaler.unscale_(optimizer)
            applied = []
            for optimizer in optimizers:
                scaler.step(optimizer)
                applied.append(scaler.step_was_applied)
            scaler.update()
            assert applied == [overflowed == 1, overflowed == 0]
            assert torch.equal(weights[overflowed], torch.ones(2))
            assert torch.equal(weights[1 - overflowed], torch.full((2,), 0.5))
            assert scaler.get_scale() == 32.0 and scaler.skipped_steps == 1


def test_the_flag_of_the_last_step_outlives_the_update() -> None:
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    first, second = (torch.optim.SGD([w], lr=0.5) for w in weights)
    scaler = GradScaler("cpu", 64.0)
    scaler.scale(weights[0].sum() + weights[1].sum() * math.inf).backward()
    scaler.unscale_(first)
    scaler.step(second)
    assert not scaler.step_was_applied
    scaler.step(first)
    scaler.update()  # PyTorch adds up the optimizers' findings in place
    assert scaler.step_was_applied and torch.equal(weights[0], torch.full((2,), 0.5))


@pytest.mark.parametrize("overflow", [False, True])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.SparseAdam])
def test_sparse_gradients_are_unscaled_and_checked(make: Any, overflow: bool) -> None:
    results = []
    for scaler in (GradScaler("cpu", 128.0), NoScaler()):
        torch.manual_seed(0)
        table = nn.Embedding(5, 3, sparse=True)
        before = table.weight.detach().clone()
        optimizer = make(table.parameters(), lr=0.25)
        loss = table(torch.tensor([1, 3, 3])).pow(2).sum()  # 3 twice: uncoalesced
        scaler.scale(loss * math.inf if overflow else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(table.weight[[0, 2, 4]], before[[0, 2, 4]])
        assert torch.equal(table.weight, before) == overflow
        results.append(table.weight.detach())
        if isinstance(scaler, GradScaler):
            assert scaler.step_was_applied == (not overflow)
            assert scaler.get_scale() == (64.0 if overflow else 128.0)
    assert torch.equal(*results)


def test_misuse_is_refused_as_pytorch_refuses_it() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    scaler = GradScaler("cpu")
    with pytest.raises(AssertionError, match="_scale is None"):
        scaler.step(optimizer)
    scaler.scale(weight.sum()).backward()
    with pytest.raises(AssertionError, match="No inf checks were recorded prior to update"):
        scaler.update()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.unscale_(optimizer)
    with pytest.raises(AssertionError, match="only be pickled at the beginning"):
        scaler.__getstate__()
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match=r"step\(\) has already been called"):
        scaler.step(optimizer)


def test_the_value_of_the_step_is_handed_on() -> None:
    class Telling(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            return 7.0

    weight = nn.Parameter(torch.ones(2))
    optimizer, scaler = Telling([weight], lr=0.5), GradScaler("cpu")
    assert isinstance(scaler, torch.amp.GradScaler)
    scaler.scale(weight.sum()).backward()
    assert scaler.step(optimizer) == 7.0
    scaler.update()
    scaler.scale(weight.sum() * math.nan).backward()
    assert scaler.step(optimizer) is None


def test_unscaling_finds_inf_and_nan_in_any_layout_and_format() -> None:
    """PyTorch's own test of `_unscale_grads_`, in its essence: contiguous, strided, FP16, an inf in any of them."""
    values = torch.full((6, 6), 4.0)
    for bad in (None, 0, 1, 2, 3):
        for poison in (math.inf, -math.inf, math.nan):
            gradients = [values.clone(), values.clone()[:, :5], values.half(), values.double().t()]
            if bad is not None:
                gradients[bad][2, 2] = poison
            weights = [torch.empty_like(g) for g in gradients]
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient
            optimizer = torch.optim.SGD(weights, lr=1.0)
            found = GradScaler("cpu")._unscale_grads_(optimizer, torch.full((1,), 0.25), torch.zeros(1), True)
            assert sum(flag.item() for flag in found.values()) == (0 if bad is None else 1)
            for index, gradient in enumerate(gradients):
                if index != bad:
                    assert torch.equal(gradient, torch.ones_like(gradient))


def test_fp16_duplicates_of_a_sparse_gradient_are_added_before_the_check() -> None:
    indices = torch.tensor([[0, 1, 0], [2, 0, 2]])

    def sparse(*values: float) -> Tensor:
        return torch.sparse_coo_tensor(indices, values, (2, 3), dtype=torch.float16, check_invariants=True)

    for value, overflows in ((16000.0, False), (64000.0, True)):  # twice 64000 is beyond FP16
        weight = sparse(1.0, 1.0, 1.0)
        weight.grad = sparse(value, 32.0, value)
        optimizer = torch.optim.SGD([weight], lr=1.0)
        found = GradScaler("cpu")._unscale_grads_(optimizer, torch.full((1,), 0.25), torch.zeros(1), True)
        assert [bool(flag.item()) for flag in found.values()] == [overflows]
        if not overflows:
            assert weight.grad.to_dense().tolist() == [[0.0, 0.0, 8000.0], [8.0, 0.0, 0.0]]


@pytest.mark.parametrize("bad", [None, math.inf, math.nan])
def test_complex_gradients_are_unscaled_where_pytorchs_kernel_refuses_them(bad: float | None) -> None:
    weight = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    for scaler in (torch.amp.GradScaler("cpu", 4.0), GradScaler("cpu", 4.0)):
        scaler.scale(torch.ones(()))
        weight.grad = torch.tensor([4.0 + 8.0j, complex(0.0, bad or 4.0)])
        if isinstance(scaler, GradScaler):
            scaler.step(optimizer)
            assert scaler.step_was_applied == (bad is None)
            assert weight.tolist() == ([0.5 - 1.0j, 1.0 - 0.5j] if bad is None else [1.0, 1.0])
        else:
            with pytest.raises(RuntimeError):
                scaler.step(optimizer)


def test_optimizers_that_take_the_scaler_or_its_tensors_get_them() -> None:
    got: list[Any] = []

    class TakesScaler(torch.optim.SGD):
        _step_supports_amp_scaling = True

        def step(self, closure: Any = None, *, grad_scaler: Any = None) -> None:  # type: ignore[override]
            got.append(grad_scaler)

    class TakesTensors(torch.optim.SGD):
        _step_supports_amp_scaling = True

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            got.append((self.grad_scale.item(), self.found_inf.item()))  # type: ignore[attr-defined]

    weight = nn.Parameter(torch.ones(2))
    first, second = TakesScaler([weight], lr=1.0), TakesTensors([weight], lr=1.0)
    scaler = GradScaler("cpu", 2.0, min_scale=0.5)
    scaler.scale(weight.sum()).backward()
    with pytest.warns(FutureWarning, match="passing itself"):
        scaler.step(first)
    assert got == [scaler]
    scaler = GradScaler("cpu", 2.0)
    scaler.scale(weight.sum()).backward()
    scaler.step(second)
    scaler.update()
    assert got[1:] == [(2.0, 0.0)]
    assert not hasattr(second, "grad_scale") and not hasattr(second, "found_inf")


def test_unscaled_gradients_are_not_checked_again() -> None:
    """Between `unscale_` and `step` a script may do to them what it wants."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    scaler = GradScaler("cpu")
    scaler.scale(weight.sum()).backward()
    scaler.unscale_(optimizer)
    assert weight.grad is not None
    weight.grad[0] = math.inf
    scaler.step(optimizer)
    scaler.update()
    assert weight.tolist() == [-math.inf, 0.5] and scaler.get_scale() == 2.0**16


def test_state_loads_before_and_after_the_first_use() -> None:
    for used in (False, True):
        saved = GradScaler("cpu", 4.0, 4.0, 0.25, 2)
        scaler = GradScaler("cpu", 8.0, 8.0, 0.125, 1)
        scaler._init_growth_tracker = 7
        if used:
            scaler.scale(torch.full((1,), 4.0))
            assert isinstance(scaler._scale, torch.FloatTensor)
        scaler.load_state_dict(saved.state_dict())
        assert scaler.get_scale() == 4.0 and scaler._init_growth_tracker == 0
        assert (scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval()) == (4.0, 0.25, 2)
        fresh = torch.amp.grad_scaler._refresh_per_optimizer_state()
        assert scaler._per_optimizer_states["any"] == fresh  # type: ignore[index]
        assert scaler.scale(torch.tensor([4.0])).item() == 16.0
