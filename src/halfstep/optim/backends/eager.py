"""The backend in plain torch operations: runs anywhere, shows what is meant, and is what others are compared with.

It takes about forty times as long as the compiled ones and an FP32 copy of one parameter, its gradient and states at a
time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from halfstep.optim import dither, masters, moments, rules
from halfstep.optim.rules import Rule
from halfstep.optim.update import Job, Survey

name = "eager"


@torch.no_grad()
def update(
    jobs: Sequence[Job], rule: Rule, *, stochastic: bool, coefficient: Tensor | None, found_inf: Tensor | None
) -> None:
    """Step every job: `halfstep.optim.update.Backend.update`."""
    for job in jobs:
        on_host = job.parameter.device.type == "cpu"
        if found_inf is not None and on_host:
            if found_inf.item():
                continue
            found_inf = None
        if found_inf is None:
            _update(job, rule, stochastic, coefficient)
        else:
            _update_unless(job, rule, stochastic, coefficient, found_inf)


def _update(job: Job, rule: Rule, stochastic: bool, coefficient: Tensor | None) -> None:
    job.step.add_(1)
    step: int | Tensor = int(job.step.item()) if job.step.device.type == "cpu" else job.step
    g = job.gradient.float()
    if coefficient is not None:
        g = g * coefficient
    x = masters.decode(job.parameter, job.kept)
    decoded = [moments.decode(s, scale, job.row) for s, scale in zip(job.states, job.scales, strict=True)]
    rules.apply(rule, x, g, decoded, step)
    for index, (_, square) in enumerate(rule.states):
        codes, scale = job.states[index], job.scales[index]
        dithered = square and codes.dtype is not torch.float32
        noise = _noise(job, dither.STATE[index], step) if dithered else None
        moments.encode(decoded[index], codes, scale, job.row, noise)
    drops = job.parameter.dtype is not torch.float32 and (job.kept is None or job.kept.dtype is torch.int8)
    masters.encode(x, job.parameter, job.kept, _noise(job, dither.WEIGHT, step) if stochastic and drops else None)


def _update_unless(job: Job, rule: Rule, stochastic: bool, coefficient: Tensor | None, found_inf: Tensor) -> None:
    """On a device, where asking for the flag would wait: step, and put back what was there if it is set."""
    places = [t for t in (job.parameter, job.kept, *job.states, *job.scales, job.step) if t is not None]
    before = [t.clone() for t in places]
    _update(job, rule, stochastic, coefficient)
    for place, old in zip(places, before, strict=True):
        place.copy_(torch.where(found_inf != 0, old, place))


def _noise(job: Job, stream: int, step: int | Tensor) -> Tensor:
    key = dither.key(job.seed, job.ordinal, stream, job.first)
    return dither.dither(job.parameter.numel(), key, step, job.parameter.device)


def survey(gradients: Sequence[Tensor]) -> Survey:
    """Look at gradients, once: `halfstep.optim.update.Backend.survey`."""
    device = gradients[0].device if gradients else torch.device("cpu")
    total = torch.zeros((), dtype=torch.float64, device=device)
    amax = torch.zeros(len(gradients), device=device)
    for index, gradient in enumerate(gradients):
        if gradient.numel():
            total += gradient.double().square_().sum()
            amax[index] = gradient.abs().amax()
    return Survey(total, (~amax.isfinite()).any().float(), amax)
