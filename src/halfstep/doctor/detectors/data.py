"""HS110: inf and NaN that come from outside: no number format and no loss scale is to blame."""

from __future__ import annotations

from collections.abc import Iterator

from halfstep.doctor.event import OpEvent, Suspicion, Value
from halfstep.doctor.finding import Finding, Severity


def bad_data(event: OpEvent, value: Value, parameter: str | None) -> Iterator[Suspicion]:
    """Suspect a tensor that no op of the run has made, where it is first used.

    -inf alone is how attention is masked and no fault.

    Args:
        parameter: its name, if it is a parameter.
    """
    tensor = value.tensor.detach()
    if not event.outputs or value.is_finite:
        return
    nans, infinities = int(tensor.isnan().sum()), int(tensor.isposinf().sum())
    if nans + infinities == 0:
        return
    name = f"the parameter {parameter}" if parameter else f"an input of {event.name}, of shape {tuple(tensor.shape)},"
    held = " and ".join(text for text in (nans and f"{nans} NaN", infinities and f"{infinities} inf") if text)
    finding = Finding(
        "HS110",
        event.place,
        f"{name} holds {held} among {tensor.numel()} numbers before anything was computed",
        "No number format and no loss scale can help: everything computed from it is lost in FP32 too.",
        "Load a checkpoint from before it broke." if parameter else "Look at this batch, and at how it is loaded.",
        Severity.ERROR,
        {"nan": nans, "inf": infinities, "elements": tensor.numel()},
    )
    yield Suspicion(finding, tuple(range(len(event.outputs))))
