"""A problem of three weights, one iteration of it, and the slow obvious twin of a loss scale."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn


def problem(optimizer: str = "sgd") -> tuple[nn.Parameter, torch.optim.Optimizer]:
    weight = nn.Parameter(torch.ones(3))
    make = {
        "sgd": lambda: torch.optim.SGD([weight], lr=0.125),
        "fused": lambda: torch.optim.AdamW([weight], lr=0.125, fused=True),
        "foreach": lambda: torch.optim.AdamW([weight], lr=0.125, foreach=True),
    }[optimizer]
    return weight, make()


def iterate(scaler: Any, weight: nn.Parameter, optimizer: Any, overflow: bool) -> None:
    """One iteration whose gradients are finite, or hold one inf."""
    optimizer.zero_grad()
    scaler.scale(weight.sum()).backward()
    if overflow:
        assert weight.grad is not None
        weight.grad[1] = math.inf
    scaler.step(optimizer)
    scaler.update()


class Twin:
    """The scale's rule, spelled out. Powers of two keep floats exact."""

    def __init__(
        self,
        scale: float,
        growth: float,
        backoff: float,
        interval: int,
        low: float,
        high: float,
        hysteresis: int = 1,
        dynamic: bool = True,
    ) -> None:
        self.scale, self.growth, self.backoff, self.interval = scale, growth, backoff, interval
        self.low, self.high, self.hysteresis, self.dynamic = low, high, hysteresis, dynamic
        self.good = self.skipped = self.in_a_row = 0

    def step(self, overflow: bool) -> None:
        self.skipped += overflow
        self.in_a_row = self.in_a_row + 1 if overflow else 0
        if not self.dynamic:
            return
        if overflow:
            self.good = 0
            if self.in_a_row >= self.hysteresis:
                self.scale = max(self.scale * self.backoff, self.low)
        else:
            self.good += 1
            if self.good == self.interval:
                self.good = 0
                self.scale = min(self.scale * self.growth, self.high)
