"""What one step asks of a CUDA device, after the backward pass: how often the host waits, and how much it starts.

A wait costs what the host could have prepared meanwhile, a start some microseconds; neither shows in a result, so
nothing else would tell that one came back. The device is a fake one (`fake_cuda`), the model a GPT of 52 tensors: what
is done for each tensor shows. "More" is what a way starts beyond PyTorch's own for the same policy: the fused AdamW on
FP32 parameters, its scaler, and ``clip_grad_norm_``. Counts are upper bounds, for they differ a little between
PyTorch's versions; waits are exact.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fake_cuda import CUDA, Counting, FakeCuda
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import halfstep
from halfstep import optim
from halfstep.optim import arrivals, backends
from halfstep.optim.backends import cuda, eager
from halfstep.optim.clipping import multiply_
from halfstep.policy import parse
from halfstep.scale import KeptBuffers
from halfstep.scale.skips import total
from halfstep.split import SplitTensor
from halfstep.transfer import moved

Step = Callable[[], object]
LAYERS, WIDTH = 4, 64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        yield FakeCuda(monkeypatch)
    gc.collect()


def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.device("meta"):
        embeddings = [nn.Embedding(256, WIDTH), nn.Embedding(32, WIDTH)]
        model = nn.Sequential(*embeddings, *(Block() for _ in range(LAYERS)), nn.LayerNorm(WIDTH))
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=CUDA))
    return model


def count(device: FakeCuda, model: nn.Module, step: Step) -> Counting:
    """What the third step asks for, with gradients in the same places in each."""
    parameters = list(model.parameters())
    gradients = [torch.empty_like(parameter) for parameter in parameters]
    for _ in range(3):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        with device.counting() as counted:
            step()
    return counted


def waits_of(counted: Counting) -> list[str]:
    return list(counted.waits.elements())


def fused(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)


def foreach(parameters: Any) -> torch.optim.Optimizer:
    """Knows nothing of scales: somebody has to know before whether it is to be called."""
    return torch.optim.AdamW(parameters, lr=1e-3, foreach=True)


def smallest(parameters: Any) -> torch.optim.Optimizer:
    return optim.AdamW(parameters, lr=1e-3, master="24bit", state="8bit")


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "torch fused": fused,
    "torch foreach": foreach,
    "adamw": optim.AdamW,
    "24bit+8bit": smallest,
    "adam": optim.Adam,
    "sgd": lambda parameters: optim.SGD(parameters, lr=0.1, momentum=0.9),
    "lion": optim.Lion,
}


def torch_way(device: FakeCuda, limit: float | None, *, scales: bool) -> int:
    """What PyTorch's own loop starts; it waits for nothing."""
    model = make_model()
    optimizer = fused(model.parameters())
    scaler = torch.amp.GradScaler("cuda", enabled=scales)

    def step() -> None:
        scaler.scale(torch.empty((), device=CUDA))
        if limit is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), limit)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    counted = count(device, model, step)
    assert waits_of(counted) == []
    return sum(counted.started.values())


def put_in_planes(model: nn.Module, upper: torch.dtype) -> None:
    """What a policy does to real parameters; these have no memory to be split."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() > 1:
                planes = (torch.empty(parameter.shape, dtype=dtype, device=CUDA) for dtype in (upper, torch.int16))
                module._parameters[name] = nn.Parameter(SplitTensor(*planes))


def engine_way(device: FakeCuda, policy: str, optimizer: str, limit: float | None) -> Counting:
    model = make_model()
    if parse(policy).storage == "split":
        put_in_planes(model, parse(policy).compute_dtype)
    with device.counting():
        mp = halfstep.MixedPrecision(model, OPTIMIZERS[optimizer](model.parameters()), policy)

    def step() -> None:
        mp.scaler.scale(torch.empty((), device=CUDA))
        mp.step(max_grad_norm=limit)

    return count(device, model, step)


#: Policy and optimizer: how much more than PyTorch's own way is started without and with clipping. The host waits once
#: where there is something to say, which is whether the step was applied, and the norm.
ENGINE: dict[tuple[str, str], tuple[int, int]] = {
    ("fp32", "torch fused"): (0, 3),
    ("bf16-mixed", "torch fused"): (0, 3),
    ("bf16-mixed", "torch foreach"): (6, 9),
    ("bf16-mixed", "adamw"): (0, 16),
    ("bf16-mixed", "24bit+8bit"): (1, 17),
    ("bf16-mixed", "adam"): (0, 16),
    ("bf16-mixed", "sgd"): (0, 16),
    ("bf16-mixed", "lion"): (0, 16),
    ("bf16-master", "torch fused"): (3, 6),
    ("bf16-master", "torch foreach"): (3, 6),
    ("bf16-master", "adamw"): (1, 18),
    ("bf16-master", "24bit+8bit"): (2, 19),
    ("bf16-master", "adam"): (1, 18),
    ("bf16-master", "sgd"): (1, 18),
    ("bf16-master", "lion"): (1, 18),
    ("fp16-mixed", "torch fused"): (10, 7),
    ("fp16-mixed", "torch foreach"): (14, 11),
    ("fp16-mixed", "adamw"): (19, 17),
    ("fp16-mixed", "24bit+8bit"): (20, 18),
    ("fp16-master", "torch fused"): (13, 10),
    ("fp16-master", "torch foreach"): (9, 9),
    ("fp16-master", "adamw"): (21, 19),
    ("fp16-master", "24bit+8bit"): (22, 20),
}


@pytest.mark.parametrize("clips", [False, True], ids=["", "clips"])
@pytest.mark.parametrize(("policy", "optimizer"), ENGINE, ids=["-".join(key) for key in ENGINE])
def test_a_step_of_mixed_precision(policy: str, optimizer: str, clips: bool, device: FakeCuda) -> None:
    limit = 1.0 if clips else None
    scales = policy.startswith("fp16")
    counted = engine_way(device, policy, optimizer, limit)
    assert len(waits_of(counted)) == int(clips or scales), waits_of(counted)
    more = sum(counted.started.values()) - torch_way(device, limit, scales=scales)
    assert ENGINE[policy, optimizer][clips] <= 40
    assert more <= ENGINE[policy, optimizer][clips], (more, counted.started)


def own_way(device: FakeCuda, make: Callable[[Any], Any], step_of: Callable[[Any, list[Tensor]], Step]) -> Counting:
    model = make_model(torch.bfloat16)
    parameters = list(model.parameters())
    return count(device, model, step_of(make(parameters), parameters))


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if not name.startswith("torch")])
def test_the_optimizers_wait_for_nothing(name: str, device: FakeCuda) -> None:
    """What waits cannot be captured in a CUDA graph."""
    plain = own_way(device, OPTIMIZERS[name], lambda optimizer, _: optimizer.step)
    clipped = own_way(device, OPTIMIZERS[name], lambda optimizer, _: lambda: optimizer.clipped_step(1.0))
    looked = own_way(device, OPTIMIZERS[name], lambda optimizer, _: optimizer.survey)
    assert waits_of(plain) == waits_of(clipped) == waits_of(looked) == []
    assert sum(plain.started.values()) <= 3, plain.started
    assert sum(looked.started.values()) <= 10, looked.started
    assert sum(clipped.started.values()) <= 22, clipped.started


@pytest.mark.parametrize("clips", [False, True], ids=["", "clips"])
@pytest.mark.parametrize("scales", [False, True], ids=["", "scales"])
def test_gradients_that_are_released(clips: bool, scales: bool, device: FakeCuda) -> None:
    """Two launches for each parameter, as PyTorch's fused optimizer needs when called for each; two more to look."""
    scaler = halfstep.GradScaler("cuda", enabled=scales)

    def step_of(optimizer: Any, parameters: list[Tensor]) -> Step:
        optimizer.release.max_grad_norm = 1.0 if clips else None
        if scales:
            optimizer.release.scale_with(scaler)

        def step() -> None:
            scaler.scale(torch.empty((), device=CUDA))
            for parameter in parameters:
                optimizer.release.take(parameter)
            scaler.step(optimizer)
            scaler.update()

        return step

    counted = own_way(device, lambda p: optim.AdamW(p, release_gradients=True), step_of)
    assert waits_of(counted) == []
    each = 4 if clips or scales else 2
    assert sum(counted.started.values()) <= each * (4 + 12 * LAYERS) + 40, counted.started


def test_released_gradients_in_the_engine(device: FakeCuda) -> None:
    model = make_model()
    optimizer = optim.AdamW(model.parameters(), release_gradients=True)
    release: Any = optimizer.release
    release.max_grad_norm = 1.0
    mp = halfstep.MixedPrecision(model, optimizer, "fp16-mixed")

    def step() -> None:
        mp.scaler.scale(torch.empty((), device=CUDA))
        for parameter in model.parameters():
            release.take(parameter)
        mp.step(max_grad_norm=1.0)

    assert len(waits_of(count(device, model, step))) == 1


def test_masters_around_another_optimizer(device: FakeCuda) -> None:
    def step_of(optimizer: Any, _: list[Tensor]) -> Step:
        def step() -> None:
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()

        return step

    counted = own_way(device, lambda p: halfstep.MasterWeights(fused(p)), step_of)
    assert waits_of(counted) == []
    assert sum(counted.started.values()) <= torch_way(device, 1.0, scales=False) + 5, counted.started


@pytest.mark.parametrize("make", [fused, foreach])
def test_the_scaler_by_itself_waits_as_often_as_pytorchs(make: Callable[[Any], Any], device: FakeCuda) -> None:
    waits = []
    for kind in (torch.amp.GradScaler, halfstep.GradScaler):
        model = make_model()
        optimizer, scaler = make(model.parameters()), kind("cuda")

        def step(optimizer: Any = optimizer, scaler: Any = scaler) -> None:
            scaler.scale(torch.empty((), device=CUDA))
            scaler.step(optimizer)
            scaler.update()

        waits.append(len(waits_of(count(device, model, step))))
    assert waits == [int(make is foreach)] * 2


def test_gradients_on_both_sides(device: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers that come to the host are waited for: the mode refuses a copy that would be read before it came."""
    monkeypatch.setattr(backends, "choose", lambda _, where: (cuda if where.type == "cuda" else eager, "by place"))
    model = make_model()
    model[0].weight = nn.Parameter(torch.empty(256, WIDTH))  # type: ignore[index]
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    scaler = halfstep.GradScaler("cuda")

    def step() -> None:
        scaler.scale(torch.empty((), device=CUDA))
        scaler.step(optimizer)
        scaler.update()

    counted = count(device, model, step)
    assert {wait.partition(",")[0] for wait in waits_of(counted)} == {"a copy from cuda"}


def test_small_things_on_the_host_wait_for_the_device(device: FakeCuda) -> None:
    on_device, on_host = torch.zeros((), device=CUDA), torch.zeros(())
    model, kept = nn.Sequential(nn.BatchNorm1d(3)), KeptBuffers()
    with device.counting() as counted:
        kept.keep(model)
        kept.wrote(model)
        claimed = kept.claim(optim.SGD(model.parameters(), lr=0.1))
        for start in (
            lambda: moved(on_device, on_host.device),
            lambda: total([on_device], on_host.device),
            lambda: multiply_([torch.empty(3)], [on_device]),
            lambda: kept.put_back(claimed, on_device),
        ):
            before = counted.waits.total()
            start()
            assert counted.waits.total() == before + 1
        moved(on_host.reshape(1), CUDA)
        total([on_host, on_host], CUDA)
        multiply_([torch.empty(3, device=CUDA)], [on_host])
        assert counted.waits.total() == before + 1


def test_the_counting_sees_what_it_is_for(device: FakeCuda) -> None:
    x = torch.empty(4, device=CUDA)
    with device.counting() as counted:
        for wait in (
            lambda: x.sum().item(),
            lambda: float(x[0]),
            lambda: bool((x > 0).any()),
            x.tolist,
            x.cpu,
            lambda: torch.ones(4).to(CUDA),
            lambda: torch.equal(x, x),
        ):
            before = counted.waits.total()
            with contextlib.suppress(DataDependentOutputException):
                wait()
            assert counted.waits.total() == before + 1
    with device.counting() as counted, pytest.raises(AssertionError, match="before it came"):
        x.to("cpu", non_blocking=True)
    with device.counting() as counted:
        y = x.view(2, 2).t().mul(2).add_(1)
        torch._foreach_add_([x, x], 1.0)
        torch.ones(4).to(CUDA, non_blocking=True)
        y.detach().unbind()
    assert (counted.waits.total(), counted.started.total()) == (0, 4)


# On a device that is there ------------------------------------------------------------------------------------------


needs_device = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class OnDevice:
    """A small model whose steps are taken with gradients that are given."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(96, 128), nn.LayerNorm(128), nn.Linear(128, 8)).to("cuda", dtype)
        self.gradients = [torch.randn_like(p) for p in self.model.parameters()]

    def feed(self, factor: float = 1.0) -> None:
        for parameter, gradient in zip(self.model.parameters(), self.gradients, strict=True):
            parameter.grad = gradient * factor

    def values(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]


def without_waits(step: Step) -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


class TestOnADevice:
    pytestmark = needs_device

    @pytest.mark.parametrize("name", [name for name in OPTIMIZERS if not name.startswith("torch")])
    def test_a_clipped_step_waits_for_nothing_and_can_be_captured(self, name: str) -> None:
        made = [OnDevice(torch.bfloat16) for _ in range(2)]
        optimizers = [OPTIMIZERS[name](one.model.parameters()) for one in made]
        for one, optimizer in zip(made, optimizers, strict=True):
            for _ in range(2):  # compiles
                one.feed()
                optimizer.clipped_step(1.0)
            without_waits(lambda optimizer=optimizer: optimizer.clipped_step(1.0))  # type: ignore[misc]
            one.feed(0.5)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizers[0].clipped_step(1.0)
        for _ in range(3):
            graph.replay()
            optimizers[1].clipped_step(1.0)
        assert all(map(torch.equal, made[0].values(), made[1].values()))

    @pytest.mark.parametrize("scales", [False, True])
    def test_released_gradients(self, scales: bool) -> None:
        """The backward pass waits for nothing, and its steps have the bits of torch's operations on the same sums."""
        results = []
        for fused_arrival in (True, False):
            one = OnDevice(torch.bfloat16)
            optimizer = optim.AdamW(one.model.parameters(), lr=1e-2, release_gradients=True)
            release: Any = optimizer.release
            release.max_grad_norm = 1.0
            scaler = halfstep.GradScaler("cuda", 2.0**8, enabled=scales)
            if scales:
                release.scale_with(scaler)
            with pytest.MonkeyPatch.context() as patch:
                if not fused_arrival:
                    patch.setattr(arrivals, "Arriving", type(None))
                for step in range(4):
                    scaler.scale(torch.zeros((), device="cuda"))
                    one.feed((1.0, 3.0, math.inf if scales else 2.0, 0.1)[step])
                    taken = functools.partial(deque, map(release.take, one.model.parameters()), 0)
                    without_waits(taken) if step else taken()
                    scaler.step(optimizer)
                    scaler.update()
            results.append([*one.values(), release.grad_norm])
        assert all(map(torch.equal, *results))

    def test_masters_around_another_optimizer(self) -> None:
        one = OnDevice(torch.bfloat16)
        optimizer = halfstep.MasterWeights(fused(one.model.parameters()))

        def step() -> None:
            one.feed()
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()

        step()
        without_waits(step)
        first = next(one.model.parameters())
        first.data.mul_(2)  # seen, although it moves no version
        before = first.detach().float()
        step()
        assert (optimizer.of(first) - before).abs().amax() < 1e-2
        assert torch.equal(first, optimizer.of(first).bfloat16())

    @pytest.mark.parametrize("policy", ["bf16-mixed", "bf16-master", "fp16-mixed", "fp16-master"])
    @pytest.mark.parametrize("name", ["torch fused", "torch foreach", "adamw"])
    def test_mixed_precision_waits_once(self, policy: str, name: str) -> None:
        one = OnDevice()
        mp = halfstep.MixedPrecision(one.model, OPTIMIZERS[name](one.model.parameters()), policy)
        x = torch.randn(4, 96, device="cuda")
        for limit in (None, 1.0):
            for step in range(3):
                with mp.autocast():
                    loss = one.model(x).float().square().mean()
                mp.backward(loss)
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    with warnings.catch_warnings(record=True) as caught:
                        warnings.simplefilter("always")
                        mp.step(max_grad_norm=limit)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                waits = [w for w in caught if "synchronizing CUDA operation" in str(w.message)]
                assert len(waits) == int(limit is not None or policy.startswith("fp16")) or step == 0
