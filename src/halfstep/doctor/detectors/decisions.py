"""Discrete decisions that rounding flips: which expert, which class, which node.

A choice has no small error: two scores that are one ulp apart, or equal after rounding, send a token to another expert
than FP32 would. The run's choices are compared with the shadow's, as sets: the order of the chosen means nothing.

A few flips are what 16 bits cost anywhere upstream, and one batch is a small sample of them. So the share has to exceed
a limit with some certainty (the lower end of Wilson's interval), and what it means depends on the scores: rounded to 16
bits themselves, they tie exactly, and that is to mend right here; in FP32 behind a 16-bit layer, flips are inherited,
and only many of them are worth more than a note. Few rows, whatever their share, are never more.

Only choices of several (topk) count as decisions that steer a model. An argmax or the position of a maximum is mostly
read for a metric, or used for its value, where near ties do no harm: a note. Comparisons decide too, element by
element, but so does every ReLU: they are left alone, and so is the order of a full sort.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from halfstep.doctor.event import LOW_PRECISION, OpEvent, Suspicion
from halfstep.doctor.finding import Finding, Severity
from halfstep.doctor.shadow import named

#: Share of the choices that differ which is worth telling: one in four hundred, so that of tokens with two experts one
#: in two hundred goes elsewhere. Routers in bf16 usually send away one or two in a hundred.
SHARE = 0.0025
#: One or two flips prove nothing, however few the choices.
FEWEST = 3
#: Share from which on inherited flips are more than a note: every twentieth token elsewhere.
GROSS_SHARE = 0.05
#: Of a normal distribution, for a one-sided 95 %.
_CERTAINTY = 1.645
#: Rows that have to differ for more than a note: a count has a spread of its root, and one batch of a few is luck.
MANY = 32

_CHOICES = frozenset({"topk"})
_SINGLE = frozenset({"argmax", "argmin", "max", "min", "kthvalue"})


def flipped_decisions(event: OpEvent) -> Iterator[Suspicion]:
    """HS408: choices that FP32 makes otherwise."""
    if event.error is not None or event.name not in _CHOICES | _SINGLE or not event.decisions or not event.inputs:
        return
    chosen, expected = event.decisions[0]
    if expected is None or chosen.dtype != torch.int64 or chosen.shape != expected.shape or chosen.numel() == 0:
        return
    several = event.name in _CHOICES
    rows, others = _as_rows(event, chosen, several), _as_rows(event, expected, several)
    missing = _missing(rows, others)
    count, of_all, wrong_rows = int(missing.sum()), rows.numel(), int((missing > 0).sum())
    if count < FEWEST or _at_least(count, of_all) <= SHARE:
        return
    rounded = event.inputs[0].tensor.dtype in LOW_PRECISION
    steers = several and wrong_rows >= MANY and (rounded or _at_least(count, of_all) > GROSS_SHARE)
    finding = _finding(event, wrong_rows, rows.shape[0], count, of_all, rounded, steers)
    yield Suspicion(finding, tuple(range(len(event.outputs))) if several else ())


def _as_rows(event: OpEvent, indices: Tensor, several: bool) -> Tensor:
    """Indices with one row per decision, its choices sorted."""
    if not several or indices.dim() == 0:
        return indices.reshape(-1, 1)
    given = {argument.name: value for argument, value in named(event.func, event.args, event.kwargs)}
    dim = int(given.get("dim", -1))
    rows = indices.movedim(dim, -1)
    return rows.reshape(-1, rows.shape[-1]).sort(-1).values


def _missing(mine: Tensor, theirs: Tensor) -> Tensor:
    """How many of each row's choices are not among the other's. Rows are sorted and hold no index twice."""
    at = torch.searchsorted(theirs.contiguous(), mine.contiguous()).clamp(max=theirs.shape[1] - 1)
    return (theirs.gather(1, at) != mine).sum(1)


def _at_least(count: int, of_all: int) -> float:
    """The lower end of Wilson's interval for a share: what `count` of `of_all` proves."""
    share, z2 = count / of_all, _CERTAINTY**2 / of_all
    spread = _CERTAINTY * math.sqrt(share * (1 - share) / of_all + z2 / (4 * of_all))
    return (share + z2 / 2 - spread) / (1 + z2)


def _finding(event: OpEvent, wrong: int, rows: int, count: int, of_all: int, rounded: bool, steers: bool) -> Finding:
    where = "on scores rounded to 16 bits" if rounded else "on FP32 scores behind 16-bit ops"
    return Finding(
        code="HS408",
        place=event.place,
        what=f"{event.name} {where} decides otherwise than FP32 for {wrong:,} of {rows:,} rows ({wrong / rows:.1%})",
        consequence="These rows take another path than the weights were trained for, and the choice is partly noise.",
        remedy="Compute the scores and the choice in FP32: keep this module (a router, a gate) out of autocast.",
        severity=Severity.WARNING if steers else Severity.NOTE,
        numbers={"rows": rows, "rows_differing": wrong, "choices": of_all, "choices_differing": count},
        step=event.step,
    )
