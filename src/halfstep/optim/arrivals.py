"""What gradients add up to while they arrive one by one: for clipping and scaling when none of them is kept.

Sums stay on the device. Each is kept by device and stream, because hooks may run in several streams, which would have
to wait for each other to add to one number: those of FSDP2 have one of their own.

In torch's operations an arrival is some fifty small kernels for each parameter of a model, in the backward pass; a
backend that can (`halfstep.optim.update.Arriving`) does it in the launches that look at the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from halfstep.optim import backends
from halfstep.optim.backends import BackendName
from halfstep.optim.layout import flat, is_dense, is_sharded
from halfstep.optim.surveying import survey_of
from halfstep.optim.update import Arrival, Arriving, Survey
from halfstep.transfer import moved

Place = tuple[torch.device, Any]


def place_of(device: torch.device) -> Place:
    """A device and its current stream; None for the stream where there is but one."""
    module: Any = None if device.type == "cpu" else torch.get_device_module(device)
    return device, module.current_stream(device) if hasattr(module, "current_stream") else None


class Tally:
    """What the gradients of one place add up to, so far.

    Attributes:
        sum_of_squares: float64 0-d, of the unscaled gradients; without those that hold inf or NaN.
        found_inf: float32 0-d: 1 if any holds inf or NaN.
        found: float32 0-d, for backends: of the last gradient. What reads it is queued before the next one arrives.
        coefficient: float32 0-d, likewise.
    """

    def __init__(self, device: torch.device) -> None:
        self.sum_of_squares = torch.zeros((), dtype=torch.float64, device=device)
        self.found_inf = torch.zeros((), dtype=torch.float32, device=device)
        self.found = torch.empty((), dtype=torch.float32, device=device)
        self.coefficient = torch.empty((), dtype=torch.float32, device=device)

    def take(
        self,
        gradient: Tensor,
        backend: BackendName,
        *,
        inverse_scale: Tensor | None,
        norm_before: Tensor | None,
        limit: float | None,
    ) -> Arrival:
        """Look at a gradient, and add it.

        Args:
            inverse_scale: float32 0-d: what it is multiplied by before; None: 1.
            norm_before: float32 0-d: of the step before this one.
            limit: of the norm; None: no clipping.
        """
        device = self.found_inf.device
        inverse_scale = None if inverse_scale is None else moved(inverse_scale, device)
        norm_before = None if norm_before is None else moved(norm_before, device, torch.float32)
        chosen = backends.choose(backend, device)[0]
        if isinstance(chosen, Arriving) and gradient.layout is torch.strided and not is_sharded(gradient):
            dense = gradient if is_dense(gradient) else gradient.contiguous()
            return chosen.arrive(flat(dense), self, inverse_scale, norm_before, limit)
        survey = survey_of([gradient], backend)
        inverse = torch.ones((), dtype=torch.float32, device=device) if inverse_scale is None else inverse_scale
        found = self.add(survey, inverse)
        return Arrival(survey, found, None if limit is None else self._limited(limit, inverse, norm_before))

    def add(self, survey: Survey, inverse_scale: Tensor) -> Tensor:
        """Add a gradient that was looked at; returns `Arrival.found_inf`."""
        found = (~(survey.amax * inverse_scale).isfinite()).any()
        squares = survey.sum_of_squares * inverse_scale.double().square()
        self.sum_of_squares = self.sum_of_squares + squares.masked_fill(found, 0.0)
        self.found_inf = torch.maximum(self.found_inf, found.float())
        return found.float()

    def _limited(self, limit: float, inverse_scale: Tensor, norm_before: Tensor | None) -> Tensor:
        norm = self.sum_of_squares.sqrt()
        if norm_before is not None:
            norm = torch.maximum(norm, norm_before.to(norm.dtype))
        return ((limit / (norm + 1e-6)).clamp(max=1.0) * inverse_scale).float()
