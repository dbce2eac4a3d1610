"""Errors that one op makes large: differences of nearly equal numbers, and whatever else magnifies.

Both detectors compare with the FP32 shadow, and a shadow differs from the run wherever anything was rounded. So neither
looks at the error as such, but at what the op made of it.

HS406, *a difference cancels*: the result is smaller than the operands' own rounding (a few ulp of them, or exactly 0),
and FP32's is another number. ``1 - p`` for a p that rounded to 1, ``E[x²] - E[x]²`` for a mean far from 0.

HS407, *an error jumps*: an op's relative error, by norms over the whole output, is large and many times that of its
inputs. A cosine of a large phase; a distance by way of squares.

What must stay quiet: results that are zero in exact arithmetic (the gradient of a bias in front of a normalization, a
mean of what was centred): there FP32's own value is noise as well, and being far from it means nothing. Hence only the
forward pass, and only what stands out of FP32's rounding noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from halfstep import formats
from halfstep.doctor.event import OpEvent, Suspicion, Value, read
from halfstep.doctor.finding import Finding, Severity
from halfstep.doctor.shadow import again, widened

_DIFFERENCES = frozenset({"add", "sub", "rsub"})

#: A result below this many eps of the larger operand consists of the operands' rounding errors.
NOISE_EPS = 4.0
#: Share of elements to cancel. Unrelated numbers come within 4 eps of each other in 1 to 2 % of cases (bf16).
CANCELLED_SHARE = 0.1
#: An element or a norm is wrong if it is off by more than half.
WRONG = 0.5
#: Eight roundings of FP32, relative to the operands: below, FP32's difference is noise too.
FP32_NOISE = 2.0**-20
#: A sum of many terms gathers more: relative to the sum of their magnitudes.
FP32_SUM_NOISE = 2.0**-16
#: How much larger than its inputs' error an output's has to be. Sound ops magnify by their condition number, a few.
JUMP = 30.0

#: Sums of products: large relative errors where terms cancel. Their terms' magnitudes tell by how much.
_SUMS = frozenset(
    {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "vdot", "sum", "mean", "cumsum", "convolution", "linear"}
    | {"_convolution", "mkldnn_convolution"}
)
#: Not looked at: differences (HS406); casts, where a large error is a flush (HS106); what chooses or shifts, where it
#: is a decision (HS408) or only moved there from elsewhere.
_NOT_JUMPS = _DIFFERENCES | frozenset(
    {
        "_to_copy",
        "copy",
        "to",
        "where",
        "masked_fill",
        "index",
        "index_select",
        "gather",
        "scatter",
        "embedding",
        "topk",
    }
    | {"sort", "max", "min", "kthvalue", "median", "mode", "round", "floor", "ceil", "trunc", "sign", "frac", "fmod"}
    | {"remainder", "heaviside", "index_put", "index_add", "scatter_add", "masked_scatter", "fill", "nan_to_num", "sgn"}
    | {"max_pool2d_with_indices", "max_pool3d_with_indices", "cummax", "cummin", "unique", "bucketize", "roll"}
)


def cancelled_differences(event: OpEvent) -> Iterator[Suspicion]:
    """HS406: a sum or difference in 16 bits that is nothing but its operands' rounding errors."""
    name = event.name.removesuffix("_")
    if event.place.phase == "backward" or name not in _DIFFERENCES or not _one_low_output(event):
        return
    output = event.outputs[0]
    operands = _operands(event, output)
    if output.shadow is None or operands is None:
        return
    format = formats.of(output.tensor.dtype)
    result, exact = output.tensor.detach().float(), output.shadow.float()
    magnitude, smaller = torch.maximum(*operands), torch.minimum(*operands)
    meant = (exact.abs() > FP32_NOISE * magnitude) & magnitude.isfinite() & exact.isfinite() & result.isfinite()
    # Two operands of a like size: 0 + 1e-8 does not cancel, it flushes.
    cancelled = meant & (smaller > magnitude / 2) & (result.abs() <= NOISE_EPS * format.eps * magnitude)
    cancelled &= (result - exact).abs() > WRONG * exact.abs()
    count, of_all = int(cancelled.sum()), result.numel()
    if count and count >= CANCELLED_SHARE * of_all:
        yield Suspicion(_difference_finding(event, format, result, exact, magnitude, cancelled), (0,))


def error_jumps(event: OpEvent) -> Iterator[Suspicion]:
    """HS407: an op whose output is much farther from FP32's than its inputs are."""
    name = event.name.removesuffix("_")
    if event.place.phase != "forward" or event.error is not None or name in _NOT_JUMPS or event.written:
        return
    if not event.outputs or event.decisions or all(value.shadow is None for value in event.inputs):
        return
    errors = _relative_errors([*event.inputs, *event.outputs])
    incoming, outgoing = errors[: len(event.inputs)], errors[len(event.inputs) :]
    if any(error is None for error in incoming):
        return
    # An op that rounds its result makes an error of its own: an exact input is not infinitely better.
    floor = max((formats.of(v.tensor.dtype).eps / 2 for v in (*event.inputs, *event.outputs) if v.is_low), default=0.0)
    before = max([floor, *(error for error in incoming if error is not None)])
    for index, output in enumerate(event.outputs):
        after = outgoing[index]
        if after is None or output.shadow is None or after <= WRONG or after <= JUMP * before or before == 0.0:
            continue
        if _flushes(output) or (name in _SUMS and _is_noise(event, output.shadow)):
            continue
        yield Suspicion(_jump_finding(event, before, after), (index,))


# ------------------------------------------------------------------ differences


def _one_low_output(event: OpEvent) -> bool:
    return event.error is None and len(event.outputs) == 1 and event.outputs[0].is_low


def _operands(event: OpEvent, output: Value) -> tuple[Tensor, Tensor] | None:
    """The magnitudes of what is added or subtracted, of the output's shape."""
    found: list[Tensor] = []
    tensors = iter(event.inputs)
    for operand in event.args[:2]:
        if isinstance(operand, Tensor):
            if not operand.is_floating_point():
                return None
            found.append(next(tensors).tensor.detach().float().abs())
        elif isinstance(operand, int | float):
            found.append(torch.tensor(abs(float(operand)), dtype=torch.float32, device=output.tensor.device))
    alpha = event.kwargs.get("alpha", event.args[2] if len(event.args) > 2 else 1)
    if len(found) != 2 or not isinstance(alpha, int | float):
        return None
    scaled = 0 if event.name.startswith("rsub") else 1  # rsub computes other - alpha * self
    found[scaled] = found[scaled] * abs(float(alpha))
    shape = output.tensor.shape
    return found[0].expand(shape), found[1].expand(shape)


def _difference_finding(
    event: OpEvent, format: formats.Format, result: Tensor, exact: Tensor, magnitude: Tensor, cancelled: Tensor
) -> Finding:
    count, of_all = int(cancelled.sum()), result.numel()
    zeros = int((cancelled & (result == 0)).sum())
    at = int((cancelled.float() * (result - exact).abs()).argmax())
    example = f"{float(result.flatten()[at]):.3g} where FP32 has {float(exact.flatten()[at]):.3g}"
    return Finding(
        code="HS406",
        place=event.place,
        what=f"{count:,} of {of_all:,} differences cancel to rounding noise in {format}, {zeros:,} of them to 0: "
        f"{example}, from operands of {float(magnitude.flatten()[at]):.3g}",
        consequence="The result holds rounding errors instead of the difference.",
        remedy="Compute the operands and the difference in FP32, or rewrite it (with_logits, log1p, expm1).",
        severity=Severity.WARNING,
        numbers={"cancelled": count, "elements": of_all, "zeros": zeros, "format": format.name},
        step=event.step,
    )


# ------------------------------------------------------------------ jumps


def _relative_errors(values: Sequence[Value]) -> list[float | None]:
    """Distances from FP32 by the norm of FP32's; 0 without a shadow; None if there is no such number."""
    norms: list[Tensor] = []
    for value in values:
        if value.shadow is not None and value.tensor.numel():
            there = value.shadow.float()
            difference = value.tensor.detach().float() - there
            norms += torch.linalg.vector_norm(there), torch.linalg.vector_norm(difference)
    found = iter(read(*norms))
    errors: list[float | None] = []
    for value in values:
        if value.shadow is None or not value.tensor.numel():
            errors.append(0.0)
            continue
        norm, error = next(found), next(found)
        if error == 0.0:
            errors.append(0.0)
        else:
            errors.append(error / norm if norm > 0 and math.isfinite(error + norm) else None)
    return errors


def _flushes(output: Value) -> bool:
    """Whether the error is mostly in numbers that are too small for the format: HS106's."""
    if not output.is_low or output.shadow is None:
        return False
    there = output.shadow.float()
    lost = (output.tensor == 0) & (there.abs() < formats.of(output.tensor.dtype).tiny)
    error = (output.tensor.detach().float() - there).abs()
    return float(torch.linalg.vector_norm(error[lost])) > WRONG * float(torch.linalg.vector_norm(error))


def _is_noise(event: OpEvent, exact: Tensor) -> bool:
    """Whether a sum's terms cancel so far that FP32's own result is noise: the same sum over magnitudes tells."""
    values = {id(value.tensor): value.reference.abs() for value in event.inputs}

    def magnitude(tensor: Tensor) -> Tensor:
        return values[id(tensor)] if id(tensor) in values else widened(tensor).abs()

    total = again(event.func, event.args, event.kwargs, magnitude)
    bound = float(torch.linalg.vector_norm(total.float()))
    return float(torch.linalg.vector_norm(exact.float())) <= FP32_SUM_NOISE * bound


def _jump_finding(event: OpEvent, before: float, after: float) -> Finding:
    return Finding(
        code="HS407",
        place=event.place,
        what=f"{event.name} makes a relative error of {before:.2g} one of {after:.2g}: {after / before:,.0f} times",
        consequence="Its output has little to do with what FP32 computes here.",
        remedy="Run this op, and what leads to it, in FP32.",
        severity=Severity.WARNING,
        numbers={"error_before": before, "error_after": after, "factor": after / before},
        step=event.step,
    )
