"""Constants that rounding turns into something else: 0, 1, or inf.

A kernel computes in FP32 and takes a Python number as it is, so that the constant itself is rarely what is rounded: the
*result* is. What a constant is for decides whether that matters, and each op family tells what its constants are for:

    addend    x + 1e-8      keeps a denominator or the argument of a logarithm off zero: lost where x is 0
    lower     clamp(min=c)  keeps values off a pole: lost where values lie at the bound and the bound has moved to it
    upper     clamp(max=c)  the same from above: 0.9999 is 1 in bf16
    fill      full, where, masked_fill: the values themselves
    factor    m *= 0.9995   forgets a little at every step: forgets nothing where the product rounds back
    eps       of a normalization: keeps a variance of 0 from being divided by

A finding needs the effect: an element where the 16-bit result is 0 or 1 and FP32's is not, or a range error. This also
settles what kernels do inside. Nearly all normalizations use their ``eps`` in FP32 and round only the result, so that
1e-12 does its work in fp16; the CPU's batch norm on fp16 statistics rounds it, and a constant channel becomes NaN.

Arguments that are not listed are silent: the ``eps`` of fused optimizers (used in FP32), the weight of ``lerp``,
``alpha`` and ``value`` (a product in FP32), exponents, comparisons, and probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from halfstep import formats
from halfstep.doctor.detectors.updates import is_kept, is_parameter
from halfstep.doctor.event import LOW_PRECISION, OpEvent, Suspicion
from halfstep.doctor.finding import Finding, Severity
from halfstep.doctor.shadow import named
from halfstep.formats import Format

Role = Literal["addend", "lower", "upper", "fill", "factor", "eps"]

#: By op (without ``_foreach_`` and the final underscore): which arguments are constants of which role.
_ROLES: dict[str, dict[str, Role]] = {
    "add": {"other": "addend", "scalar": "addend", "scalars": "addend"},
    "sub": {"other": "addend", "scalar": "addend", "scalars": "addend"},
    "rsub": {"other": "addend"},
    "clamp": {"min": "lower", "max": "upper"},
    "clamp_min": {"min": "lower", "scalar": "lower", "scalars": "lower", "other": "lower"},
    "clamp_max": {"max": "upper", "scalar": "upper", "scalars": "upper", "other": "upper"},
    "hardtanh": {"min_val": "lower", "max_val": "upper"},
    "maximum": {"other": "lower", "scalar": "lower", "scalars": "lower"},
    "minimum": {"other": "upper", "scalar": "upper", "scalars": "upper"},
    "full": {"fill_value": "fill"},
    "new_full": {"fill_value": "fill"},
    "full_like": {"fill_value": "fill"},
    "fill": {"value": "fill"},
    "scalar_tensor": {"s": "fill"},
    "masked_fill": {"value": "fill"},
    "index_fill": {"value": "fill"},
    "constant_pad_nd": {"value": "fill"},
    "where": {"self": "fill", "other": "fill"},
    "mul": {"other": "factor", "scalar": "factor", "scalars": "factor"},
    "div": {"other": "factor", "scalar": "factor", "scalars": "factor"},
    "native_layer_norm": {"eps": "eps"},
    "native_group_norm": {"eps": "eps"},
    "native_batch_norm": {"eps": "eps"},
    "_native_batch_norm_legit": {"eps": "eps"},
    "_fused_rms_norm": {"eps": "eps"},
    "cudnn_batch_norm": {"epsilon": "eps"},
    "miopen_batch_norm": {"epsilon": "eps"},
}

#: Ops whose outcome is a plain number: a 0-d tensor that they made counts as a constant. (`lift_fresh` is how
#: ``torch.tensor(1e-8)`` shows.)
_LITERALS = frozenset({"lift_fresh", "scalar_tensor", "full", "_to_copy"})

#: PyTorch refuses to convert a constant that does not fit.
_REFUSED = "without overflow"


@dataclass(frozen=True)
class _Constant:
    """A number among an op's arguments and what it is for."""

    argument: str
    role: Role
    value: float
    position: int  #: in a list of numbers, one per tensor; 0 otherwise


def rounded_constants(event: OpEvent) -> Iterator[Suspicion]:
    """HS401, HS402, HS403: constants that this op's 16-bit format cannot tell from 0, from 1, or from inf."""
    roles = _ROLES.get(_base(event.name))
    if roles is None:
        return
    if event.error is not None:
        yield from _refused(event, roles)
        return
    for constant in _constants(event, roles):
        # A list op pairs its numbers with its tensors; one number goes to all.
        several = len(event.outputs) > 1 and "_foreach_" in event.name
        of_list = _is_list(event, constant.argument)
        positions = [constant.position] if of_list or not several else range(len(event.outputs))
        for position in positions:
            if position < len(event.outputs) and event.outputs[position].is_low:
                yield from _examined(event, constant, position)


def _examined(event: OpEvent, constant: _Constant, position: int) -> Iterator[Suspicion]:
    """What became of one constant in one output."""
    output = event.outputs[position].tensor.detach()
    format = formats.of(output.dtype)
    value, rounded = constant.value, _rounded(constant.value, format)
    if rounded == value or value != value or math.isinf(value):
        return
    code: str | None = None
    if math.isinf(rounded):
        if constant.role != "factor" and bool(output.isinf().any()):
            code = "HS403"
    elif constant.role == "factor":
        if abs(rounded) == 1.0 and _forgets_nothing(event, position):
            code = "HS402"
    elif constant.role == "eps":
        code = (
            "HS401" if rounded == 0.0 and event.inputs[0].is_finite and not event.outputs[position].is_finite else None
        )
    elif rounded == 0.0:
        affected = int((output == 0).sum()) if constant.role != "addend" else _guard_lost(event, position, output)
        code = "HS401" if affected and _holds_back(constant, event, position) else None
    elif abs(rounded) == 1.0 and constant.role != "addend" and bool((output == rounded).any()):
        code = "HS402" if constant.role == "fill" or _holds_back(constant, event, position) else None
    if code is not None:
        alone = constant.role == "factor"  # what a factor does not do shows in no single number
        yield Suspicion(_finding(code, event, constant, format, output), () if alone else (position,))


def _guard_lost(event: OpEvent, position: int, output: Tensor) -> int:
    """Elements that are 0 with the addend as they would be without it."""
    tensor = event.inputs[position].tensor.detach() if position < len(event.inputs) else output
    if tensor.shape != output.shape:
        return 0
    return int(((output == 0) & (tensor == 0)).sum())


def _holds_back(constant: _Constant, event: OpEvent, position: int) -> bool:
    """Whether some value lies beyond a bound as it was meant, so that the bound is what should come out."""
    if constant.role not in ("lower", "upper"):
        return True
    if position >= len(event.inputs):
        return False
    reference = event.inputs[position].tensor.detach().float()
    beyond = reference < constant.value if constant.role == "lower" else reference > constant.value
    return bool(beyond.any())


def _forgets_nothing(event: OpEvent, position: int) -> bool:
    """Whether a factor near 1 left every element of a kept tensor as it was. A weight's decay is HS301's."""
    if position not in event.written or is_parameter(event, position) or not is_kept(event, position):
        return False
    before, after = event.inputs[position].tensor.detach(), event.outputs[position].tensor.detach()
    return bool((before != 0).any()) and torch.equal(before, after)


def _refused(event: OpEvent, roles: dict[str, Role]) -> Iterator[Suspicion]:
    """PyTorch raised because a constant does not fit the format."""
    if _REFUSED not in str(event.error):
        return
    dtypes = [value.tensor.dtype for value in event.inputs if value.is_low]
    dtypes += [v for v in event.kwargs.values() if isinstance(v, torch.dtype) and v in LOW_PRECISION]
    if not dtypes:
        return
    format = formats.of(dtypes[0])
    for constant in _constants(event, roles):
        if math.isfinite(constant.value) and math.isinf(_rounded(constant.value, format)):
            yield Suspicion(_finding("HS403", event, constant, format, None))


# ------------------------------------------------------------------ finding them


def _base(name: str) -> str:
    return name.removeprefix("_foreach_").removesuffix("_")


def _is_list(event: OpEvent, argument: str) -> bool:
    return any(
        a.name == argument and isinstance(v, list | tuple) for a, v in named(event.func, event.args, event.kwargs)
    )


def _constants(event: OpEvent, roles: dict[str, Role]) -> Iterator[_Constant]:
    """Python numbers, and 0-d tensors that are nothing but a number, in arguments that have a role."""
    made = {id(value.tensor): value for value in event.inputs}
    for argument, given in named(event.func, event.args, event.kwargs):
        role = roles.get(argument.name)
        if role is None:
            continue
        for position, item in enumerate(given if isinstance(given, list | tuple) else (given,)):
            number = _number(item, made)
            if number is not None:
                yield _Constant(argument.name, role, number, position)


def _number(item: Any, made: dict[int, Any]) -> float | None:
    if isinstance(item, bool):
        return None
    if isinstance(item, int | float):
        return float(item)
    if isinstance(item, Tensor) and item.dim() == 0 and item.dtype in (torch.float32, torch.float64):
        value = made.get(id(item))
        literal = value is not None and (value.made_by is None or value.made_by.op in _LITERALS)
        if literal and not item.requires_grad and not isinstance(item, torch.nn.Parameter):
            return float(item)
    return None


def _rounded(value: float, format: Format) -> float:
    return float(formats.round_to(torch.tensor(value, dtype=torch.float64, device="cpu"), format))


# ------------------------------------------------------------------ words

_PURPOSE: dict[Role, str] = {
    "addend": "added constant",
    "lower": "lower bound",
    "upper": "upper bound",
    "fill": "fill value",
    "factor": "factor",
    "eps": "eps",
}


def _finding(code: str, event: OpEvent, constant: _Constant, format: Format, output: Tensor | None) -> Finding:
    value, rounded = constant.value, _rounded(constant.value, format)
    severity = Severity.WARNING
    affected = 0
    if code == "HS403":
        what = f"the {_PURPOSE[constant.role]} {value:.6g} is beyond {format}'s largest number, {format.max:.6g}"
        remedy = f"Use torch.finfo(x.dtype).max or .min, -inf with a boolean mask, or compute this in {_wider(format)}."
        if output is None:
            severity, consequence = Severity.ERROR, f"PyTorch refuses to convert it, and the program stops in {format}."
        else:
            affected = int(output.isinf().sum())
            # As a mask, -inf is what such a number stands for; only a row of nothing else is wrong, and that is HS104.
            severity = Severity.NOTE if value < 0 else Severity.WARNING
            consequence = f"It becomes {rounded} in {affected:,} of {output.numel():,} elements."
    elif code == "HS401":
        assert output is not None
        affected = int((~output.isfinite() if constant.role == "eps" else output == 0).sum())
        what = f"the {_PURPOSE[constant.role]} {value:.6g} rounds to 0 in {format}: {affected:,} of {output.numel():,}"
        what += " results are " + ("inf or NaN" if constant.role == "eps" else "exactly 0")
        consequence = "What it should keep away from zero is zero: a logarithm, root or division that follows fails."
        smallest = format.smallest_subnormal
        remedy = f"Use a constant above {smallest:.2g} ({format.tiny:.2g} to be exact), or compute this in FP32."
    else:
        assert output is not None
        affected = int((output == rounded).sum())
        what = f"the {_PURPOSE[constant.role]} {value:.8g} is {rounded:g} in {format}"
        if constant.role == "factor":
            affected = output.numel()
            what += f": all {output.numel():,} elements stay as they were"
            consequence = "Nothing is ever forgotten: the average keeps its old value."
            remedy = "Keep this tensor in FP32."
        else:
            what += f", and {affected:,} of {output.numel():,} results are exactly {rounded:g}"
            consequence = f"The distance to {rounded:g} that it should keep is gone: 1 - x is 0, its logarithm -inf."
            step = format.eps / 2
            remedy = f"Compute this in FP32, in log space, or stay {step:.2g} away from 1."
    return Finding(
        code=code,
        place=event.place,
        what=what,
        consequence=consequence,
        remedy=remedy,
        severity=severity,
        numbers={"constant": value, "rounded": rounded, "affected": affected, "format": format.name},
        step=event.step,
    )


def _wider(format: Format) -> str:
    return "bf16 or FP32" if format.name == "fp16" else "FP32"
