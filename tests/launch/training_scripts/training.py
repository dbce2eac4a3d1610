"""What the scenarios share: a small model, its data, and the loop that everybody writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

#: Small enough that 16-bit weights alone would lose most updates, as they do late in a real training.
SMALL = 1e-4


def made(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 4))


def batch(i: int, n: int = 32) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 8, generator=torch.Generator().manual_seed(i))
    return x, x[:, :4].argmax(1)


def loss_of(model: nn.Module, i: int = 0, n: int = 32) -> Tensor:
    x, y = batch(i, n)
    return F.cross_entropy(model(x), y)


def step(model: nn.Module, optimizer: Optimizer, loss: Callable[[], Tensor]) -> float:
    """One step; the library's columns put the library's three calls in its place."""
    optimizer.zero_grad()
    value = loss()
    value.backward()
    optimizer.step()
    return value.item()


def train(model: nn.Module, optimizer: Optimizer, steps: int = 20, first: int = 0) -> float:
    last = 0.0
    for i in range(first, first + steps):
        last = step(model, optimizer, lambda i=i: loss_of(model, i))
    return last


def held_out(model: nn.Module) -> float:
    with torch.no_grad():
        return loss_of(model, 99_999, 512).item()


def weights(model: nn.Module | Iterable[Tensor]) -> list[Tensor]:
    """Copies, float64."""
    tensors = model.parameters() if isinstance(model, nn.Module) else model
    return [p.detach().double().clone() for p in tensors]


def distance(a: nn.Module | Iterable[Tensor], b: nn.Module | Iterable[Tensor]) -> float:
    pairs = zip(weights(a), weights(b), strict=True)
    return sum(float((x - y).square().sum()) for x, y in pairs) ** 0.5


def largest_difference(a: nn.Module | Iterable[Tensor], b: nn.Module | Iterable[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(weights(a), weights(b), strict=True))


def norm(tensors: Iterable[Tensor]) -> float:
    return sum(float(t.detach().double().square().sum()) for t in tensors) ** 0.5
