"""Updates that rounding takes back: ``w += u`` where w afterwards holds what it held before.

A number of the format has neighbours one ulp away, and what is added to it has to be more than half of that to count.
Weights near 1 in bf16 lie 2**-7 apart; an optimizer's update of 3e-4 never reaches half of that. Nothing fails: the
loss goes down more slowly or not at all. The same happens to gradients accumulated over many micro-batches, to
averages of weights, and to counters, which in bf16 end at 256.

The test: run the op again in FP32 on the values from before. Elements that FP32 would have changed (an update of zero,
a fixed point, or one that FP32 itself would lose are no loss) and that did not change are lost. A few lost are ordinary
rounding, whose errors cancel. Half of them, and the typical update is below half an ulp: the sum no longer follows.

Only what is kept is looked at: parameters, gradients being accumulated, and tensors that are updated again and again.
A residual branch that is small beside its stream, or an ``eps`` that guards a denominator, is meant to vanish.

Not seen: compensated summation (Kahan) makes up in a second tensor for what the first loses, and looks like a loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from halfstep import formats
from halfstep.doctor.event import LOW_PRECISION, OpEvent, Suspicion, floats
from halfstep.doctor.finding import Finding, Severity
from halfstep.doctor.shadow import again, named

#: Share of a tensor's non-zero updates that has to be lost. From a half on, the median update is below half an ulp.
LOST_SHARE = 0.5
#: An average this near to what it follows (relative to it) has arrived: what is left to do is its rounding error.
ARRIVED = 2.0**-4
#: From this share on a weight or a gradient stands still for good: an error, not only a loss of speed.
STANDS_STILL = 0.9

#: Ops that bring something into a tensor, by their names without ``_foreach_`` and the final underscore. Not ``copy_``:
#: 16-bit copies of FP32 masters are meant to stay the same for many steps.
_UPDATES = frozenset(
    {"add", "sub", "mul", "div", "lerp", "addcmul", "addcdiv", "addmm", "addmv", "addr", "addbmm", "baddbmm"}
    | {"index_add", "scatter_add", "index_put"}
)
#: Ops that make a tensor to be filled: what they made and is updated in place is a running value.
_FRESH = frozenset({"zeros", "ones", "full", "empty", "zero", "fill", "scalar_tensor", "lift_fresh"})


@dataclass
class _Loss:
    """What one tensor lost in one op."""

    lost: int
    wanted: int  #: elements that FP32 would have changed
    ratio: float  #: median of |update| / ulp over them
    amount: float  #: median of |update| over them


def lost_updates(event: OpEvent) -> Iterator[Suspicion]:
    """HS301, HS302, HS303: what an op should have added to a 16-bit tensor and did not."""
    if event.error is not None:
        return
    accumulates = event.place.phase == "backward"
    if accumulates:
        targets = [0] if _is_gradient_sum(event) else []
    elif _base(event.name) in _UPDATES or event.name.startswith("_fused_"):
        targets = event.written
    else:
        return
    targets = [index for index in targets if event.inputs[index].is_low]
    if not targets:
        return
    arguments = _floating_tensors(event)
    if len(arguments) != len(event.inputs):
        return
    kept = [i for i in targets if accumulates or is_parameter(event, i) or _is_running_value(event, i)]
    losses: dict[str, list[_Loss]] = {}
    if any(_left_some(event, i, arguments) for i in kept):
        for index, loss in _losses(event, kept, arguments):
            code = "HS302" if accumulates else "HS301" if is_parameter(event, index) else "HS303"
            losses.setdefault(code, []).append(loss)
    for code, found in losses.items():
        affected = [loss for loss in found if loss.wanted and loss.lost >= LOST_SHARE * loss.wanted]
        if affected:
            dtype = event.inputs[kept[0]].tensor.dtype
            yield Suspicion(_finding(code, event, affected, len(found), formats.of(dtype).name))


def is_parameter(event: OpEvent, index: int) -> bool:
    """Whether an input is a weight that is trained: one that an optimizer steps, or a parameter with a gradient.

    A parameter without one, written outside of any optimizer, is a copy: an average of weights.
    """
    if index in event.parameters:
        return True
    arguments = _floating_tensors(event)
    if index >= len(arguments) or not isinstance(arguments[index], torch.nn.Parameter):
        return False
    return event.place.phase == "optimizer" or arguments[index].grad is not None


def _is_running_value(event: OpEvent, index: int) -> bool:
    """Whether this is an HS303, unless nothing is lost. A factor that rounds to 1 is told as such, as HS402."""
    dtype = event.inputs[index].tensor.dtype
    factor = event.args[1] if _base(event.name) in ("mul", "div") and len(event.args) > 1 else None
    factor_is_one = (
        isinstance(factor, float) and float(torch.tensor(factor, dtype=torch.float32, device="cpu").to(dtype)) == 1.0
    )
    return not factor_is_one and is_kept(event, index)


def is_kept(event: OpEvent, index: int) -> bool:
    """Whether a tensor that an op writes into is one that goes on from step to step, and no intermediate result.

    It was there before the examination, or was made to be filled, or was last written in place at this very line. For
    a constant addend it has to have been this very op: ``sqrt.div_(c).add_(eps)`` guards a denominator.
    """
    made = event.inputs[index].made_by
    if made is None or _base(made.op).removesuffix("_like").removeprefix("new_") in _FRESH:
        return True
    same_line = (made.file, made.line, made.module, made.phase) == (
        event.place.file,
        event.place.line,
        event.place.module,
        event.place.phase,
    )
    if not (same_line and made.op.endswith("_")):
        return False
    constant_addend = _base(event.name) in ("add", "sub") and not _has_tensor_operand(event)
    return made.op == event.place.op if constant_addend else True


def _is_gradient_sum(event: OpEvent) -> bool:
    """Whether this is autograd adding to a parameter's ``.grad``: in place or, where it is shared, not."""
    return event.place.parameter is not None and _base(event.name) == "add" and len(event.inputs) == 2


def _base(name: str) -> str:
    return name.removeprefix("_foreach_").removesuffix("_")


def _has_tensor_operand(event: OpEvent) -> bool:
    operand = event.args[1] if len(event.args) > 1 else event.kwargs.get("other")
    if isinstance(operand, list | tuple):
        operand = operand[0] if operand else None
    return isinstance(operand, Tensor)


def _floating_tensors(event: OpEvent) -> list[Tensor]:
    """The arguments that `OpEvent.inputs` were made from."""
    return floats([value for _, value in named(event.func, event.args, event.kwargs)])


def _stored(event: OpEvent, index: int, arguments: list[Tensor]) -> Tensor:
    """What a target holds after the op: in its own memory, or in a new tensor."""
    return (arguments[index] if index in event.written else event.outputs[0].tensor).detach()


def _left_some(event: OpEvent, index: int, arguments: list[Tensor]) -> bool:
    """Whether any element is what it was: mostly none is, and there is nothing to compute."""
    before, after = event.inputs[index].tensor, _stored(event, index, arguments)
    return before.shape == after.shape and bool((before == after).any())


def _losses(event: OpEvent, targets: list[int], arguments: list[Tensor]) -> Iterator[tuple[int, _Loss]]:
    """Run the op again in FP32 on the values from before, and compare."""
    wide: dict[int, Tensor] = {}
    for argument, value in zip(arguments, event.inputs, strict=True):
        if id(argument) not in wide:
            widened = value.tensor.dtype in LOW_PRECISION
            # The op may write into any of them, and none of them is ours: always a copy.
            wide[id(argument)] = value.tensor.detach().to(torch.float32 if widened else value.tensor.dtype, copy=True)
    result = again(event.func, event.args, event.kwargs, lambda tensor: wide[id(tensor)])
    for index in targets:
        before = event.inputs[index].tensor.detach().float()
        exact = wide[id(arguments[index])] if index in event.written else result
        stored = _stored(event, index, arguments)
        if exact.shape != before.shape or stored.shape != before.shape:
            continue
        update = exact.float() - before
        wanted = (update != 0) & update.isfinite()
        if _base(event.name) == "lerp":
            ahead = len(event.args[0]) if "_foreach_" in event.name else 1 - index
            goal = event.inputs[index + ahead].tensor.detach().float()
            wanted &= (goal - before).abs() > ARRIVED * goal.abs()
        lost = wanted & (stored.float() == before)
        count = int(wanted.sum())
        if count:
            ulp = formats.of(event.inputs[index].tensor.dtype).ulp(before)[wanted]
            size = update[wanted].abs()
            yield index, _Loss(int(lost.sum()), count, float((size / ulp).median()), float(size.median()))


# ------------------------------------------------------------------ words

_CONSEQUENCES = {
    "HS301": "These weights do not learn what the optimizer computed for them.",
    "HS302": "Later micro-batches count for little or nothing in this gradient.",
    "HS303": "The running value no longer follows what goes into it.",
}
_REMEDIES = {
    "HS301": "Keep FP32 master weights (halfstep.MasterWeights), or round the update stochastically.",
    "HS302": "Accumulate gradients in FP32: FP32 parameters under autocast, or FP32 master gradients.",
    "HS303": "Keep this tensor in FP32.",
}
_WHOSE = {"HS301": "weight", "HS302": "gradient", "HS303": "value"}


def _finding(code: str, event: OpEvent, affected: list[_Loss], tensors: int, format: str) -> Finding:
    lost, wanted = sum(loss.lost for loss in affected), sum(loss.wanted for loss in affected)
    middle = sorted(affected, key=lambda loss: loss.ratio)[len(affected) // 2]
    among = f" in {len(affected)} of {tensors} tensors" if tensors > 1 else ""
    what = (
        f"{lost:,} of {wanted:,} non-zero updates{among} left the {format} {_WHOSE[code]} as it was: "
        f"the median update, {middle.amount:.2g}, is {middle.ratio:.2g} of the step to the next {format} number"
    )
    share = lost / wanted
    decays = code == "HS301" and _base(event.name) in ("mul", "div")
    stands_still = code != "HS303" and not decays and share >= STANDS_STILL
    return Finding(
        code=code,
        place=event.place,
        what=what,
        consequence="Weight decay has no effect on them." if decays else _CONSEQUENCES[code],
        remedy=_REMEDIES[code],
        severity=Severity.ERROR if stands_still else Severity.WARNING,
        numbers={
            "lost": lost,
            "updates": wanted,
            "share": share,
            "update_in_ulps": middle.ratio,
            "median_update": middle.amount,
            "tensors": len(affected),
            "format": format,
        },
        step=event.step,
    )
