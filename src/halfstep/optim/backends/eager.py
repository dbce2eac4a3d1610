"""The backend in plain torch operations: runs anywhere, shows what is meant, and is what others are compared with.

It takes about forty times as long as the compiled ones, and copies of one parameter, its gradient and states at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from halfstep.optim import dither, masters, moments, rules
from halfstep.optim.rules import Rule
from halfstep.optim.update import Job, Survey
from halfstep.transaction import to_the_end

name = "eager"


@torch.no_grad()
def update(
    jobs: Sequence[Job], rule: Rule, *, stochastic: bool, coefficient: Tensor | None, found_inf: Tensor | None
) -> None:
    """Step every job: `halfstep.optim.update.Backend.update`."""
    if found_inf is not None and jobs and jobs[0].parameter.device.type == "cpu":
        if found_inf.item():
            return
        found_inf = None
    copies: list[tuple[Tensor, Tensor]] = []
    index = 0

    @torch.no_grad()
    def write() -> None:
        nonlocal copies, index
        while index < len(jobs):
            copies = copies or _stepped(jobs[index], rule, stochastic, coefficient, found_inf)
            for place, value in copies:  # once more, should it be interrupted
                place.copy_(value)
            index, copies = index + 1, []

    to_the_end(write, "an update")


def _stepped(
    job: Job, rule: Rule, stochastic: bool, coefficient: Tensor | None, found_inf: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    """The job's tensors and what they become: on a device, where asking for the flag would wait, what they were if it
    is set."""

    def copy(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.clone()

    new = job._replace(
        parameter=job.parameter.clone(),
        kept=copy(job.kept),
        states=tuple(state.clone() for state in job.states),
        scales=tuple(copy(scale) for scale in job.scales),
        step=job.step.clone(),
    )
    _update(new, rule, stochastic, coefficient)
    copies: list[tuple[Tensor, Tensor]] = []
    for place, value in zip(_places(job), _places(new), strict=True):
        copies.append((place, value if found_inf is None else torch.where(found_inf != 0, place, value)))
    return copies


def _places(job: Job) -> list[Tensor]:
    return [t for t in (job.parameter, job.kept, *job.states, *job.scales, job.step) if t is not None]


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


def _noise(job: Job, stream: int, step: int | Tensor) -> Tensor:
    key = dither.key(job.seed, job.ordinal, stream, job.first)
    return dither.dither(job.parameter.numel(), key, step, job.parameter.device)


def survey(gradients: Sequence[Tensor]) -> Survey:
    """Look at gradients, once: `halfstep.optim.update.Backend.survey`."""
    device = gradients[0].device if gradients else torch.device("cpu")
    total = torch.zeros((), dtype=torch.float64, device=device)
    amax = torch.zeros(len(gradients), dtype=torch.float32, device=device)
    for index, gradient in enumerate(gradients):
        if gradient.numel():
            total += gradient.double().square_().sum()
            amax[index] = gradient.abs().amax()
    return Survey(total, (~amax.isfinite()).any().float(), amax)
