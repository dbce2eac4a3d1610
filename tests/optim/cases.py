"""Optimizers, parameters of every shape, and their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

MakeOptimizer = Callable[[Any], Optimizer]
OPTIMIZERS: dict[str, MakeOptimizer] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, foreach=False),
    "adam-foreach": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}
LOW = [torch.bfloat16, torch.float16]


def make_parameters(dtype: torch.dtype, seed: int = 0) -> list[nn.Parameter]:
    """Matrix, vector, 0-d, empty, not contiguous, an FP32 one, a frozen one, and one without gradients."""
    torch.manual_seed(seed)
    values = [torch.randn(4, 3), torch.randn(5), torch.randn(()), torch.randn(0, 2), torch.randn(3, 4).t()]
    parameters = [nn.Parameter(v.to(dtype)) for v in values]
    parameters.append(nn.Parameter(torch.randn(3)))
    parameters.append(nn.Parameter(torch.randn(2).to(dtype), requires_grad=False))
    parameters.append(nn.Parameter(torch.randn(2).to(dtype)))
    return parameters


def feed(parameters: list[nn.Parameter], step: int) -> None:
    """The gradients of one step, in each parameter's own format."""
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters[:6]:
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = gradient.bfloat16().half().to(parameter.dtype)  # the same value in every format


def fp32_copy(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().float().clone(), requires_grad=p.requires_grad) for p in parameters]


def groups_of(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": parameters[:3]}, {"params": parameters[3:], "lr": 0.05}]


def tensors_of(state: Any) -> list[Tensor]:
    leaves, _ = torch.utils._pytree.tree_flatten(state)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
