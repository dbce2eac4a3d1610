"""Jobs for the tests of backends: every format, rule and size, and how two results are compared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from halfstep.optim import masters, moments
from halfstep.optim.rules import SGD, Adam, Lion, Rule
from halfstep.optim.update import Job

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STORAGES = (
    ("fp32", "nearest"),
    ("exact", "nearest"),
    ("24bit", "nearest"),
    ("24bit", "stochastic"),
    ("none", "nearest"),
    ("none", "stochastic"),
    ("none", "kahan"),
)
LR = 1e-3
RULES: dict[str, Rule] = {
    "adamw": Adam(LR, 0.9, 0.999, 1e-8, 0.1, True, False, False),
    "adam": Adam(torch.tensor(LR), 0.9, 0.999, 1e-8, 0, False, False, True),
    "adam-decay": Adam(LR, 0.9, 0.95, 1e-6, 0.1, False, False, False),
    "amsgrad": Adam(LR, 0.9, 0.999, 1e-8, 0.1, True, True, True),
    "adam-low-beta": Adam(LR, 0.4, 0.5, 0.0, 0, True, False, False),
    "sgd": SGD(LR, 0, 0, False, 0.1, False),
    "sgd-momentum": SGD(LR, 0.9, 0.1, False, 0, True),
    "nesterov": SGD(LR, 0.9, 0, True, 0.1, False),
    "lion": Lion(LR, 0.9, 0.99, 0.1, False),
    "lion-low-beta": Lion(LR, 0.3, 0.4, 0, True),
}


class CorrectRoots(TorchDispatchMode):
    """Within, torch's FP32 square roots are the nearest numbers to the true ones.

    The processor's are, and C's with them. Where torch is built with MKL, its vector library computes them instead,
    and one in five is off by a unit in the last place.
    """

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.sqrt.default:
            return args[0].double().sqrt().to(args[0].dtype)
        if function is torch.ops.aten.sqrt_.default:
            return args[0].copy_(args[0].double().sqrt())
        return function(*args, **(kwargs or {}))


def make_job(
    rule: Rule,
    parameter: torch.dtype,
    gradient: torch.dtype,
    master: Any = "exact",
    rounding: Any = "nearest",
    state: Any = "fp32",
    shape: tuple[int, ...] = (1000,),
    seed: int = 0,
    offset: int = 0,
) -> Job:
    """A job with empty state and values of very different sizes; ``offset`` moves every tensor off its alignment."""
    generator = torch.Generator().manual_seed(seed)
    n, row = torch.Size(shape).numel(), moments.row_length(shape)

    def new(dtype: torch.dtype, count: int = n) -> Tensor:
        return torch.zeros(count + offset, dtype=dtype)[offset:]

    values = torch.randn(n, generator=generator) * torch.logspace(-6, 3, n) if n else torch.zeros(0)
    extra = masters.extra(master, rounding, parameter)
    kept = new(extra[1]) if extra else None
    if master == "fp32" and kept is not None:
        kept.copy_(values)
    dtypes = [(moments.SQUARE_DTYPES if square else moments.SIGNED_DTYPES)[state] for _, square in rule.states]
    groups = torch.Size(moments.scale_shape(shape)).numel() if n else 0
    return Job(
        parameter=new(parameter).copy_(values),
        gradient=new(gradient).copy_(torch.randn(n, generator=generator)),
        kept=kept,
        states=tuple(new(dtype) for dtype in dtypes),
        scales=tuple(new(torch.float32, groups) if state == "8bit" else None for _ in dtypes),
        step=torch.zeros(()),
        row=row,
        seed=1 << 40 | 17,
        ordinal=3,
        first=1 << 33 | 12_345,
    )


def clone(job: Job) -> Job:
    parts = [torch.utils._pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, part) for part in job]
    return Job(*parts)


def named(job: Job) -> Iterator[tuple[str, Tensor]]:
    yield "parameter", job.parameter
    if job.kept is not None:
        yield "kept", job.kept
    for index, (state, scale) in enumerate(zip(job.states, job.scales, strict=True)):
        yield f"state {index}", state
        if scale is not None:
            yield f"scale {index}", scale
    yield "step", job.step


def assert_same_bits(ours: Job, theirs: Job, what: object) -> None:
    """Every tensor bit for bit; only which NaN a NaN is may differ."""
    for (name, a), (_, b) in zip(named(ours), named(theirs), strict=True):
        bits = {1: torch.int8, 2: torch.int16, 4: torch.int32}[a.element_size()]
        differ = a.view(bits) != b.view(bits)
        if a.is_floating_point():
            differ &= ~(a.isnan() & b.isnan())
        assert not differ.any(), f"{what}: {name} at {differ.nonzero()[:3].tolist()}: {a[differ][:3]}, {b[differ][:3]}"
