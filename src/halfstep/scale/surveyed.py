"""Optimizers that look at their gradients themselves and divide them while they step: one look, then one step.

PyTorch's way over an optimizer's gradients is to divide them in memory and look for inf and NaN (`unscale_`), to clip
them in memory, and to step: each of these reads all of them again, and two write them. An optimizer that can *survey*
its gradients reads them once and says whether inf or NaN is among them and how large they are; the scaler agrees on
that across ranks, and hands back two numbers on the device, which the step then multiplies and skips by. Nothing is
written to an FP16 gradient, so it is divided in FP32, whose range the quotient needs; others are left divided where a
scaler's own ``step`` is called, since its user may look at them.

The scaler knows nothing else of such optimizers (`halfstep.optim.MasterOptimizer` is one): it asks for two methods.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from halfstep.transfer import moved


class Findings(Protocol):
    """What an optimizer found in its gradients as they are, scaled; on their device, of all shards."""

    @property
    def found_inf(self) -> Tensor:
        """Float32 0-d: above 0 where an element is inf or NaN."""

    @property
    def amax(self) -> Tensor:
        """Float32 (number of gradients,): the largest magnitude of each."""


@runtime_checkable
class Surveying(Protocol):
    """An optimizer that surveys its gradients, and multiplies them while it steps."""

    @property
    def steps_made(self) -> int:
        """So many steps have been made, whole: one that is interrupted is made, or changes nothing."""

    @property
    def is_scaled(self) -> bool:
        """Whether this is within `scaled`."""

    def survey(self) -> Findings:
        """Look at all gradients, once."""

    def scaled(
        self, coefficient: Tensor, found_inf: Tensor | None, *, in_memory: bool = False
    ) -> AbstractContextManager[None]:
        """Within, ``step`` multiplies gradients by ``coefficient`` and changes nothing where ``found_inf`` is not 0.

        Args:
            in_memory: leave the gradients multiplied, but FP16 ones.
        """


class Unscaling(NamedTuple):
    """What a survey's optimizer has to step with; 0-d, on the loss's device."""

    scale: Tensor  #: float32: the loss scale, until `halfstep.GradScaler.update` moves it
    inverse: Tensor  #: float32: what the gradients have to be multiplied by, to be the loss's
    found_inf: Tensor  #: float32: above 0 where the step has to be skipped, on any of the ranks


def surveying(optimizer: object) -> Surveying | None:
    """The optimizer if a scaler's ``step`` is to have it survey its gradients.

    Not one whose ``grad_scale`` its user has set: PyTorch's scaler multiplies the two.
    """
    asked = getattr(optimizer, "grad_scale", None) is None
    return optimizer if asked and isinstance(optimizer, Surveying) else None


def flags_of(found: Findings, inverse: Tensor, *, look_again: bool) -> dict[torch.device, Tensor]:
    """The flag of a survey, by its device as `halfstep.scale.gradients` has them; none where no gradient exists.

    Args:
        inverse: 1 / scale.
        look_again: where the scale is below 1, a gradient may overflow as it is divided: look at the quotients. The
            largest overflows first, so it is enough to look at that.
    """
    if not found.amax.numel():
        return {}
    found_inf = found.found_inf
    if look_again:
        quotients = found.amax * moved(inverse, found.amax.device)
        found_inf = torch.maximum(found_inf, (~quotients.isfinite()).any().float())
    return {found_inf.device: found_inf}
