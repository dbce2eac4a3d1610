"""Update rules on FP32 tensors: Adam and AdamW, SGD with momentum, Lion.

A rule holds the hyperparameters of one step of one parameter group, and says which states it keeps. `apply` is the
rule in torch's own operations, in the order in which ``torch.optim`` applies them, so the results are the same bits;
every other backend is measured against it.

Sources: Kingma & Ba 2015 (Adam), Loshchilov & Hutter 2019 (AdamW), ``torch/optim/{adam,sgd}.py``; Chen et al. 2023,
Symbolic Discovery of Optimization Algorithms, algorithm 2 (Lion).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Scalar = float | Tensor


@dataclass(frozen=True)
class Adam:
    """Adam; with ``decoupled`` weight decay AdamW."""

    lr: Scalar  #: a number, or a tensor of one element
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool
    amsgrad: bool
    maximize: bool

    @property
    def states(self) -> tuple[tuple[str, bool], ...]:
        """Name of each state, and whether it is a mean of squares."""
        ever = (("max_exp_avg_sq", True),) if self.amsgrad else ()
        return (("exp_avg", False), ("exp_avg_sq", True), *ever)


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent, with momentum where it is not 0."""

    lr: Scalar
    momentum: float
    dampening: float
    nesterov: bool
    weight_decay: float
    maximize: bool

    @property
    def states(self) -> tuple[tuple[str, bool], ...]:
        """Name of each state, and whether it is a mean of squares."""
        return (("momentum_buffer", False),) if self.momentum else ()


@dataclass(frozen=True)
class Lion:
    """Evolved sign momentum: the sign of an interpolation, with decoupled weight decay."""

    lr: Scalar
    beta1: float
    beta2: float
    weight_decay: float
    maximize: bool

    @property
    def states(self) -> tuple[tuple[str, bool], ...]:
        """Name of each state, and whether it is a mean of squares."""
        return (("exp_avg", False),)


Rule = Adam | SGD | Lion


def apply(rule: Rule, x: Tensor, g: Tensor, states: Sequence[Tensor], step: Scalar) -> None:
    """One step, in place on the FP32 master ``x`` and its FP32 states.

    Args:
        x, g: float32 of one shape; g, the gradient, is not changed.
        states: in the order of ``rule.states``.
        step: the number of this step, from 1; where it is a tensor (0-d, on x's device) nothing waits for it, and the
            bias corrections are computed on the device in float64.
    """
    if rule.maximize:
        g = -g
    if isinstance(rule, Adam):
        _adam(rule, x, g, states, step)
    elif isinstance(rule, SGD):
        _sgd(rule, x, g, states, step)
    else:
        _lion(rule, x, g, states[0])


def _adam(rule: Adam, x: Tensor, g: Tensor, states: Sequence[Tensor], step: Scalar) -> None:
    lr = _number(rule.lr)
    exp_avg, exp_avg_sq = states[:2]
    if rule.weight_decay:
        if rule.decoupled:
            x.mul_(1 - lr * rule.weight_decay)
        else:
            g = g.add(x, alpha=rule.weight_decay)
    exp_avg.lerp_(g, 1 - rule.beta1)
    exp_avg_sq.mul_(rule.beta2).addcmul_(g, g, value=1 - rule.beta2)
    largest = exp_avg_sq
    if rule.amsgrad:
        largest = torch.maximum(states[2], exp_avg_sq, out=states[2])
    if isinstance(step, Tensor):
        step = step.double()
    step_size = lr / (1 - rule.beta1**step)
    root = (1 - rule.beta2**step) ** 0.5
    denominator = (largest.sqrt() / root).add_(rule.eps)
    if isinstance(step_size, Tensor):
        x.add_((exp_avg * -step_size).div_(denominator))
    else:
        x.addcdiv_(exp_avg, denominator, value=-step_size)


def _sgd(rule: SGD, x: Tensor, g: Tensor, states: Sequence[Tensor], step: Scalar) -> None:
    if rule.weight_decay:
        g = g.add(x, alpha=rule.weight_decay)
    if rule.momentum:
        buffer = states[0]
        if isinstance(step, Tensor):
            later = (buffer * rule.momentum).add_(g, alpha=1 - rule.dampening)
            buffer.copy_(torch.where(step <= 1, g, later))
        elif step <= 1:
            buffer.copy_(g)
        else:
            buffer.mul_(rule.momentum).add_(g, alpha=1 - rule.dampening)
        g = g.add(buffer, alpha=rule.momentum) if rule.nesterov else buffer
    _move(x, g, rule.lr)


def _lion(rule: Lion, x: Tensor, g: Tensor, exp_avg: Tensor) -> None:
    if rule.weight_decay:
        x.mul_(1 - _number(rule.lr) * rule.weight_decay)
    _move(x, exp_avg.lerp(g, 1 - rule.beta1).sign_(), rule.lr)
    exp_avg.lerp_(g, 1 - rule.beta2)


def _move(x: Tensor, direction: Tensor, lr: Scalar) -> None:
    lr = _number(lr)
    if isinstance(lr, Tensor):
        x.sub_(direction * lr)
    else:
        x.add_(direction, alpha=-lr)


def _number(value: Scalar) -> Scalar:
    """A tensor in the host's memory as a number; one on a device, or in a graph that is compiled, stays one, 0-d."""
    if isinstance(value, Tensor):
        on_host = value.device.type == "cpu" and not torch.compiler.is_compiling()
        return value.item() if on_host else value.reshape(())
    return value
