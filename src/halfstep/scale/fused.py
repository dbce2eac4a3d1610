"""Fused optimizers under a loss scale: their kernel unscales and skips by itself, and ``step`` is called all the same.

That is what saves the host from waiting, and what misleads those who conclude from the call that the step was applied.
"""

from __future__ import annotations

import inspect

from torch.optim import Optimizer


def divides_itself(optimizer: Optimizer) -> bool:
    """Whether this is a fused optimizer, which is handed scale and flag, and is called whatever the flag says.

    Not one of those that take a scaler as an argument: they do it all.
    """
    return (
        getattr(optimizer, "_step_supports_amp_scaling", False)
        and "grad_scaler" not in inspect.signature(optimizer.step).parameters
    )


def asks_first(optimizer: Optimizer) -> bool:
    """Whether a scaler's ``step`` has to know, and to wait for, the answer before it calls this optimizer's."""
    return not divides_itself(optimizer) or is_listened_to(optimizer)


def is_listened_to(optimizer: Optimizer) -> bool:
    """Whether somebody replaced this optimizer's ``step`` to hear whether it is called, as Accelerate does.

    Not where gradients are released: the backward pass has stepped those that were finite, and the call ends that step.
    """
    if hasattr(getattr(optimizer, "release", None), "is_accumulating"):
        return False
    step = vars(optimizer).get("step")
    scheduler_or_itself = hasattr(step, "_wrapped_by_lr_sched") or getattr(step, "__self__", None) is optimizer
    return step is not None and not scheduler_or_itself
