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

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

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
        """Step every job; all are on one device.

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
