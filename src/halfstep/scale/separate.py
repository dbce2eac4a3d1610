"""A scale for each of several losses that share parameters.

One scale for a sum of losses is set by whichever has the largest gradients, and the other's underflow. Here each loss
has a `Trajectory`. Their gradients meet in one ``.grad``, so they have to be brought to one scale before they are
added: each backward pass runs into an empty ``.grad``, its gradients are checked and multiplied by
(common scale / own scale), in FP32, and only then added to what the passes before it left. Nothing is changed for
whoever reads ``.grad`` later: all of it is at the common scale.

The alternative, hooks that divide each gradient as it arrives, needs a check per parameter instead of one over all, and
cannot tell two losses apart that are added up before their backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from halfstep.scale.gradients import is_sharded, parameters
from halfstep.scale.skips import total
from halfstep.scale.trajectory import Move, Rule, Trajectory


class SeparateLosses:
    """The losses of a scaler that have a scale of their own.

    Args:
        state: what `state` returned.
    """

    def __init__(self, state: dict[Any, Any] | None = None) -> None:
        self._losses = {name: Trajectory(*values) for name, values in (state or {}).items()}
        self._found: dict[Hashable, Tensor] = {}

    def scale_of(self, name: Hashable, common: Tensor) -> Tensor:
        """The scale of a loss; a new one starts at the common scale."""
        if name not in self._losses:
            self._losses[name] = Trajectory(float(common.item()))
        return self._losses[name].on(common.device)[0]

    def get_scale(self, name: Hashable) -> float:
        """The scale of a loss, for the host.

        Raises:
            LookupError: no loss of this name was scaled.
        """
        if name not in self._losses:
            raise LookupError(f"no loss named {name!r} was scaled; there are {sorted(map(repr, self._losses))}")
        return self._losses[name].state()[0]

    def scales(self) -> list[float]:
        """All their scales. Waits for the device."""
        return [trajectory.state()[0] for trajectory in self._losses.values()]

    @contextlib.contextmanager
    def collecting(
        self,
        name: Hashable,
        common: Tensor,
        optimizers: Sequence[Optimizer],
        multiply: Callable[[Optimizer, Tensor, Tensor, bool, bool], dict[torch.device, Tensor]],
    ) -> Iterator[Tensor]:
        """Within, the backward pass of a loss, at the scale that this yields.

        On exit its gradients are brought to the ``common`` scale and added to those that were there.

        Args:
            multiply: multiplies an optimizer's gradients by a factor, with a flag to start from; returns the flags.
        """
        scale = self.scale_of(name, common)
        kept = set_aside(optimizers)
        try:
            yield scale
            ratio, nothing = common / scale, torch.zeros_like(scale)
            # A product that overflows is the common scale's fault: the common check finds it, and lowers that one.
            found = [multiply(each, ratio, nothing, False, False) for each in optimizers]
            add_back(kept)
        except BaseException:
            put_back(kept)
            raise
        self.overflowed(name, total((flag for flags in found for flag in flags.values()), scale.device))

    def overflowed(self, name: Hashable, found_inf: Tensor) -> None:
        """A backward pass of a loss found this; it may have several before an update."""
        self._found[name] = self._found[name] + found_inf if name in self._found else found_inf

    def any_used(self) -> bool:
        """Whether any of them took part since the last update."""
        return bool(self._found)

    def found_inf(self) -> Tensor | None:
        """Above 0 where any of them overflowed since the last update; None where none took part."""
        return torch.stack(list(self._found.values())).sum() if self._found else None

    def moves(self, rule: Rule) -> list[Move]:
        """The moves of the scales of those that took part since the last update."""
        return [Move(*self._losses[name].on(found.device), found, rule) for name, found in self._found.items()]

    def forget(self) -> None:
        """They were made: an iteration is over."""
        self._found.clear()

    def state(self) -> dict[Hashable, tuple[float, int, int]]:
        return {name: trajectory.state() for name, trajectory in self._losses.items()}


Kept = list[tuple[Tensor, Tensor | None]]


def set_aside(optimizers: Iterable[Optimizer]) -> Kept:
    """Take the gradients off the optimizers' parameters, so that a backward pass starts from none.

    Raises:
        RuntimeError: an optimizer would release the gradients before they are brought to the common scale.
    """
    kept: dict[Tensor, Tensor | None] = {}
    for optimizer in optimizers:
        if getattr(getattr(optimizer, "release", None), "is_accumulating", True) is False:
            raise RuntimeError(
                f"{type(optimizer).__name__}(release_gradients=True) would step in this backward pass, with gradients "
                "that are not at the common scale yet: run it inside `with optimizer.accumulating():`, or scale the "
                "sum of the losses by scale()"
            )
        kept.update((parameter, parameter.grad) for parameter in parameters(optimizer))
    for parameter in kept:
        parameter.grad = None
    return list(kept.items())


def put_back(kept: Kept) -> None:
    """Undo `set_aside`; gradients that came since are dropped."""
    for parameter, before in kept:
        parameter.grad = before


@torch.no_grad()
def add_back(kept: Kept) -> None:
    """Add the gradients that came since to those set aside.

    Raises:
        RuntimeError: a backward pass wrote into the memory of a gradient that was set aside.
    """
    sums: list[Tensor] = []
    summands: list[Tensor] = []
    for parameter, before in kept:
        now = parameter.grad
        if before is None:
            continue
        if now is None:
            parameter.grad = before
        elif before.is_sparse or now.is_sparse:
            parameter.grad = before + now
        else:
            if not is_sharded(now) and before.data_ptr() == now.data_ptr() != 0:
                raise RuntimeError(
                    "a backward pass wrote over the gradients of the one before it, so they cannot be added: "
                    "DistributedDataParallel needs gradient_as_bucket_view=False with separately scaled losses"
                )
            parameter.grad = before
            sums.append(before)
            summands.append(now)
    if sums:
        torch._foreach_add_(sums, summands)
