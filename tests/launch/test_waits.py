"""A run waits for its device once a step, at the end, and what it reads there is what it read before, bit for bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from halfstep.launch import steps as steps_module
from halfstep.launch.reading import read
from halfstep.launch.steps import StepObserver
from halfstep.observe import gradient_norm

#: A training loop that counts what would make a host wait for its device: reading an element of a tensor.
SCRIPT = """
import sys
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

class Reads(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.where = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            frame = sys._getframe(1)
            while "/halfstep/" not in frame.f_code.co_filename and frame.f_code.co_filename != __file__:
                frame = frame.f_back
            self.where.append(f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_code.co_name}")
        return func(*args, **(kwargs or {}))

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
SCALER
reads = Reads()
with reads:
    for step in range(4):
        optimizer.zero_grad()
        loss = model(torch.ones(3, 4)).square().mean()
        BACKWARD
torch.save({"where": reads.where}, "out.pt")
"""
PLAIN = {"SCALER": "", "BACKWARD": "loss.backward(); CLIP; optimizer.step()"}
OWN_SCALER = {
    "SCALER": "scaler = torch.amp.GradScaler('cpu')",
    "BACKWARD": "scaler.scale(loss).backward(); scaler.step(optimizer); scaler.update()",
}


#: A sum of what has been read, on the host.
SUMMED = "steps.py:ended"


def script(parts: dict[str, str], clip: bool) -> str:
    source = SCRIPT
    for name, text in parts.items():
        source = source.replace(name, text)
    return source.replace("CLIP", "nn.utils.clip_grad_norm_(model.parameters(), 1.0)" if clip else "pass")


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("policy", ["fp32", "bf16-mixed"])
def test_nothing_is_read_before_the_step_is_over(launch: Any, policy: str, clip: bool) -> None:
    ran = launch(script(PLAIN, clip), policy)
    assert set(ran.out["where"]) <= {SUMMED}
    assert all(step.loss is not None and step.grad_norm is not None for step in ran.record.steps)


def test_under_a_loss_scale_only_the_answer_whether_to_step_is_read(launch: Any) -> None:
    ran = launch(script(PLAIN, clip=True), "fp16-mixed")
    assert [place for place in ran.out["where"] if place != SUMMED] == ["scaling.py:<genexpr>"] * 4
    assert [step.scale for step in ran.record.steps] == [2.0**16] * 4


def test_beside_a_scaler_of_the_scripts_nothing_is_read_but_by_itself(launch: Any) -> None:
    ran = launch(script(OWN_SCALER, clip=False), "bf16-mixed")
    assert [place for place in ran.out["where"] if place != SUMMED] == ["own.py:scaler_step"] * 4, "PyTorch's own"
    assert [step.scale for step in ran.record.steps] == [2.0**16] * 4
    assert all(step.applied for step in ran.record.steps)


@pytest.mark.parametrize("policy", ["fp32", "bf16-mixed", "fp16-mixed"])
def test_a_step_is_read_once(launch: Any, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(steps_module, "read", lambda *args: calls.append(len(args[0])) or read(*args))
    launch(script(PLAIN, clip=True), policy)
    assert len(calls) == 4


def test_losses_and_norms_are_those_of_reading_each_by_itself() -> None:
    told: list[Any] = []
    observer = StepObserver(told.append, None)
    observer.measures_memory = False
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(5, dtype=dtype)) for dtype in (torch.float32, torch.float64)]
    for parameter in parameters:
        parameter.grad = torch.randn(5, generator=generator).to(parameter.dtype)
    losses = [torch.randn(size, generator=generator) for size in (1, 7, 3)]
    scale = torch.tensor(3.0)
    observer.loss(losses, [None, None, torch.full((3,), 0.1)], scale)
    expected = [losses[0].sum() / 3.0, losses[1].sum() / 3.0, (losses[2] * torch.full((3,), 0.1)).sum() / 3.0]
    norm = gradient_norm(parameters)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    assert observer.ended(optimizer, observer.norm(parameters), scale, False, None)
    assert told[0].loss == float(torch.stack(expected).sum())
    assert (told[0].grad_norm, told[0].scale, told[0].device_bytes) == (norm, 3.0, None)


@pytest.mark.parametrize(
    ("flags", "applied"), [([0.0, 0.0], True), ([0.0, 1.0], False), ([2.0, 0.0], False), ([], True)]
)
def test_a_flag_on_any_device_means_that_the_step_was_skipped(flags: list[float], applied: bool) -> None:
    told: list[Any] = []
    observer = StepObserver(told.append, None)
    observer.measures_memory = False
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    assert observer.ended(optimizer, None, None, [torch.tensor([flag]) for flag in flags], None) is applied
    assert told[0].applied is applied


def test_numbers_are_read_exactly_and_in_order() -> None:
    third = torch.tensor(1 / 3, dtype=torch.float64)
    values = [None, 2.5, torch.tensor([0.1]), third, torch.tensor(math.inf, dtype=torch.bfloat16), torch.tensor(7)]
    assert read(values) == [None, 2.5, float(torch.tensor(0.1)), 1 / 3, math.inf, 7.0]
    assert math.isnan(read([torch.tensor(math.nan)])[0])  # type: ignore[arg-type]
    assert read([]) == []


class Copies(TorchDispatchMode):
    """Counts copies to the host, and whether they wait."""

    def __init__(self) -> None:
        super().__init__()
        self.blocking: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and str(kwargs.get("device")) == "cpu":
            self.blocking.append(not kwargs.get("non_blocking"))
        return func(*args, **kwargs)


class Optimizer:
    def __init__(self, parameters: list[Tensor]) -> None:
        self.param_groups = [{"params": parameters}]
        self.state: dict[Any, Any] = {}


def test_each_gpu_is_waited_for_once_and_the_models_own_are(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[str] = []
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waited.append(str(device)))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: asked.append(str(device)) or 1000)
    monkeypatch.setattr(FakeTensor, "tolist", lambda self: [0.0] * self.numel(), raising=False)
    told: list[Any] = []
    observer = StepObserver(told.append, None)
    observer.measures_memory = False
    with FakeTensorMode():
        first, second = (torch.zeros(3, device=f"cuda:{index}") for index in (1, 2))
        flags = [second.sum(), first.sum()]
        copies = Copies()
        with copies:
            observer.loss([first.sum()], [None], second.sum())
            copies.blocking.clear()
            applied = observer.ended(
                Optimizer([second]),  # type: ignore[arg-type]  # all that is asked of one
                first.sum(),
                2.0,
                flags,
                torch.device("cuda:1"),
            )
    assert applied and copies.blocking == [False, False]
    assert sorted(waited) == sorted(asked) == ["cuda:1", "cuda:2"]
    assert told[0].device_bytes == 2000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("policy", ["fp32", "bf16-mixed"])
def test_on_a_gpu_no_operation_of_a_step_waits(launch: Any, policy: str) -> None:
    """PyTorch's own check: an operation that waits for the device is an error; `torch.cuda.synchronize` is none."""
    source = """
    import torch
    from torch import nn
    model = nn.Linear(64, 64).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.ones(8, 64, device="cuda")
    for step in range(4):
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    torch.cuda.set_sync_debug_mode("default")
    """
    ran = launch(source, policy)
    assert ran.run.exit_code == 0 and len(ran.record.steps) == 4
    assert all(step.device_bytes for step in ran.record.steps)
