"""`Profile`: the numbers of a run, one `OpRecord` per place and dtype, and the gradients of every parameter.

Profiles add up: over steps, over ranks, in any order. What is kept of an op is what merges without loss: counts (the
exponent histogram), sums and largest values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from halfstep.observe.histogram import ExponentHistogram
from halfstep.observe.place import Place

#: Parts of a record that are names, written to JSON once each.
_NAMES = ("op", "phase", "module", "module_type", "file", "parameter")


def larger(a: float | None, b: float | None) -> float | None:
    """The larger of two largest values; NaN before all numbers, any value before none. In any order the same."""
    if a is None or b is None:
        return b if a is None else a
    if math.isnan(a) or math.isnan(b):
        return math.nan
    return max(a, b)


@dataclass(frozen=True)
class OpRecord:
    """All results of one op at one place, in one dtype."""

    place: Place
    dtype: str  #: of the results: ``torch.float32``
    calls: int
    elements: int  #: in all results together; the histogram has fewer where it is of a sample
    amax: float  #: largest magnitude of a result; inf or NaN if there was one
    lowered: bool  #: whether the policy asked about would compute it in 16 bits
    histogram: ExponentHistogram
    operand_amax: float | None = None  #: of forward ops: largest magnitude among the inputs
    growth: float | None = None  #: of forward ops: largest ratio of a result's amax to that of its inputs

    def __add__(self, other: OpRecord) -> OpRecord:
        """Both together.

        Raises:
            ValueError: they are of different places or dtypes.
        """
        if (self.place, self.dtype) != (other.place, other.dtype):
            raise ValueError(f"records of {self.place} ({self.dtype}) and {other.place} ({other.dtype}) do not add up")
        amax = larger(self.amax, other.amax)
        return OpRecord(
            self.place,
            self.dtype,
            self.calls + other.calls,
            self.elements + other.elements,
            0.0 if amax is None else amax,
            self.lowered or other.lowered,
            self.histogram + other.histogram,
            larger(self.operand_amax, other.operand_amax),
            larger(self.growth, other.growth),
        )


@dataclass(frozen=True)
class Profile:
    """What was seen of one or several steps; see the module.

    ``gradients`` are those of parameters as accumulated when the optimizer stepped, by name; under DDP this rank's,
    before they are averaged.
    """

    records: Mapping[tuple[Place, str], OpRecord] = field(default_factory=dict)
    gradients: Mapping[str, ExponentHistogram] = field(default_factory=dict)

    def merge(self, *others: Profile) -> Profile:
        """This and other steps, or other ranks; associative and commutative."""
        records: dict[tuple[Place, str], OpRecord] = {}
        gradients: dict[str, list[ExponentHistogram]] = {}
        for profile in (self, *others):
            for key, record in profile.records.items():
                records[key] = records[key] + record if key in records else record
            for name, histogram in profile.gradients.items():
                gradients.setdefault(name, []).append(histogram)
        return Profile(records, {name: ExponentHistogram.merge(found) for name, found in gradients.items()})

    def layers(self) -> dict[str, tuple[OpRecord, ...]]:
        """The records of forward and backward by module path, in the order in which they first ran."""
        found: dict[str, list[OpRecord]] = {}
        for record in self.records.values():
            if record.place.phase != "optimizer":
                found.setdefault(record.place.module, []).append(record)
        return {module: tuple(records) for module, records in found.items()}

    def to_json(self) -> dict[str, Any]:
        """Plain values. Names are written once and numbered, bins without the empty ones at either end."""
        numbers: dict[str | None, int] = {}

        def number(name: str | None) -> int:
            return numbers.setdefault(name, len(numbers))

        records = []
        for record in self.records.values():
            place = [number(getattr(record.place, name)) for name in _NAMES]
            values = [record.calls, record.elements, _plain(record.amax), record.lowered]
            seen = [_plain(record.operand_amax), _plain(record.growth), record.histogram.to_json()]
            records.append([*place, record.place.line, number(record.dtype), *values, *seen])
        return {
            "names": list(numbers),
            "records": records,
            "gradients": {name: histogram.to_json() for name, histogram in self.gradients.items()},
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Profile:
        """The profile that `to_json` wrote.

        Raises:
            ValueError: these are not such values.
        """
        try:
            names: Sequence[Any] = values["names"]
            records = [_record(row, names) for row in values["records"]]
            gradients = {name: ExponentHistogram.from_json(found) for name, found in values["gradients"].items()}
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"not a profile: {type(error).__name__}: {error}") from error
        return cls({(record.place, record.dtype): record for record in records}, gradients)


def merge(profiles: Iterable[Profile]) -> Profile:
    """All of them together; of none, the empty profile."""
    return Profile().merge(*profiles)


def _record(row: Sequence[Any], names: Sequence[Any]) -> OpRecord:
    count = len(_NAMES)
    if len(row) != count + len(fields(OpRecord)):
        raise ValueError(f"not a profile: a record of {len(row)} values, not {count + len(fields(OpRecord))}")
    known: dict[str, Any] = {name: names[number] for name, number in zip(_NAMES, row, strict=False)}
    line, dtype, calls, elements, amax, lowered, operand_amax, growth, histogram = row[count:]
    place = Place(**known, line=line)
    largest = [None if value is None else float(value) for value in (operand_amax, growth)]
    return OpRecord(
        place,
        names[dtype],
        calls,
        elements,
        float(amax),
        lowered,
        ExponentHistogram.from_json(histogram),
        *largest,
    )


def _plain(value: float | None) -> float | str | None:
    """JSON has no inf and NaN: as the strings that `float` reads."""
    return value if value is None or math.isfinite(value) else str(value)
