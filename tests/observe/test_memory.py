"""Peak memory against closed forms and against PyTorch's own profiler, to the byte; gradient norms against float64."""

from __future__ import annotations

import gc
import math
import mmap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from halfstep.observe import (
    ACTIVATIONS,
    OTHER,
    PeakMemory,
    gradient_norm,
    peak_resident_bytes,
    resident_bytes,
)
from halfstep.record import Memory

FLOAT = 4


def measure(step: Callable[[], Any], names: Callable[[], dict[str, list[Tensor]]]) -> Memory:
    """One measured step; what it returns is dropped while it is measured."""
    gc.collect()
    tracker = PeakMemory()
    assert tracker.can_start()
    tracker.start()
    step()
    for category, tensors in names().items():
        tracker.name(category, tensors)
    (memory,) = tracker.finish(7)
    assert memory.device == "cpu"
    return memory


def own(memory: Memory) -> dict[str, int]:
    """Bytes by category, without what the rest of this process holds."""
    return {name: size for name, size in memory.by_category.items() if name != OTHER}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_product_by_hand_is_counted_to_the_byte(dtype: torch.dtype) -> None:
    b, i, o = 30, 20, 10
    x, w = torch.randn(b, i, dtype=dtype), torch.randn(i, o, dtype=dtype, requires_grad=True)
    upstream = torch.randn(b, o, dtype=dtype)

    def step() -> None:
        y = x @ w
        y.backward(upstream)

    memory = measure(step, lambda: {"inputs": [x, upstream], "parameters": [w], "gradients": [w.grad]})  # type: ignore[list-item]
    size = dtype.itemsize
    assert own(memory) == {
        "inputs": size * (b * i + b * o),
        "parameters": size * i * o,
        "gradients": size * i * o,
        ACTIVATIONS: size * b * o,  # y
    }
    assert memory.step == 7
    assert memory.at_op is not None and "mm" in memory.at_op
    assert memory.peak_bytes == sum(memory.by_category.values())


def test_what_was_freed_before_the_peak_is_not_in_it() -> None:
    small, large = 1000, 5000

    def step() -> None:
        a = torch.empty(small)
        b = torch.empty(large)
        del b
        c = torch.empty(large - small + 1)
        del a, c

    memory = measure(step, dict)
    assert own(memory) == {ACTIVATIONS: FLOAT * (small + large)}
    memory = measure(lambda: (torch.ones(small).exp().log(), torch.ones(large)), dict)
    assert own(memory) == {ACTIVATIONS: FLOAT * (small + large)}


def test_of_two_equal_peaks_the_first_names_the_op() -> None:
    def step() -> None:
        a = torch.zeros(9)
        del a
        b = torch.ones(9)
        del b

    assert measure(step, dict).at_op == "aten.zeros.default"


def test_views_and_in_place_results_are_counted_once() -> None:
    def step() -> None:
        a = torch.zeros(100, 10)
        b = a.t()[:5].add_(1)
        c = b.view_as(b).detach()
        assert c.untyped_storage().nbytes() == FLOAT * 1000

    assert own(measure(step, dict)) == {ACTIVATIONS: FLOAT * 1000}


def test_the_first_name_stays_and_a_gradient_from_before_the_step_is_known() -> None:
    w = torch.ones(100, requires_grad=True)
    w.grad = torch.ones(100)
    names = {"parameters": [w], "gradients": [w.grad], "again": [w, w.grad]}
    memory = measure(lambda: torch.ones(1), lambda: names)
    assert own(memory) == {"parameters": 400, "gradients": 400, ACTIVATIONS: FLOAT}


def make() -> tuple[nn.Sequential, torch.optim.Optimizer, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)
    return model, optimizer, torch.randn(128, 32), torch.randn(128, 8)


def train_step(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor, low: bool) -> None:
    optimizer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
        loss = (model(x).float() - y).pow(2).mean()
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("warm", [False, True])
def test_the_peak_is_that_of_pytorchs_profiler(warm: bool) -> None:
    model, optimizer, x, y = make()
    if warm:
        train_step(model, optimizer, x, y, low=False)
    state = lambda: [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]  # noqa: E731
    optimizer.zero_grad()
    before = sum(FLOAT * t.numel() for t in [*model.parameters(), x, y, *state()])
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        train_step(model, optimizer, x, y, low=False)
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    allocations = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    assert len(allocations) > 20
    live = peak = 0
    for _, size in allocations:
        live += size
        peak = max(peak, live)

    model, optimizer, x, y = make()
    if warm:
        train_step(model, optimizer, x, y, low=False)
    optimizer.zero_grad()
    memory = measure(
        lambda: train_step(model, optimizer, x, y, low=False),
        lambda: {
            "parameters": list(model.parameters()),
            "gradients": [p.grad for p in model.parameters() if p.grad is not None],
            "optimizer state": state(),
            "data": [x, y],
        },
    )
    assert sum(own(memory).values()) == before + peak
    assert memory.by_category["parameters"] == sum(FLOAT * p.numel() for p in model.parameters())
    assert memory.peak_bytes == sum(memory.by_category.values())


@pytest.mark.parametrize("low", [False, True])
def test_a_measured_step_computes_what_an_unmeasured_one_does(low: bool) -> None:
    results = []
    for measured in (False, True):
        model, optimizer, x, y = make()
        for _ in range(3):
            if measured:
                measure(lambda: train_step(model, optimizer, x, y, low), dict)  # noqa: B023
            else:
                train_step(model, optimizer, x, y, low)
        results.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_an_error_in_the_step_leaves_no_mode_behind() -> None:
    gc.collect()
    tracker = PeakMemory()
    tracker.start()
    kept = torch.ones(50)
    with pytest.raises(RuntimeError, match="shapes"):
        torch.ones(2, 3) @ torch.ones(2, 3)
    (memory,) = tracker.finish(1)
    assert _get_current_dispatch_mode_stack() == [] and PeakMemory.can_start()
    assert memory.by_category[ACTIVATIONS] >= kept.nbytes
    assert own(measure(lambda: torch.ones(3), dict)) == {ACTIVATIONS: 12}


def test_it_does_not_start_under_another_mode() -> None:
    class Other(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    with Other():
        assert not PeakMemory.can_start()
    assert PeakMemory.can_start()


def test_sparse_and_nested_results_do_not_break_it() -> None:
    def step() -> None:
        table = nn.Embedding(5, 3, sparse=True)
        table(torch.tensor([1, 1])).sum().backward()
        assert table.weight.grad is not None and table.weight.grad.is_sparse

    assert measure(step, dict).peak_bytes > 0


parameter = st.tuples(
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.integers(0, 40),
    st.floats(2.0**-10, 2.0**10),
    st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(parameter, max_size=6), st.integers(0, 2**20))
def test_the_gradient_norm_is_float64s_to_rounding(shapes: list[Any], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parameters, squares = [], 0.0
    for dtype, size, factor, has_gradient in shapes:
        p = torch.zeros(size, dtype=dtype, requires_grad=True)
        if has_gradient:
            p.grad = (torch.randn(size, generator=generator) * factor).to(dtype)
            squares += float(p.grad.double().pow(2).sum())
        parameters.append(p)
    norm = gradient_norm(iter(parameters))
    if not any(has_gradient for *_, has_gradient in shapes):
        assert norm is None
    else:
        assert norm == pytest.approx(math.sqrt(squares), rel=1e-6, abs=0.0)  # FP32 sums of at most 240 squares


def test_the_gradient_norm_of_sparse_and_of_broken_gradients() -> None:
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1, 1, 2])).sum().backward()
    assert gradient_norm(table.parameters()) == pytest.approx(math.sqrt(3 * 2**2 + 3), rel=1e-6)
    for bad in (math.inf, math.nan):
        w = torch.ones(2, requires_grad=True)
        w.grad = torch.tensor([1.0, bad])
        assert repr(gradient_norm([w])) == repr(abs(bad))


def test_a_16_bit_gradient_whose_square_overflows_still_has_a_norm() -> None:
    w = torch.ones(3, dtype=torch.float16, requires_grad=True)
    w.grad = torch.full((3,), 60000.0, dtype=torch.float16)
    assert gradient_norm([w]) == pytest.approx(60000.0 * math.sqrt(3), rel=1e-6)


def test_resident_memory_is_at_most_its_peak() -> None:
    now = resident_bytes()
    with mmap.mmap(-1, 64 << 20) as block:  # new pages: the heap may have as many to spare
        for page in range(0, len(block), 4096):
            block[page] = 1
        grown = resident_bytes()
    assert grown - now > 32 << 20
    assert peak_resident_bytes() >= grown - (1 << 20)


def test_shapes_without_memory_have_no_bytes() -> None:
    """Tensors on the meta device, of which models are made before they are loaded."""
    assert own(measure(lambda: [torch.ones(10**6, device="meta"), torch.ones(3)], dict)) == {ACTIVATIONS: 12}


class OnGpu(Tensor):
    """Says that it is on a GPU; its storage has no bytes here, as an accelerator's has none on the host."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnGpu:
        return torch.Tensor._make_wrapper_subclass(cls, inner.size(), dtype=inner.dtype, device="cuda:0")  # type: ignore[no-any-return,attr-defined]

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inner = [x.inner if isinstance(x, OnGpu) else x for x in args]
        return OnGpu(func(*inner, **(kwargs or {})))


def test_a_gpus_memory_and_the_hosts_are_counted_apart() -> None:
    data = torch.ones(5000)  # what a GPU does not hold must not be in its peak
    x = OnGpu(torch.ones(1000))
    size = x.untyped_storage().nbytes()
    assert size == FLOAT * 1000
    gc.collect()
    tracker = PeakMemory()
    tracker.start()
    tracker.name("data", [data])
    tracker.name("parameters", [x])
    y = x + x
    host = torch.ones(100)
    del y
    larger_on_host = torch.ones(200)
    on_gpu, on_host = tracker.finish(3)
    assert (on_gpu.device, on_host.device) == ("cuda", "cpu")
    assert on_gpu.by_category == {"parameters": size, ACTIVATIONS: size}
    assert on_gpu.at_op == "aten.add.Tensor" and on_gpu.peak_bytes == 2 * size
    assert on_host.at_op == "aten.ones.default" and on_host.by_category["data"] == data.nbytes
    assert own(on_host)[ACTIVATIONS] >= host.nbytes + larger_on_host.nbytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_peak_is_the_allocators_where_no_kernel_takes_a_workspace() -> None:
    host = torch.ones(10**6)
    x = torch.ones(256, 1024, device="cuda")
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    tracker = PeakMemory()
    tracker.start()
    tracker.name("inputs", [x])
    y = x * 2
    z = y + 1
    del y, z
    on_gpu, on_host = tracker.finish(1)
    assert (on_gpu.device, on_host.device) == ("cuda", "cpu")
    assert on_gpu.by_category[ACTIVATIONS] == 2 * x.nbytes == torch.cuda.max_memory_allocated() - before
    assert on_host.peak_bytes >= host.nbytes


class Silent(Tensor):
    """A tensor of somebody else's that answers nothing."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise LookupError(func)


def test_a_tensor_that_answers_nothing_does_not_keep_a_measurement_from_starting() -> None:
    silent = torch.zeros(3).as_subclass(Silent)
    memory = PeakMemory()
    memory.start()
    kept = torch.ones(1000)
    assert memory.finish(1)[0].peak_bytes >= kept.nbytes
    assert type(silent) is Silent
