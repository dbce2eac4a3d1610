"""Parameters, gradients and states of any shape and sharding as `Job`s, kept from step to step.

A model has hundreds of parameters, and each step asks for all their jobs: what does not change from one step to the
next, which is all but the gradient, is kept, and looked at again each time, because others may have put new tensors, or
new memory, in its place (a reset of the state, a load, a move to another device).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from halfstep.optim import masters, moments
from halfstep.optim.layout import first_element, flat, is_dense, is_sharded, like, local, memory_of
from halfstep.optim.update import Job
from halfstep.split import SplitTensor


class _Known(NamedTuple):
    """A job without its gradient, and what it was made from."""

    parameter: Tensor  #: held, so that its id is no other's
    address: int
    states: tuple[tuple[str, bool], ...]
    entries: tuple[tuple[str, Tensor, int], ...]  #: names in the state, tensors and addresses
    contiguous: bool  #: and of this process alone: the common case, and the quick one
    job: Job


class Jobs:
    """The jobs of one optimizer's parameters.

    Args:
        seed: of stochastic rounding.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.dropped: list[Tensor] = []  #: parameters whose masters were of another format
        self._known: dict[int, _Known] = {}

    def keep_only(self, present: Container[int]) -> None:
        """Forget parameters that are not ``present`` (ids): others stand in their place, and their memory is let go."""
        self._known = {identity: known for identity, known in self._known.items() if identity in present}

    def forget(self, parameter: Tensor | None = None) -> None:
        """Make this parameter's job anew, or all."""
        if parameter is None:
            self._known.clear()
        else:
            self._known.pop(id(parameter), None)

    def job(
        self,
        parameter: Tensor,
        gradient: Tensor,
        state: dict[str, Any],
        states: tuple[tuple[str, bool], ...],
        kept_as: tuple[str, Any] | None,
        ordinal: int,
        copied: list[tuple[Tensor, Tensor]],
        name_of: Callable[[Tensor], str],
    ) -> Job:
        """The parameter's job with this gradient.

        Args:
            states: of its rule.
            kept_as: `halfstep.optim.masters.extra` of it.
            copied: gets the parameter and its copy, where the copy is stepped because the parameter's memory has gaps.
            name_of: what messages call a parameter.

        Raises:
            ValueError: an entry of the state has not the parameter's shape.
        """
        known = self._known.get(id(parameter))
        if known is None or not _is_current(known, parameter, state, states):
            known = self._new(parameter, state, states, kept_as, ordinal, name_of)
            ours = local(parameter)
            if is_dense(ours):
                self._known[id(parameter)] = known
            else:
                copied.append((ours, known.job.parameter.view(ours.shape)))
        if known.contiguous and gradient.is_contiguous():
            theirs = gradient.view(-1)
        else:
            ours = local(parameter)
            theirs = flat(like(local(gradient), ours if is_dense(ours) else ours.contiguous()))
        return Job(known.job[0], theirs, *known.job[2:])

    def _new(
        self,
        parameter: Tensor,
        state: dict[str, Any],
        states: tuple[tuple[str, bool], ...],
        kept_as: tuple[str, Any] | None,
        ordinal: int,
        name_of: Callable[[Tensor], str],
    ) -> _Known:
        ours = local(parameter)
        planes = ours if isinstance(ours, SplitTensor) and is_dense(ours) else None
        dense = planes.hi if planes is not None else ours if is_dense(ours) else ours.contiguous()
        stale = [name for name in masters.NAMES if name in state and (kept_as is None or kept_as[0] != name)]
        if stale:  # of a parameter that has another format since
            self.dropped.append(parameter)
        for name in stale:
            del state[name]
        names = [moments.entry(state, name) for name, _ in states]
        scale_names = [f"{name}_scale" for name, _ in states]
        kept_names = [kept_as[0]] if kept_as else []
        if wrong := _misshapen(parameter, state, [*names, *kept_names], scale_names):
            raise ValueError(f"{name_of(parameter)}: {' and '.join(wrong)} in the optimizer's state. {_RESIZED}")
        for name, scale_name in zip([*names, *kept_names], [*scale_names, ""], strict=False):
            part = local(state[name])
            if part.stride() != dense.stride() and not is_sharded(state[name]):
                state[name] = moments.relaid(part, state.get(scale_name), dense)
        scales = [state.get(scale_name) for scale_name in scale_names]
        job = Job(
            parameter=flat(dense),
            gradient=dense,
            kept=flat(planes.lo) if planes is not None else flat(local(state[kept_as[0]])) if kept_as else None,
            states=tuple(flat(local(state[name])) for name in names),
            scales=tuple(None if scale is None else flat(local(scale)) for scale in scales),
            step=state["step"],
            row=moments.row_length(ours.shape),
            seed=self.seed,
            ordinal=ordinal,
            first=first_element(parameter),
            notes={},
        )
        present = ["step", *names, *scale_names, *masters.NAMES]
        entries = tuple((n, state[n], local(state[n]).data_ptr()) for n in present if state.get(n) is not None)
        contiguous = is_dense(ours) and ours.is_contiguous() and not is_sharded(parameter)
        return _Known(parameter, memory_of(ours).data_ptr(), states, entries, contiguous, job)


_RESIZED = (
    "A parameter that grows or is pruned takes all its state along: give each entry the parameter's shape, as you did "
    "with the others (new rows of zeros). What belongs to a master (master, remainder, fp16_remainder, compensation) "
    "may also be deleted from optimizer.state[parameter], and it then starts from the weight. 8-bit codes have one "
    "scale for 64 elements and cannot be resized: take state='fp32' or 'bf16' for parameters that change their shape"
)


def _misshapen(parameter: Tensor, state: dict[str, Any], names: Sequence[str], scale_names: Sequence[str]) -> list[str]:
    """What is said of entries that have not their parameter's shape; they would be read beyond their ends."""
    shape = local(parameter).shape
    expected = {name: tuple(shape) for name in names}
    expected |= {name: moments.scale_shape(shape) for name in scale_names if name in state}
    found = {name: tuple(local(state[name]).shape) for name in expected}
    return [f"{name} has shape {found[name]}" for name in expected if found[name] != expected[name]]


def _is_current(known: _Known, parameter: Tensor, state: dict[str, Any], states: tuple[tuple[str, bool], ...]) -> bool:
    if known.states != states:
        return False
    if known.contiguous:
        if memory_of(parameter).data_ptr() != known.address or not parameter.is_contiguous():
            return False
        if parameter.numel() != known.job.parameter.numel():
            return False
        for name, tensor, address in known.entries:
            if state.get(name) is not tensor or tensor.data_ptr() != address:
                return False
        return True
    if memory_of(parameter).data_ptr() != known.address or local(parameter).stride() != local(known.parameter).stride():
        return False
    return all(state.get(n) is tensor and local(tensor).data_ptr() == a for n, tensor, a in known.entries)
