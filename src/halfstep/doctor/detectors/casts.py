"""Casts that make different numbers equal: positions, timesteps, ids.

A format counts whole numbers up to 2**p, p being its significand's bits: bf16 to 256, fp16 to 2048. Beyond that,
neighbours fall together: of 4096 positions bf16 keeps 769. For most numbers such a relative error of 2**-9 is what 16
bits mean. Not for numbers that count something and are then multiplied by a frequency: there the absolute error is what
counts, and 987 is another timestep than 988.

HS404, a *ramp* loses steps: positions, grids, schedules. A row is a ramp if it rises or falls throughout and is either
evenly spaced or too long to do so by chance; a table is, if all rows are ramps, or columns multiples of one ramp (the
phases of position times frequency).

HS405, *different inputs become equal*: a batch of single numbers, (N,) or (N, 1), of which two that differ by a whole
step or more are one number after the cast, or whole numbers of which some turn into others. Activations, weights and
losses collide in any cast and are no inputs: what an op has computed is not looked at, nor is a parameter. One unit is
the step because that is what counts have: it takes magnitudes above 2**p to lose one, where normalized data never are.

Both are reported only where the error grows to a gross one further on, as it does in a sine (`halfstep.doctor.marks`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from halfstep import formats
from halfstep.doctor.event import LOW_PRECISION, OpEvent, Suspicion
from halfstep.doctor.finding import Finding, Severity
from halfstep.doctor.shadow import again, widened

#: Ops that convert, and ops that make a ramp.
_CASTS = frozenset({"_to_copy", "to", "copy_", "_autocast_to_reduced_precision"})
_RAMPS = frozenset({"arange", "linspace", "logspace"})

#: Ops behind which a number is still an input: drawing, counting, choosing, shifting by views.
_INPUT_OPS = frozenset(
    {
        "arange",
        "linspace",
        "logspace",
        "lift_fresh",
        "scalar_tensor",
        "full",
        "rand",
        "rand_like",
        "randint",
        "uniform_",
    }
    | {"index", "index_select", "gather", "cat", "stack", "repeat", "clone", "_to_copy", "random_", "randperm"}
)

#: The shortest row that has a shape at all.
_SHORTEST = 3
#: Steps that differ by less than this many FP32 roundings of the largest value are even.
_EVEN = 4 * 2.0**-24
#: So many values in order are no accident (1 in 16!), evenly spaced or not.
_NO_ACCIDENT = 16
#: Columns are multiples of one ramp within this relative error: a few FP32 roundings.
_PROPORTIONAL = 1e-5
#: Rows that are looked at; a batch repeats its positions.
_MAX_ROWS = 64
#: Batches are small; longer lists are data.
_MAX_BATCH = 4096
#: Share of the values lost from which on the ramp is useless: an error.
_MOST = 0.5


def colliding_values(event: OpEvent) -> Iterator[Suspicion]:
    """HS404, HS405: different numbers that are the same number after this cast."""
    pair = _before_and_after(event)
    if pair is None:
        return
    before, after = pair
    row = _colliding_ramp(before, after)
    if row is not None:
        yield Suspicion(_ramp_finding(event, *row), (0,))
        return
    if event.name in _CASTS and _is_input(event):
        finding = _batch_finding(event, before.flatten(), after.flatten(), before.shape)
        if finding is not None:
            yield Suspicion(finding, (0,))


def _before_and_after(event: OpEvent) -> tuple[Tensor, Tensor] | None:
    """The numbers before and after a cast to 16 bits, in float64; None if this is none."""
    if event.error is not None or not event.outputs or not event.outputs[0].is_low:
        return None
    output = event.outputs[0]
    if event.name in _RAMPS:
        exact = again(event.func, event.args, event.kwargs, widened)  # the same ramp in FP32
    elif event.name in _CASTS and not isinstance(event.args[0], torch.nn.Parameter):
        exact = event.args[1] if event.name == "copy_" else event.args[0]
    else:
        return None
    if not isinstance(exact, Tensor) or exact.dtype in LOW_PRECISION or exact.is_complex() or exact.dtype == torch.bool:
        return None
    if exact.numel() < 2 or exact.shape != output.tensor.shape:
        return None
    before, after = exact.detach().double(), output.tensor.detach().double()
    # An overflow or a mask is somebody else's finding, and -inf equals -inf.
    return (before, after) if bool(after.isfinite().all()) else None


# ------------------------------------------------------------------ ramps


def _colliding_ramp(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor] | None:
    """The ramp of a tensor that loses most steps in the cast, before and after; None if it has none."""
    before, after = _without_repeats(before), _without_repeats(after)
    if before.dim() == 0 or before.dim() > 2:
        return None
    if before.dim() == 1:
        before, after = before[None], after[None]
    found = None
    if before.shape[0] <= _MAX_ROWS and all(_is_ramp(row) for row in before):
        found = before, after
    elif _is_outer(before):  # positions down, frequencies across
        found = before.T, after.T
    elif _is_outer(before.T):
        found = before, after
    if found is None:
        return None
    losses = [_collisions(b, a) for b, a in zip(*found, strict=True)]
    worst = max(range(len(losses)), key=losses.__getitem__)
    return (found[0][worst], found[1][worst]) if losses[worst] else None


def _without_repeats(x: Tensor) -> Tensor:
    """Without dimensions of size 1, and once what was expanded."""
    for dim in reversed(range(x.dim())):
        first = x.select(dim, 0)
        if x.shape[dim] == 1 or (
            x.dim() > 1 and dim < x.dim() - 1 and torch.equal(x, first.unsqueeze(dim).expand_as(x))
        ):
            x = first
    return x


def _is_ramp(row: Tensor) -> bool:
    if row.numel() < _SHORTEST:
        return False
    steps = row.diff()
    if not (bool((steps > 0).all()) or bool((steps < 0).all())):
        return False
    even = float((steps - steps.mean()).abs().max()) <= _EVEN * float(row.abs().max())
    return even or row.numel() >= _NO_ACCIDENT


def _is_outer(table: Tensor) -> bool:
    """Whether every column is a multiple of one ramp: an outer product of positions and something."""
    if table.shape[0] < _NO_ACCIDENT:
        return False
    largest = table.abs().amax(0)
    column = table[:, largest.argmax()]
    if not _is_ramp(column):
        return False
    last = column.abs().argmax()
    outer = torch.outer(column / column[last], table[last])
    return bool(((table - outer).abs() <= _PROPORTIONAL * largest).all())


def _collisions(before: Tensor, after: Tensor) -> int:
    """Neighbours that differed and do no longer."""
    return int(((after.diff() == 0) & (before.diff() != 0)).sum())


# ------------------------------------------------------------------ batches of inputs


def _is_input(event: OpEvent) -> bool:
    """Whether what is cast came in from outside, and was not computed."""
    source = event.args[1] if event.name == "copy_" else event.args[0]
    if not source.is_floating_point():
        return True
    made = next((value.made_by for value in event.inputs if value.tensor is source), None)
    return not source.requires_grad and (made is None or made.op in _INPUT_OPS)


def _batch_finding(event: OpEvent, before: Tensor, after: Tensor, shape: torch.Size) -> Finding | None:
    single = len(shape) == 1 or (len(shape) == 2 and shape[1] == 1)
    if not single or before.numel() > _MAX_BATCH:
        return None
    order = before.argsort()
    ordered, landed = before[order], after[order]
    # Rounding keeps the order, so what becomes equal is next to each other.
    merged = (landed.diff() == 0) & (ordered.diff() >= 1.0)
    whole = torch.equal(before, before.round())
    moved = (before - after).abs()
    became_another = whole & (moved >= 1.0)
    pairs, others = int(merged.sum()), int(became_another.sum())
    if not pairs and not others:
        return None
    if pairs:
        at = int(merged.int().argmax())
        first, second, both = float(ordered[at]), float(ordered[at + 1]), float(landed[at])
        example = f"{first:.9g} and {second:.9g} both become {both:.9g}"
    else:
        at = int(moved.argmax())
        example = f"{float(before[at]):.9g} becomes {float(after[at]):.9g}"
    format = formats.of(event.outputs[0].tensor.dtype)
    return Finding(
        code="HS405",
        place=event.place,
        what=f"of {before.numel():,} inputs cast to {format}, {int((moved > 0).sum()):,} change: {example}",
        consequence="The model cannot tell these inputs apart, and a sine or cosine of them is far off.",
        remedy=f"Keep them in FP32 through the embedding; {format} counts whole numbers only to {_counts_to(format)}.",
        severity=Severity.WARNING,
        numbers={
            "inputs": before.numel(),
            "changed": int((moved > 0).sum()),
            "pairs": pairs,
            "largest_change": float(moved.max()),
            "format": format.name,
        },
        step=event.step,
    )


def _ramp_finding(event: OpEvent, before: Tensor, after: Tensor) -> Finding:
    format = formats.of(event.outputs[0].tensor.dtype)
    kept, had = int(torch.unique(after).numel()), int(torch.unique(before).numel())
    # Where the value has moved by half a step or more, it may as well be a neighbour's.
    steps = before.diff().abs()
    far = (after - before).abs()[1:] >= steps / 2
    first = int(far.int().argmax()) + 1 if bool(far.any()) else int((after.diff() == 0).int().argmax()) + 1
    return Finding(
        code="HS404",
        place=event.place,
        what=(
            f"a ramp of {had:,} values has {kept:,} in {format}; the first wrong one is number {first:,}, "
            f"{float(before[first]):.6g}, which becomes {float(after[first]):.6g}"
        ),
        consequence="The model cannot tell the positions that fell together apart, and their phases are wrong.",
        remedy=f"Compute positions and phases in FP32 and cast only their sine and cosine; {format} counts whole "
        f"numbers only to {_counts_to(format)}.",
        severity=Severity.ERROR if kept <= _MOST * had else Severity.WARNING,
        numbers={"values": had, "left": kept, "first_wrong": first, "format": format.name},
        step=event.step,
    )


def _counts_to(format: formats.Format) -> int:
    return int(2 ** (format.mantissa_bits + 1))
