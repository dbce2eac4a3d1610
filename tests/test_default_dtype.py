"""`torch.set_default_dtype` and `torch.set_default_device` change nothing: each scenario below states the dtype and the
device of all that it makes, and has to give the same bits under every default as under PyTorch's own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import halfstep
from halfstep.optim.options import State
from halfstep.split.store import split_parameters

DTYPES = (torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((64, 80), (5,), (3, 7))  # the first is large enough for 8-bit state

Scenario = Callable[[Path], list[Any]]


@pytest.fixture
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    yield request.param
    torch.set_default_dtype(before)


@pytest.fixture
def device() -> Iterator[str]:
    yield "meta"
    torch.set_default_device(None)


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def parameters(kind: torch.dtype) -> list[nn.Parameter]:
    return [nn.Parameter(normal(i, *shape).to(kind)) for i, shape in enumerate(SHAPES)]


def give_gradients(ours: list[nn.Parameter], step: int) -> None:
    for i, parameter in enumerate(ours):
        parameter.grad = normal(100 * step + 10 + i, *parameter.shape).to(parameter.dtype)


def make_model() -> nn.Sequential:
    made: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    model = nn.Sequential(
        nn.Linear(16, 64, **made),
        nn.LayerNorm(64, **made),
        nn.ReLU(),
        nn.Linear(64, 64, **made),
        nn.Linear(64, 4, **made),
    )
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(normal(i, *parameter.shape) * 0.2)
    return model


def loss_of(model: nn.Module, step: int) -> Tensor:
    return nn.functional.mse_loss(model(normal(step, 8, 16)).float(), normal(step + 50, 8, 4))


def held(optimizer: Any, ours: list[nn.Parameter]) -> list[Any]:
    """Weights, masters and state."""
    state = [dict(sorted(optimizer.state[p].items())) for p in ours]
    masters = [optimizer.master(p) for p in ours] if hasattr(optimizer, "master") else []
    return [list(ours), state, masters]


def steps(make: Callable[[Any], Any], kind: torch.dtype, _: Path) -> list[Any]:
    ours = parameters(kind)
    optimizer = make(ours)
    for step in range(4):
        give_gradients(ours, step)
        optimizer.step()
    return held(optimizer, ours)


def survey_with_an_inf(_: Path) -> list[Any]:
    ours = parameters(torch.bfloat16)
    optimizer = halfstep.optim.AdamW(ours, lr=1e-2)
    nothing = optimizer.survey()
    give_gradients(ours, 0)
    sound = optimizer.survey()
    assert ours[1].grad is not None
    ours[1].grad[2] = float("inf")
    bad = optimizer.survey()
    assert [float(s.found_inf) for s in (nothing, sound, bad)] == [0.0, 0.0, 1.0]
    return [*nothing, *sound, *bad]


def clipped_step(state: State, _: Path) -> list[Any]:
    ours = parameters(torch.bfloat16)
    optimizer = halfstep.optim.AdamW(ours, lr=1e-2, state=state)
    surveys = []
    for step in range(4):
        give_gradients(ours, step)
        if step == 2:
            assert ours[0].grad is not None
            ours[0].grad[0, 0] = float("nan")
        surveys.extend(optimizer.clipped_step(1.0))
    return [*surveys, *held(optimizer, ours)]


def clip_grad_norm(_: Path) -> list[Any]:
    ours = parameters(torch.bfloat16)
    wrapped = halfstep.MasterWeights(torch.optim.SGD(ours, lr=0.1))
    nothing = wrapped.clip_grad_norm_(1.0)
    give_gradients(ours, 0)
    return [nothing, wrapped.clip_grad_norm_(1.0, loss_scale=4.0), [p.grad for p in ours]]


def release(max_grad_norm: float | None, _: Path) -> list[Any]:
    model = make_model().to(torch.bfloat16)
    optimizer = halfstep.optim.AdamW(model.parameters(), lr=1e-2, release_gradients=True)
    scaler = halfstep.GradScaler("cpu", init_scale=16.0)
    optimizer.release.max_grad_norm = max_grad_norm
    optimizer.release.scale_with(scaler)
    losses = []
    for step in range(4):
        loss = nn.functional.mse_loss(model(normal(step, 8, 16).bfloat16()).float(), normal(step + 50, 8, 4))
        scaler.scale(loss * (float("inf") if step == 1 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss)
    return [losses, scaler.get_scale(), optimizer.release.grad_norm, *held(optimizer, list(model.parameters()))]


def scaled(make: Callable[[Any], Any], unscale: bool, kind: torch.dtype, _: Path) -> list[Any]:
    model = make_model().to(kind)
    ours = list(model.parameters())
    optimizer = make(ours)
    scaler = halfstep.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    told = []
    for step in range(5):
        x = normal(step, 8, 16).to(kind)
        loss = nn.functional.mse_loss(model(x).float(), normal(step + 50, 8, 4))
        scaler.scale(loss).backward()
        if step == 2:
            assert ours[0].grad is not None
            ours[0].grad[1, 1] = float("inf")
        if unscale:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(ours, 1.0)
        scaler.step(optimizer)
        scaler.update()
        told.append((loss, scaler.step_was_applied, scaler.get_scale()))
        optimizer.zero_grad()
    assert [applied for _, applied, _ in told] == [True, True, False, True, True]
    return [told, ours, scaler.state_dict()]


def engine(policy: str, make: Callable[[Any], Any], _: Path) -> list[Any]:
    model = make_model()
    optimizer = make(model.parameters())
    mp = halfstep.MixedPrecision(model, optimizer, policy=policy)
    told = []
    for step in range(5):
        with mp.autocast():
            loss = loss_of(model, step)
        mp.backward(loss * (float("inf") if step == 2 else 1.0))
        result = mp.step(max_grad_norm=0.5)
        told.append((loss, result.applied, result.scale, result.grad_norm))
    return [told, list(model.parameters()), list(mp.scaler.state_dict().items())]


def split(upper: torch.dtype, _: Path) -> list[Any]:
    model = make_model()
    split_parameters(model, upper=upper)
    optimizer = halfstep.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(3):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return list(model.parameters())


def checkpoint(folder: Path) -> list[Any]:
    ours = parameters(torch.bfloat16)
    optimizer = halfstep.optim.AdamW(ours, lr=1e-2, state="8bit", master="24bit")
    give_gradients(ours, 0)
    optimizer.step()
    state = {"weights": [p.detach() for p in ours], "optimizer": optimizer.state_dict()}
    halfstep.save(state, folder / "run.ckpt")
    read = halfstep.load(folder / "run.ckpt")
    again = [nn.Parameter(weight) for weight in read["weights"]]
    resumed = halfstep.optim.AdamW(again, lr=1e-2, state="8bit", master="24bit")
    resumed.load_state_dict(read["optimizer"])
    of_torch = halfstep.optim.AdamW(parameters(torch.float32), lr=1e-2)
    of_torch.load_state_dict(torch.optim.AdamW(parameters(torch.float32), lr=1e-2).state_dict())
    give_gradients(again, 1)
    resumed.step()
    return held(resumed, again)


def from_torch(_: Path) -> list[Any]:
    """Through a state of `torch.optim`, whose count of steps has the default dtype."""
    ours = parameters(torch.float32)
    theirs = torch.optim.AdamW(ours, lr=1e-2)
    give_gradients(ours, 0)
    theirs.step()
    optimizer = halfstep.optim.AdamW(ours, lr=1e-2)
    optimizer.load_state_dict(theirs.state_dict())
    give_gradients(ours, 1)
    optimizer.step()
    return held(optimizer, ours)


def adamw(**options: Any) -> Callable[[Any], Any]:
    return functools.partial(halfstep.optim.AdamW, lr=1e-2, **options)


def wrapped(parameters: Any) -> halfstep.MasterWeights:
    return halfstep.MasterWeights(torch.optim.SGD(parameters, lr=1e-2, momentum=0.9))


def wrapped_adamw(parameters: Any) -> halfstep.MasterWeights:
    return halfstep.MasterWeights(torch.optim.AdamW(parameters, lr=1e-2))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
STEPS: dict[str, tuple[Callable[[Any], Any], torch.dtype]] = {
    "AdamW": (adamw(), BF16),
    "AdamW of fp16": (adamw(), FP16),
    "AdamW of fp32": (adamw(amsgrad=True), FP32),
    "AdamW 24bit 8bit": (adamw(master="24bit", state="8bit"), BF16),
    "AdamW fp32 master, eager": (adamw(master="fp32", state="8bit", backend="eager"), BF16),
    "SGD": (functools.partial(halfstep.optim.SGD, lr=0.1, momentum=0.9), BF16),
    "Lion": (functools.partial(halfstep.optim.Lion, lr=1e-3, master="none", state="bf16"), BF16),
    "MasterWeights": (wrapped, BF16),
}
SCENARIOS: dict[str, Scenario] = {
    **{name: functools.partial(steps, make, kind) for name, (make, kind) in STEPS.items()},
    "survey": survey_with_an_inf,
    "clipped_step": functools.partial(clipped_step, "fp32"),
    "clipped_step 8bit": functools.partial(clipped_step, "8bit"),
    "clip_grad_norm_": clip_grad_norm,
    "release": functools.partial(release, None),
    "release, clipped": functools.partial(release, 0.5),
    "GradScaler": functools.partial(scaled, adamw(), False, BF16),
    "GradScaler unscales": functools.partial(scaled, adamw(), True, FP32),
    "GradScaler, MasterWeights": functools.partial(scaled, wrapped, False, BF16),
    "GradScaler, torch.optim": functools.partial(scaled, sgd, False, FP32),
    "checkpoint": checkpoint,
    "split bf16": functools.partial(split, BF16),
    "split fp16": functools.partial(split, FP16),
    **{
        f"{policy}, {name}": functools.partial(engine, policy, make)
        for policy in ("bf16-mixed", "fp16-mixed", "bf16-master")
        for name, make in (("torch.optim", sgd), ("halfstep.optim", adamw()))
    },
}
#: Where PyTorch's own AdamW makes its count of steps, on the default device.
WITH_TORCHS_COUNT: dict[str, Scenario] = {
    "MasterWeights of AdamW": functools.partial(steps, wrapped_adamw, BF16),
    "a state of torch.optim": from_torch,
}


def assert_same(ours: Any, theirs: Any, where: str) -> None:
    """Equal in dtype, device and bits; PyTorch's own count of steps in its value alone."""
    if isinstance(theirs, Tensor):
        if where.endswith(".step"):
            assert float(ours) == float(theirs), where
            return
        assert (ours.dtype, ours.device, ours.shape) == (theirs.dtype, theirs.device, theirs.shape), where
        assert torch.equal(bits(ours), bits(theirs)), where
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs), where
        for key in theirs:
            assert_same(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), where
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(one, other, f"{where}[{index}]")
    else:
        assert repr(ours) == repr(theirs), where


def bits(tensor: Tensor) -> Tensor:
    plain = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    return plain.view(torch.uint8) if plain.numel() else plain


def run(scenario: Scenario, folder: Path) -> list[Any]:
    folder.mkdir()
    torch.manual_seed(0)  # of stochastic rounding
    return scenario(folder)


@pytest.mark.parametrize("name", [*SCENARIOS, *WITH_TORCHS_COUNT])
@pytest.mark.parametrize("dtype", DTYPES, ids=str, indirect=True)
def test_the_default_dtype_changes_nothing(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    scenario = {**SCENARIOS, **WITH_TORCHS_COUNT}[name]
    expected = run(scenario, tmp_path / "float32")
    torch.set_default_dtype(dtype)
    assert_same(run(scenario, tmp_path / "other"), expected, name)


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_default_device_changes_nothing(name: str, device: str, tmp_path: Path) -> None:
    expected = run(SCENARIOS[name], tmp_path / "cpu")
    torch.set_default_device(device)
    ours = run(SCENARIOS[name], tmp_path / "other")
    torch.set_default_device(None)
    assert_same(ours, expected, name)
