"""Whether an optimizer has written anything: asked when its step was interrupted.

The optimizers of `halfstep.optim` make a step whole or not at all, and count. Of others the version counters of
parameters and state are compared, for some write their state long before the weights; a fused optimizer's kernel does
not count, so its step is taken to have begun.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from halfstep.scale.surveyed import Surveying


class Progress:
    """An optimizer as it is now, to be compared with later.

    Attributes:
        is_whole: the optimizer makes a step as a whole or not at all.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self.is_whole = isinstance(optimizer, Surveying)
        self._made = optimizer.steps_made if isinstance(optimizer, Surveying) else 0
        self._versions = [] if self.is_whole else [(tensor, _version(tensor)) for tensor in _held(optimizer)]

    def has_moved(self) -> bool:
        """Whether weights or state were written since."""
        optimizer = self._optimizer
        if isinstance(optimizer, Surveying):
            return optimizer.steps_made != self._made
        if any(group.get("fused") for group in optimizer.param_groups) or torch._C._len_torch_dispatch_stack() > 0:
            return True
        known = {id(tensor) for tensor, _ in self._versions}
        return any(_version(tensor) != version for tensor, version in self._versions) or any(
            # State that was made since, and is what it was made as.
            id(tensor) not in known and (_version(tensor) != 0 or bool(tensor.any()))
            for tensor in _held(optimizer)
        )


def note_half_written(error: BaseException, optimizer: Optimizer) -> None:
    """Say of a step that was interrupted when it had begun to write that it can be neither repeated nor undone."""
    error.add_note(
        f"halfstep: {type(optimizer).__name__}.step() had begun to write weights and state when this was raised, and "
        "may not have ended: the step cannot be repeated. To go on from exact numbers load the last checkpoint; the "
        "optimizers of halfstep.optim make a step whole or not at all"
    )


def _held(optimizer: Optimizer) -> list[Tensor]:
    """All parameters, and the state of each group's first and last: all of it, at each step, would take too long. State
    is written in the order of parameters, or for many at once."""
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    ends = []
    for group in optimizer.param_groups:
        stepped = [parameter for parameter in group["params"] if parameter.grad is not None]
        ends += [*stepped[:1], *stepped[1:][-1:]]
    for parameter in ends:
        values = optimizer.state.get(parameter)
        if isinstance(values, Mapping):
            held += [value for value in values.values() if isinstance(value, Tensor)]
    return held


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
