"""Checks of the options that the optimizers share with PyTorch's."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from halfstep.optim.masters import Master, Rounding
from halfstep.optim.moments import State

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_not_negative(**options: float | Tensor) -> None:
    """Hyperparameters that may not be negative or NaN; a tensor may have one element only.

    Raises:
        ValueError: names the first that is out of range.
    """
    for name, value in options.items():
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"{name} as a tensor must have one element, not {tuple(value.shape)}")
        if not isinstance(value, int | float | Tensor):
            raise TypeError(f"{name} must be a number, not {value!r}")
        if not value >= 0:
            raise ValueError(f"{name} must be at least 0, not {float(value):g}")


def check_betas(betas: tuple[float | Tensor, float | Tensor]) -> tuple[float, float]:
    """Two decay rates in [0, 1), as numbers.

    Raises:
        ValueError: one is out of range.
    """
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(f"betas must be two numbers, as in (0.9, 0.999), not {betas!r}")
    first, second = (float(beta) for beta in betas)
    for index, beta in enumerate((first, second)):
        if not 0 <= beta < 1:
            raise ValueError(f"betas[{index}] must be at least 0 and less than 1, not {beta:g}")
    return first, second


def torch_options(*, differentiable: bool = False, **taken: Any) -> dict[str, Any]:
    """PyTorch's options on how to compute a step: kept in the groups, for those who look there.

    Raises:
        ValueError: ``differentiable=True``; steps here write through pointers, where autograd cannot follow.
    """
    if differentiable:
        raise ValueError("differentiable=True is not supported: differentiate through a torch.optim optimizer instead")
    if taken.get("foreach") and taken.get("fused"):
        raise ValueError("fused and foreach cannot both be True; here neither is needed")
    return {**taken, "differentiable": differentiable}


def check_storage(group: dict[str, Any]) -> None:
    """Whether a parameter group's storage is known, goes together, and suits its parameters.

    Raises:
        TypeError: a parameter is neither float32, bfloat16 nor float16.
        ValueError: an option is unknown, or two do not go together.
    """
    for name, known in (("master", Master), ("state", State), ("rounding", Rounding)):
        value = group[name]
        if value not in get_args(known) and not (name == "rounding" and value is None):
            raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(known)))}, not {value!r}")
    master, rounding = group["master"], group["rounding"]
    if rounding == "kahan" and master != "none":
        raise ValueError(f"rounding='kahan' takes the place of a master: it goes with master='none', not {master!r}")
    if rounding == "stochastic" and master in ("fp32", "exact"):
        raise ValueError(f"master={master!r} drops no bits, so there is nothing to round stochastically")
    for parameter in group["params"]:
        if parameter.dtype not in DTYPES:
            raise TypeError(
                f"a parameter of shape {tuple(parameter.shape)} is {parameter.dtype}: halfstep.optim steps float32, "
                "bfloat16 and float16; give others to a torch.optim optimizer of their own"
            )
