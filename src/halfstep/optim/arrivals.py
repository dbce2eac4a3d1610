"""What gradients add up to while they arrive one by one: for clipping and scaling when none of them is kept.

Sums stay on the device. Each is kept by device and stream, because hooks may run in several streams, which would have
to wait for each other to add to one number: those of FSDP2 have one of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from halfstep.optim.update import Survey

Place = tuple[torch.device, Any]


def place_of(device: torch.device) -> Place:
    """A device and its current stream; None for the stream where there is but one."""
    module: Any = None if device.type == "cpu" else torch.get_device_module(device)
    return device, module.current_stream(device) if hasattr(module, "current_stream") else None


class Tally:
    """What the gradients of one place add up to, so far."""

    def __init__(self, device: torch.device) -> None:
        self.sum_of_squares = torch.zeros((), dtype=torch.float64, device=device)  #: unscaled; of the finite ones
        self.found_inf = torch.zeros((), device=device)

    def add(self, survey: Survey, inverse_scale: Tensor) -> Tensor:
        """Add a gradient.

        Returns:
            Float32 0-d: 1 if it holds inf or NaN, or would when divided by a scale below 1; else 0.
        """
        found = (~(survey.amax * inverse_scale).isfinite()).any()
        squares = survey.sum_of_squares * inverse_scale.double().square()
        self.sum_of_squares = self.sum_of_squares + squares.masked_fill(found, 0.0)
        self.found_inf = torch.maximum(self.found_inf, found.float())
        return found.float()
