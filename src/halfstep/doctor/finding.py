"""`Finding`: a coded verdict with its place, numbers, consequence and remedy; and how findings are silenced.

Codes are stable: ``HS1xx`` range, ``HS2xx`` loss scale, ``HS3xx`` updates and state, ``HS4xx`` casts and constants,
``HS5xx`` hardware and set-up. `halfstep.doctor.codes` lists them.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, Literal

from halfstep.doctor import codes
from halfstep.observe.place import Place


class Severity(IntEnum):
    """How bad it is: a *note* informs, a *warning* says that numbers are worse than they look, an *error* that they
    are wrong. Only warnings and errors make ``halfstep doctor`` end with exit code 1."""

    NOTE = 0
    WARNING = 1
    ERROR = 2

    def __str__(self) -> str:
        return self.name.lower()


#: What came of trying a remedy: run again under it, the finding was gone and no worse one came; or not.
Outcome = Literal["verified", "tried, did not help"]


@dataclass(frozen=True)
class Trial:
    """A remedy that was run."""

    remedy: str  #: one sentence: what was changed
    outcome: Outcome
    evidence: str  #: what was seen when it ran, with numbers
    policy: str | None = None  #: the remedy as a policy's text
    diff: str | None = None  #: the remedy as a change to the source, unified, a few lines


@dataclass(frozen=True)
class Finding:
    """What is wrong, where, by how much, what it does to training, and what to do."""

    code: str
    place: Place | None  #: None: of the whole run
    what: str  #: one sentence with the numbers
    consequence: str  #: one sentence: what it does to training
    remedy: str  #: one sentence: what to do
    severity: Severity
    numbers: Mapping[str, float | int | str] = field(default_factory=dict, compare=False)
    count: int = 1  #: how often it was seen at this place
    step: int | None = None  #: optimizer step in which it was first seen, from 1
    trials: tuple[Trial, ...] = ()

    def __post_init__(self) -> None:
        codes.get(self.code)

    @property
    def title(self) -> str:
        return codes.get(self.code).title

    def __str__(self) -> str:
        where = f" at {self.place}" if self.place is not None else ""
        times = f" ({self.count} times)" if self.count > 1 else ""
        return f"{self.code} {self.severity}: {self.what}{where}{times}. {self.consequence} {self.remedy}"

    def with_trials(self, trials: Sequence[Trial]) -> Finding:
        return replace(self, trials=(*self.trials, *trials))


def to_json(finding: Finding) -> dict[str, Any]:
    """Plain values: what ``halfstep doctor --json`` prints and `from_json` reads."""
    place = None if finding.place is None else vars(finding.place)
    trials = [dict(vars(trial)) for trial in finding.trials]
    values = {**vars(finding), "place": place, "severity": str(finding.severity), "trials": trials}
    return {**values, "title": finding.title, "numbers": dict(finding.numbers)}


def from_json(values: Mapping[str, Any]) -> Finding:
    """The finding that `to_json` wrote.

    Raises:
        KeyError, TypeError: it did not write this.
    """
    given = {key: value for key, value in values.items() if key != "title"}
    given["place"] = None if given["place"] is None else Place(**given["place"])
    given["severity"] = Severity[given["severity"].upper()]
    given["trials"] = tuple(Trial(**trial) for trial in given["trials"])
    return Finding(**given)


def ordered(findings: Iterable[Finding]) -> list[Finding]:
    """Worst first, then in the order in which they were found."""
    return sorted(findings, key=lambda finding: -finding.severity)


class SilenceError(ValueError):
    """This text silences nothing that could exist."""


@dataclass(frozen=True)
class Silence:
    """A rule that drops findings: ``HS401``, ``HS4*``, ``HS408@*.router``, ``*@train.py:41``.

    Before the ``@`` a code or a glob of codes; after it a glob of module paths or of ``file:line``.
    """

    codes: str
    place: str | None = None

    @staticmethod
    def parse(text: str) -> Silence:
        """
        Raises:
            SilenceError: no code matches it.
        """
        pattern, at, place = text.strip().partition("@")
        if not any(fnmatch.fnmatchcase(code, pattern) for code in codes.CODES):
            raise SilenceError(f"{text!r} silences nothing: no code matches {pattern!r}; `halfstep explain` lists them")
        if at and not place:
            raise SilenceError(f"{text!r} names no place after '@': a module path (HS408@*.router) or a file:line")
        return Silence(pattern, place or None)

    def covers(self, finding: Finding) -> bool:
        if not fnmatch.fnmatchcase(finding.code, self.codes):
            return False
        if self.place is None:
            return True
        if finding.place is None:
            return False
        names = [finding.place.module, finding.place.parameter or ""]
        if finding.place.file is not None:
            line = f"{finding.place.file}:{finding.place.line}"
            names += [line, re.split(r"[\\/]", line)[-1]]
        return any(fnmatch.fnmatchcase(name, self.place) for name in names if name)


def without_silenced(findings: Iterable[Finding], silence: Sequence[str | Silence]) -> list[Finding]:
    """The findings that no rule drops.

    Raises:
        SilenceError: a rule cannot be read.
    """
    rules = [Silence.parse(rule) if isinstance(rule, str) else rule for rule in silence]
    return [finding for finding in findings if not any(rule.covers(finding) for rule in rules)]
