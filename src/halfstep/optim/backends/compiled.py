"""The eager backend through ``torch.compile``: one fused loop for each parameter, on whatever torch compiles for.

One graph serves parameters of every length with the same dtypes: they are flat, their length is dynamic, and all that
changes from step to step (the learning rate, the step, the dither's key) enters as a tensor.

**What a compiler takes away.** Inductor keeps values in FP32 registers and drops a rounding to 16 bits whose result
goes on in FP32. In ``x - float(bf16(x))`` that rounding is the point: the compensation of ``kahan`` becomes 0, the
comparison of an FP32 master with its parameter is always unequal, and training goes on with the loss of all small
updates and without a word. So the graphs are compiled with ``emulate_precision_casts``, and the first use of each
storage is checked against the eager backend; where that fails the backend refuses to run.

Source: the behaviour is described as intended in PyTorch's issues 183761 and 185337.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from halfstep.optim import dither, masters, moments, rules
from halfstep.optim.backends import eager
from halfstep.optim.rules import Rule
from halfstep.optim.update import Job, Survey
from halfstep.transaction import to_the_end

name = "compile"

#: Below this a graph of its own for so few elements (lengths 0 and 1 are special to the compiler) is not worth it.
SMALLEST = 64

_checked: set[tuple[Any, ...]] = set()


class LostRoundingError(RuntimeError):
    """Compiled code does not round where it must: masters would be lost. The eager backend is right, and slower."""


def missing(device_type: str) -> str:
    """What is missing for this backend on such a device; empty where nothing is."""
    if device_type == "cpu" and not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++", "cl")):
        return "torch.compile needs a C++ compiler on the host"
    return ""


@torch.no_grad()
def update(
    jobs: Sequence[Job], rule: Rule, *, stochastic: bool, coefficient: Tensor | None, found_inf: Tensor | None
) -> None:
    """Step every job: `halfstep.optim.update.Backend.update`.

    Raises:
        LostRoundingError: the compiler removed a rounding that matters.
    """
    options = {"stochastic": stochastic, "coefficient": coefficient, "found_inf": found_inf}
    index = 0
    step_before: float | None = None  # of the job under way, on the host: it is written with the weights

    def write() -> None:
        nonlocal index, step_before
        while index < len(jobs):
            job = jobs[index]
            if step_before is None or float(job.step) == step_before:
                step_before = float(job.step) if job.step.device.type == "cpu" else None
                step_one(job)
            index, step_before = index + 1, None

    def step_one(job: Job) -> None:
        # 8-bit rows that are no whole number of groups make the graph's index arithmetic take minutes to compile.
        ragged = job.row % moments.GROUP != 0 and any(scale is not None for scale in job.scales)
        if ragged or job.parameter.numel() < SMALLEST:
            eager.update([job], rule, **options)  # type: ignore[arg-type]
        else:
            _check(job, rule, stochastic)
            _step(job, rule, stochastic, coefficient, found_inf)

    to_the_end(write, "an update")


def survey(gradients: Sequence[Tensor]) -> Survey:
    """Look at gradients, once: `halfstep.optim.update.Backend.survey`."""
    return eager.survey(gradients)


def _step(job: Job, rule: Rule, stochastic: bool, coefficient: Tensor | None, found_inf: Tensor | None) -> None:
    device = job.parameter.device
    one = torch.ones((), dtype=torch.float32, device=device)
    zero = torch.zeros((), dtype=torch.float32, device=device)
    lr = torch.as_tensor(rule.lr, dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)
    streams = [dither.WEIGHT, *dither.STATE[: len(job.states)]]
    keys = [dither.signed(dither.key(job.seed, job.ordinal, stream, job.first)) for stream in streams]
    tensors = [job.parameter, job.gradient, job.kept, *job.states]
    for tensor in tensors:
        if tensor is not None:
            torch._dynamo.mark_dynamic(tensor, 0)
    _graph()(
        job.parameter,
        job.gradient,
        job.kept,
        job.states,
        job.scales,
        job.step,
        torch.tensor(keys, dtype=torch.int32, device=device),
        one if coefficient is None else coefficient,
        zero if found_inf is None else found_inf,
        replace(rule, lr=0.0),
        lr.reshape(()),
        stochastic,
    )


def _update(
    parameter: Tensor,
    gradient: Tensor,
    kept: Tensor | None,
    states: tuple[Tensor, ...],
    scales: tuple[Tensor | None, ...],
    step: Tensor,
    keys: Tensor,
    coefficient: Tensor,
    found_inf: Tensor,
    rule: Rule,
    lr: Tensor,
    stochastic: bool,
) -> None:
    skip = found_inf != 0
    now = step + 1
    x = masters.decode(parameter, kept)
    decoded = [moments.decode(s, scale, moments.GROUP).clone() for s, scale in zip(states, scales, strict=True)]
    rules.apply(replace(rule, lr=lr), x, gradient.float() * coefficient, decoded, now)
    for index, (_, square) in enumerate(rule.states):
        codes, scale = states[index], scales[index]
        dithered = square and codes.dtype is not torch.float32
        noise = dither.dither(codes.numel(), keys[index + 1], now, codes.device) if dithered else None
        new, new_scale = torch.empty_like(codes), None if scale is None else torch.empty_like(scale)
        moments.encode(decoded[index], new, new_scale, moments.GROUP, noise)
        codes.copy_(torch.where(skip, codes, new))
        if scale is not None and new_scale is not None:
            scale.copy_(torch.where(skip, scale, new_scale))
    drops = parameter.dtype is not torch.float32 and (kept is None or kept.dtype is torch.int8)
    noise = dither.dither(parameter.numel(), keys[0], now, parameter.device) if stochastic and drops else None
    new, new_kept = torch.empty_like(parameter), None if kept is None else torch.empty_like(kept)
    masters.encode(x, new, new_kept, noise)
    parameter.copy_(torch.where(skip, parameter, new))
    if kept is not None and new_kept is not None:
        kept.copy_(torch.where(skip, kept, new_kept))
    step.copy_(torch.where(skip, step, now))


@functools.cache
def _graph() -> Callable[..., None]:
    """`_update`, compiled. The option is the point: see the module's text."""
    return torch.compile(_update, dynamic=True, options={"emulate_precision_casts": True})


def _check(job: Job, rule: Rule, stochastic: bool) -> None:
    """Once for each storage: two steps on made-up numbers, against the eager backend."""
    kept = None if job.kept is None else job.kept.dtype
    dtypes = (job.parameter.dtype, job.gradient.dtype, kept, *(s.dtype for s in job.states))
    form = (job.parameter.device, type(rule), stochastic, *dtypes)
    if form in _checked:
        return
    ours, theirs = _made_up(job), _made_up(job)
    for _ in range(2):
        _step(ours, rule, stochastic, None, None)
        eager.update([theirs], rule, stochastic=stochastic, coefficient=None, found_inf=None)
    expected, found = (masters.decode(j.parameter, j.kept) for j in (theirs, ours))
    error = ((found - expected).norm() / expected.norm()).item()
    lost = 0 if ours.kept is None or theirs.kept is None else int((theirs.kept != 0).sum() - (ours.kept != 0).sum())
    limit = 1e-6 if ours.kept is not None and not stochastic else 2.0**-8
    if error > limit or lost > ours.parameter.numel() // 2:
        raise LostRoundingError(
            f"torch.compile on {job.parameter.device.type} changes the rounding of {job.parameter.dtype} parameters "
            f"with {'no master' if job.kept is None else f'{job.kept.dtype} beside them'} (error {error:.1e}): "
            "use backend='eager', or master='exact', whose integers no compiler simplifies"
        )
    _checked.add(form)


def _made_up(job: Job) -> Job:
    """A job like this one, of 4096 numbers."""
    n, row = 4096, 4096
    generator = torch.Generator().manual_seed(0)
    on_host = [torch.randn(n, generator=generator, dtype=torch.float32, device="cpu") for _ in range(2)]
    values = [value.to(job.parameter.device) for value in on_host]
    scale_count = n // moments.GROUP
    return job._replace(
        parameter=values[0].to(job.parameter.dtype),
        gradient=values[1].to(job.gradient.dtype),
        kept=None if job.kept is None else _kept_for(values[0], job),
        states=tuple(torch.zeros(n, dtype=s.dtype, device=s.device) for s in job.states),
        scales=tuple(
            None if s is None else torch.zeros(scale_count, dtype=s.dtype, device=s.device) for s in job.scales
        ),
        step=torch.zeros_like(job.step),
        row=row,
    )


def _kept_for(value: Tensor, job: Job) -> Tensor:
    assert job.kept is not None
    parameter, kept = value.to(job.parameter.dtype), torch.zeros_like(value, dtype=job.kept.dtype)
    masters.encode(value.clone(), parameter, kept)
    return kept
