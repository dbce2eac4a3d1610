"""Why a step was skipped, and whether a loss scale can help.

Three causes look alike in the gradients, and only one of them is the scale's business::

    the data hold NaN or inf          -> the data
    the loss is not finite            -> the forward pass: it ran before the scale was multiplied in
    the loss is finite                -> the gradients: too large for FP16 at this scale

Looked at only when a step is known to have been skipped; the losses and inputs are at hand then.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

import torch
from torch import Tensor

from halfstep.scale.trajectory import Rule


class LossScaleError(FloatingPointError):
    """Too many steps in a row were skipped; the message says why and what to do."""


class Cause(StrEnum):
    """What made gradients inf or NaN."""

    DATA = "data"
    FORWARD = "forward"
    GRADIENTS = "gradients"


def diagnose(losses: Iterable[Tensor], inputs: Iterable[Tensor]) -> Cause:
    """The cause of a skipped step, from its losses (before scaling) and the inputs of its forward passes."""
    if any(_is_bad_data(value) for value in inputs):
        return Cause.DATA
    if not all(bool(torch.isfinite(loss).all()) for loss in losses):
        return Cause.FORWARD
    return Cause.GRADIENTS


def explain(cause: Cause, in_a_row: int, scale: float, rule: Rule, *, inputs_seen: bool) -> str:
    """The message of `LossScaleError`."""
    said = f"{in_a_row} steps in a row were skipped; the loss scale is {scale:g}. "
    if cause is Cause.DATA:
        return said + (
            "The data hold inf or NaN: inputs of the model are not finite, so no loss scale and no number format can "
            "help. Look at the batches that the last steps were given."
        )
    if cause is Cause.FORWARD:
        whence = (
            "the forward pass overflows" if inputs_seen else "the forward pass overflows or the data hold inf or NaN"
        )
        check = "" if inputs_seen else ", or check the data (GradScaler.watch(model) lets the scaler look at them)"
        return said + (
            f"The loss itself is not finite, so no loss scale can help: {whence}. "
            f"Use bf16 or fp32 (for the modules that overflow){check}."
        )
    said += "The loss is finite, its gradients are not, at this scale too: "
    if not rule.dynamic:
        return said + (
            f"they exceed fp16's 65504, and the scale is static. A lower one can help: GradScaler(init_scale="
            f"{max(scale / 256, rule.min_scale):g}), or dynamic=True, which finds it."
        )
    if scale > rule.min_scale:
        return said + (
            f"they exceed fp16's 65504. A lower scale may help, and it may fall to {rule.min_scale:g} yet: start lower "
            f"(init_scale), or allow more skips (max_skipped)."
        )
    return said + (
        f"they exceed fp16's 65504, or the backward pass divides by zero, and the scale is at its floor (min_scale="
        f"{rule.min_scale:g}). Use bf16, or fp32 for the modules whose gradients overflow."
    )


def _is_bad_data(value: Tensor) -> bool:
    """NaN or +inf. A tensor may hold -inf on purpose: it is how attention is masked."""
    return bool((value.isnan() | value.isposinf()).any())
