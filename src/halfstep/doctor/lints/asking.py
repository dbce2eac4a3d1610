"""What an optimizer of PyTorch would do, found by asking it.

A table of optimizers would be wrong with the next release. So the class's own ``step`` is run on a tensor of four
elements that belongs to nobody, with the group's options and an empty state: what state it makes and in which dtype,
and whether its update depends on the gradient's scale. Nothing of the user's is touched, no hook is called (the
function below PyTorch's hook wrapper is), and no random number is drawn.

Only steps that PyTorch wrote are asked. Others may compile kernels, talk to other ranks, or step an optimizer within.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

#: Options on how the step is computed, not on what; the plain loop takes any dtype on the CPU.
_PLAIN = {"foreach": False, "fused": False, "capturable": False, "differentiable": False}
_STEPS = 8  # past the warm-up of RAdam, whose first steps are not normalised


def steps_as_torch(optimizer: Optimizer) -> bool:
    """Whether the class's ``step`` is one that PyTorch wrote; a subclass that leaves it alone counts."""
    return type(optimizer).step.__module__.startswith("torch.optim.")


def state_dtypes(optimizer: Optimizer, options: Mapping[str, Any], dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Name and dtype of the state that it would keep for each element of a parameter of ``dtype``.

    Empty where it keeps none, and where it cannot be asked.
    """
    asked = _ask(optimizer, options, dtype, gradient=1.0, steps=1)
    if asked is None:
        return {}
    return {name: value.dtype for name, value in asked[1].items() if isinstance(value, Tensor) and value.numel() > 1}


def is_normalised(optimizer: Optimizer, options: Mapping[str, Any]) -> bool | None:
    """Whether its update stays the same when all gradients are multiplied by a constant, as Adam's does.

    Such an update has the size of the learning rate. None: it cannot be asked.
    """
    moves = []
    for gradient in (2.0**-4, 2.0**4):
        asked = _ask(optimizer, options, torch.float32, gradient, _STEPS)
        if asked is None:
            return None
        moves.append(asked[0])
    return abs(moves[0] - moves[1]) <= 0.01 * max(abs(move) for move in moves)


def _ask(
    optimizer: Optimizer, options: Mapping[str, Any], dtype: torch.dtype, gradient: float, steps: int
) -> tuple[float, dict[str, Any]] | None:
    """How far the last step moves a weight of 1, and the state afterwards; None: the step wants something else."""
    if not steps_as_torch(optimizer):
        return None
    owner: Any = next(kind for kind in type(optimizer).__mro__ if "step" in vars(kind))
    step: Any = owner.step
    while hasattr(step, "__wrapped__"):
        step = step.__wrapped__
    weight = torch.ones(2, 2, dtype=dtype, device="cpu", requires_grad=True)
    plain = {name: _number(value) for name, value in options.items() if name != "params"}
    plain.update({name: value for name, value in _PLAIN.items() if name in plain})
    if plain.get("weight_decay"):
        plain["weight_decay"] = 0.0
    probe = owner.__new__(owner)  # not through __init__, which others may have wrapped to learn of new optimizers
    probe.__dict__.update(
        defaults={}, state=defaultdict(dict), param_groups=[{**plain, "params": [weight]}], _patched=True
    )
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            for _ in range(steps):
                before.copy_(weight)
                weight.grad = torch.full_like(weight, gradient)
                step(probe)
    except Exception:  # it wants a closure, sparse gradients, state that its constructor makes: it is not asked then
        return None
    return float((before.float() - weight.detach().float()).mean()), dict(probe.state[weight])


def _number(option: Any) -> Any:
    if isinstance(option, Tensor) and option.numel() == 1:
        return float(option)
    if isinstance(option, tuple | list):
        return type(option)(_number(item) for item in option)
    return option
