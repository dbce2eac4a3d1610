"""How a loss scale moves: a frozen `Rule`, and a `Trajectory` whose three numbers live on the device.

::

    overflow:  overflows += 1, good = 0;  if overflows >= hysteresis: scale = max(scale * backoff_factor, min_scale)
    otherwise: overflows = 0, good += 1;  if good == growth_interval: scale = min(scale * growth_factor, max_scale),
                                                                      good = 0

Without ``consecutive_hysteresis`` a good step forgets no overflow, and ``overflows = 0`` stands beside the growth only.

Everything is tensor arithmetic, so that the host never has to wait to learn whether a step overflowed. The floor is not
cosmetic: without it PyTorch's scale reaches 0 after 166 overflows, and the next finite step computes 0 * inf.

Sources: ``torch._amp_update_scale_`` (the two factors). Hysteresis: Megatron-LM's ``DynamicGradScaler`` and DeepSpeed's
``DynamicLossScaler`` forget overflows where the scale grows; DeepSpeed with its option ``consecutive_hysteresis``,
after each good step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from halfstep.transfer import moved

DEFAULT_SCALE = 2.0**16

#: Below this a scale's reciprocal is inf, or the scale itself is flushed to zero on a GPU.
SMALLEST_SCALE = 2.0**-126


@dataclass(frozen=True)
class Rule:
    """What a loss scale may do. Training never changes it.

    Raises:
        ValueError: bounds out of order, or a factor on the wrong side of 1.
    """

    growth_factor: float
    backoff_factor: float
    growth_interval: int
    min_scale: float
    max_scale: float
    hysteresis: int  #: so many overflows in a row lower the scale, and each one after them; 1: each one does
    dynamic: bool  #: False: the scale never moves by itself
    consecutive_hysteresis: bool = True  #: only overflows in a row count for it; False: all since the scale grew

    def __post_init__(self) -> None:
        if not SMALLEST_SCALE <= self.min_scale <= self.max_scale < math.inf:
            raise ValueError(
                f"loss scales must satisfy 2^-126 <= min_scale <= max_scale < inf, not min_scale={self.min_scale:g}, "
                f"max_scale={self.max_scale:g}: gradients are multiplied by 1 / scale, which has to be finite"
            )
        if self.hysteresis < 1:
            raise ValueError(f"hysteresis must be at least 1 (lower the scale at once), not {self.hysteresis}")

    def within(self, scale: float) -> float:
        """``scale`` brought between floor and cap."""
        return min(max(scale, self.min_scale), self.max_scale)


def bounds(
    init_scale: float | Literal["auto"], min_scale: float | None, max_scale: float | None
) -> tuple[float, float, float]:
    """Where a scale starts, its floor and its cap, with what was left open filled in.

    Raises:
        ValueError: they contradict each other.
    """
    start = DEFAULT_SCALE if init_scale == "auto" else init_scale
    min_scale = min(1.0, start) if min_scale is None else min_scale
    max_scale = max(2.0**24, start) if max_scale is None else max_scale
    if init_scale == "auto":
        start = min(max(start, min_scale), max_scale)
    if not 0 < min_scale <= start <= max_scale:
        raise ValueError(
            f"loss scales must satisfy 0 < min_scale <= init_scale <= max_scale, "
            f"not {min_scale:g}, {start:g}, {max_scale:g}"
        )
    return start, min_scale, max_scale


class Trajectory:
    """A scale, the good steps since it moved, and the overflows that count. Plain numbers until `on` a device.

    Args:
        scale: where it starts.
        good: steps without overflow since the scale moved.
        overflows: overflows in a row, or since the scale grew.
    """

    def __init__(self, scale: float, good: int = 0, overflows: int = 0) -> None:
        self._start = (scale, good, overflows)
        self._tensors: tuple[Tensor, Tensor, Tensor] | None = None

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Scale (FP32), good steps and overflows (int32), 0-dim, put on ``device`` at the first call."""
        if self._tensors is None:
            scale, good, overflows = self._start
            self._tensors = (
                torch.full((), scale, dtype=torch.float32, device=device),
                torch.full((), good, dtype=torch.int32, device=device),
                torch.full((), overflows, dtype=torch.int32, device=device),
            )
        return self._tensors

    def state(self) -> tuple[float, int, int]:
        """The three numbers. Waits for the device."""
        if self._tensors is None:
            return self._start
        scale, good, overflows = self._tensors
        return float(scale.item()), int(good.item()), int(overflows.item())

    def __getstate__(self) -> dict[str, Any]:
        return {"_start": self.state(), "_tensors": None}


class Move:
    """One update of a trajectory's tensors, in place.

    Args:
        scale, good, overflows: of the trajectory.
        found_inf: above 0 where the update's gradients overflowed.
        void: where this is above 0 the update does not count, and nothing moves.
    """

    def __init__(
        self,
        scale: Tensor,
        good: Tensor,
        overflows: Tensor,
        found_inf: Tensor,
        rule: Rule,
        *,
        void: Tensor | None = None,
    ) -> None:
        self._tensors = (scale, good, overflows)
        self._found_inf, self._rule, self._void = found_inf, rule, void
        self._version = scale._version
        self._before = [t.clone() for t in self._tensors] if void is not None or rule.hysteresis > 1 else []

    def write(self) -> None:
        """Make it. Called again after an interruption, it ends what was begun."""
        rule, (scale, good, overflows), found_inf = self._rule, self._tensors, self._found_inf
        if not rule.dynamic:
            return
        if scale._version != self._version:
            for tensor, value in zip(self._tensors, self._before, strict=False):
                tensor.copy_(value)
        if scale._version == self._version or self._before:
            torch._amp_update_scale_(
                scale, good, found_inf, rule.growth_factor, rule.backoff_factor, rule.growth_interval
            )
        scale.clamp_(rule.min_scale, rule.max_scale)
        if rule.hysteresis > 1:
            overflowed = found_inf > 0
            overflows.add_(overflowed)
            # Growth has just begun to count anew, as an overflow has.
            overflows.mul_(overflowed if rule.consecutive_hysteresis else overflowed | (good > 0))
            tolerated = (overflows > 0) & (overflows < rule.hysteresis)
            scale.copy_(torch.where(tolerated, self._before[0], scale))
        if self._void is not None:
            for tensor, value in zip(self._tensors, self._before, strict=True):
                tensor.copy_(torch.where(self._void > 0, value, tensor))


def take_(scale: Tensor, new_scale: float | Tensor, rule: Rule) -> None:
    """Set a scale by hand, inside floor and cap.

    Args:
        new_scale: a number, or a tensor of one element, of any shape, format and device; there inf and NaN, which the
            host does not see, leave the scale as it is.

    Raises:
        ValueError: not a finite number.
        AssertionError: a tensor of several elements; PyTorch's scaler raises this.
    """
    if isinstance(new_scale, Tensor):
        if new_scale.numel() != 1:
            raise AssertionError(f"new_scale must be a number or a 1-element tensor, not {tuple(new_scale.shape)}")
        value = moved(new_scale.detach().reshape(()), scale.device, torch.float32)
        scale.copy_(torch.where(value.isfinite(), value, scale))
    elif math.isfinite(new_scale):
        scale.fill_(float(new_scale))
    else:
        raise ValueError(f"a loss scale cannot be {new_scale}")
    scale.clamp_(rule.min_scale, rule.max_scale)
