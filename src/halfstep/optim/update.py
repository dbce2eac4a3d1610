"""The seam between optimizers and backends: one parameter's update, with everything as flat tensors.

The optimizer (`halfstep.optim.base`) turns parameters of any shape, layout and sharding into `Job`s; a backend brings
them one step further. What is stored how can be seen from the tensors' dtypes:

==================  ===========================================================================
``parameter``       float32, bfloat16 or float16 (n,): memory order, contiguous
``gradient``        float32, bfloat16 or float16 (n,), the same order
``kept``            None, or (n,) float32 ``fp32``, int16 ``exact``, int8 ``24bit``, or the parameter's
                    dtype ``kahan``
``states``          one for each of ``rule.states``, (n,): float32, bfloat16, or int8 / uint8 codes
``scales``          None, or float32 (groups,) for codes, one for each state
``step``            float32 0-d on the parameter's device: steps applied so far
==================  ===========================================================================

An update, in the words of the oracle (`halfstep.optim.backends.eager`)::

    if found_inf: nothing at all changes
    step += 1
    g = float32(gradient) * coefficient
    x = masters.decode(parameter, kept)
    s = moments.decode(each state)
    rules.apply(rule, x, g, s, step)
    moments.encode(each state);  masters.encode(x)
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from halfstep.optim.clipping import multiply_
from halfstep.optim.layout import local
from halfstep.optim.rules import Rule

if TYPE_CHECKING:
    from halfstep.optim.arrivals import Tally


class Job(NamedTuple):
    """One parameter's update."""

    parameter: Tensor
    gradient: Tensor
    kept: Tensor | None
    states: tuple[Tensor, ...]
    scales: tuple[Tensor | None, ...]
    step: Tensor
    row: int  #: elements behind one index of the first dimension: groups of 64 do not cross it
    seed: int  #: the optimizer's seed
    ordinal: int  #: the parameter's place among all of the optimizer's
    first: int = 0  #: of a part of a sharded parameter: the index of its first element in the whole
    #: Where a backend may keep what it derives from all but the gradient; the same from step to step.
    notes: dict[str, Any] | None = None


class Survey(NamedTuple):
    """What one pass over gradients finds: tensors on their device, of the gradients as they are (scaled)."""

    sum_of_squares: Tensor  #: float64 0-d; of all elements, inf and NaN included
    found_inf: Tensor  #: float32 0-d: 1 where an element is inf or NaN, else 0
    amax: Tensor  #: float32 (number of gradients,): each one's largest magnitude; inf or NaN where it holds one


class Arrival(NamedTuple):
    """What is known of a gradient when it has been looked at and added; tensors on its device."""

    survey: Survey  #: of this gradient, as it is
    found_inf: Tensor  #: float32 0-d: 1 if it holds inf or NaN, or would when divided by a scale below 1; else 0
    coefficient: Tensor | None  #: float32 0-d: the inverse scale, and what clipping takes; None without a limit


class Backend(Protocol):
    """A way of computing updates. All of them keep the meaning of `halfstep.optim.backends.eager`."""

    name: str

    def update(
        self,
        jobs: Sequence[Job],
        rule: Rule,
        *,
        stochastic: bool,
        coefficient: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Step every job, whole; all are on one device. What is interrupted has stepped all of them, or none.

        Args:
            stochastic: round what a 24-bit master, or a parameter without one, drops, stochastically.
            coefficient: 0-d float32 on the device: what gradients are multiplied by; None: 1.
            found_inf: 0-d float32 on the device: where it is not 0 nothing changes. None: 0.
        """

    def survey(self, gradients: Sequence[Tensor]) -> Survey:
        """Look at flat gradients of one device, once."""


@runtime_checkable
class Arriving(Protocol):
    """A backend that looks at a gradient and adds it to what arrived before, in fewer launches than torch's own."""

    def arrive(
        self,
        gradient: Tensor,
        tally: Tally,
        inverse_scale: Tensor | None,
        norm_before: Tensor | None,
        limit: float | None,
    ) -> Arrival:
        """`halfstep.optim.arrivals.Tally.take` of a flat gradient, on the tally's device with all numbers."""


class Update:
    """One call of a backend, prepared: a group's jobs on one device.

    Args:
        backend: makes it.
        rule, stochastic, coefficient, found_inf: as `Backend.update` has them.
        unscale: leave gradients multiplied by the coefficient in memory, but FP16 ones.

    Attributes:
        jobs: what it steps; all or none of them.
        copied: parameters, and copies that are stepped for them, because their memory has gaps.
        in_planes: parameters whose planes are stepped.
        scaled: to be left multiplied: gradients, their jobs, and their versions as they are now.
    """

    def __init__(
        self,
        backend: Backend,
        rule: Rule,
        *,
        stochastic: bool,
        coefficient: Tensor | None,
        found_inf: Tensor | None,
        unscale: bool = False,
    ) -> None:
        self.jobs: list[Job] = []
        self.copied: list[tuple[Tensor, Tensor]] = []
        self.in_planes: list[Tensor] = []
        self.scaled: list[tuple[Tensor, Job, int]] = []
        self._unscale = unscale
        self._backend, self._rule = backend, rule
        self._stochastic, self._coefficient, self._found_inf = stochastic, coefficient, found_inf
        self._step_before: float | None = None
        self._was_called = False

    @torch.no_grad()
    def write(self) -> None:
        """Make it, unless it is made; may be called again when it was interrupted."""
        if not self._is_made():
            # The compiled kernels do it while a gradient is in the cache.
            options: dict[str, Any] = {"unscale": True} if self._unscale and self._backend.name == "native" else {}
            self._backend.update(
                self.jobs,
                self._rule,
                stochastic=self._stochastic,
                coefficient=self._coefficient,
                found_inf=self._found_inf,
                **options,
            )
            self._was_called = True
        self._unscale_rest()
        for parameter, copy in self.copied:
            parameter.copy_(copy)
        # The kernels write through pointers; autograd and others look at the version to see that values changed.
        torch.autograd.graph.increment_version([job.parameter for job in self.jobs])
        torch.autograd.graph.increment_version(self.in_planes)

    def _unscale_rest(self) -> None:
        """Multiply the gradients that the pass over their parameters has not multiplied, unless it is done."""
        if self._coefficient is None:
            return
        native = self._backend.name == "native"
        rest = []
        for gradient, job, version in self.scaled:
            done = native and job.gradient.data_ptr() == local(gradient).data_ptr()
            if gradient.dtype is not torch.float16 and not done and gradient._version == version:
                rest.append(gradient)
        multiply_(rest, [self._coefficient])

    def _is_made(self) -> bool:
        """On the host a count of steps, which is written with the weights, tells; elsewhere only that the call
        returned, for the host would have to wait for the device."""
        if self._was_called:
            return True
        step = self.jobs[0].step
        if step.device.type != "cpu" or type(step) is not Tensor:  # a fake one has no memory
            return False
        # Out of memory, and not by `item`: nobody waits for a device here.
        count = ctypes.c_float.from_address(step.data_ptr()).value
        if self._step_before is None:
            self._step_before = count
        return count != self._step_before
