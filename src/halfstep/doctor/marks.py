"""Which suspicions have consequences: marks that travel with the numbers.

A suspicion is pending until what it did reaches something that matters: a gradient, a parameter, a buffer, a returned
value, or Python. Masks hold -inf on purpose, ``torch.where`` computes branches that it throws away, and a constant may
be lost where nothing depends on it: none of that is a finding.

A mark sits on the storage of the op's output and goes on from an op's inputs to its outputs

    numbers     while an output is grossly different from FP32's: an overflow that became -inf and then, in a softmax,
                the 0 that it should be, has ended
    seeds       while it differs at all, and counts once it differs grossly somewhere: two positions that became equal
                are a small error until the cosine of them is taken
    always      while an output holds inf or NaN: where FP32 has them too
    hidden      while it is grossly different and finite: where NaN tells, the overflow itself is the finding
    decisions   always: FP32's shadow follows the run's decisions, so that there is nothing to compare with

*Grossly* is by more than a quarter of FP32's largest magnitude: rounding errors of 16 bits stay an order below that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from halfstep.doctor.event import Value, read
from halfstep.doctor.finding import Finding

Kind = Literal["numbers", "seeds", "always", "hidden", "decisions"]

#: Share of FP32's largest magnitude that an error has to exceed to be gross.
GROSS = 0.25
#: Below this share a difference is that of FP32 arithmetic in another order.
ANY = 1e-6

_KINDS: dict[str, Kind] = {
    "HS102": "always",
    "HS103": "hidden",
    "HS104": "always",
    "HS110": "always",
    "HS408": "decisions",
}


def kind_of(code: str) -> Kind:
    """How the effect of a finding travels."""
    return _KINDS.get(code, "seeds" if code.startswith("HS4") else "numbers")


@dataclass
class Pending:
    """A suspicion on its way."""

    finding: Finding
    kind: Kind
    counts: bool  #: whether it has been gross somewhere
    reached: str | None = None
    causes: set[int] = field(default_factory=set)  #: marks that were in what its op was given


class Marks:
    """All pending suspicions, by number."""

    def __init__(self, report: Callable[[Finding, str], None]) -> None:
        self._report = report
        self._pending: dict[int, Pending] = {}
        self._numbers: dict[object, int] = {}

    def add(self, finding: Finding, key: object, gross: bool, given: Iterable[int] = ()) -> int | None:
        """The number of a suspicion, the same for the same key; None once it has been reported.

        Args:
            gross: whether the op's own output is grossly wrong already.
            given: the marks of the op's inputs. Where inf is hidden, the overflow that made it ends there, and is
                reported with what hides it.
        """
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = len(self._numbers)
            kind = kind_of(finding.code)
            self._pending[number] = Pending(finding, kind, counts=kind != "seeds" or gross)
        pending = self._pending[number]
        pending.counts |= gross
        if pending.kind == "hidden":
            pending.causes |= {number for number in given if self._pending[number].kind == "numbers"}
        if pending.reached is not None:
            self._report(finding, pending.reached)
            return None
        return number

    def carried(self, marks: Iterable[int], output: Value) -> set[int]:
        """The marks of an op's inputs that go on with one of its floating outputs."""
        going = set()
        wrong: tuple[bool, bool] | None = None
        for number in marks:
            pending = self._pending[number]
            if pending.reached is not None:
                continue
            if pending.kind == "decisions" or (pending.kind == "always" and not output.is_finite):
                going.add(number)
            elif pending.kind != "always":
                if wrong is None:
                    wrong = differs(output)
                any_difference, gross = wrong
                pending.counts |= gross and pending.kind == "seeds"
                if pending.kind == "hidden" and not output.is_finite:
                    continue
                if gross or (pending.kind == "seeds" and any_difference):
                    going.add(number)
        return going

    def reach(self, marks: Iterable[int], what: str) -> None:
        """These marks have arrived somewhere: report those that count."""
        for number in marks:
            pending = self._pending[number]
            if pending.reached is None and pending.counts:
                pending.reached = what
                self.reach(pending.causes, what)
                self._report(pending.finding, what)


def differs(value: Value) -> tuple[bool, bool]:
    """Whether a tensor differs from FP32's at all, and grossly."""
    if value.shadow is None:
        return (not value.is_finite,) * 2
    if value.tensor.numel() == 0:
        return False, False
    here, there = value.tensor.detach().float(), value.shadow
    finite = here.isfinite()
    elsewhere = (finite != there.isfinite()).any()
    otherwise, largest, error = read(elsewhere, _largest(there, finite), _largest(here - there, finite))
    if otherwise:
        return True, True
    return error > ANY * largest, error > GROSS * largest


def _largest(tensor: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, tensor, 0.0).abs().max()
