"""HS101–HS106: numbers that leave a format's range, at the op where they leave it.

The op to name is the one whose inputs were finite and whose output is not: NaN is usually *noticed* much later. FP32's
shadow tells why::

    FP32's result is finite, and beyond the format       HS101  overflow
    the op in FP32, on the run's own inputs, is finite   HS101  overflow on the way (a sum, a norm)
    … is not: it divides by or takes the log of a zero   HS105  a zero that rounding made
    FP32's result is not finite either                   HS102  not the format's doing
    a softmax row of nothing but -inf                    HS104

An overflow need not end as inf: ``x * rsqrt(inf)`` is 0. That is HS103, said where a finite result comes out of inf and
is grossly wrong. HS106 is the other end: most of a result is zero and FP32's is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from halfstep import formats
from halfstep.doctor import attention
from halfstep.doctor.event import OpEvent, Suspicion, Value, floats, read
from halfstep.doctor.finding import Finding, Severity
from halfstep.doctor.marks import GROSS
from halfstep.doctor.shadow import again, can_follow, named, widened
from halfstep.observe.place import Place

_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}

#: Ops whose output is what memory held, or what they were told to write.
_NOT_COMPUTED = ("empty", "new_empty", "fill", "full", "new_full", "scalar_tensor", "masked_fill", "set_", "resize_")
_CASTS = ("_to_copy", "copy_", "to", "_copy_from", "_foreach_copy_")
_SOFTMAX = ("_softmax", "_log_softmax", "_safe_softmax", "_scaled_dot_product")
#: Ops that look at inf to report it, or that the run decides by.
_NOT_ARITHMETIC = ("_amp_", "isfinite", "isinf", "isnan", "where", "masked_fill", "nan_to_num", "clamp")
#: Ops whose small results are meant to vanish: tails of distributions, and decays.
_VANISHING = (
    "exp",
    "sigmoid",
    "_softmax",
    "_safe_softmax",
    "softplus",
    "gelu",
    "silu",
    "erfc",
    "threshold",
    "tanh_backward",
    "sigmoid_backward",
    "_scaled_dot_product",
    "native_dropout",
    "where",
    "relu",
    "elu",
    "mish",
    "hardtanh",
    "sub",
)
#: Ops whose inf comes from a large input.
_GROWING = ("exp", "pow", "cosh", "sinh", "square", "mul", "cumprod", "prod")
#: Share of results that have to have become zero.
_FLUSHED = 0.5


def range_of_results(event: OpEvent) -> Iterator[Suspicion]:
    """HS101, HS102, HS104, HS105."""
    if event.error is not None or event.name.lstrip("_").startswith(_NOT_COMPUTED):
        return
    # Behind the output of fused attention stands its log-sum-exp: inf in rows that pad it, and in those without a key.
    statistics = attention.is_fused(event.func) and not event.name.endswith("backward")
    results = event.outputs[:1] if statistics else event.outputs
    wrong = [i for i, value in enumerate(results) if not value.is_finite]
    if not wrong:
        return
    masked = event.name.startswith(_SOFTMAX) and "backward" not in event.name
    if masked and (finding := _empty_rows(event, wrong[0])) is not None:
        yield Suspicion(finding, tuple(wrong))
        return
    if not all(value.is_finite for value in event.inputs):
        return
    for index in wrong:
        yield Suspicion(_explained(event, event.outputs[index]), (index,))
        return  # the first is enough: the others come from the same numbers


def hidden_overflow(event: OpEvent) -> Iterator[Suspicion]:
    """HS103: an op makes a finite number of an inf that FP32 does not have, in the same place of the tensor."""
    if event.error is not None or event.place.phase != "forward" or event.name.startswith(_NOT_ARITHMETIC):
        return
    for source in event.inputs:
        if not _overflowed(source):
            continue
        for index, value in enumerate(event.outputs):
            wrong = _wrong_where_infinite(source, value)
            if wrong is None:
                continue
            name = _NAMES[source.tensor.dtype] if source.is_low else None
            limit = f"; {name} ends at {formats.of(name).max:.6g}" if name else ""
            amax = _amax_where_infinite(source)
            yield Suspicion(
                Finding(
                    "HS103",
                    event.place,
                    f"{event.name} turns inf, where FP32 has {amax:.4g}, into finite numbers that are wrong by "
                    f"{wrong:.3g}",
                    "The result looks healthy and is not: no NaN will ever tell.",
                    f"Compute this in FP32 (x.float()), or with PyTorch's own op, which does so inside{limit}.",
                    Severity.ERROR,
                    {"fp32_amax": amax, "error": wrong},
                ),
                (index,),
            )
            return


def flushed_results(event: OpEvent) -> Iterator[Suspicion]:
    """HS106: most numbers of a forward result are zero, and FP32's are not."""
    if event.error is not None or event.place.phase != "forward" or event.name.lstrip("_").startswith(_VANISHING):
        return
    for index, value in enumerate(event.outputs):
        if not value.is_low or value.shadow is None:
            continue
        there = value.shadow != 0
        nonzero, lost = (int(count) for count in read(there.sum(), (there & (value.tensor == 0)).sum()))
        if nonzero == 0 or lost < _FLUSHED * nonzero or not _beyond_reach(value, there):
            continue
        if any(_flushed_share(v) >= _FLUSHED / 2 for v in event.inputs):
            continue  # it was lost before
        name, format = _NAMES[value.tensor.dtype], formats.of(value.tensor.dtype)
        amax = float(value.shadow.abs().max())
        yield Suspicion(
            Finding(
                "HS106",
                event.place,
                f"{lost} of {nonzero} results of {event.name} are zero in {name}; in FP32 they reach {amax:.3g}, and "
                f"{name} ends at {format.smallest_subnormal:.3g}",
                "What is multiplied with them, or divided by them, is lost.",
                "Multiply by a power of two before and divide after, or compute this in FP32 or bf16.",
                Severity.WARNING,
                {"zero": lost, "nonzero_in_fp32": nonzero, "fp32_amax": amax},
            ),
            (index,),
        )
        return


# ------------------------------------------------------------------ helpers, in the order of their first use


def _empty_rows(event: OpEvent, index: int) -> Finding | None:
    """HS104, if -inf is all that some rows hold."""
    inputs = [v for v in event.inputs if not v.is_finite]
    if not inputs or any(bool((v.tensor.isnan() | v.tensor.isposinf()).any()) for v in inputs):
        return None
    output = event.outputs[index]
    given = {argument.name: value for argument, value in named(event.func, event.args, event.kwargs)}
    nans = output.tensor.isnan()
    rows = (
        nans.movedim(given.get("dim", -1), -1).flatten(0, -2) if nans.dim() > 1 else nans[None] if nans.dim() else None
    )
    broken = 0 if rows is None else int(rows.any(-1).sum())
    if rows is None or broken == 0:
        return None
    return Finding(
        "HS104",
        event.place,
        f"{broken} of {rows.shape[0]} rows of this {event.name.lstrip('_')} hold nothing but -inf: the result is 0/0",
        "The rows become NaN, in the output and in every gradient that passes them.",
        "Let every row attend to something, or mask with the format's smallest number instead of -inf: "
        "scores.masked_fill(mask, torch.finfo(scores.dtype).min).",
        Severity.ERROR,
        {"rows": broken, "of": rows.shape[0]},
    )


def _explained(event: OpEvent, output: Value) -> Finding:
    """Why finite inputs gave this output."""
    bad = ~output.tensor.isfinite()
    place = place_of_arithmetic(event)
    if not _is_rounded(event, output):
        return _not_the_formats(event, output, bad)
    fp32 = output.shadow if output.shadow is not None else _on_own_inputs(event, output)
    if fp32 is None or not bool(fp32[bad].isfinite().all()):
        return _not_the_formats(event, output, bad)
    amax = float(fp32[bad].abs().max())
    local = _on_own_inputs(event, output)
    if local is not None and not bool(local[bad].isfinite().all()):
        return _made_zero(event, output, bad, amax)
    if local is not None:
        amax = float(local[bad].abs().max())
    name, format = _NAMES[output.tensor.dtype], formats.of(output.tensor.dtype)
    beyond = amax >= format.overflow_threshold
    finding = partial(Finding, "HS101", place, severity=Severity.ERROR)
    numbers = {"fp32_amax": amax, "format_max": format.max, "elements": int(bad.sum()), "of": bad.numel()}
    said = f"{int(bad.sum())} of {bad.numel()} results of {place.op} are not finite in {name}{_channel(bad)}"
    inputs = ", ".join(f"{value.amax:.4g}" for value in event.inputs[:3])
    why = (
        f"FP32 has {amax:.5g} there, {amax / format.max:.2f} times {name}'s largest number {format.max:.6g}"
        if beyond
        else f"FP32 has {amax:.5g}, which {name} could hold: it overflows on the way there"
    )
    return finding(
        what=f"{said}: {why} (largest inputs: {inputs})" if inputs else f"{said}: {why}",
        consequence="inf becomes NaN at the next difference or normalisation, and the step is lost.",
        remedy=_overflow_remedy(event, place, name),
        numbers=numbers,
    )


def place_of_arithmetic(event: OpEvent) -> Place:
    """The op to name: where a result is only rounded by a cast on the same line, the op before the cast."""
    if event.name not in _CASTS or not event.inputs:
        return event.place
    before = event.inputs[-1 if event.name == "copy_" else 0].made_by
    here = event.place
    if before is None or (before.file, before.line, before.module) != (here.file, here.line, here.module):
        return here
    return replace(here, op=before.op)


def _is_rounded(event: OpEvent, output: Value) -> bool:
    """Whether 16 bits had a part in this output."""
    return output.is_low or output.shadow is not None or any(v.is_low for v in event.inputs)


def _on_own_inputs(event: OpEvent, output: Value) -> Tensor | None:
    """What the op gives in FP32 on the very inputs it had."""
    namespace, _, name = event.func._schema.name.partition("::")
    is_attention = attention.is_fused(event.func)
    if not is_attention and not can_follow(event.func, namespace, name):
        return None
    given = [t for _, value in named(event.func, event.args, event.kwargs) for t in floats(value)]
    before = {id(t): value for t, value in zip(given, event.inputs, strict=True)}
    targets: dict[int, Tensor] = {}

    def wide(tensor: Tensor) -> Tensor:
        value = before.get(id(tensor))
        if value is None or value.tensor is tensor:
            return widened(tensor.detach())
        return targets.setdefault(id(tensor), value.tensor.to(torch.float32, copy=True))

    try:
        if is_attention:
            result: Any = attention.in_fp32(event.func, event.args, event.kwargs, None, wide)
        else:
            result = again(event.func, event.args, event.kwargs, wide)
    except Exception:  # no FP32 kernel for this op: the shadow alone has to do
        return None
    if id(output.tensor) in targets:
        return targets[id(output.tensor)]
    found = [t for t in floats(result) if t.shape == output.tensor.shape]
    return found[0].float() if found else None


def _not_the_formats(event: OpEvent, output: Value, bad: Tensor) -> Finding:
    zeros = sum(int((v.tensor == 0).sum()) for v in event.inputs)
    too_large = event.name.lstrip("_").startswith(_GROWING) and not bool(output.tensor.isnan().any())
    held = f"; its inputs hold {zeros} zeros" if zeros else ""
    return Finding(
        "HS102",
        event.place,
        f"{int(bad.sum())} of {bad.numel()} results of {event.name} are inf or NaN from finite inputs, in FP32 "
        f"too{held}",
        "No number format and no loss scale can help: training without mixed precision meets it as well.",
        "The result is beyond FP32's largest number: subtract the maximum before it, or use a form that does so inside "
        "(logsumexp, log_softmax, cross_entropy)."
        if too_large
        else "Guard this op: clamp its input away from where it is not defined (log(0), 0/0, the slope of sqrt at 0).",
        Severity.ERROR,
        {"elements": int(bad.sum()), "of": bad.numel(), "zeros": zeros},
    )


def _made_zero(event: OpEvent, output: Value, bad: Tensor, amax: float) -> Finding:
    low = next((v for v in event.inputs if v.is_low), output)
    name = _NAMES[low.tensor.dtype]
    made = [v for v in event.inputs if v.shadow is not None and bool(((v.tensor == 0) & (v.shadow != 0)).any())]
    fp32 = float(made[0].shadow[made[0].tensor == 0].abs().max()) if made and made[0].shadow is not None else 0.0
    whence = f", made by {made[0].made_by}" if made and made[0].made_by is not None else ""
    zero = (
        f"a zero that is {fp32:.3g} in FP32{whence}"
        if made
        else "a number that rounding moved to where it is undefined"
    )
    return Finding(
        "HS105",
        event.place,
        f"{int(bad.sum())} of {bad.numel()} results of {event.name} are inf or NaN: it meets {zero}; FP32 has "
        f"{amax:.4g}",
        "The loss or its gradient becomes inf or NaN although nothing is too large.",
        f"Use a guard that {name} can hold (its smallest normal number is {formats.of(low.tensor.dtype).tiny:.2g}), a "
        "form that needs none (log_softmax, *_with_logits), or compute this in FP32.",
        Severity.ERROR,
        {"fp32_result": amax, "fp32_input": fp32, "elements": int(bad.sum()), "of": bad.numel()},
    )


def _channel(bad: Tensor) -> str:
    """Where the bad results share their last index: that channel."""
    if bad.dim() < 2 or int(bad.sum()) < 2:
        return ""
    channels = bad.reshape(-1, bad.shape[-1]).any(0).nonzero().flatten()
    return f", all in channel {int(channels[0])}" if len(channels) == 1 and bad.shape[-1] > 1 else ""


def _overflow_remedy(event: OpEvent, place: Place, name: str) -> str:
    if place.phase == "optimizer":
        return (
            f"Keep gradients and optimizer state in FP32: {name} parameters need FP32 masters (halfstep.MasterWeights)."
        )
    where = f"keep_fp32={place.module}" if place.module else "FP32 for this line (x.float())"
    scale = ", or a lower loss scale" if place.phase == "backward" else ""
    return f"Use bf16, which has FP32's range, or {where}{scale}."


def _overflowed(value: Value) -> bool:
    """Whether it holds an inf that FP32 does not."""
    if value.shadow is None or value.is_finite:
        return False
    return bool((value.tensor.isinf() & value.shadow.isfinite()).any())


def _amax_where_infinite(value: Value) -> float:
    assert value.shadow is not None
    there: Any = value.shadow[value.tensor.isinf() & value.shadow.isfinite()]
    return float(there.abs().max())


def _wrong_where_infinite(source: Value, value: Value) -> float | None:
    """The largest error of finite results where the source overflowed; None where there is none of note."""
    if value.shadow is None or source.shadow is None or value.tensor.shape != source.tensor.shape:
        return None
    there = source.tensor.isinf() & source.shadow.isfinite() & value.tensor.isfinite()
    error = torch.where(there, (value.tensor.float() - value.shadow).abs(), 0.0)
    wrong = error > GROSS * value.shadow.abs()
    return float(error[wrong].max()) if bool(wrong.any()) else None


def _flushed_share(value: Value) -> float:
    if value.shadow is None or value.tensor.numel() == 0:
        return 0.0
    there = value.shadow != 0
    nonzero, lost = read(there.sum(), (there & (value.tensor == 0)).sum())
    return lost / nonzero if nonzero else 0.0


def _beyond_reach(value: Value, there: Tensor) -> bool:
    """Whether the results are zero because the format ends there, and not because they cancelled."""
    assert value.shadow is not None
    lost = there & (value.tensor == 0)
    return bool(
        (value.shadow[lost].abs() <= formats.of(value.tensor.dtype).smallest_subnormal).float().mean() > _FLUSHED
    )
