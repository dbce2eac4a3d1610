"""Events for detectors, made by really running an op with its shadow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from halfstep.doctor.event import OpEvent, Suspicion
from halfstep.doctor.execution import Execution
from halfstep.doctor.finding import Finding
from halfstep.doctor.shadow import Shadows
from halfstep.observe.place import Phase, Place


def event_of(
    func: Any,
    *args: Any,
    shadows: Sequence[tuple[Tensor, Tensor]] = (),
    made_by: Mapping[int, Place] | None = None,
    parameters: Iterable[int] = (),
    phase: Phase = "forward",
    parameter: str | None = None,
    **kwargs: Any,
) -> OpEvent:
    """The event of ``func(*args, **kwargs)``.

    Args:
        shadows: tensors among the arguments, each with what FP32 would have in its place.
        made_by: what made an input, by its index among the event's inputs.
        parameters: inputs that an optimizer steps.
    """

    def failed(what: str, error: BaseException) -> None:
        raise AssertionError(what) from error

    known = Shadows()
    for tensor, shadow in shadows:
        known.put(tensor, shadow)
    name = func._schema.name.partition("::")[2]
    place = Place(name, phase, file="train.py", line=7, parameter=parameter)
    _, event = Execution(known, failed).run(func, args, kwargs, place, 1)
    for index, place in (made_by or {}).items():
        event.inputs[index].made_by = place
    event.parameters = set(parameters)
    return event


def findings_of(detector: Callable[[OpEvent], Iterable[Suspicion]], event: OpEvent) -> list[Finding]:
    """What a detector says of an event."""
    return [suspicion.finding for suspicion in detector(event)]
